"""iCTCF (HUST-19): single slices of three classes, and whole patients (FACTS 7.5)."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from lib.data.datasets.folders import files_in, find_layout, read_split_lists, subfolders, unlisted
from lib.data.datasets.source import (
    COVID,
    NON_COVID,
    NON_INFORMATIVE,
    DataSet,
    Entry,
    ListingProblem,
    Reason,
    ScanSource,
)
from lib.data.splits import TEST, TRAIN

CLASS_FOLDERS = {"nCT": NON_COVID, "pCT": COVID, "NiCT": NON_INFORMATIVE}
SPLIT_LISTS = {TRAIN: "train_ictcf.txt", TEST: "test_ictcf.txt"}
_SLICE_NAME = re.compile(r"(?:\d_)?((?:nCT|pCT|NiCT)\d+)", re.IGNORECASE)
_PATIENT_FOLDER = re.compile(r"Patient[ _]?(\d+)", re.IGNORECASE)
_SERIES_SLICE = re.compile(r"IMG-(\d+)-\d+", re.IGNORECASE)


def find_ictcf(root: Path) -> Iterator[Entry]:
    """Slices of ``NiCT``, ``nCT`` and ``pCT``, and scans of ``Patient <n>/CT``.

    A slice does not tell its patient, so each counts as its own; a split that is not the published
    one cannot keep patients together. The published lists hold ``nCT`` and ``pCT`` only, about 400
    slices of these are in neither. Patients have no label: it is in the clinical table.
    """
    wanted = {name.lower() for name in CLASS_FOLDERS}
    folder = find_layout(root, wanted)
    splits = read_split_lists(SPLIT_LISTS, root, folder, key=_slice_id)
    found = {}
    for name, label in CLASS_FOLDERS.items():
        for picture in files_in(folder / name):
            scan_id = _slice_id(picture.name)
            if not _SLICE_NAME.fullmatch(picture.stem):
                yield ListingProblem(Reason.UNRECOGNISED, picture)
                continue
            found[scan_id] = label
            yield ScanSource(scan_id, scan_id, (picture,), label, splits.get(scan_id))
    two_classes = {scan_id for scan_id, label in found.items() if label != NON_INFORMATIVE}
    yield from unlisted(splits, two_classes, folder)
    for patient in subfolders(root):
        yield from _patient(patient)


def _slice_id(name: str) -> str:
    """``pCT1088`` from ``pCT1088.jpg`` or from the lists' ``2_pCT1088.jpg``."""
    return re.sub(r"^\d_", "", Path(name).stem)


def _patient(folder: Path) -> Iterator[Entry]:
    """One scan per series of ``Patient <n>/CT/IMG-<series>-<k>.jpg``."""
    number = _PATIENT_FOLDER.fullmatch(folder.name)
    if not number:
        return
    series = defaultdict(list)
    for picture in files_in(folder / "CT"):
        match = _SERIES_SLICE.fullmatch(picture.stem)
        series[match[1] if match else "0"].append(picture)
    if not series:
        yield ListingProblem(Reason.SCAN_WITHOUT_SLICES, folder)
    for name, pictures in series.items():
        patient_id = f"patient-{number[1]}"
        yield ScanSource(f"{patient_id}-series-{name}", patient_id, tuple(pictures))


ICTCF = DataSet(
    name="ictcf",
    title="iCTCF (HUST-19)",
    where="https://ngdc.cncb.ac.cn/ictcf/",
    licence="see its page",
    layout="NiCT, nCT, pCT (also below 'Original CT Scans') with *.jpg, or "
    "Patient <n>/CT/IMG-<series>-<k>.jpg",
    citation="Ning 2020",
    find=find_ictcf,
)
