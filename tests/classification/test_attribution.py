"""Tests of lib/classification/attribution.py: exact on linear networks, complete elsewhere."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from lib.classification.attribution import (
    by_slice,
    class_difference,
    evaluating,
    input_gradients,
    integrated_gradients,
    output_change,
)

SHAPE = (3, 6, 8, 8)
BLACK = torch.tensor([-2.0, -1.0, -0.5])[:, None, None, None]


def clip(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 8 * 8, 2))


def curved(seed=0):
    """A smooth network with batch normalisation and dropout, both in training mode."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.Tanh(), nn.Dropout(0.5),
        nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip
    return network.train()


def test_a_positive_difference_speaks_for_covid():
    assert class_difference(torch.tensor([[1.0, 4.0], [2.0, -1.0]])).tolist() == [3.0, -3.0]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("batch_clips", [1, 2, 5])
def test_of_a_linear_network_every_value_contributes_weight_times_way(steps, batch_clips):
    network = linear()
    weights = (network[1].weight[1] - network[1].weight[0]).detach().view(SHAPE)
    found = integrated_gradients(network, clip(), BLACK, steps=steps, batch_clips=batch_clips)
    torch.testing.assert_close(found, weights * (clip() - BLACK))


def test_contributions_add_up_to_what_the_output_moved_by():
    network, change = curved(), output_change(curved(), clip(), BLACK)
    errors = [
        abs(float(integrated_gradients(network, clip(), BLACK, steps=n).sum()) - change)
        for n in (1, 4, 16, 64)
    ]
    assert abs(change) > 0.05
    assert errors[-1] < 1e-3 * abs(change)
    assert errors[0] > errors[1] > errors[3]
    assert errors[2] < errors[1] / 4  # midpoints: the error falls with the square of the steps


def test_the_gradient_is_that_of_finite_differences():
    network, point, delta = curved().double().eval(), clip().double()[None], 1e-6
    gradient = input_gradients(network, point)
    for place in [(0, 0, 0, 0, 0), (0, 2, 5, 7, 7), (0, 1, 3, 4, 2)]:
        moved = [point.clone(), point.clone()]
        moved[0][place] += delta
        moved[1][place] -= delta
        up, down = (class_difference(network(one)).item() for one in moved)
        assert gradient[place].item() == pytest.approx((up - down) / (2 * delta), rel=1e-4)


def test_steps_at_once_change_nothing_and_a_second_run_gives_the_same():
    network = curved()
    alone, again, together = (
        integrated_gradients(network, clip(), BLACK, steps=8, batch_clips=n) for n in (1, 1, 3)
    )
    assert torch.equal(alone, again)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_network_is_left_as_it_was(frozen):
    network = curved().requires_grad_(not frozen)
    network[3].eval()  # modes may differ between parts
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():  # gradients are taken all the same
        integrated_gradients(network, clip(), BLACK)
    output_change(network, clip(), BLACK)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert [part.training for part in network] == [True, True, True, False, True, True, True]
    assert network.training


def test_modes_come_back_after_an_error():
    network = curved()
    with pytest.raises(KeyError), evaluating(network):
        raise KeyError
    assert network.training and network[1].training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps and batch_clips are at least 1, got 0 and 1"),
        ({"batch_clips": 0}, "steps and batch_clips are at least 1, got 8 and 0"),
        ({"black": torch.zeros(3, 5, 8, 8)}, r"got \(3, 6, 8, 8\) and \(3, 5, 8, 8\)"),
        ({"clip": clip()[None]}, r"got \(1, 3, 6, 8, 8\) and \(3, 1, 1, 1\)"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        integrated_gradients(linear(), **({"clip": clip(), "black": BLACK} | arguments))


def test_a_repeated_slice_gets_the_sum_and_one_left_out_has_no_entry():
    contributions = torch.arange(1.0, 13).view(1, 3, 2, 2).repeat(3, 1, 1, 1)
    slices, maps = by_slice(contributions, np.array([1, 4, 4]))
    assert slices.tolist() == [1, 4]
    np.testing.assert_array_equal(maps[0], 3 * np.array([[1, 2], [3, 4]]))
    np.testing.assert_array_equal(maps[1], 3 * np.array([[5 + 9, 6 + 10], [7 + 11, 8 + 12]]))


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.int64, 6, elements=st.integers(0, 9)))
def test_putting_back_keeps_the_sum(positions):
    slices, maps = by_slice(clip(), np.sort(positions))
    assert slices.tolist() == sorted(set(positions.tolist()))
    assert maps.sum() == pytest.approx(float(clip().sum()), rel=1e-4)


def test_positions_must_be_those_of_the_clip():
    with pytest.raises(ValueError, match="5 positions for a clip of 6 slices"):
        by_slice(clip(), np.arange(5))
