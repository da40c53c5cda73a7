"""Which slices are pictures: judged by themselves, each with its class and its part.

COVID-CT-Mask-Net classifies single axial slices (paper 002, section 2; FACTS 5.2, 7.3): of patients
without infection every slice, of those with pneumonia or COVID-19 only slices that show it. It
learns from a small balanced sample of the training part; what that leaves over is a second test
part, of the same patients (its table 7).

``data/pictures/<data set>/pictures.csv`` lists *every* slice of every scan. Slices that nobody
judges by themselves have neither class nor part.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from lib.data.datasets import (
    COVID,
    LABELS,
    NON_COVID,
    ScanSource,
    covidx_name,
    read_name_list,
)
from lib.data.datasets.folders import find_file, find_layout
from lib.data.splits import SPLITS, TRAIN, VALIDATION
from lib.data.store import open_volume

REMAINING = "remaining"  # what a sample of the training part leaves over: patients of the sample
PARTS = (*SPLITS, REMAINING)
CONTROL = "control"
CLASSES = (CONTROL, "pneumonia", "covid")  # always in this order
TRAINING_LIST = "train_split_classification.txt"  # paper 002's 3,000 slices of COVIDx-CT

COLUMNS = ("image_id", "scan_id", "slice", "patient_id", "split", "label", "lesion_pixels")


def list_pictures(
    manifest: pd.DataFrame,
    sources: Mapping[str, ScanSource],
    *,
    data_set: str,
    raw: Path,
    lesions: Path,
    classes: Mapping[str, Collection[str]],
    per_class: int | None,
    seed: int,
) -> pd.DataFrame:
    """Every slice of a data set, with class and part where it is judged by itself.

    The parts are the published ones where there are lists (`PUBLISHED`), else those of the
    manifest, of whose training part a balanced sample is drawn.

    Args:
        manifest: of the prepared data set.
        sources: where its scans lie, by scan_id.
        data_set: its name.
        raw: its raw folder, in which the published lists are looked for.
        lesions: folder of the stored lesion masks.
        classes: for some of `CLASSES` the labels of data sets that belong to it.
        per_class: pictures of each class to train on where no list is published, see
            `draw_training`; None takes the whole training part.
        seed: of that draw.

    Returns:
        `COLUMNS`, in the order of the manifest and of the slices. ``lesion_pixels`` (Int64) is the
        area of ground-glass opacity and consolidation, missing where there is no mask.

    Raises:
        ValueError: in one sentence, for labels, lists or slices that do not fit together.
    """
    slices = every_slice(manifest, sources, lesions)
    classes_of_scans = class_of(slices["label"], classes)
    slices["label"] = classes_of_scans.where(judged(slices, classes_of_scans), "")
    parts = PUBLISHED[data_set](sources, raw) if data_set in PUBLISHED else {}
    if parts:
        slices["split"] = slices["image_id"].map(parts).fillna("")
    slices["split"] = slices["split"].where(slices["label"] != "", "")
    if not parts:
        slices["split"] = draw_training(slices, per_class=per_class, seed=seed)
    return slices[list(COLUMNS)]


def every_slice(
    manifest: pd.DataFrame, sources: Mapping[str, ScanSource], lesions: Path
) -> pd.DataFrame:
    """One row per stored slice, not yet judged.

    Args:
        manifest: of the prepared data set.
        sources: where its scans lie, by scan_id.
        lesions: folder of the stored lesion masks.

    Returns:
        `COLUMNS` with split and label of the scan, and ``single``: whether the slice was chosen by
        itself, as the only one of its scan or by a name of its own.

    Raises:
        ValueError: if a scan is not in the raw data set, or has another number of slices there or
            in its lesion mask.
    """
    rows = [row for scan in manifest.itertuples() for row in _slices_of(scan, sources, lesions)]
    table = pd.DataFrame(rows, columns=[*COLUMNS, "single"])
    return table.astype({"lesion_pixels": "Int64"})


def _slices_of(
    scan: tuple, sources: Mapping[str, ScanSource], lesions: Path
) -> Iterator[dict[str, object]]:
    """The rows of one scan of the manifest."""
    if scan.scan_id not in sources:
        raise ValueError(f"{scan.scan_id} is not in the raw data set: run the stage prepare again")
    names = published_names(sources[scan.scan_id])
    single = bool(names) or scan.slices == 1
    names = names or image_names(scan.scan_id, scan.slices)
    areas = lesion_areas(lesions / f"{scan.scan_id}.b2nd") or [None] * scan.slices
    if not len(names) == len(areas) == scan.slices:
        raise ValueError(
            f"{scan.scan_id} has {scan.slices} stored slices, but {len(names)} names and "
            f"{len(areas)} slices of its lesion mask: run the stage prepare again, without "
            "skipping slices"
        )
    for index, (name, area) in enumerate(zip(names, areas, strict=True)):
        yield {
            "image_id": name,
            "scan_id": scan.scan_id,
            "slice": index,
            "patient_id": scan.patient_id,
            "split": scan.split or "",
            "label": scan.label or "",
            "lesion_pixels": area,
            "single": single,
        }


def published_names(source: ScanSource) -> list[str]:
    """Names of slices that are published one by one: files ``<scan_id>_<number>`` of COVIDx-CT.

    Any other file name may tell who the patient is, and is not used.

    Args:
        source: the scan.

    Returns:
        Names without suffix in the order of the slices; empty where a file is named otherwise.
    """
    start = f"{source.scan_id}_"
    names = [file.stem for file in source.files]
    own = all(n.startswith(start) and n.removeprefix(start).isdecimal() for n in names)
    return names if own else []


def image_names(scan_id: str, slices: int) -> list[str]:
    """Names of slices that have none: the scan's own for a single one, else with its number."""
    return [scan_id] if slices == 1 else [f"{scan_id}_{index:04d}" for index in range(slices)]


