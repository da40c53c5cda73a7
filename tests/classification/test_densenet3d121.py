import pytest
import torch

from lib.classification import densenet3d121
from lib.classification.densenet3d121 import VARIANTS, build

TINY = {"init_features": 8, "growth_rate": 4, "block_config": [1, 1, 1, 1], "bn_size": 2}
SETTINGS = {
    "slices": 16,
    "image_size": 32,
    "batch_scans": 6,
    "rounds": 1,
    "learning_rate": 5.0e-3,
    "weight_decay": 5.0e-4,
    "epochs": 6,
    "patience": None,
    "chosen_by": "loss",
    "schedule": {"kind": "cosine", "T_max": 6},
    "loader_processes": 0,
    "cache_volumes": True,
}


def test_the_published_stem_keeps_the_slices():
    with torch.device("meta"):
        stem = build(**VARIANTS["paper"]).features.conv0
        assert stem(torch.empty(1, 1, 64, 128, 128)).shape == (1, 64, 64, 64, 64)


@pytest.mark.parametrize("preset", ["small", "paper"])
def test_shapes(preset):
    """As small as can be as well, where a single voxel is left at the end."""
    with torch.device("meta"):
        model = build(**VARIANTS[preset])
        for shape in [(2, 1, 24, 64, 64), (2, 1, 16, 32, 32)]:
            assert model(torch.empty(shape)).shape == (2, 2)


def test_it_learns_and_predicts_the_same_again(assert_it_learns):
    assert_it_learns(densenet3d121, TINY, SETTINGS)
