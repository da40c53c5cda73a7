"""The study's figures: each function takes data and returns one Matplotlib figure.

Figures are closed for pyplot: nothing stays open, the caller's style stays as it is, and a notebook
shows a figure once, as the last expression of a cell.
Colours are Okabe and Ito's, which people with colour-vision deficiency can tell apart; systems
differ in line style as well. Legends stand beside the data.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_curve

from lib.data.files import whole_file
from lib.data.scan import CONSOLIDATION, GROUND_GLASS_OPACITY, LEFT_LUNG, RIGHT_LUNG, Scan, to_grey
from lib.data.splits import TEST
from lib.evaluation.classification import (
    DEFAULT_THRESHOLD,
    PROBABILITY_PREFIX,
    class_names,
    confusion_matrix,
    probability_matrix,
)
from lib.evaluation.statistics import bootstrap_interval, classification_statistic
from lib.reporting.tables import heading

# Okabe and Ito's colours for lines on white: blue, vermillion, green, purple, orange, sky blue.
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")
LUNG_OUTLINES = {RIGHT_LUNG: ("right lung", "#56B4E9"), LEFT_LUNG: ("left lung", "#E69F00")}
LESION_OUTLINES = {
    GROUND_GLASS_OPACITY: ("ground-glass opacity", "#F0E442"),
    CONSOLIDATION: ("consolidation", "#CC79A7"),
}
INSIDE, OUTSIDE = "inside lungs", "outside lungs"
HOUNSFIELD_EDGES = np.arange(-1024, 626, 25)  # HU, air to soft bone

DOTS_PER_INCH = 150
PICTURE_INCHES = 2.4  # width of an example slice or a confusion matrix with its title
OVERVIEW_INCHES = 1.4  # width of a slice of an overview
CHARACTERS_PER_INCH = 12  # of a title
NAME_CHARACTERS = 34  # a line of a legend
STYLE = {
    **seaborn.axes_style("ticks"),
    "font.family": "DejaVu Sans",  # comes with Matplotlib, so the same on every machine
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,  # text stays text
}
# No date, no version: the same figure gives the same bytes.
METADATA = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


@dataclass(frozen=True, eq=False)
class ExampleSlice:
    """One picture of :func:`example_slices`.

    Attributes:
        title: shown above, broken into lines.
        voxels: shape (height, width), int16 Hounsfield units or uint8.
        lungs: lung mask of the same shape, 1 right and 2 left, or None.
        lesions: lesion mask of the same shape, 1 ground-glass opacity and 2 consolidation, or None.
    """

    title: str
    voxels: np.ndarray
    lungs: np.ndarray | None = None
    lesions: np.ndarray | None = None


@matplotlib.rc_context(STYLE)
def example_slices(cases: Sequence[ExampleSlice], *, columns: int = 4) -> Figure:
    """Slices in grey with the outlines of their masks.

    Args:
        cases: in reading order.
        columns: pictures beside one another.

    Returns:
        A grid of pictures; the patient's right is on the left.

    Raises:
        ValueError: when there is no case, or a mask has another shape than its slice.
    """
    columns = min(columns, max(1, len(cases)))
    figure, axes = _grid(len(cases), columns, cell=(PICTURE_INCHES, PICTURE_INCHES + 0.3))
    drawn = set()
    for axis, case in zip(axes, cases, strict=True):
        drawn |= _draw_slice(axis, case)
        axis.set_title(_wrapped(case.title, PICTURE_INCHES))
    _outline_legend(figure, drawn)
    return figure


@matplotlib.rc_context(STYLE)
def scan_overview(
    scan: Scan,
    lungs: np.ndarray | None = None,
    lesions: np.ndarray | None = None,
    *,
    title: str = "",
    slices: int = 24,
    columns: int = 8,
) -> Figure:
    """Evenly spaced slices of one scan from head to feet, with outlines.

    Args:
        scan: the scan.
        lungs: lung mask of the scan's shape, or None.
        lesions: lesion mask of the scan's shape, or None.
        title: of the figure.
        slices: how many to show; all, where the scan has fewer.
        columns: pictures beside one another.

    Returns:
        A grid of pictures with their slice numbers, which count from 0 at the head.

    Raises:
        ValueError: when the scan is empty or a mask has another shape.
    """
    for mask in (lungs, lesions):
        if mask is not None and mask.shape != scan.voxels.shape:
            raise ValueError(f"the mask has shape {mask.shape}, the scan {scan.voxels.shape}")
    total = len(scan.voxels)
    shown = np.unique(np.linspace(0, total - 1, min(slices, total)).round().astype(int))
    figure, axes = _grid(
        len(shown), min(columns, max(1, len(shown))), cell=(OVERVIEW_INCHES, OVERVIEW_INCHES)
    )
    drawn = set()
    for axis, index in zip(axes, shown, strict=True):
        parts = (None if mask is None else mask[index] for mask in (lungs, lesions))
        drawn |= _draw_slice(axis, ExampleSlice("", scan.voxels[index], *parts))
        axis.annotate(
            str(index), (0.04, 0.96), xycoords="axes fraction", va="top", color="white",
            bbox={"facecolor": "black", "linewidth": 0, "pad": 1},
        )  # fmt: skip
    if title:
        figure.suptitle(_wrapped(title, OVERVIEW_INCHES * len(shown[:columns])))
    _outline_legend(figure, drawn)
    return figure


@matplotlib.rc_context(STYLE)
def learning_curves(histories: Mapping[str, pd.DataFrame]) -> Figure:
    """What was measured after each epoch of training.

    Args:
        histories: for each system a table with the column ``epoch`` and columns
            ``train_<quantity>`` and ``validation_<quantity>``.

    Returns:
        One panel per quantity; validation drawn full, training faint.

    Raises:
        ValueError: when no history holds such a column.
    """
    parts = ("train_", "validation_")
    quantities = list(
        dict.fromkeys(
            column.split("_", 1)[1]
            for history in histories.values()
            for column in history.columns
            if column.startswith(parts)
        )
    )
    figure, axes = _panels(len(quantities), size=(3.6, 2.9))
    for axis, quantity in zip(axes, quantities, strict=True):
        for number, history in enumerate(histories.values()):
            line = _line_style(number)
            for part, opacity in zip(parts, (0.35, 1.0), strict=True):
                if part + quantity in history:
                    values = history[part + quantity]
                    marker = "o" if len(values) == 1 else None
                    axis.plot(history["epoch"], values, alpha=opacity, marker=marker, **line)
        axis.set(xlabel="Epoch", ylabel=heading(quantity))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    lines = [
        Line2D([], [], label=_legend_name(name), **_line_style(number))
        for number, name in enumerate(histories)
    ]
    faint = Line2D([], [], color="grey", alpha=0.35, label="training (faint)")
    _legend_beside(figure, [*lines, faint])
    return figure


@matplotlib.rc_context(STYLE)
def roc_curves(
    predictions: Mapping[str, pd.DataFrame], *, positive: str, seed: int, split: str = TEST
) -> Figure:
    """ROC curves of several systems, with the areas and their 95 % intervals in the legend.

    Args:
        predictions: for each system its predictions with the column ``patient_id``.
        positive: the class to detect.
        seed: of the bootstrap over patients.
        split: rows to use.

    Returns:
        One panel; the ring on each curve is the threshold 0.5.
    """
    figure, (axis,) = _panels(1, size=(4.2, 4.0))
    axis.plot([0, 1], [0, 1], color="lightgrey", linewidth=1, zorder=0)
    handles = []
    for number, (name, frame) in enumerate(predictions.items()):
        tested = frame[frame["split"] == split]
        line = _line_style(number)
        _draw_roc(axis, tested, positive, line)
        statistic = partial(classification_statistic, positive=positive)
        area = bootstrap_interval(tested, statistic, seed=seed).loc["roc_auc"]
        handles.append(Line2D([], [], label=f"{_legend_name(name)}\n{_auc_text(area)}", **line))
    axis.set(xlabel="1 − specificity", ylabel="Sensitivity", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axis.set_aspect("equal")
    _legend_beside(figure, handles)
    return figure


@matplotlib.rc_context(STYLE)
def confusion_matrices(
    predictions: Mapping[str, pd.DataFrame],
    *,
    positive: str,
    split: str = TEST,
    threshold: float = DEFAULT_THRESHOLD,
) -> Figure:
    """Counts of true against predicted classes, shaded by the share of each true class.

    Args:
        predictions: for each system its predictions.
        positive: the class to detect.
        split: rows to use.
        threshold: for two classes only.

    Returns:
        One square per system.
    """
    columns = min(4, max(1, len(predictions)))
    most = max((len(class_names(frame)) for frame in predictions.values()), default=0)
    width = max(PICTURE_INCHES, float(most))  # an inch per class name
    figure, axes = _grid(len(predictions), columns, cell=(width, width + 0.1))
    for axis, (name, frame) in zip(axes, predictions.items(), strict=True):
        tested = frame[frame["split"] == split]
        counts = confusion_matrix(
            tested["label"],
            probability_matrix(tested),
            positive=positive,
            classes=class_names(tested),
            threshold=threshold,
        )
        _draw_confusion(axis, counts)
        axis.set_title(_wrapped(name, width))
    return figure


def count_hounsfield(voxels: np.ndarray, lungs: np.ndarray) -> pd.DataFrame:
    """How many voxels of each intensity lie inside and outside the lungs.

    Counts of several scans may be added, so that a group needs one scan in memory at a time.

    Args:
        voxels: int16 Hounsfield units, any shape; intensities beyond the ends count at the ends.
        lungs: lung mask of the same shape, above 0 inside.

    Returns:
        Counts ``inside lungs`` and ``outside lungs``, indexed by the middle of each bin in HU.

    Raises:
        TypeError: when the voxels are 8-bit grey values, which have no Hounsfield units.
        ValueError: when the shapes differ.
    """
    if voxels.dtype != np.int16:
        raise TypeError(f"a Hounsfield histogram needs int16 Hounsfield units, got {voxels.dtype}")
    if voxels.shape != lungs.shape:
        raise ValueError(f"the mask has shape {lungs.shape}, the scan {voxels.shape}")
    clipped = np.clip(voxels, HOUNSFIELD_EDGES[0], HOUNSFIELD_EDGES[-1])
    parts = {INSIDE: clipped[lungs > 0], OUTSIDE: clipped[lungs == 0]}
    middles = pd.Index((HOUNSFIELD_EDGES[:-1] + HOUNSFIELD_EDGES[1:]) / 2, name="hounsfield")
    return pd.DataFrame(
        {name: np.histogram(part, HOUNSFIELD_EDGES)[0] for name, part in parts.items()},
        index=middles,
    )


@matplotlib.rc_context(STYLE)
def hounsfield_histogram(counts: Mapping[str, pd.DataFrame]) -> Figure:
    """Distribution of intensities inside and outside the lungs, for groups of scans.

    Args:
        counts: for each group the sum of :func:`count_hounsfield` over its scans.

    Returns:
        Two panels of curves, each curve summing to 100 %.
    """
    figure, axes = _panels(2, size=(3.6, 2.9))
    for axis, part in zip(axes, (INSIDE, OUTSIDE), strict=True):
        for number, table in enumerate(counts.values()):
            total = max(1, table[part].sum())
            axis.plot(table.index, 100 * table[part] / total, **_line_style(number))
        axis.set(title=part.capitalize(), xlabel="Intensity (HU)", ylabel="Share of voxels (%)")
        axis.set_ylim(bottom=0)
    lines = [
        Line2D([], [], label=_legend_name(name), **_line_style(number))
        for number, name in enumerate(counts)
    ]
    _legend_beside(figure, lines)
    return figure


@matplotlib.rc_context(STYLE)
def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and PDF.

    Each file appears whole or not at all; the same figure gives the same bytes on one machine.

    Args:
        figure: as the functions of this module return it.
        folder: made where it does not exist.
        name: of the files, without ending, for example ``"sam2clip2sam_figure3"``.

    Returns:
        The two files.

    Raises:
        ValueError: when the name is a path.
    """
    if Path(name).name != name:
        raise ValueError(f"a figure's name is no path, got {name}")
    files = []
    for ending, metadata in METADATA.items():
        file = folder / f"{name}.{ending}"
        with whole_file(file) as partial_file:
            figure.savefig(
                partial_file,
                format=ending,
                dpi=DOTS_PER_INCH,
                metadata=metadata,
                bbox_inches="tight",
            )
        files.append(file)
    return files