def lesion_areas(mask: Path) -> list[int]:
    """Pixels of lesion in every slice of a stored lesion mask; empty where there is no mask."""
    if not mask.is_file():
        return []
    volume = open_volume(mask)
    return [int(np.count_nonzero(volume[index])) for index in range(len(volume))]


def class_of(labels: pd.Series, classes: Mapping[str, Collection[str]]) -> pd.Series:
    """Class of each label; empty for no label and for one that belongs to no class.

    Non-informative slices of iCTCF belong to no class, as in paper 002.

    Args:
        labels: of a data set, some of `LABELS` or empty.
        classes: for some of `CLASSES` the labels that belong to it.

    Raises:
        ValueError: for an unknown class or label, or a label of two classes.
    """
    pairs = [(label, name) for name, named in classes.items() for label in named]
    known = dict(pairs)
    if not set(classes) <= set(CLASSES):
        raise ValueError(f"classes are {', '.join(CLASSES)}, got {', '.join(classes)}")
    if len(known) < len(pairs):
        raise ValueError(f"a label belongs to one class only, got {dict(classes)}")
    unknown = sorted(({*known} | set(labels)) - {*LABELS, ""})
    if unknown:
        raise ValueError(f"labels are {', '.join(LABELS)}, got {unknown[0]!r}")
    return labels.map(known).fillna("")


def judged(slices: pd.DataFrame, classes: pd.Series) -> pd.Series:
    """Whether each slice has a class of its own, by COVIDx-CT's rule (FACTS 7.3).

    Of scans without infection every slice has; of the others each slice with a lesion. Where there
    is no lesion mask, only slices that were chosen by themselves have: of the slices of a whole
    scan nobody knows which show the disease.

    Args:
        slices: of `every_slice`.
        classes: class of the scan of each slice, empty for none.

    Returns:
        bool, one per row.
    """
    area = slices["lesion_pixels"]
    shows = area.fillna(0).gt(0) | (area.isna() & slices["single"])
    return (classes == CONTROL) | ((classes != "") & shows)


def draw_training(slices: pd.DataFrame, *, per_class: int | None, seed: int) -> pd.Series:
    """Parts with a balanced sample of the training part, the rest of which becomes `REMAINING`.

    Every picture of a class is as likely as any other, whoever its patient is: the published
    sample of 1000 per class spreads over as many patients as such a draw does (135, 247 and 225
    by one draw, 140, 252 and 216 published).

    Args:
        slices: with image_id, label and split, both empty for slices without a class.
        per_class: pictures of each class; fewer where the smallest class that occurs has fewer, so
            that the sample stays balanced. None takes all.
        seed: of the draw, which does not depend on the order of rows.

    Returns:
        The part of each row.

    Raises:
        ValueError: if ``per_class`` is not a positive number.
    """
    if per_class is not None and per_class < 1:
        raise ValueError(f"per_class is a positive number of pictures or null, got {per_class}")
    training = slices[slices["split"] == TRAIN]
    if per_class is None or training.empty:
        return slices["split"]
    count = min(per_class, training["label"].value_counts().min())
    generator = np.random.default_rng(seed)
    drawn: set[str] = set()
    for _, ids in training.groupby("label")["image_id"]:
        drawn.update(generator.permutation(np.sort(ids.to_numpy(str)))[:count].tolist())
    left_over = (slices["split"] == TRAIN) & ~slices["image_id"].isin(drawn)
    return slices["split"].mask(left_over, REMAINING)


