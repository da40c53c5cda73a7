import pytest
import torch
from torch import nn
from torchvision.models import squeezenet1_1

from lib.classification import light_cnn
from lib.classification.light_cnn import CARD, VARIANTS, build

SETTINGS = {
    "image_size": 32,
    "batch_scans": 6,
    "rounds": 1,
    "learning_rate": 3e-3,
    "weight_decay": 0.0,
    "class_balanced": False,
    "augmentation": {"mirrored": True, "shift": 0.05},
    "epochs": 12,
    "patience": None,
    "chosen_by": "loss",
    "schedule": None,
    "loader_processes": 0,
    "cache_pictures": True,
}


def count(model):
    """Number of parameters."""
    return sum(weights.numel() for weights in model.parameters())


@pytest.mark.parametrize("preset, parameters", [("paper", 729_923), ("small", 185_507)])
def test_parameters_and_shapes(preset, parameters):
    with torch.device("meta"):
        model = build(**VARIANTS[preset])
        for size in (512, 48):
            assert model(torch.empty(2, 3, size, size)).shape == (2, 3)
    assert count(model) == parameters


def test_the_published_width_is_squeezenet_and_norms():
    with torch.device("meta"):
        theirs, ours = squeezenet1_1(), build(classes=1000)
    norms = sum(count(layer) for layer in ours.modules() if isinstance(layer, nn.BatchNorm2d))
    assert count(theirs) == 1_235_496
    assert count(ours) == 1_235_496 + norms == 1_235_496 + 5_888
    assert CARD.approximation and CARD.parameters == 729_923


def test_without_its_norms_it_computes_what_squeezenet_does():
    """But for the ReLU behind the class layer."""
    torch.manual_seed(0)
    theirs, ours = squeezenet1_1(num_classes=3).eval(), build().eval()
    pairs = zip(
        *(
            [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
            for net in (theirs, ours)
        ),
        strict=True,
    )
    for from_, to in pairs:
        to.load_state_dict(from_.state_dict())
    for layer in ours.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 0.0
    pictures = torch.rand(2, 3, 70, 70)
    with torch.no_grad():
        scores = ours.output(ours.features(pictures))
        torch.testing.assert_close(scores.relu().mean((2, 3)), theirs(pictures))
        torch.testing.assert_close(ours(pictures), scores.mean((2, 3)))


def test_it_learns(assert_it_separates):
    torch.manual_seed(0)
    assert_it_separates(build(width=0.5, dropout=0.0), steps=40, learning_rate=3e-3)


def test_it_learns_pictures(assert_it_learns_pictures):
    assert_it_learns_pictures(light_cnn, light_cnn.VARIANTS["small"], SETTINGS)
