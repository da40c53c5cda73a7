"""Tests of lib/reporting/selection_figures.py: what is drawn, read back from the figure."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from lib.data.selection import Selection
from lib.reporting.selection_figures import (
    BOX_COLOUR,
    DROPPED_COLOUR,
    KEPT_COLOUR,
    MOST_BINS,
    SelectedScan,
    choose_scans,
    kept_counts,
    selected_ranges,
    shown_slices,
    whole_bins,
)

RATIOS = np.array([0.0, 0.1, 0.3, 0.4, 0.35, 0.3, 0.2, 0.1])
BOX = (1, 2, 11, 13)


def scan(first=2, last=5, threshold=0.7, ratios=RATIOS):
    volume = np.zeros((len(ratios), 16, 12), np.uint8)
    return SelectedScan("a", volume, ratios, Selection("a", "covid", first, last, BOX), threshold)


def selected(*rows):
    columns = ["scan_id", "split", "slices", "first", "last", "accepted"]
    return pd.DataFrame(rows, columns=columns)


@st.composite
def ranges(draw):
    ratios = draw(st.lists(st.floats(0, 1), min_size=1, max_size=12))
    first, last = sorted(draw(st.integers(0, len(ratios) - 1)) for _ in range(2))
    return Selection("a", "covid", first, last, BOX), np.array(ratios)


@given(ranges())
def test_shown_slices_are_seven_places_with_each_slice_once(drawn):
    selection, ratios = drawn
    shown = shown_slices(selection, ratios)
    there = [index for index in shown if index is not None]
    assert len(shown) == 7 and len(there) == len(set(there))
    kept = range(selection.first, selection.last + 1)
    assert all(index not in kept for index in [*shown[:2], *shown[5:]] if index is not None)
    assert {selection.first, selection.last} <= set(there)
    assert {0, len(ratios) - 1} <= set(there)  # both ends are seen, kept or dropped


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (2, 5, [0, 1, 2, 3, 5, 6, 7]),
        (1, 6, [None, 0, 1, 3, 6, 7, None]),
        (0, 7, [None, None, 0, 3, 7, None, None]),
        (3, 3, [0, 2, 3, None, None, 4, 7]),
    ],
)
def test_shown_slices_by_examples(first, last, expected):
    assert shown_slices(Selection("a", "covid", first, last, BOX), RATIOS) == expected


def test_a_row_shows_the_curve_the_threshold_and_what_is_kept():
    figure = selected_ranges([scan(), scan(threshold=np.nan)])
    assert len(figure.axes) == 2 * 8
    curve = figure.axes[0]
    assert curve.get_title() == "a: 4 of 8 slices"
    line, threshold = curve.lines
    np.testing.assert_array_equal(line.get_ydata(), RATIOS)
    np.testing.assert_allclose(threshold.get_ydata(), 0.7 * 0.4)
    assert [text.get_text() for text in curve.texts] == ["0.7"]
    assert len(figure.axes[8].lines) == 1 and not figure.axes[8].texts  # no threshold
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in curve.patches]
    assert spans == [(1.5, 5.5), (-0.5, 1.5), (5.5, 7.5)]


def test_pictures_say_what_became_of_the_slice_and_kept_ones_show_the_box():
    pictures = selected_ranges([scan()]).axes[1:]
    assert [axis.get_title().split("\n")[0] for axis in pictures] == [
        "0 dropped", "1 dropped", "2 kept", "3 kept", "5 kept", "6 dropped", "7 dropped",
    ]  # fmt: skip
    assert pictures[3].get_title() == "3 kept\nratio 0.40"
    for place, axis in enumerate(pictures):
        kept = 2 <= place <= 4
        colour = KEPT_COLOUR if kept else DROPPED_COLOUR
        assert to_hex(axis.title.get_color()) == colour.lower()
        boxes = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
        assert len(boxes) == kept
        for box in boxes:  # around the pixels, whose middles are the whole numbers
            assert box.get_bbox().extents.tolist() == [0.5, 1.5, 10.5, 12.5]
            assert to_hex(box.get_edgecolor()) == BOX_COLOUR.lower()


def test_a_scan_of_one_slice_leaves_six_places_empty():
    pictures = selected_ranges([scan(0, 0, ratios=RATIOS[:1])]).axes[1:]
    assert [bool(axis.images) for axis in pictures] == [place == 2 for place in range(7)]


def test_examples_are_the_smallest_median_and_largest_share_of_accepted_ranges():
    table = selected(
        ("a", "train", 10, 0, 8, True),  # 0.9
        ("b", "train", 20, 5, 8, True),  # 0.2
        ("c", "test", 10, 1, 5, True),  # 0.5
        ("d", "test", 1, 0, 0, False),
    )
    assert choose_scans(table) == {"least kept": "b", "median": "c", "most kept": "a"}
    assert choose_scans(table.assign(accepted=False))["most kept"] == "d"
    assert list(choose_scans(table[:1]).values()) == ["a"]


def test_counts_of_each_split_are_counted_once():
    table = selected(
        ("a", "train", 10, 0, 8, True),
        ("b", "train", 20, 5, 8, True),
        ("c", "test", 12, 1, 5, True),
    )
    figure = kept_counts(table)
    train, test = figure.axes
    assert train.get_title() == "train: median 6 of 15 slices kept"
    assert test.get_title() == "test: median 5 of 12 slices kept"
    bars = [patch.get_height() for patch in train.patches if isinstance(patch, Rectangle)]
    assert sum(bars) == 2


@given(st.integers(1, 900), st.integers(0, 900))
def test_bins_hold_every_whole_number_once_and_are_equally_wide(lowest, more):
    edges = whole_bins(lowest, lowest + more)
    counts, _ = np.histogram(np.arange(lowest, lowest + more + 1), edges)
    assert counts.sum() == more + 1 and len(counts) <= MOST_BINS
    assert len(set(np.diff(edges))) == 1 and set(counts[:-1]) <= {np.diff(edges)[0]}


def test_nothing_to_show_is_said():
    with pytest.raises(ValueError, match="a figure needs something to show"):
        selected_ranges([])
