import copy

import pytest
import torch
from torch import nn

from lib.classification.padded_racnet import padded_logits, padded_slices, routed_outputs
from lib.classification.racnet import RACNet, unchanged_statistics

POSITIONS, WIDTH = 12, 6
LENGTHS = [5, 1, 12]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny_racnet(**changes):
    backbone = nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, stride=2, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    numbers = {"positions": POSITIONS, "recurrent_width": 5, "hidden_width": 4, "dropout": 0.0}
    model = RACNet(backbone=backbone, feature_width=WIDTH, **numbers | changes)
    nn.init.normal_(model.dense.table)
    return model


def random_slices(total):
    return torch.randint(0, 256, (total, 1, 16, 16), dtype=torch.uint8)


def test_padding_is_black_and_behind_the_scan():
    slices = torch.arange(1, 6).view(5, 1, 1, 1)
    padded = padded_slices(slices, [2, 3], 4)
    assert padded.flatten(1).tolist() == [[1, 2, 0, 0], [3, 4, 5, 0]]


@pytest.mark.parametrize(
    ("routing", "expected"), [("first", [1, 2, 3, 0, 0]), ("alignment", [1, 0, 2, 0, 3])]
)
def test_outputs_of_padding_are_masked_wherever_they_go(routing, expected):
    outputs = torch.arange(1.0, 6.0).view(1, 5, 1)
    assert routed_outputs(outputs, [3], routing).flatten().tolist() == expected


@pytest.mark.parametrize("routing", ["alignment", "first"])
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [12, 12], [3, 3, 2, 7]])
def test_packed_and_padded_agree_in_evaluation(routing, lengths):
    model = tiny_racnet(routing=routing).eval()
    slices = random_slices(sum(lengths))
    torch.testing.assert_close(model(slices, lengths), padded_logits(model, slices, lengths))


def gradients(model, logits):
    model.zero_grad()
    nn.functional.cross_entropy(logits, torch.arange(len(logits)) % 2).backward()
    return [weights.grad.clone() for weights in model.parameters()]


@pytest.mark.parametrize("chunk", [None, 4])
def test_gradients_agree_too_where_no_statistics_are_taken(chunk):
    model = tiny_racnet(slices_per_chunk=chunk).eval()
    slices = random_slices(sum(LENGTHS))
    packed = gradients(model, model(slices, LENGTHS))
    padded = gradients(model, padded_logits(model, slices, LENGTHS))
    for ours, theirs in zip(packed, padded, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_in_training_black_slices_enter_only_the_padded_statistics():
    model = tiny_racnet().train()
    slices = random_slices(sum(LENGTHS))
    with unchanged_statistics(model):
        differ = (model(slices, LENGTHS) - padded_logits(model, slices, LENGTHS)).abs().max()
        full = random_slices(2 * POSITIONS)  # nothing to pad, nothing that differs
        same = model(full, 2 * [POSITIONS]), padded_logits(model, full, 2 * [POSITIONS])
    assert differ > 1e-3
    torch.testing.assert_close(*same)


def test_running_statistics_of_padded_scans_are_pulled_to_black():
    packed = tiny_racnet().train()
    padded = copy.deepcopy(packed)
    slices = torch.full((2, 1, 16, 16), 255, dtype=torch.uint8)
    packed(slices, [2])
    padded_logits(padded, slices, [2])
    means = [model.normalisation.running_mean for model in (packed, padded)]
    assert not torch.allclose(*means)
