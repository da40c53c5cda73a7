import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet18

from lib.classification import resnet18_location
from lib.classification.resnet18_location import (
    CARD,
    VARIANTS,
    LocationResNet,
    build,
    distances_from_edge,
    noisy_or,
)

SETTINGS = {
    "image_size": 64,
    "batch_scans": 6,
    "rounds": 1,
    "learning_rate": 5e-3,
    "weight_decay": 0.0,
    "class_balanced": False,
    "augmentation": {"shift": 0.05},
    "epochs": 8,
    "patience": None,
    "chosen_by": "loss",
    "schedule": None,
    "loader_processes": 0,
    "cache_pictures": True,
}


@pytest.mark.parametrize("preset, parameters", [("paper", 11_178_054), ("small", 717_606)])
def test_parameters_and_shapes(preset, parameters):
    with torch.device("meta"):
        model = build(**VARIANTS[preset])
        for size in (224, 48):
            assert model(torch.empty(2, 3, size, size)).shape == (2, 3)
    assert sum(weights.numel() for weights in model.parameters()) == parameters


def test_the_trunk_is_torchvisions():
    with torch.device("meta"):
        theirs, ours = resnet18().state_dict(), build().trunk.state_dict()
    theirs = {name: value.shape for name, value in theirs.items() if not name.startswith("fc.")}
    assert {name: value.shape for name, value in ours.items()} == theirs
    assert CARD.approximation and CARD.parameters == 11_178_054


@pytest.mark.parametrize("grid", [1, 2, 4, 5])
def test_places_are_distances_from_the_nearest_edge(grid):
    """Of a slice whose patches are 10 pixels wide."""
    size, expected = 10 * grid, []
    for row in range(grid):
        for column in range(grid):
            x, y = 10 * column + 5, 10 * row + 5
            expected.append(min(x, y, size - x, size - y) / math.hypot(size, size))
    assert distances_from_edge(grid).tolist() == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(patches=st.integers(1, 9), classes=st.integers(2, 4), seed=st.integers(0, 999))
@example(patches=1, classes=4, seed=416)  # a probability of 0.0001
def test_noisy_or_is_its_definition(patches, classes, seed):
    torch.manual_seed(seed)
    scores = 2 * torch.randn(1, patches, classes)
    shares = scores[0].softmax(1).tolist()
    expected = [math.prod(share[0] for share in shares)]
    expected += [1 - math.prod(1 - share[k] for share in shares) for k in range(1, classes)]
    assert noisy_or(scores)[0].exp().tolist() == pytest.approx(expected, rel=1e-4)


def test_noisy_or_stays_finite_at_certainty():
    patches = torch.tensor([[[200.0, 0, 0]], [[0, 200.0, 0]]], requires_grad=True)
    scores = noisy_or(patches)
    scores.sum().backward()
    assert scores.isfinite().all() and patches.grad.isfinite().all()
    assert scores.argmax(1).tolist() == [0, 1]


def test_half_of_all_pictures_start_without_disease():
    model = LocationResNet(nn.Identity(), width=3, grid=4)
    nn.init.zeros_(model.output.weight)
    shares = model(torch.rand(1, 3, 8, 8)).exp()[0].tolist()
    assert shares[0] == pytest.approx(0.5, abs=1e-4)
    assert shares[1] == pytest.approx(shares[2]) and 0.2 < shares[1] < 0.4


def test_the_place_of_a_patch_counts():
    """The same mark, once at the edge and once inside, where only the place tells them apart."""
    model = LocationResNet(nn.Identity(), width=3, grid=4)
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.weight[1] = torch.tensor([1.0, 1.0, 1.0, -20.0])  # the edge speaks for class 1
    edge, inside = torch.zeros(2, 1, 3, 4, 4)
    edge[..., 0, 0], inside[..., 1, 1] = 3, 3
    assert model(edge)[0, 1] > model(inside)[0, 1]


def test_it_learns(assert_it_separates):
    torch.manual_seed(0)
    assert_it_separates(build(**VARIANTS["small"]), steps=25, learning_rate=2e-3)


def test_it_learns_pictures(assert_it_learns_pictures):
    variant = {"widths": [8, 16, 32, 32], "grid": 2}
    assert_it_learns_pictures(resnet18_location, variant, SETTINGS)
