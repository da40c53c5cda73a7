"""COVIDx-CT version 1: a flat folder of PNG slices and three lists (FACTS 7.3)."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lib.data.datasets.folders import entries, find_file, find_layout, read_text, subfolders
from lib.data.datasets.source import (
    COVID,
    NORMAL,
    PNEUMONIA,
    DataSet,
    DataSetProblem,
    Entry,
    ListingProblem,
    Reason,
    ScanSource,
)
from lib.data.splits import TEST, TRAIN, VALIDATION

SPLIT_LISTS = {
    TRAIN: "train_COVIDx_CT-1.txt",
    VALIDATION: "val_COVIDx_CT-1.txt",
    TEST: "test_COVIDx_CT-1.txt",
}
CLASSES = {"Normal": (0, NORMAL), "CP": (1, PNEUMONIA), "NCP": (2, COVID)}  # prefix: number, label
_LINE = re.compile(r"(((Normal|CP|NCP)_\d+)_\d+)_(\d+)\.png ([012]) (\d+) (\d+) (\d+) (\d+)")
_MASK_NET_NAME = re.compile(r"([012])_(\d+_\d+_\d+\.png)")


class ListedSlice(NamedTuple):
    """One line of a COVIDx-CT list.

    Attributes:
        name: file name, ``{Normal|CP|NCP}_<patient>_<scan>_<slice>.png``.
        scan_id: ``{Normal|CP|NCP}_<patient>_<scan>``.
        patient_id: ``{Normal|CP|NCP}_<patient>``.
        label: normal, pneumonia or covid.
        box: body box in pixels: left, top, right, bottom.
    """

    name: str
    scan_id: str
    patient_id: str
    label: str
    box: tuple[int, int, int, int]


def read_covidx_list(file: Path) -> list[ListedSlice]:
    """Slices of a list, in its order.

    Raises:
        DataSetProblem: for a line that is not ``name class xmin ymin xmax ymax`` of version 1, or
            whose class contradicts its name.
    """
    lines = read_text(file).splitlines()
    return [_parse_line(line, file, k) for k, line in enumerate(lines, start=1) if line.strip()]


def _parse_line(line: str, file: Path, number: int) -> ListedSlice:
    match = _LINE.fullmatch(line.strip())
    if not match:
        raise DataSetProblem(f"{file}, line {number}: not 'name class xmin ymin xmax ymax'.")
    scan_id, patient_id, prefix, index, stated, *box = match.groups()
    class_number, label = CLASSES[prefix]
    if int(stated) != class_number:
        raise DataSetProblem(f"{file}, line {number}: {prefix} is class {class_number}.")
    return ListedSlice(f"{scan_id}_{index}.png", scan_id, patient_id, label, tuple(map(int, box)))


def covidx_name(mask_net_name: str) -> str:
    """COVIDx-CT's name of a slice in paper 002's lists (``{0|1|2}_<patient>_<scan>_<slice>.png``).

    Raises:
        ValueError: for any other name.
    """
    match = _MASK_NET_NAME.fullmatch(mask_net_name)
    if not match:
        raise ValueError(f"{mask_net_name!r} is not <class>_<patient>_<scan>_<slice>.png")
    return f"{list(CLASSES)[int(match[1])]}_{match[2]}"


def find_covidx_ct(root: Path) -> Iterator[Entry]:
    """Scans made of the listed slices, in the order of their numbers.

    The slices lie in the root or in one folder below it; the lists in the root or ``splits/``.

    Raises:
        DataSetProblem: for a damaged list, or a scan listed under two splits.
    """
    lists = find_layout(root, {*(name.lower() for name in SPLIT_LISTS.values()), "splits"})
    folder_of = _folder_of_names(root)
    split_of: dict[str, str] = {}
    for split, name in SPLIT_LISTS.items():
        file = find_file(name, lists, root)
        if file is None:
            yield ListingProblem(Reason.SPLIT_MISSING, root / name)
            continue
        for scan_id, slices in _by_scan(read_covidx_list(file)).items():
            if split_of.setdefault(scan_id, split) != split:
                raise DataSetProblem(f"{scan_id} is listed under {split_of[scan_id]} and {split}.")
            yield from _scan(scan_id, slices, split, folder_of, file)


def _by_scan(slices: list[ListedSlice]) -> dict[str, list[ListedSlice]]:
    """Slices of each scan, in the order of the slice numbers."""
    scans = defaultdict(list)
    for listed in sorted(slices, key=lambda s: (s.scan_id, len(s.name), s.name)):
        scans[listed.scan_id].append(listed)
    return scans


def _scan(
    scan_id: str, slices: list[ListedSlice], split: str, folder_of: dict[str, Path], file: Path
) -> Iterator[Entry]:
    """The scan of the slices present, preceded by a problem where some are not."""
    names = [listed.name for listed in slices]
    if len(set(names)) < len(names):
        raise DataSetProblem(f"{file} lists a slice of {scan_id} twice.")
    present = tuple(folder_of[name] / name for name in names if name in folder_of)
    if len(present) < len(names):
        detail = f"{len(names) - len(present)} of {len(names)} slices of {scan_id}"
        yield ListingProblem(Reason.FILE_MISSING, file, detail)
    if present:
        yield ScanSource(scan_id, slices[0].patient_id, present, slices[0].label, split)


def _folder_of_names(root: Path) -> dict[str, Path]:
    """Folder of every picture in the root and the folders in it, read without touching a file."""
    folders = [*reversed(subfolders(root)), root]  # where a name occurs twice, the root's counts
    return {e.name: folder for folder in folders for e in entries(folder) if e.name[-4:] == ".png"}


COVIDX_CT = DataSet(
    name="covidx-ct",
    title="COVIDx-CT (version 1)",
    where="https://www.kaggle.com/datasets/hgunraj/covidxct and, for the lists, "
    "https://github.com/haydengunraj/COVIDNet-CT",
    licence="see its page",
    layout="{train,val,test}_COVIDx_CT-1.txt and {Normal,CP,NCP}_<patient>_<scan>_<slice>.png",
    citation="Gunraj 2020",
    find=find_covidx_ct,
)
