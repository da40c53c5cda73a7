import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lib.reporting.classification_benchmarks import (
    LONGEST,
    MEAN,
    SHORTEST,
    MovedBytes,
    Step,
    bandwidth,
    bandwidth_estimate,
    compare_training,
    counted,
    length_mixes,
    training_figure,
    whole_scans,
)

TINY = {
    "backbone": "test_efficientnet", "positions": 24, "recurrent_width": 8, "hidden_width": 8,
    "freeze_batch_norm": True,
}  # fmt: skip


@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 99))
def test_lengths_are_those_of_the_data_set(mixes, scans, seed):
    drawn = length_mixes(mixes, scans, seed=seed)
    assert [len(mix) for mix in drawn] == mixes * [scans]
    assert all(SHORTEST <= length <= LONGEST for mix in drawn for length in mix)
    assert drawn == length_mixes(mixes, scans, seed=seed)
    for mix in drawn:  # a stratum is at most this wide, so the mean is at most this far off
        assert abs(np.mean(mix) - MEAN) <= (LONGEST - SHORTEST) / scans + 1


def test_many_lengths_have_the_published_mean_and_spread_over_the_range():
    (mix,) = length_mixes(1, 2000)
    assert np.mean(mix) == pytest.approx(MEAN, abs=1)
    assert min(mix) < SHORTEST + 10
    assert max(mix) > LONGEST - 10


def test_both_ways_take_a_step_from_the_same_start():
    steps = [
        Step(way, TINY | {"dropout": 0.0}, [3, 24, 1], image_size=16)
        for way in ("padded", "packed")
    ]
    for step in steps:
        step.model.eval()  # where both must agree
    before = [step.model.output.weight.clone() for step in steps]
    losses = [step() for step in steps]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for step, weights in zip(steps, before, strict=True):
        assert not torch.equal(step.model.output.weight, weights)


def test_operations_follow_the_slices():
    flops = [counted(Step(way, TINY, [4, 8], image_size=16)) for way in ("padded", "packed")]
    assert flops[0] / flops[1] == pytest.approx(48 / 12, rel=0.05)


def test_a_comparison_reports_speed_memory_and_their_limit():
    result = compare_training(TINY, [4, 8], image_size=16, repetitions=1)
    assert result["slices"] == 12
    assert result["mean_length"] == 6
    assert result["limit"] == 4
    assert result["memory_mib"]["padded"] > result["memory_mib"]["packed"] >= 0
    assert len(result["reference_seconds"]) == len(result["our_seconds"]) == 1
    figure = training_figure({"a": result, "b": result})
    assert [axis.get_ylabel().split(",")[0] for axis in figure.axes] == ["Speed", "Memory"]


def test_moved_bytes_are_those_read_and_written():
    values = torch.ones(1000)
    with MovedBytes() as moved:
        values.view(10, 100)  # moves nothing
        values + values
    assert moved.total == 3 * 4000
    layer = nn.Linear(10, 5, bias=False)
    with MovedBytes() as moved, torch.no_grad():
        layer(torch.ones(2, 10, device="cpu"))
    assert moved.total >= 4 * (20 + 50 + 10)


def test_the_bandwidth_estimate_is_bytes_by_bandwidth():
    step = Step("packed", TINY, [2, 3], image_size=16)
    found = bandwidth_estimate(step)
    expected = found["gigabytes_moved"] / found["gigabytes_per_second"]
    assert found["seconds_expected"] == pytest.approx(expected, abs=0.01)
    assert found["seconds"] > 0
    assert bandwidth("cpu", repetitions=1) > 1e8


def test_whole_scans_take_all_positions():
    found = whole_scans(TINY, scans=2, image_size=32)
    assert found["slices"] == 2 * TINY["positions"]
    assert found["memory_mib"] > 100  # the process itself holds Python and PyTorch
    assert 0 < found["seconds"] < 120