def covidx_parts(sources: Mapping[str, ScanSource], raw: Path) -> dict[str, str]:
    """Part of each slice of COVIDx-CT: paper 002's list trains, the other 58,782 remain.

    Listed slices that the preparation left out are left out here; those that are not in the
    training part at all mean a wrong list.

    Args:
        sources: the scans, by scan_id.
        raw: the folder in which, or in ``splits/`` of which, the list is looked for.

    Returns:
        Name of the slice -> part; empty where there is no list.

    Raises:
        ValueError: for a name of another form, a name listed twice, or one that is no slice of
            the training part.
    """
    file = find_file(TRAINING_LIST, find_layout(raw, {TRAINING_LIST, "splits"}), raw)
    if file is None:
        return {}
    names = [Path(covidx_name(name)).stem for name in read_name_list(file)]
    parts = {f.stem: source.split for source in sources.values() for f in source.files}
    elsewhere = [name for name in names if parts.get(name) != TRAIN]
    if elsewhere:
        raise ValueError(
            f"{file} names {len(elsewhere)} slices that are not in the training part of the data "
            f"set, first {elsewhere[0]}"
        )
    listed = set(names)
    if len(listed) < len(names):
        raise ValueError(f"{file} names {len(names) - len(listed)} slices twice")
    return {
        name: REMAINING if part == TRAIN and name not in listed else part
        for name, part in parts.items()
    }


def ictcf_parts(sources: Mapping[str, ScanSource], raw: Path) -> dict[str, str]:
    """Part of each slice of iCTCF: paper 002's lists, the about 400 in neither validate.

    The manifest cuts a validation part out of the training list, as of every data set published
    without one; here that is not needed. Slices do not tell their patient, so that parts may share
    some (FACTS 7.5).

    Args:
        sources: the slices, by scan_id, with their published split.
        raw: not used.

    Returns:
        Name of the slice -> part; empty where there are no lists.
    """
    if all(source.split is None for source in sources.values()):
        return {}
    two_classes = (s for s in sources.values() if s.label in (COVID, NON_COVID))
    return {source.scan_id: source.split or VALIDATION for source in two_classes}


# Data sets whose pictures are divided by published lists.
PUBLISHED: dict[str, Callable[[Mapping[str, ScanSource], Path], dict[str, str]]] = {
    "covidx-ct": covidx_parts,
    "ictcf": ictcf_parts,
}


def read_pictures(folder: Path) -> pd.DataFrame:
    """The list of pictures of a data set; text columns as text, empty cells as ``""``.

    Args:
        folder: ``data/pictures/<data set>``.

    Returns:
        `COLUMNS`; ``slice`` int64, ``lesion_pixels`` Int64.

    Raises:
        FileNotFoundError: in one sentence, if the list was not made.
        ValueError: in one sentence, for other columns, a part or class that is not known, a class
            without a part, or a slice listed twice.
    """
    path = folder / "pictures.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: run the stage list_pictures@{folder.name}")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if list(table.columns) != list(COLUMNS):
        raise ValueError(f"{path} has the columns {', '.join(table)}, not {', '.join(COLUMNS)}")
    numbers = {name: pd.to_numeric(table[name]) for name in ("slice", "lesion_pixels")}
    table = table.assign(**numbers).astype({"slice": "int64", "lesion_pixels": "Int64"})
    _check_rows(table, path)
    return table


def _check_rows(table: pd.DataFrame, path: Path) -> None:
    """Raise ValueError with the first picture at fault."""
    faults = {
        f"its part is none of {', '.join(PARTS)}": ~table["split"].isin([*PARTS, ""]),
        f"its class is none of {', '.join(CLASSES)}": ~table["label"].isin([*CLASSES, ""]),
        "it has a class or a part but not both": (table["split"] == "") != (table["label"] == ""),
        "it is listed twice": table.duplicated("image_id") | table.duplicated(["scan_id", "slice"]),
    }
    for fault, rows in faults.items():
        if rows.any():
            raise ValueError(f"{path}: {table.loc[rows, 'image_id'].iloc[0]}: {fault}")
