"""Figures 1, 2 and 6 of COVID-CT-Mask-Net: slices with their lesions, true and found.

Examples with masks, how many and how large lesions are, and what the lesion model finds under two
thresholds (Ter-Sarkisov 2022, 2 and 3.2.3). Which pictures are shown is a rule, see
`chosen_pictures`. Colours are those of `lib.reporting.pictures`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.transforms import Bbox
from torchvision.models.detection import MaskRCNN

from lib.data.pictures import CLASSES, REMAINING
from lib.data.scan import to_grey
from lib.data.splits import SPLITS, TRAIN
from lib.data.store import open_volume
from lib.reporting.pictures import LESION_OUTLINES, LINE_COLOURS, STYLE, grid
from lib.reporting.segmentation_cases import shown_part
from lib.reporting.segmentation_figures import choose_cases
from lib.segmentation import lesion_instances
from lib.segmentation.lesion_training import LesionSlice
from lib.segmentation.mask_rcnn import detections

CLASS_TITLES = {"control": "control", "pneumonia": "common pneumonia", "covid": "COVID-19"}
CASES = ("lowest", "median", "highest")  # of the lesion area of a patient's fullest slice
NMS_THRESHOLDS = (0.25, 0.75)  # of the RoI layers, figure 6
LESION_NAMES = {value: name for value, (name, _) in LESION_OUTLINES.items()}
COLOURS = {name: colour for name, colour in LESION_OUTLINES.values()} | {"lesion": LINE_COLOURS[4]}
CELL_INCHES = {"example": 1.55, "prediction": 2.9}
MOST_LESIONS = 10  # of a slice, told apart in figure 2
BINS = 16
FILLED = 0.45  # opacity of a lesion over its slice
WHITE = 255
TITLE_CHARACTERS = 20  # above a picture of figure 1
SCORE_POINTS, SCORE_CHARACTERS = 6, 4  # of a written score: font size, length
SCORE_GROUND = {"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 0.4}


@dataclass(frozen=True, eq=False)
class LesionPicture:
    """A slice with its lesions, true or found.

    Attributes:
        title: which it is.
        grey: uint8, shape (height, width).
        lesions: true lesion mask of the same shape, 1 ground-glass opacity and 2 consolidation;
            None where none is known.
        found: what a model finds, by the title of the setting.
    """

    title: str
    grey: np.ndarray
    lesions: np.ndarray | None
    found: Mapping[str, "Found"] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Found:
    """Lesions of one picture, best first.

    Attributes:
        names: class of each.
        boxes: x1, y1, x2, y2 in pixels, shape (lesions, 4).
        masks: bool, shape (lesions, height, width).
        scores: shape (lesions,); None for true lesions.
    """

    names: list[str]
    boxes: np.ndarray
    masks: np.ndarray
    scores: np.ndarray | None = None


# -------------------------------------------------------------------------- which and from where


def chosen_pictures(pictures: pd.DataFrame) -> pd.DataFrame:
    """Pictures to be shown, by a rule: of each class three patients of the test part.

    Every patient stands for one picture: that with the most lesion, and of equals, as in controls,
    the middle one of the first scan. By its lesion area the lowest, the median and the highest
    patient are taken (of equals in the order of the pictures' names). Without a test part all
    pictures that have a class count.

    Args:
        pictures: of `lib.data.pictures.read_pictures`.

    Returns:
        Rows of it with the column ``case`` (of `CASES`), classes last to first, fewer than three
        where there are fewer patients.
    """
    part = shown_part(pictures[pictures["label"] != ""])
    part = part.assign(area=pd.to_numeric(part["lesion_pixels"], errors="coerce").fillna(0))
    rows = []
    for label in reversed(CLASSES):
        of_class = part[part["label"] == label]
        fullest = [_fullest(rows) for _, rows in of_class.groupby("patient_id")]
        by_name = pd.DataFrame(fullest, columns=part.columns).set_index("image_id", drop=False)
        cases = choose_cases(by_name["area"].astype(float))
        rows += [
            by_name.loc[cases[case]].drop("area").to_dict() | {"case": case}
            for case in CASES
            if case in cases
        ]
    return pd.DataFrame(rows, columns=[*pictures.columns, "case"])


def _fullest(rows: pd.DataFrame) -> pd.Series:
    """A patient's picture with the most lesion, of equals the middle one of the first scan."""
    equals = rows[rows["area"] == rows["area"].max()].sort_values(["scan_id", "slice"])
    first = equals[equals["scan_id"] == equals["scan_id"].iloc[0]]
    return first.iloc[len(first) // 2]


def stored_picture(row: Mapping[str, object], prepared: Path) -> LesionPicture:
    """A picture of the list with its true lesions, from the store.

    Args:
        row: image_id, scan_id, slice, label.
        prepared: folder of the data set, with ``scans`` and perhaps ``lesions``.
    """
    index, file = int(row["slice"]), f"{row['scan_id']}.b2nd"
    mask = prepared / "lesions" / file
    return LesionPicture(
        f"{CLASS_TITLES[row['label']]}\n{_shortened(row['image_id'])}",
        to_grey(open_volume(prepared / "scans" / file)[index]),
        open_volume(mask)[index] if mask.is_file() else None,
    )


def _shortened(name: str) -> str:
    """A name that fits above a picture; of a longer one both ends."""
    half = TITLE_CHARACTERS // 2
    return name if len(name) <= TITLE_CHARACTERS else f"{name[: half - 1]}...{name[2 - half :]}"


def true_lesions(mask: np.ndarray, *, mask_type: str = "both") -> Found:
    """The lesions of a mask one by one, see `lib.segmentation.lesion_instances`."""
    instances = lesion_instances.lesion_instances(mask, mask_type=mask_type)
    return Found(
        _names(instances.labels, mask_type),
        instances.boxes.numpy(),
        instances.masks.numpy().astype(bool),
    )


def predicted_picture(
    model: MaskRCNN,
    picture: LesionPicture,
    *,
    mask_type: str = "both",
    thresholds: Sequence[float] = NMS_THRESHOLDS,
) -> LesionPicture:
    """A picture with what the lesion model finds in it under some thresholds.

    Args:
        model: the lesion model.
        picture: the picture.
        mask_type: that it was trained on, which names its classes.
        thresholds: IoU of two boxes of one class from which on the RoI layers drop the weaker.

    Returns:
        The picture with `found` filled in.
    """
    device = next(model.parameters()).device
    tensor = torch.from_numpy(picture.grey).to(device) / WHITE
    found = {}
    for threshold in thresholds:
        (one,) = detections(model, [tensor], nms_threshold=threshold)
        boxes, masks, scores = (part.cpu().numpy() for part in (one.boxes, one.masks, one.scores))
        names = _names(one.labels, mask_type)
        found[f"RoI NMS {threshold:g}"] = Found(names, boxes, masks, scores)
    return LesionPicture(picture.title, picture.grey, picture.lesions, found)


def precision_pictures(
    model: MaskRCNN,
    slices: Sequence[LesionSlice],
    precisions: Sequence[float],
    *,
    mask_type: str = "both",
    shares: Sequence[float] = (0, 0.33, 0.67, 1),
) -> list[LesionPicture]:
    """Slices of the lowest precision, in between and of the highest, with what is found in them.

    Args:
        model: the lesion model.
        slices: those that were scored.
        precisions: average precision at an IoU of 0.5 of each, 0 to 1.
        mask_type: that the model was trained on.
        shares: which places of the ranking are shown, 0 the lowest, 1 the highest; of equals the
            first comes first.

    Returns:
        As `predicted_picture`, one for each share.
    """
    ranked = np.argsort(precisions, kind="stable")
    chosen = [int(ranked[round(share * (len(ranked) - 1))]) for share in shares]
    return [
        predicted_picture(
            model,
            LesionPicture(
                f"{slices[place].image_id}\nAP@0.5 {precisions[place]:.2f}",
                slices[place].picture,
                slices[place].mask,
            ),
            mask_type=mask_type,
        )
        for place in chosen
    ]


def _names(labels: torch.Tensor, mask_type: str) -> list[str]:
    """Names of classes that count from 1."""
    return [lesion_instances.CLASSES[mask_type][label - 1] for label in labels.tolist()]


# ------------------------------------------------------------------------------------- figure 1


@matplotlib.rc_context(STYLE)
def example_figure(examples: Sequence[Sequence[LesionPicture]]) -> Figure:
    """Pictures and their masks side by side, a row for each class (figure 1).

    Args:
        examples: the pictures of each row; rows may differ in length.

    Raises:
        ValueError: when there is none, or a mask has another shape than its picture.
    """
    columns = 2 * max((len(row) for row in examples), default=0)
    size = CELL_INCHES["example"]
    figure, axes = grid(columns * len(examples), max(1, columns), cell=(size, size + 0.35))
    for axis in axes:
        axis.set_axis_off()
    for number, row in enumerate(examples):
        start = number * columns
        for place, picture in enumerate(row):
            beside = axes[start + 2 * place : start + 2 * place + 2]
            _draw_example(*beside, picture)
    _lesion_legend(figure, list(LESION_NAMES.values()))
    return figure


def _draw_example(left: Axes, right: Axes, picture: LesionPicture) -> None:
    """A slice and its mask."""
    _draw_grey(left, picture.grey)
    left.set_title(picture.title, loc="left", fontsize=8)
    if picture.lesions is None:
        right.text(0.5, 0.5, "no mask known", ha="center", va="center", fontsize=8)
        return
    if picture.lesions.shape != picture.grey.shape:
        raise ValueError(
            f"the mask has shape {picture.lesions.shape}, the picture {picture.grey.shape}"
        )
    share = 100 * np.count_nonzero(picture.lesions) / picture.lesions.size
    right.imshow(mask_colours(picture.lesions), interpolation="nearest")
    right.set_title(f"\n{share:.2g} % lesion", loc="left", fontsize=8)


def mask_colours(mask: np.ndarray) -> np.ndarray:
    """A lesion mask as a picture, black where there is no lesion.

    Args:
        mask: 0 none, 1 ground-glass opacity, 2 consolidation, shape (height, width).

    Returns:
        Colours 0 to 1, shape (height, width, 3).
    """
    colours = np.zeros((max(LESION_OUTLINES) + 1, 3))
    for value, (_, colour) in LESION_OUTLINES.items():
        colours[value] = to_rgb(colour)
    return colours[mask]


def _draw_grey(axis: Axes, grey: np.ndarray) -> None:
    axis.imshow(grey, cmap="gray", vmin=0, vmax=WHITE, interpolation="nearest")
    axis.set_axis_off()


def _lesion_legend(figure: Figure, names: Sequence[str]) -> None:
    """Colours of classes, below all."""
    handles = [Patch(facecolor=COLOURS[name], edgecolor="0.15", label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


# ------------------------------------------------------------------------------------- figure 2


def lesion_table(pictures: pd.DataFrame, lesions: Path, *, ignored_area: float = 0) -> pd.DataFrame:
    """Every lesion of the pictures that have some.

    Args:
        pictures: of `lib.data.pictures.read_pictures`.
        lesions: folder of the lesion masks.
        ignored_area: see `lib.segmentation.lesion_instances`.

    Returns:
        One row per lesion: image_id, split, lesion (its class), share (of the picture's pixels).
        What a sample of the training part leaves over counts to it: lesion models learn there.
    """
    pictures = pictures.assign(split=pictures["split"].replace(REMAINING, TRAIN))
    areas = pd.to_numeric(pictures["lesion_pixels"], errors="coerce").fillna(0)
    some = pictures[(areas > 0) & pictures["split"].isin(SPLITS)]
    rows = []
    for scan_id, of_scan in some.groupby("scan_id"):
        volume = open_volume(lesions / f"{scan_id}.b2nd")
        for row in of_scan.itertuples():
            mask = volume[int(row.slice)]
            found = lesion_instances.lesion_instances(mask, ignored_area=ignored_area)
            names = _names(found.labels, "both")
            shares = found.masks.sum((1, 2)).double() / mask.size
            rows += [
                (row.image_id, row.split, name, share)
                for name, share in zip(names, shares.tolist(), strict=True)
            ]
    return pd.DataFrame(rows, columns=["image_id", "split", "lesion", "share"])


def slice_table(lesions: pd.DataFrame) -> pd.DataFrame:
    """What each picture holds of each class.

    Args:
        lesions: of `lesion_table`.

    Returns:
        One row per picture and class, those of which it has none included: image_id, split, lesion,
        count (of lesions), share (of the picture's pixels).
    """
    grouped = lesions.groupby(["image_id", "lesion"])["share"].agg(["count", "sum"])
    every = pd.MultiIndex.from_product(
        [lesions["image_id"].unique(), LESION_NAMES.values()], names=["image_id", "lesion"]
    )
    table = grouped.reindex(every, fill_value=0).rename(columns={"sum": "share"}).reset_index()
    split = lesions.drop_duplicates("image_id").set_index("image_id")["split"]
    table.insert(1, "split", table["image_id"].map(split))
    return table


@matplotlib.rc_context(STYLE)
def statistics_figure(lesions: pd.DataFrame) -> Figure:
    """How many lesions a slice has, how large they are, and how much of the slice (figure 2).

    Args:
        lesions: of `lesion_table`.

    Returns:
        A row of three panels for each part. Areas and shares are on a logarithmic axis; slices
        without lesions are in none.

    Raises:
        ValueError: when there is no lesion.
    """
    if lesions.empty:
        raise ValueError("a figure of lesions needs a slice that has some")
    slices = slice_table(lesions)
    parts = [split for split in SPLITS if (lesions["split"] == split).any()]
    figure, axes = grid(3 * len(parts), 3, cell=(3.1, 2.2))
    areas, shares = (
        np.geomspace(values.min() * 0.99, values.max() * 1.01, BINS + 1)
        for values in (100 * lesions["share"], 100 * slices["share"][slices["share"] > 0])
    )
    for number, part in enumerate(parts):
        left, middle, right = axes[3 * number : 3 * number + 3]
        of_part = slices[slices["split"] == part]
        held = of_part[of_part["count"] > 0]
        one_by_one = lesions[lesions["split"] == part]
        _draw_counts(left, of_part)
        _draw_areas(middle, one_by_one, areas)
        _draw_areas(right, held, shares)
        shown = _counted(of_part["image_id"].nunique(), "slice", "slices")
        left.set_title(f"{part}: {shown}", loc="left")
        left.set(xlabel="Lesions in a slice", ylabel="Slices (%)")
        middle.set(xlabel="Area of a lesion (% of the slice)", ylabel="Lesions (%)")
        right.set(xlabel="All lesions of a class (% of the slice)", ylabel="Slices with some (%)")
    _lesion_legend(figure, list(LESION_NAMES.values()))
    return figure


def _draw_counts(axis: Axes, slices: pd.DataFrame) -> None:
    """Share of slices with 0, 1, 2, ... lesions of each class."""
    for number, name in enumerate(LESION_NAMES.values()):
        counts = slices.loc[slices["lesion"] == name, "count"].clip(upper=MOST_LESIONS)
        heights = 100 * counts.value_counts(normalize=True).sort_index()
        places = heights.index + 0.4 * (number - 0.5)
        axis.bar(places, heights, 0.4, color=COLOURS[name], edgecolor="0.15", linewidth=0.6)
    most = min(MOST_LESIONS, int(slices["count"].max()))
    labels = [f"{count}+" if count == MOST_LESIONS else str(count) for count in range(most + 1)]
    axis.set_xticks(range(most + 1), labels)
    _write_medians(axis, slices, "count", "{:g}")


def _draw_areas(axis: Axes, table: pd.DataFrame, edges: np.ndarray) -> None:
    """Histogram of the column share, in percent, of each class beside the other."""
    shares = [100 * table.loc[table["lesion"] == name, "share"] for name in LESION_NAMES.values()]
    weights = [np.full(len(values), 100 / max(1, len(values))) for values in shares]
    axis.hist(
        shares,
        edges,
        weights=weights,
        color=[COLOURS[name] for name in LESION_NAMES.values()],
        edgecolor="0.15",
        linewidth=0.6,
    )
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    _write_medians(axis, table.assign(share=100 * table["share"]), "share", "{:.2g}")


def _write_medians(axis: Axes, table: pd.DataFrame, column: str, form: str) -> None:
    """Median of each class, above the panel on the right."""
    medians = table.groupby("lesion")[column].median().reindex(LESION_NAMES.values())
    texts = [form.format(value) if np.isfinite(value) else "none" for value in medians]
    axis.set_title(f"medians {', '.join(texts)}", loc="right", fontsize=8, color="0.35")


# ------------------------------------------------------------------------------------- figure 6


@matplotlib.rc_context(STYLE)
def prediction_figure(pictures: Sequence[LesionPicture], *, mask_type: str = "both") -> Figure:
    """What the lesion model finds under each threshold, beside the truth (figure 6).

    A score is written where no other one stands, best first.

    Args:
        pictures: with the same settings in `found`, a row each.
        mask_type: of the model.

    Raises:
        ValueError: when there is no picture.
    """
    settings = list(pictures[0].found) if pictures else []
    size = CELL_INCHES["prediction"]
    columns = len(settings) + 1
    figure, axes = grid(columns * len(pictures), columns, cell=(size, size + 0.25))
    for number, picture in enumerate(pictures):
        *left, last = axes[number * columns : (number + 1) * columns]
        axes[number * columns].text(
            -0.03, 0.5, picture.title, rotation=90, ha="right", va="center", ma="center",
            transform=axes[number * columns].transAxes,
        )  # fmt: skip
        for axis, setting in zip(left, settings, strict=True):
            found = picture.found[setting]
            draw_lesions(axis, picture.grey, found)
            axis.set_title(f"{setting}: {_counted(len(found.names), 'box', 'boxes')}")
        _draw_truth(last, picture, mask_type)
    _lesion_legend(figure, list(lesion_instances.CLASSES[mask_type]))
    return figure


def _counted(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _draw_truth(axis: Axes, picture: LesionPicture, mask_type: str) -> None:
    """The true lesions, or that none are known."""
    if picture.lesions is None:
        _draw_grey(axis, picture.grey)
        axis.set_title("truth: not known")
        return
    truth = true_lesions(picture.lesions, mask_type=mask_type)
    draw_lesions(axis, picture.grey, truth)
    axis.set_title(f"truth: {_counted(len(truth.names), 'lesion', 'lesions')}")


def draw_lesions(axis: Axes, grey: np.ndarray, found: Found) -> None:
    """A slice with boxes, masks and scores of lesions, the best on top.

    Args:
        axis: where to draw.
        grey: uint8, shape (height, width).
        found: the lesions.
    """
    _draw_grey(axis, grey)
    overlay = np.zeros((*grey.shape, 4))
    for place in reversed(range(len(found.names))):
        colour = COLOURS[found.names[place]]
        overlay[found.masks[place]] = (*to_rgb(colour), FILLED)
        left, top, right, bottom = found.boxes[place]
        axis.add_patch(
            Rectangle(
                (left - 0.5, top - 0.5), right - left, bottom - top,
                fill=False, edgecolor=colour, linewidth=0.8,
            )
        )  # fmt: skip
    axis.imshow(overlay, interpolation="nearest")
    if found.scores is not None:
        _write_scores(axis, found)


def _write_scores(axis: Axes, found: Found) -> None:
    """Scores above their boxes, best first, but for those that would cover another one."""
    width = np.ptp(axis.get_xlim())
    pixels_per_point = 1.35 * width / (72 * CELL_INCHES["prediction"])
    high = 1.4 * SCORE_POINTS * pixels_per_point
    wide = 0.65 * SCORE_POINTS * SCORE_CHARACTERS * pixels_per_point
    written: list[Bbox] = []
    for name, box, score in zip(found.names, found.boxes, found.scores, strict=True):
        left, bottom = min(box[0], width - wide), max(box[1] - 1, high)
        place = Bbox.from_extents(left, bottom - high, left + wide, bottom)
        if not any(place.overlaps(other) for other in written):
            written.append(place)
            axis.text(
                left, bottom, f"{score:.2f}", color=COLOURS[name], fontsize=SCORE_POINTS,
                va="bottom", ha="left", clip_on=True, bbox=SCORE_GROUND,
            )  # fmt: skip
