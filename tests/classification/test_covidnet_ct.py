import pytest
import torch

from lib.classification import covidnet_ct
from lib.classification.covidnet_ct import CARD, VARIANTS, ReplicationBlock, build

SETTINGS = {
    "image_size": 24,
    "batch_scans": 6,
    "rounds": 1,
    "learning_rate": 0.05,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "class_balanced": True,
    "augmentation": {"mirrored": True, "shift": 0.05},
    "epochs": 8,
    "patience": None,
    "chosen_by": "loss",
    "schedule": None,
    "loader_processes": 0,
    "cache_pictures": True,
}


@pytest.mark.parametrize("preset, parameters", [("paper", 780_803), ("small", 28_819)])
def test_parameters_and_shapes(preset, parameters):
    with torch.device("meta"):
        model = build(**VARIANTS[preset])
        for size in (512, 96):
            assert model(torch.empty(2, 3, size, size)).shape == (2, 3)
    assert sum(weights.numel() for weights in model.parameters()) == parameters


def test_the_card_says_that_it_is_an_approximation():
    assert CARD.approximation
    assert CARD.parameters == 780_803
    assert "could not be read" in CARD.ours


def test_a_block_projects_replicates_projects_and_expands():
    """Parameters by hand: weights of each step, and scale and shift of its channels."""
    block = ReplicationBlock(24, 16, stride=2)
    widths = [next(iter(step.children())).out_channels for step in block.steps]
    assert widths == [4, 8, 4, 16]
    weights = 24 * 4 + 8 * 9 + 8 * 4 + 4 * 16
    assert sum(w.numel() for w in block.parameters()) == weights + 2 * sum(widths)
    assert block(torch.zeros(1, 24, 10, 10)).shape == (1, 16, 5, 5)


def test_replication_makes_each_channel_twice_from_itself_alone():
    replication = ReplicationBlock(8, 16).eval().steps.replication
    values = torch.zeros(1, 4, 5, 5)
    before = replication(values)
    values[:, 2] = 1
    changed = (replication(values) != before).flatten(2).any(2)[0]
    assert not changed[[0, 1, 2, 3, 6, 7]].any()


def test_projections_are_linear():
    steps = ReplicationBlock(8, 16).eval().steps
    features = torch.randn(1, 8, 4, 4)
    for step, values in ((steps.projection, features), (steps.second_projection, features)):
        torch.testing.assert_close(step(values) + step(-values), 2 * step(0 * values))
    assert (steps.projection(features) < 0).any()


def test_only_blocks_that_keep_the_shape_have_a_shortcut():
    features = torch.rand(1, 16, 4, 4)
    for block, kept in (
        (ReplicationBlock(16, 16), True),
        (ReplicationBlock(16, 16, stride=2), False),
    ):
        torch.nn.init.zeros_(block.steps.expansion[1].weight)
        block.eval()
        assert block(features).equal(features) if kept else not block(features).any()


def test_stages_without_a_number_of_blocks_are_named():
    with pytest.raises(ValueError, match=r"2 stages need as many numbers of blocks, got \[1\]"):
        build(stem=4, widths=[4, 8], blocks=[1])


def test_it_learns(assert_it_separates):
    torch.manual_seed(0)
    assert_it_separates(build(**VARIANTS["small"]), steps=40, learning_rate=5e-3)


def test_it_learns_pictures(assert_it_learns_pictures):
    assert_it_learns_pictures(covidnet_ct, covidnet_ct.VARIANTS["small"], SETTINGS)
