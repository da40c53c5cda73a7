"""MosMedData COVID19_1110, as NIfTI or as PNG slices (FACTS 7.2)."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lib.data.datasets.folders import (
    NIFTI,
    files_in,
    find_file,
    find_layout,
    has_slices,
    read_text,
    subfolders,
    unlisted,
)
from lib.data.datasets.source import (
    COVID,
    NON_COVID,
    DataSet,
    DataSetProblem,
    Entry,
    ListingProblem,
    Reason,
    ScanSource,
)
from lib.data.scan import GROUND_GLASS_OPACITY
from lib.data.splits import TEST, TRAIN

STUDY_NUMBERS = {  # severity class -> numbers of its studies
    "CT-0": range(1, 255),
    "CT-1": range(255, 939),
    "CT-2": range(939, 1064),
    "CT-3": range(1064, 1109),
    "CT-4": range(1109, 1111),
}
PUBLISHED_SPLITS = {  # two different splits of the same studies: most nii-test ids are in png-train
    "nii": {TRAIN: "nii_train.json", TEST: "nii_test.json"},
    "png": {TRAIN: "nii_png_train.json", TEST: "nii_png_test.json"},
}
_STUDY_NAME = re.compile(r"(?:study_)?(\d{1,4})(?:_mask)?(?:\.nii(?:\.gz)?)?", re.IGNORECASE)


def find_mosmed(root: Path, *, published_split: str = "nii") -> Iterator[Entry]:
    """Studies of the five severity classes; CT-0 is non-COVID, CT-1 to CT-4 are COVID.

    Args:
        root: holds ``CT-0`` to ``CT-4``, or ``studies/`` or ``COVID19_1110/studies/`` with them.
        published_split: ``"nii"`` (paper 000's and HKBU's) or ``"png"``; its two JSON files lie in
            the root or in ``splits/``.

    Raises:
        DataSetProblem: for an unknown split, or one whose files are damaged or incomplete.
    """
    studies = find_layout(root, {name.lower() for name in STUDY_NUMBERS}, depth=2)
    places = [folder for folder in (studies, *studies.parents) if folder.is_relative_to(root)]
    splits = _read_split(published_split, *places)
    masks = _masks(*places)
    found = set()
    for name, number, file in _studies(studies):
        found.add(_scan_id(number))
        if number not in STUDY_NUMBERS[name]:
            yield ListingProblem(Reason.WRONG_CLASS_FOLDER, file)
        if file.is_dir() and not has_slices(file):
            yield ListingProblem(Reason.SCAN_WITHOUT_SLICES, file)
        else:
            yield _source(name, _scan_id(number), file, splits, masks)
    if found and not splits:
        files = " and ".join(PUBLISHED_SPLITS[published_split].values())
        yield ListingProblem(Reason.SPLIT_MISSING, root, f"{files} of marsggbo/CovidNet3D")
    yield from unlisted(splits, found, studies)
    for scan_id in sorted(masks.keys() - found):
        yield ListingProblem(Reason.MASK_WITHOUT_SCAN, masks[scan_id])


def _source(
    name: str, scan_id: str, file: Path, splits: dict[str, str], masks: dict[str, Path]
) -> ScanSource:
    return ScanSource(
        scan_id=scan_id,
        patient_id=scan_id,  # 1110 studies of 1110 patients
        files=(file,),
        label=NON_COVID if name == "CT-0" else COVID,
        split=splits.get(scan_id),
        lesion_mask=(masks[scan_id],) if scan_id in masks else None,
        attributes={"severity": name},
    )


def _scan_id(number: int) -> str:
    return f"study_{number:04d}"


def _study_number(name: str) -> int | None:
    match = _STUDY_NAME.fullmatch(name)
    return int(match[1]) if match else None


def _numbered(paths: Iterable[Path]) -> dict[int, Path]:
    """Paths by the number of the study in their names; other names are left out."""
    numbered = ((_study_number(path.name), path) for path in paths)
    return {number: path for number, path in numbered if number is not None}


def _studies(root: Path) -> Iterator[tuple[str, int, Path]]:
    """Class, number and path of every study: its NIfTI file, else its folder of PNG slices."""
    for name in STUDY_NUMBERS:
        pictures = {n: _innermost(f) for n, f in _numbered(subfolders(root / name)).items()}
        files = pictures | _numbered(files_in(root / name, NIFTI))
        yield from ((name, number, files[number]) for number in sorted(files))


def _innermost(folder: Path) -> Path:
    """``<id>/<id>`` of the PNG variant, or ``<id>`` where the slices lie there."""
    inner = folder / folder.name
    return inner if inner.is_dir() else folder


def _masks(*folders: Path) -> dict[str, Path]:
    """Lesion masks by scan id, from every ``masks/`` in the folders."""
    files = [file for folder in folders for file in files_in(folder / "masks", NIFTI)]
    return {_scan_id(number): file for number, file in _numbered(files).items()}


def _read_split(published_split: str, *folders: Path) -> dict[str, str]:
    """Scan id -> split, from the two files of one published split; empty where both are absent."""
    if published_split not in PUBLISHED_SPLITS:
        known = " and ".join(PUBLISHED_SPLITS)
        raise DataSetProblem(f"published_split is {published_split!r}; MosMed has {known}.")
    names = PUBLISHED_SPLITS[published_split]
    found = {split: find_file(name, *folders) for split, name in names.items()}
    if not any(found.values()):
        return {}
    if not all(found.values()):
        raise DataSetProblem(f"MosMed's split needs both {' and '.join(names.values())}.")
    ids = {split: _read_study_list(file) for split, file in found.items()}
    if ids[TRAIN] & ids[TEST]:
        raise DataSetProblem(f"{' and '.join(names.values())} share studies, so are of two splits.")
    return {scan_id: split for split, listed in ids.items() for scan_id in listed}


def _read_study_list(file: Path) -> set[str]:
    """Scan ids of a JSON file ``{class: {study: {study: [files]}}}``."""
    try:
        listed = [study for studies in json.loads(read_text(file)).values() for study in studies]
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise DataSetProblem(f"{file} is not JSON of the form class, study, study.") from error
    numbers = [_study_number(str(study)) for study in listed]
    if None in numbers:
        raise DataSetProblem(f"{file} names a study that is not study_<number>.")
    return {_scan_id(number) for number in numbers}


MOSMED = DataSet(
    name="mosmed",
    title="MosMedData COVID19_1110",
    where="https://mosmed.ai/datasets/covid19_1110",
    licence="CC BY-NC-ND 3.0",
    layout="CT-0 to CT-4 with study_<4 digits>.nii.gz or <id>/<id>/<k>.png, and masks/",
    citation="Morozov 2020",
    find=find_mosmed,
    lesion_values={1: GROUND_GLASS_OPACITY},  # ground glass or consolidation, not told apart
)
