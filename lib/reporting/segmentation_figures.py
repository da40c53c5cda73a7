"""Figures of lung segmentation: figure 3 of SAM2CLIP2SAM, its claim in numbers, a slice's journey.

Cases are chosen by `choose_cases` and `fullest_slice`, never by hand. Style, colours and saving are
those of `lib.reporting.pictures`.
"""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from lib.data.scan import to_grey
from lib.data.store import open_volume
from lib.reporting.pictures import (
    LINE_COLOURS,
    STYLE,
    ExampleSlice,
    draw_slice,
    grid,
    legend_beside,
    new_figure,
    outline_legend,
    panels,
    wrapped,
)
from lib.reporting.tables import HIGH, LOW, heading

PANEL_INCHES = 1.7  # side of a picture of a comparison
JOURNEY_INCHES = 2.3  # side of a large picture of a journey
MARGIN = 0.12  # of the lungs' longer side, around them
UNSEGMENTED, TRUE_OUTLINE = "unsegmented", "true outline"
CROPS_SHOWN, CROP_COLUMNS = 8, 4
MASK_OPACITY = 0.55
GOLDEN_RATIO = 0.618034  # steps of it around the colour wheel never come close to each other
CHOSEN_COLOUR = "#E69F00"
# Panel of the claim: metrics drawn in it, each with its marker.
CLAIM_PANELS = (
    {"mediastinum_leakage": "o"},
    {"rim_error": "o"},
    {"lesions_kept": "o", "ground_glass_kept": "^", "consolidation_kept": "s"},
)


@dataclass(frozen=True, eq=False)
class SegmentedSlice:
    """One row of :func:`outline_comparison` and :func:`masked_comparison`.

    Attributes:
        title: shown left of the row, broken into lines.
        voxels: shape (height, width), int16 Hounsfield units or uint8.
        masks: for each method its lung mask of the same shape, 0, 1 right and 2 left lung.
        truth: the true lung mask, or None where it is not known.
    """

    title: str
    voxels: np.ndarray
    masks: Mapping[str, np.ndarray]
    truth: np.ndarray | None = None


