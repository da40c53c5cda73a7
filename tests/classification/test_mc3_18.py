import pytest
import torch

from lib.classification import mc3_18
from lib.classification.mc3_18 import VARIANTS, build

TINY = {"widths": [4, 8, 8, 8]}
SETTINGS = {
    "slices": 8,
    "image_size": 16,
    "batch_scans": 6,
    "rounds": 2,
    "learning_rate": 5.0e-3,
    "weight_decay": 5.0e-4,
    "epochs": 6,
    "patience": None,
    "chosen_by": "loss",
    "schedule": {"kind": "cosine", "T_max": 6},
    "loader_processes": 0,
    "cache_volumes": True,
}


def test_the_published_network_is_torchvisions():
    """Layer by layer, but for one channel instead of three and two classes."""
    from torchvision.models.video import mc3_18

    with torch.device("meta"):
        theirs, ours = mc3_18(num_classes=2).state_dict(), build(**VARIANTS["paper"]).state_dict()
    shapes = [tuple(values.shape) for values in theirs.values()]
    shapes[0] = (64, 1, 3, 7, 7)
    assert [tuple(values.shape) for values in ours.values()] == shapes


@pytest.mark.parametrize("preset", ["small", "paper"])
def test_shapes(preset):
    """One slice and few pixels as well: what is left at the end may be a single voxel."""
    with torch.device("meta"):
        model = build(**VARIANTS[preset])
        for shape in [(2, 1, 24, 64, 64), (2, 1, 1, 32, 32)]:
            assert model(torch.empty(shape)).shape == (2, 2)


def test_it_learns_and_predicts_the_same_again(assert_it_learns):
    assert_it_learns(mc3_18, TINY, SETTINGS)
