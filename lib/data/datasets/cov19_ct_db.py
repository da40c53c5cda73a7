"""COV19-CT-DB as handed out for the ICCV 2021 and the ECCV 2022 challenge (FACTS 7.1)."""

import re
from collections.abc import Iterator
from pathlib import Path

from lib.data.datasets.folders import (
    SPLIT_NAMES,
    find_file,
    find_layout,
    has_slices,
    read_table,
    safe_id,
    subfolders,
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
from lib.data.splits import TEST, TRAIN, VALIDATION

SEVERITIES = {"1": "mild", "2": "moderate", "3": "severe", "4": "critical"}
SEVERITY_TABLES = {
    TRAIN: "train_partition_covid_categories.csv",
    VALIDATION: "val_partition_covid_categories.csv",
}
# Seen in copies of the data set: non-covid and non_covid, ct_scan_12 and ct_scan12.
_CLASS_FOLDERS = {"covid": COVID, "noncovid": NON_COVID}
_TEST_SUBSET = re.compile(r"subset_?\d+", re.IGNORECASE)
_SCAN_NAME = re.compile(r"(?:test_)?ct_?scan_?(\d+)", re.IGNORECASE)


def find_cov19_ct_db(root: Path) -> Iterator[Entry]:
    """Scans of either edition; a scan is a folder of slices and its own patient.

    The data set does not tell which scans belong to one patient. A scan id is made of split, class
    and folder name, since numbers start at 0 in every class folder.
    """
    root = find_layout(root, SPLIT_NAMES)
    for folder in subfolders(root):
        split = SPLIT_NAMES.get(folder.name.lower())
        if split:
            yield from _scans_of_split(folder, split, _severity_table(split, root, folder))


def _scans_of_split(folder: Path, split: str, table: Path | None) -> Iterator[Entry]:
    """Scans of one split, then the severities that belong to no scan."""
    severities = _read_severities(table) if table else {}
    for scan, group, label in _scan_folders(folder, split):
        if group is None:
            yield ListingProblem(Reason.UNRECOGNISED, scan, "neither covid nor non-covid")
        elif not has_slices(scan):
            yield ListingProblem(Reason.SCAN_WITHOUT_SLICES, scan)
        else:
            severity = severities.pop(_scan_number(scan.name), None) if label == COVID else None
            scan_id = safe_id("-".join(filter(None, (split, group, scan.name))))
            attributes = {"severity": severity} if severity else {}
            yield ScanSource(scan_id, scan_id, (scan,), label, split, attributes=attributes)
    for number in severities:
        yield ListingProblem(Reason.LABEL_WITHOUT_SCAN, table, f"ct_scan_{number}")


def _scan_folders(folder: Path, split: str) -> Iterator[tuple[Path, str | None, str | None]]:
    """Each scan folder of a split with its group in the id and its label; group None: unknown."""
    for child in subfolders(folder):
        label = _CLASS_FOLDERS.get(re.sub(r"[-_ ]", "", child.name.lower()))
        if label:
            yield from ((scan, label, label) for scan in subfolders(child))
        elif _TEST_SUBSET.fullmatch(child.name):
            yield from ((scan, child.name.lower(), None) for scan in subfolders(child))
        else:
            yield child, "" if split == TEST else None, None


def _scan_number(name: str) -> str:
    """Number of a scan without leading zeros, or the name itself where it has none."""
    match = _SCAN_NAME.fullmatch(name)
    return str(int(match[1])) if match else name


def _severity_table(split: str, *folders: Path) -> Path | None:
    """The severity table of a split, which ECCV 2022 has for training and validation."""
    return find_file(SEVERITY_TABLES[split], *folders) if split in SEVERITY_TABLES else None


def _read_severities(table: Path) -> dict[str, str]:
    """Scan number -> severity."""
    severities: dict[str, str] = {}
    for source, row in read_table(table, ("Name", "Category"), delimiter=";"):
        number = _scan_number(row["Name"])
        if row["Category"] not in SEVERITIES:
            raise DataSetProblem(f"{source}: Category is {row['Category']!r}, expected 1 to 4.")
        if number in severities:
            raise DataSetProblem(f"{source}: the scan {row['Name']} is listed twice.")
        severities[number] = SEVERITIES[row["Category"]]
    return severities


COV19_CT_DB_2021 = DataSet(
    name="cov19-ct-db-2021",
    title="COV19-CT-DB (ICCV 2021)",
    where="https://mlearn.lincoln.ac.uk/mia-cov19d/ (by agreement with the organisers)",
    licence="by agreement, not redistributable",
    layout="{train,val}/{covid,non-covid}/ct_scan_<n>/<k>.jpg and test/subset<1-8>/<id>/<k>.jpg",
    citation="Kollias 2021",
    find=find_cov19_ct_db,
)
COV19_CT_DB_2022 = DataSet(
    name="cov19-ct-db-2022",
    title="COV19-CT-DB (ECCV 2022)",
    where="https://mlearn.lincoln.ac.uk/eccv-2022-ai-mia/ (by agreement with the organisers)",
    licence="by agreement, not redistributable",
    layout="{train,validation}/{covid,non-covid}/ct_scan_<n>/<k>.jpg, test/ct_scan_<n>/<k>.jpg and "
    "{train,val}_partition_covid_categories.csv",
    citation="Kollias 2022",
    find=find_cov19_ct_db,
)