def choose_cases(values: pd.Series) -> dict[str, str]:
    """The scans with the highest, the median and the lowest value, to be shown as examples.

    Args:
        values: of each scan, indexed by scan_id; for example a method's Dice coefficient of both
            lungs, or where no true mask is known the Dice coefficient between two methods. Scans
            without a value are left out.

    Returns:
        scan_id of ``highest``, ``median`` (the lower of two) and ``lowest``; of equal values the
        first scan_id counts as lower. Fewer where there are fewer than three scans.
    """
    ranked = values.dropna().sort_index().sort_values(kind="stable").index
    places = {"highest": len(ranked) - 1, "median": (len(ranked) - 1) // 2, "lowest": 0}
    cases = {}
    for name, place in places.items():
        if len(ranked) and ranked[place] not in cases.values():
            cases[name] = ranked[place]
    return cases


def fullest_slice(*masks: np.ndarray) -> int:
    """The slice with the largest lung area.

    Args:
        masks: the true lung mask, or where it is not known those of all methods, of which the union
            counts; each of shape (slices, height, width).

    Returns:
        Its index, the first of equals.
    """
    union = np.any([mask > 0 for mask in masks], axis=0)
    return int(np.count_nonzero(union, axis=(1, 2)).argmax())


def stored_slice(title: str, scan: Path, masks: Mapping[str, Path], truth: Path) -> SegmentedSlice:
    """The fullest slice of a stored scan (see :func:`fullest_slice`) with its masks.

    Args:
        title: the slice's number is added to it.
        scan: file of the scan.
        masks: for each method the file of its mask; those that are not there are left out.
        truth: file of the true lung mask; it need not be there.

    Raises:
        FileNotFoundError: when there is no mask at all, or no scan.
    """
    volumes = {name: open_volume(path) for name, path in masks.items() if path.exists()}
    known = open_volume(truth) if truth.exists() else None
    if known is None and not volumes:
        raise FileNotFoundError(f"{title}: no mask of {', '.join(masks)} is stored")
    deciding = list(volumes.values()) if known is None else [known]
    place = fullest_slice(*(volume.load() for volume in deciding))
    return SegmentedSlice(
        f"{title}, slice\N{NO-BREAK SPACE}{place}",  # not torn apart at the end of a line
        open_volume(scan)[place],
        {name: volume[place] for name, volume in volumes.items()},
        None if known is None else known[place],
    )


@matplotlib.rc_context(STYLE)
def masked_comparison(cases: Sequence[SegmentedSlice]) -> Figure:
    """Slices as the classifier sees them, by each segmentation (SAM2CLIP2SAM, figure 3).

    Args:
        cases: one per row.

    Returns:
        Columns: the unsegmented slice, the slice multiplied with each method's mask, and the true
        outline where one is known. Pictures are cut to the lungs with a margin.

    Raises:
        ValueError: when there is no case, or a mask has another shape than its slice.
    """
    columns = [UNSEGMENTED, *_methods(cases), *_truth_column(cases)]
    return _comparison(cases, columns, masked=True)


@matplotlib.rc_context(STYLE)
def outline_comparison(cases: Sequence[SegmentedSlice]) -> Figure:
    """Slices with the outlines of each segmentation.

    Args:
        cases: one per row.

    Returns:
        Columns: the true outline where one is known, and each method's. Pictures are cut to the
        lungs with a margin.

    Raises:
        ValueError: when there is no case, or a mask has another shape than its slice.
    """
    columns = [*_truth_column(cases), *_methods(cases)]
    return _comparison(cases, columns, masked=False)


def _methods(cases: Sequence[SegmentedSlice]) -> list[str]:
    """Methods of all cases, in order of appearance."""
    return list(dict.fromkeys(method for case in cases for method in case.masks))


def _truth_column(cases: Sequence[SegmentedSlice]) -> list[str]:
    return [TRUE_OUTLINE] if any(case.truth is not None for case in cases) else []


def _comparison(cases: Sequence[SegmentedSlice], columns: Sequence[str], *, masked: bool) -> Figure:
    """A row per case and a picture per column; blank where a case lacks the column's mask."""
    cell = (PANEL_INCHES, PANEL_INCHES)
    figure, axes = grid(len(cases) * len(columns), max(1, len(columns)), cell=cell)
    drawn, places = set(), iter(axes)
    for row, case in enumerate(cases):
        view = _view(case)
        for column, name in enumerate(columns):
            axis = next(places)
            drawn |= _draw_column(axis, case, name, masked=masked)
            _frame(axis, *view)
            if row == 0:
                axis.set_title(wrapped(name.replace("_", " "), PANEL_INCHES))
            if column == 0:
                axis.set_ylabel(wrapped(case.title, PANEL_INCHES))
    outline_legend(figure, drawn)
    return figure


def _draw_column(
    axis: Axes, case: SegmentedSlice, name: str, *, masked: bool
) -> set[tuple[str, str]]:
    """Draw one picture; returns the names and colours of the outlines drawn."""
    if name == UNSEGMENTED:
        return draw_slice(axis, ExampleSlice("", case.voxels))
    mask = case.truth if name == TRUE_OUTLINE else case.masks.get(name)
    if mask is None or not mask.any():
        _note(axis, "not known" if mask is None else "empty mask")
    if mask is None:
        return draw_slice(axis, ExampleSlice("", np.zeros(case.voxels.shape, np.uint8)))
    if mask.shape != case.voxels.shape:
        raise ValueError(f"the mask has shape {mask.shape}, the slice {case.voxels.shape}")
    if masked and name != TRUE_OUTLINE:
        return draw_slice(
            axis, ExampleSlice("", to_grey(case.voxels) * (mask > 0).astype(np.uint8))
        )
    return draw_slice(axis, ExampleSlice("", case.voxels, mask))


def _note(axis: Axes, text: str) -> None:
    """A short remark in the middle of a picture."""
    axis.text(
        0.5, 0.5, text, transform=axis.transAxes, color="white", ha="center", va="center",
        bbox={"facecolor": "black", "linewidth": 0, "pad": 2},
    )  # fmt: skip


def _view(case: SegmentedSlice) -> tuple[tuple[float, float], tuple[float, float]]:
    """Columns and rows of a square around all masks of a case, the picture where they are empty."""
    known = [mask for mask in (case.truth, *case.masks.values()) if mask is not None]
    union = np.any([mask > 0 for mask in known] or [np.zeros(case.voxels.shape)], axis=0)
    if not union.any():
        union = np.ones(case.voxels.shape, bool)
    ends = [np.flatnonzero(union.any(axis=axis))[[0, -1]] for axis in (0, 1)]
    return _square(ends, margin=MARGIN)


def _square(
    ends: Sequence[tuple[int, int]], *, margin: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Limits of columns and rows of a square around first and last pixels, with a margin."""
    half = (0.5 + margin) * max(end - start + 1 for start, end in ends)
    return tuple(((start + end) / 2 - half, (start + end) / 2 + half) for start, end in ends)


def _frame(axis: Axes, columns: tuple[float, float], rows: tuple[float, float]) -> None:
    """Show a part of a picture, black beyond its border, without ticks but with labels."""
    axis.set_axis_on()
    axis.set(xlim=columns, ylim=rows[::-1], xticks=[], yticks=[], facecolor="black")
    axis.spines[:].set_visible(False)


@matplotlib.rc_context(STYLE)
def claim_figure(table: pd.DataFrame, *, title: str = "") -> Figure:
    """What SAM2CLIP2SAM claims about its masks, measured: each method with its intervals.

    Args:
        table: rows of one data set of ``lib.reporting.tables.segmentation_claim_table``.
        title: of the figure.

    Returns:
        Three panels with a row per method: mediastinum leakage, rim error, infected lung kept (all
        of it, ground glass and consolidation alone). Whiskers are 95 % intervals over patients; a
        cross at the left stands for a value that does not exist.

    Raises:
        ValueError: when the table holds no row.
    """
    if table.empty:
        raise ValueError("the claim needs a method with scores to show")
    height = 1.1 + 0.34 * len(table)
    figure, axes = panels(len(CLAIM_PANELS), size=(3.1, height))
    unit = ", ".join(dict.fromkeys(table["distance_unit"]))
    names = ["Mediastinum leakage (share of mask)", f"Rim error ({unit})", "Infected lung kept"]
    for axis, metrics, name in zip(axes, CLAIM_PANELS, names, strict=True):
        for number, (metric, marker) in enumerate(metrics.items()):
            lift = 0.22 * (number - (len(metrics) - 1) / 2)
            _draw_intervals(axis, table, metric, marker=marker, number=number, lift=lift)
        axis.set(xlabel=name, yticks=range(len(table)), ylim=(len(table) - 0.5, -0.5))
        axis.set_yticklabels(table["method"] if axis is axes[0] else [])
        axis.grid(axis="x", color="0.9", zorder=0)
        axis.locator_params(axis="x", nbins=4)  # more labels of small shares would overlap
    axes[0].set_xlim(left=min(0, axes[0].get_xlim()[0]))
    axes[1].axvline(0, color="0.4", linewidth=1, zorder=1)
    if title:
        figure.suptitle(title)
    legend_beside(figure, _claim_legend(CLAIM_PANELS[-1]))
    return figure


@matplotlib.rc_context(STYLE)
def ablation_figure(scores: pd.DataFrame) -> Figure:
    """Dice of every scan under every variant of a segmenter.

    Args:
        scores: columns ``variant`` and ``dice``, a row per variant and scan.

    Returns:
        One row of dots per variant, in order; the bar is their mean.

    Raises:
        ValueError: when there is no score.
    """
    if scores.empty:
        raise ValueError("an ablation needs scores to show")
    variants = list(dict.fromkeys(scores["variant"]))
    figure, (axis,) = panels(1, size=(5.6, 0.8 + 0.3 * len(variants)))
    for place, variant in enumerate(variants):
        values = scores.loc[scores["variant"] == variant, "dice"]
        axis.plot(values, np.full(len(values), place), "o", color=LINE_COLOURS[0], alpha=0.35,
                  markersize=4, markeredgewidth=0)  # fmt: skip
        axis.plot([values.mean()] * 2, [place - 0.35, place + 0.35], color="black", linewidth=2)
    axis.set(xlabel="Dice of both lungs, mean of a scan's slices", xlim=(-0.02, 1.02))
    axis.set(yticks=range(len(variants)), ylim=(len(variants) - 0.5, -0.5))
    axis.set_yticklabels(variants)
    axis.grid(axis="x", color="0.9", zorder=0)
    return figure


def _draw_intervals(
    axis: Axes, table: pd.DataFrame, metric: str, *, marker: str, number: int, lift: float
) -> None:
    """Dots with whiskers, one per row, lifted a little beside the other metrics of the panel."""
    places = np.arange(len(table)) + lift
    values = table[metric].to_numpy(np.float64)
    bounds = table[[metric + LOW, metric + HIGH]].to_numpy(np.float64)
    reach = np.abs(bounds - values[:, None]).T  # nan, no whisker, without an interval
    colour = LINE_COLOURS[number]
    axis.errorbar(
        values, places, xerr=reach, fmt=marker, color=colour, markersize=4.5, capsize=2.5,
        linewidth=1.2, zorder=3,
    )  # fmt: skip
    missing = places[np.isnan(values)]
    across = axis.get_yaxis_transform()
    axis.plot(np.full(len(missing), 0.02), missing, "x", color=colour, transform=across)


def _claim_legend(metrics: Mapping[str, str]) -> list[Line2D]:
    """The markers of the panel of infected lung; the first is that of the other panels too."""
    styles = {"linestyle": "none", "markersize": 4.5}
    return [
        Line2D([], [], marker=marker, color=LINE_COLOURS[number], label=heading(metric), **styles)
        for number, (metric, marker) in enumerate(metrics.items())
    ]


@matplotlib.rc_context(STYLE)
def journey_figure(
    grey: np.ndarray,
    masks: Sequence[np.ndarray],
    crops: Sequence[np.ndarray],
    similarities: Sequence[float],
    chosen: Sequence[int],
    boxes: np.ndarray,
    final: np.ndarray,
) -> Figure:
    """One slice's way through SAM2CLIP2SAM (section 3.1, equations 1 to 8).

    Args:
        grey: the slice, uint8, shape (height, width).
        masks: of segment everything, bool, shape (height, width) each (equation 1).
        crops: the regions that passed the area filter, uint8, two axes of any length (equation 2).
        similarities: of each crop to the sentences (equation 5), shape (crops,).
        chosen: indices of the crops kept as region of interest (equation 6).
        boxes: their boxes x0, y0, x1, y1 in pixels, shape (boxes, 4) (equation 7).
        final: the mask, 0, 1 right lung, 2 left lung, shape (height, width) (equation 8).

    Returns:
        From left to right: the slice, all masks in colours of their own, the crops most similar to
        the sentences first (the chosen ones framed, and shown whatever their place), the boxes, and
        the outlines of the final mask. What there is nothing of is said in its place.

    Raises:
        ValueError: when shapes or lengths do not fit each other.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    _check_journey(grey, [*masks, final], crops, similarities, chosen)
    figure = new_figure((JOURNEY_INCHES * 6, JOURNEY_INCHES * 1.25))
    parts = figure.add_gridspec(1, 5, width_ratios=(1, 1, 2, 1, 1))
    first, second, fourth, fifth = (figure.add_subplot(parts[k]) for k in (0, 1, 3, 4))
    third = figure.add_subfigure(parts[2])
    draw_slice(first, ExampleSlice("", grey))
    first.set_title("1  slice")

    _draw_masks(second, grey, masks)
    second.set_title(f"2  segment everything: {len(masks)}")

    _draw_crops(third, crops, np.asarray(similarities, np.float64), set(chosen))

    draw_slice(fourth, ExampleSlice("", grey))
    _draw_boxes(fourth, boxes)
    fourth.set_title(f"4  boxes as prompts: {len(boxes)}")

    outline_legend(figure, draw_slice(fifth, ExampleSlice("", grey, final)))
    fifth.set_title("5  final mask" if final.any() else "5  final mask: empty")
    return figure


def _check_journey(
    grey: np.ndarray,
    masks: Sequence[np.ndarray],
    crops: Sequence[np.ndarray],
    similarities: Sequence[float],
    chosen: Sequence[int],
) -> None:
    for mask in masks:
        if mask.shape != grey.shape:
            raise ValueError(f"the mask has shape {mask.shape}, the slice {grey.shape}")
    if len(similarities) != len(crops):
        raise ValueError(f"{len(crops)} crops have {len(similarities)} similarities")
    if not set(chosen) <= set(range(len(crops))):
        raise ValueError(f"chosen are indices of {len(crops)} crops, got {list(chosen)}")


def _draw_masks(axis: Axes, grey: np.ndarray, masks: Sequence[np.ndarray]) -> None:
    """All masks over the slice in distinct colours, small ones above large ones."""
    picture = np.repeat(grey[..., None] / 255.0, 3, axis=-1)
    for number, mask in enumerate(sorted(masks, key=np.count_nonzero, reverse=True)):
        colour = colorsys.hsv_to_rgb(number * GOLDEN_RATIO % 1, 0.85, 1.0)
        picture[mask] += MASK_OPACITY * (np.array(colour) - picture[mask])
    axis.imshow(picture, interpolation="nearest")
    axis.set_axis_off()


def _draw_crops(
    part: SubFigure, crops: Sequence[np.ndarray], similarities: np.ndarray, chosen: set[int]
) -> None:
    """A block of crops with their similarities under one title, each in a square of one size."""
    shown = _shown_crops(similarities, chosen)
    some = f"{len(shown)} of {len(crops)}" if len(shown) < len(crops) else str(len(crops))
    part.suptitle(f"3  crops by similarity to the sentences: {some}")
    axes = part.subplots(CROPS_SHOWN // CROP_COLUMNS, CROP_COLUMNS).ravel()
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    for axis, index in zip(axes, shown, strict=False):
        crop = crops[index]
        axis.imshow(crop, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        _frame(axis, *_square([(0, side - 1) for side in crop.shape[::-1]], margin=0.02))
        axis.set_title(f"{similarities[index]:.3f}", pad=2, fontsize=8)
        if index in chosen:
            axis.spines[:].set(visible=True, color=CHOSEN_COLOUR, linewidth=2.5)


def _shown_crops(similarities: np.ndarray, chosen: set[int]) -> list[int]:
    """Indices of the crops to show, most similar first; chosen ones are never left out."""
    order = np.argsort(-similarities, kind="stable").tolist()
    others = [index for index in order if index not in chosen]
    kept = {*chosen, *others[: max(0, CROPS_SHOWN - len(chosen))]}
    return [index for index in order if index in kept][:CROPS_SHOWN]


def _draw_boxes(axis: Axes, boxes: np.ndarray) -> None:
    """Boxes around the pixels that they name, over the slice."""
    for x0, y0, x1, y1 in boxes:
        frame = Rectangle(
            (x0 - 0.5, y0 - 0.5), x1 - x0 + 1, y1 - y0 + 1,
            fill=False, edgecolor=CHOSEN_COLOUR, linewidth=1.6,
        )  # fmt: skip
        axis.add_patch(frame)
    if not len(boxes):
        _note(axis, "no box")
