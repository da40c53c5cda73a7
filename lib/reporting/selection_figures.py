"""Figures of slice selection: where the threshold cuts, what is dropped, how much remains.

Colours and saving are those of `lib.reporting.pictures`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from lib.data.selection import Selection
from lib.data.store import StoredVolume
from lib.reporting.pictures import (
    LINE_COLOURS,
    STYLE,
    ExampleSlice,
    draw_slice,
    grid,
    legend_beside,
    new_figure,
    wrapped,
)
from lib.reporting.segmentation_figures import choose_cases

KEPT_COLOUR, DROPPED_COLOUR = LINE_COLOURS[0], LINE_COLOURS[1]
BOX_COLOUR = "#E69F00"
CURVE_INCHES = 3.4
SLICE_INCHES = 1.45
MOST_BINS = 30
THRESHOLD_LINE = {"color": "0.15", "linewidth": 0.9, "linestyle": "--"}


@dataclass(frozen=True, eq=False)
class SelectedScan:
    """One row of :func:`selected_ranges`.

    Attributes:
        title: shown above the curve.
        volume: int16 Hounsfield units or uint8, shape (slices, height, width); read slice by slice.
        ratios: coarse lung ratio of each slice, shape (slices,).
        selection: the kept slices and their box.
        threshold: share of the largest ratio that the range comes from; nan where there is none.
    """

    title: str
    volume: StoredVolume | np.ndarray
    ratios: np.ndarray
    selection: Selection
    threshold: float


def choose_scans(selected: pd.DataFrame) -> dict[str, str]:
    """The scans of which the smallest, the median and the largest share is kept, as examples.

    Args:
        selected: columns scan_id, slices, first, last and accepted. Scans without an accepted range
            are left out, unless there are no others.

    Returns:
        scan_id of ``least kept``, ``median`` and ``most kept``, see
        `lib.reporting.segmentation_figures.choose_cases`; fewer where there are fewer than three.
    """
    able = selected[selected["accepted"]] if selected["accepted"].any() else selected
    shares = (able["last"] - able["first"] + 1) / able["slices"]
    cases = choose_cases(shares.set_axis(able["scan_id"]))
    names = {"lowest": "least kept", "median": "median", "highest": "most kept"}
    return {names[case]: cases[case] for case in names if case in cases}


def shown_slices(selection: Selection, ratios: np.ndarray) -> list[int | None]:
    """Slices that tell what a selection does, from head to feet.

    Args:
        selection: of the scan.
        ratios: coarse lung ratio of each slice.

    Returns:
        Seven: first slice and last one dropped at the head; first kept, largest ratio, last kept;
        first one dropped at the feet and last slice. None where a slice does not exist or is shown
        already.
    """
    end, first, last = len(ratios) - 1, selection.first, selection.last
    largest = first + int(np.argmax(ratios[first : last + 1]))
    return [
        0 if first > 1 else None,
        first - 1 if first > 0 else None,
        first,
        largest if largest not in (first, last) else None,
        last if last > first else None,
        last + 1 if last < end else None,
        end if last < end - 1 else None,
    ]


@matplotlib.rc_context(STYLE)
def selected_ranges(scans: Sequence[SelectedScan]) -> Figure:
    """What slice selection keeps of a few scans (3-D CNN with BERT, section 3.3).

    Args:
        scans: one per row.

    Returns:
        Per row the lung ratio along the scan with the threshold and the kept range, and beside it
        the slices of `shown_slices`: three kept ones with the body box of the volume, up to two
        dropped ones at either end.

    Raises:
        ValueError: when there is no scan.
    """
    if not scans:
        raise ValueError("a figure needs something to show")
    columns = 7
    figure = new_figure((CURVE_INCHES + columns * SLICE_INCHES, 2.0 * len(scans)))
    widths = [CURVE_INCHES, *[SLICE_INCHES] * columns]
    axes = figure.subplots(len(scans), 1 + columns, squeeze=False, width_ratios=widths)
    for row, scan in zip(axes, scans, strict=True):
        shown = shown_slices(scan.selection, scan.ratios)
        _draw_curve(row[0], scan, [index for index in shown if index is not None])
        for axis, index in zip(row[1:], shown, strict=True):
            _draw_shown(axis, scan, index)
    axes[-1, 0].set_xlabel("slice, from the head")
    handles = [
        Line2D([], [], **THRESHOLD_LINE, label="threshold, as a share of the largest ratio"),
        Patch(facecolor=KEPT_COLOUR, alpha=0.2, label="kept range"),
        Patch(facecolor=DROPPED_COLOUR, alpha=0.2, label="dropped"),
        Rectangle(
            (0, 0), 1, 1, fill=False, edgecolor=BOX_COLOUR, label="body box of the kept range"
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


@matplotlib.rc_context(STYLE)
def kept_counts(selected: pd.DataFrame, *, columns: int = 3) -> Figure:
    """How many slices the scans have and how many are kept, one panel per split.

    Args:
        selected: columns split, slices, first and last.
        columns: panels beside one another.

    Returns:
        Histograms over scans with shared bins.

    Raises:
        ValueError: when there is no scan.
    """
    kept = selected["last"] - selected["first"] + 1
    edges = whole_bins(kept.min(), selected["slices"].max())
    splits = selected["split"].unique()
    figure, axes = grid(len(splits), min(columns, max(1, len(splits))), cell=(3.4, 2.6))
    for axis, split in zip(axes, splits, strict=True):
        of_split = selected["split"] == split
        axis.hist(selected["slices"][of_split], edges, color="0.82", label="in the scan")
        axis.hist(
            kept[of_split], edges, histtype="step", linewidth=1.6, color=KEPT_COLOUR, label="kept"
        )
        medians = [counts[of_split].median() for counts in (kept, selected["slices"])]
        title = f"{split}: median {medians[0]:.0f} of {medians[1]:.0f} slices kept"
        axis.set(title=title, xlabel="slices", ylabel="scans")
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    legend_beside(figure, axes[0].get_legend_handles_labels()[0])
    return figure


def whole_bins(lowest: int, highest: int) -> np.ndarray:
    """Edges of at most ``MOST_BINS`` bins that each hold the same number of whole numbers.

    Args:
        lowest: first number of the first bin.
        highest: a number of the last bin.

    Returns:
        Rising edges, halfway between whole numbers.
    """
    width = math.ceil((highest - lowest + 1) / MOST_BINS)
    return np.arange(lowest, highest + width + 1, width) - 0.5


def _draw_curve(axis: Axes, scan: SelectedScan, shown: Sequence[int]) -> None:
    """Ratio along a scan, the threshold and the kept range."""
    selection, end = scan.selection, len(scan.ratios) - 0.5
    start, stop = selection.first - 0.5, selection.last + 0.5
    axis.axvspan(start, stop, color=KEPT_COLOUR, alpha=0.12, linewidth=0)
    for low, high in ((-0.5, start), (stop, end)):
        if low < high:
            axis.axvspan(low, high, color=DROPPED_COLOUR, alpha=0.12, linewidth=0)
    axis.plot(scan.ratios, color="0.3", linewidth=1.2)
    inside = [selection.first <= index <= selection.last for index in shown]
    colours = [KEPT_COLOUR if kept else DROPPED_COLOUR for kept in inside]
    axis.scatter(shown, scan.ratios[list(shown)], c=colours, s=18, zorder=3)
    if np.isfinite(scan.threshold):
        height = scan.threshold * scan.ratios.max()
        axis.axhline(height, **THRESHOLD_LINE)
        axis.annotate(
            f"{scan.threshold:.1f}", (1, height), (3, 0), va="center",
            xycoords=("axes fraction", "data"), textcoords="offset points",
        )  # fmt: skip
    axis.set(xlim=(-0.5, end), ylabel="lung ratio")
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_title(wrapped(f"{scan.title}: {len(selection)} of {len(scan.ratios)} slices", 3.2))


def _draw_shown(axis: Axes, scan: SelectedScan, index: int | None) -> None:
    """One slice with its number, framed in the colour of what becomes of it."""
    axis.set_axis_off()
    if index is None:
        return
    kept = scan.selection.first <= index <= scan.selection.last
    colour = KEPT_COLOUR if kept else DROPPED_COLOUR
    draw_slice(axis, ExampleSlice("", scan.volume[index]))
    if kept:
        xmin, ymin, xmax, ymax = scan.selection.box
        corner = (xmin - 0.5, ymin - 0.5)
        axis.add_patch(
            Rectangle(corner, xmax - xmin, ymax - ymin, fill=False, edgecolor=BOX_COLOUR)
        )
    state = "kept" if kept else "dropped"
    axis.set_title(f"{index} {state}\nratio {scan.ratios[index]:.2f}", color=colour)
