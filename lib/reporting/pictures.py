"""Pictures of scans, and what all figures of the study share.

Each function takes data and returns one Matplotlib figure, closed for pyplot: nothing stays open,
the caller's style stays as it is, and a notebook shows a figure once, as the last expression of a
cell. Colours are Okabe and Ito's, which people with colour-vision deficiency can tell apart;
systems differ in line style as well. Legends stand beside the data.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib.data.files import whole_file
from lib.data.scan import CONSOLIDATION, GROUND_GLASS_OPACITY, LEFT_LUNG, RIGHT_LUNG, Scan, to_grey

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
    "axes.edgecolor": "0.15",
    "axes.labelcolor": "0.15",
    "text.color": "0.15",
    "xtick.color": "0.15",
    "ytick.color": "0.15",
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
    figure, axes = grid(len(cases), columns, cell=(PICTURE_INCHES, PICTURE_INCHES + 0.3))
    drawn = set()
    for axis, case in zip(axes, cases, strict=True):
        drawn |= draw_slice(axis, case)
        axis.set_title(wrapped(case.title, PICTURE_INCHES))
    outline_legend(figure, drawn)
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
    figure, axes = grid(
        len(shown), min(columns, max(1, len(shown))), cell=(OVERVIEW_INCHES, OVERVIEW_INCHES)
    )
    drawn = set()
    for axis, index in zip(axes, shown, strict=True):
        parts = (None if mask is None else mask[index] for mask in (lungs, lesions))
        drawn |= draw_slice(axis, ExampleSlice("", scan.voxels[index], *parts))
        axis.annotate(
            str(index), (0.04, 0.96), xycoords="axes fraction", va="top", color="white",
            bbox={"facecolor": "black", "linewidth": 0, "pad": 1},
        )  # fmt: skip
    if title:
        figure.suptitle(wrapped(title, OVERVIEW_INCHES * len(shown[:columns])))
    outline_legend(figure, drawn)
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
    figure, axes = panels(2, size=(3.6, 2.9))
    for axis, part in zip(axes, (INSIDE, OUTSIDE), strict=True):
        for number, table in enumerate(counts.values()):
            total = max(1, table[part].sum())
            axis.plot(table.index, 100 * table[part] / total, **line_style(number))
        axis.set(title=part.capitalize(), xlabel="Intensity (HU)", ylabel="Share of voxels (%)")
        axis.set_ylim(bottom=0)
    lines = [
        Line2D([], [], label=legend_name(name), **line_style(number))
        for number, name in enumerate(counts)
    ]
    legend_beside(figure, lines)
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


def save_figures(figures: Mapping[str, Figure], folder: Path) -> list[Figure]:
    """Write several figures, each as `save_figure` does.

    Args:
        figures: by the name of their files.
        folder: made where it does not exist.

    Returns:
        The figures, to be looked at.
    """
    for name, figure in figures.items():
        save_figure(figure, folder, name)
    return list(figures.values())


def panels(count: int, *, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A row of panels; ``size`` is that of one, in inches."""
    return grid(count, count, cell=size)


def grid(count: int, columns: int, *, cell: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Axes in reading order; the empty places of the last row are taken out."""
    if count < 1:
        raise ValueError("a figure needs something to show")
    rows = math.ceil(count / columns)
    figure = new_figure((cell[0] * columns, cell[1] * rows))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.remove()
    return figure, list(axes[:count])


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure of a size in inches, closed for pyplot."""
    # Made by pyplot, which teaches a notebook to show figures; closed at once, so that it shows
    # this one only where asked. A closed figure can still be drawn on and saved.
    figure = plt.figure(figsize=size, layout="constrained")
    plt.close(figure)
    return figure


def draw_slice(axis: Axes, case: ExampleSlice) -> set[tuple[str, str]]:
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
                draw_outline(axis, mask == value, colour)
                drawn.add((name, colour))
    return drawn


def draw_outline(axis: Axes, region: np.ndarray, colour: str) -> None:
    """Outline of a region, closed also where it touches the border of the picture."""
    padded = np.pad(region, 1)
    height, width = region.shape
    columns, rows = np.arange(-1, width + 1), np.arange(-1, height + 1)
    axis.contour(columns, rows, padded, levels=[0.5], colors=[colour], linewidths=1.2)
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def outline_legend(figure: Figure, drawn: set[tuple[str, str]]) -> None:
    """One legend below all pictures, in the order of the masks' values."""
    known = [*LUNG_OUTLINES.values(), *LESION_OUTLINES.values()]
    handles = [Line2D([], [], color=colour, label=name) for name, colour in known
               if (name, colour) in drawn]  # fmt: skip
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2)


def legend_beside(figure: Figure, handles: Sequence[Line2D]) -> None:
    """A legend right of the figure, which grows by it when saved; the panels keep their size."""
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), labelspacing=0.8)


def wrapped(title: str, inches: float) -> str:
    """A title in lines that fit a width."""
    return textwrap.fill(title, int(CHARACTERS_PER_INCH * inches))


def legend_name(name: str) -> str:
    """A system's name in lines that fit a legend."""
    return textwrap.fill(name, NAME_CHARACTERS)


def line_style(number: int) -> dict[str, object]:
    """Colour and dashes of the curve with this number; 28 differ."""
    return {
        "color": LINE_COLOURS[number % len(LINE_COLOURS)],
        "linestyle": LINE_STYLES[number // len(LINE_COLOURS) % len(LINE_STYLES)],
        "linewidth": 1.6,
    }