def _panels(count: int, *, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A row of panels; ``size`` is that of one, in inches."""
    return _grid(count, count, cell=size)


def _grid(count: int, columns: int, *, cell: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Axes in reading order; the empty places of the last row are taken out."""
    if count < 1:
        raise ValueError("a figure needs something to show")
    rows = math.ceil(count / columns)
    # Made by pyplot, which teaches a notebook to show figures; closed at once, so that it shows
    # this one only where asked. A closed figure can still be drawn on and saved.
    figure = plt.figure(figsize=(cell[0] * columns, cell[1] * rows), layout="constrained")
    plt.close(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.remove()
    return figure, list(axes[:count])


def _draw_slice(axis: Axes, case: ExampleSlice) -> set[tuple[str, str]]:
    """Draw a slice with its outlines; returns the names and colours of those drawn."""
    axis.imshow(to_grey(case.voxels), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set_axis_off()
    drawn = set()
    for mask, outlines in ((case.lungs, LUNG_OUTLINES), (case.lesions, LESION_OUTLINES)):
        if mask is None:
            continue
        if mask.shape != case.voxels.shape:
            raise ValueError(f"the mask has shape {mask.shape}, the slice {case.voxels.shape}")
        for value, (name, colour) in outlines.items():
            if (mask == value).any():
                _draw_outline(axis, mask == value, colour)
                drawn.add((name, colour))
    return drawn


def _draw_outline(axis: Axes, region: np.ndarray, colour: str) -> None:
    """Outline of a region, closed also where it touches the border of the picture."""
    padded = np.pad(region, 1)
    height, width = region.shape
    columns, rows = np.arange(-1, width + 1), np.arange(-1, height + 1)
    axis.contour(columns, rows, padded, levels=[0.5], colors=[colour], linewidths=1.2)
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def _outline_legend(figure: Figure, drawn: set[tuple[str, str]]) -> None:
    """One legend below all pictures, in the order of the masks' values."""
    known = [*LUNG_OUTLINES.values(), *LESION_OUTLINES.values()]
    handles = [Line2D([], [], color=colour, label=name) for name, colour in known
               if (name, colour) in drawn]  # fmt: skip
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2)


def _legend_beside(figure: Figure, handles: Sequence[Line2D]) -> None:
    """A legend right of the figure, which grows by it when saved; the panels keep their size."""
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), labelspacing=0.8)


