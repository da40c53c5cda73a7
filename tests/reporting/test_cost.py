"""Tests of lib/reporting/cost.py: counts against arithmetic, one measurement in a real process."""

import os
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lib.classification.inputs import ScanItem
from lib.classification.task import Card
from lib.data.store import save_volume
from lib.reporting import cost
from lib.reporting.cost import (
    COST_COLUMNS,
    card_modules,
    cost_figure,
    cost_table,
    count_parameters,
    counted_flops,
    inference_cost,
    systems_table,
)

WIDTH, HIDDEN, STEPS, HEADS = 16, 8, 10, 4
STEP_INPUT = torch.ones(1, STEPS, WIDTH)


@pytest.mark.parametrize(
    ("network", "values", "expected"),
    [
        (nn.Linear(WIDTH, HIDDEN), STEP_INPUT, 2 * STEPS * WIDTH * HIDDEN),
        (nn.Conv3d(2, 3, 3, padding=1), torch.ones(1, 2, 4, 5, 6), 2 * 120 * 3 * 2 * 27),
        (
            nn.GRU(WIDTH, HIDDEN, batch_first=True),
            STEP_INPUT,
            2 * STEPS * 3 * HIDDEN * (WIDTH + HIDDEN),
        ),
        (
            nn.LSTM(WIDTH, HIDDEN, num_layers=2, bidirectional=True, batch_first=True),
            STEP_INPUT,
            2 * STEPS * 4 * HIDDEN * 2 * ((WIDTH + HIDDEN) + (2 * HIDDEN + HIDDEN)),
        ),
        (
            nn.TransformerEncoderLayer(WIDTH, HEADS, dim_feedforward=32, batch_first=True),
            STEP_INPUT,
            2 * STEPS * (4 * WIDTH**2 + 2 * WIDTH * 32) + 2 * 2 * STEPS**2 * WIDTH,
        ),
    ],
)
def test_flops_are_two_for_every_multiplication_and_addition(network, values, expected):
    network.eval()
    with torch.inference_mode():
        plain = network(values)
        with counted_flops() as flops:
            counted = network(values)
    assert flops.get_total_flops() == expected
    plain, counted = (out[0] if isinstance(out, tuple) else out for out in (plain, counted))
    torch.testing.assert_close(plain, counted)
    assert torch.backends.mha.get_fastpath_enabled()


def test_parameters_are_counted_without_memory_where_that_works():
    devices = []

    def build(width):
        model = nn.Linear(width, width)
        devices.append(model.weight.device.type)
        return model

    assert count_parameters(build, {"width": 100_000}) == 100_000 * 100_001  # 40 GB if it were real
    assert devices == ["meta"]


def test_parameters_of_a_builder_that_reads_values_are_counted_all_the_same():
    def build(width):
        model = nn.Linear(width, width)
        return model if model.weight.sum().item() < np.inf else None

    assert count_parameters(build, {"width": 3}) == 12


def make_system(parameters, approximation):
    card = Card("A", "paper, 1", "a net", "its head", parameters, approximation)
    return SimpleNamespace(
        CARD=card, VARIANTS={"paper": {"width": 3}}, build=lambda width: nn.Linear(width, 2)
    )


def test_systems_table_puts_published_and_counted_parameters_side_by_side():
    table = systems_table({"A": make_system(9, False), "B": make_system(None, True)})
    assert table["system"].tolist() == ["A", "B"]
    assert table["parameters"].tolist() == [8, 8]
    assert table["parameters_published"].tolist() == [9, pd.NA]
    assert table["layers"].tolist() == ["as published", "approximated"]
    assert table.loc[0, ["source", "published", "ours"]].tolist() == [
        "paper, 1",
        "a net",
        "its head",
    ]


@pytest.fixture
def scan(tmp_path):
    voxels = np.random.default_rng(0).integers(-1000, 200, (3, 32, 32)).astype(np.int16)
    save_volume(tmp_path / "a.b2nd", voxels)
    return ScanItem("a", tmp_path / "a.b2nd", None, 1)


SETTINGS = {
    "image_size": 32, "batch_scans": 1, "precision": "bf16-mixed", "loader_processes": 4,
    "cache_slices": False,
}  # fmt: skip


@pytest.fixture
def measure(scan, tmp_path):
    """Measure RACNet's small preset with some settings, keeping results in one folder."""
    return lambda settings: cost_table(
        {"racnet": "RACNet"},
        {"racnet": {"small": settings}},
        scan,
        presets=["small"],
        folder=tmp_path / "cost",
        threads=1,
    )


def test_a_classifier_is_measured_in_a_process_of_its_own(measure, monkeypatch):
    table = measure(SETTINGS)
    assert table.columns.tolist() == list(COST_COLUMNS)
    (row,) = table.to_dict("records")
    assert (row["system"], row["preset"], row["slices"]) == ("RACNet", "small", 3)
    racnet = card_modules({"racnet": "RACNet"})["RACNet"]
    model = racnet.build(**racnet.VARIANTS["small"])
    assert row["parameters"] == sum(weights.numel() for weights in model.parameters())
    assert 0 < row["seconds_per_scan"] < 60
    assert row["peak_megabytes"] > row["parameters"] * 4 / 1e6  # weights are float32
    assert row["giga_flops"] > 0
    monkeypatch.setattr(cost, "inference_cost", None)  # a second measurement would fail
    pd.testing.assert_frame_equal(measure(SETTINGS), table)


def test_what_changed_is_measured_again(measure, monkeypatch):
    measured = []

    def pretend(classifier, preset, settings, scan, **how):
        measured.append(settings["image_size"])
        return cost.Cost(1, 1.0, 1.0, 1.0, "CPU")

    monkeypatch.setattr(cost, "inference_cost", pretend)
    for size in (32, 32, 64):
        measure(SETTINGS | {"image_size": size})
    assert measured == [32, 64]


@dataclass(frozen=True)
class Deadly:
    """Kills the process that reads it, as running out of memory does."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_process_that_dies_is_named():
    with pytest.raises(RuntimeError, match="ran racnet with preset paper died"):
        inference_cost("racnet", "paper", SETTINGS, Deadly())


def test_the_figure_shows_every_cost_of_every_classifier():
    rows = [
        ["A", "paper", 10, 1.0, 0.1, 50.0, 3, "CPU"],
        ["A", "small", 5, 0.5, 0.2, 20.0, 3, "CPU"],
        ["B", "paper", 20, 9.0, 1.0, 90.0, 3, "CPU"],
    ]
    costs = pd.DataFrame(rows, columns=COST_COLUMNS)
    axes = cost_figure(costs).axes
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["A", "B"]
    columns = ("parameters", "giga_flops", "seconds_per_scan", "peak_megabytes")
    for axis, column in zip(axes, columns, strict=True):
        values, places = axis.collections[0].get_offsets().T
        assert values.tolist() == costs[column].tolist()
        assert places.tolist() == [0, 0, 1]
        assert axis.get_xscale() == "log"