def _wrapped(title: str, inches: float) -> str:
    """A title in lines that fit a width."""
    return textwrap.fill(title, int(CHARACTERS_PER_INCH * inches))


def _legend_name(name: str) -> str:
    return textwrap.fill(name, NAME_CHARACTERS)


def _line_style(number: int) -> dict[str, object]:
    """Colour and dashes of the curve with this number; 28 differ."""
    return {
        "color": LINE_COLOURS[number % len(LINE_COLOURS)],
        "linestyle": LINE_STYLES[number // len(LINE_COLOURS) % len(LINE_STYLES)],
        "linewidth": 1.6,
    }


def _draw_roc(axis: Axes, tested: pd.DataFrame, positive: str, line: Mapping[str, object]) -> None:
    """One curve and its point at the threshold 0.5; nothing where a class is absent."""
    is_positive = tested["label"] == positive
    if is_positive.nunique() < 2:
        return
    probability = tested[PROBABILITY_PREFIX + positive]
    false_rate, true_rate, _ = roc_curve(is_positive, probability, drop_intermediate=False)
    axis.plot(false_rate, true_rate, **line)
    called = probability >= DEFAULT_THRESHOLD
    point = called[~is_positive].mean(), called[is_positive].mean()
    axis.plot(*point, marker="o", markersize=6, fillstyle="none", color=line["color"])


def _auc_text(area: pd.Series) -> str:
    """The area with its interval, for a legend."""
    if np.isnan(area["value"]):
        return "AUC undefined: one class absent"
    text = f"AUC {area['value']:.2f}"
    return text if np.isnan(area["low"]) else f"{text} [{area['low']:.2f}, {area['high']:.2f}]"


def _draw_confusion(axis: Axes, counts: pd.DataFrame) -> None:
    """One heat map of shares with the counts written in."""
    shares = counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
    names = [str(name).replace("_", "-") for name in counts.index]
    written = counts.astype(str) + "\n" + (100 * shares).round().astype(int).astype(str) + " %"
    seaborn.heatmap(
        shares, ax=axis, annot=written, fmt="", cmap="Blues", vmin=0, vmax=1, square=True,
        cbar=False, xticklabels=names, yticklabels=names, linewidths=0.5, linecolor="lightgrey",
    )  # fmt: skip
    axis.set(xlabel="Predicted", ylabel="True")
