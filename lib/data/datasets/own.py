"""A user's own scans: a table, or one folder per label."""

from collections.abc import Iterator
from pathlib import Path

from lib.data.datasets.folders import (
    NIFTI,
    PICTURES,
    files_in,
    inside,
    parse_label,
    parse_split,
    pseudonym,
    read_table,
    subfolders,
)
from lib.data.datasets.source import (
    ANY_NONZERO,
    DataSet,
    DataSetProblem,
    Entry,
    ListingProblem,
    Reason,
    ScanSource,
)
from lib.data.scan import CONSOLIDATION, GROUND_GLASS_OPACITY

SCAN_FILES = (*NIFTI, *PICTURES, ".dcm")  # those that `lib.data.readers` knows


def find_own(root: Path) -> Iterator[Entry]:
    """Scans of ``scans.csv`` where there is one, else of ``<label>/<file or folder>``.

    Names of files and folders may be names of patients: ids are `pseudonym` of them, and messages
    give a line of the table instead.
    """
    table = root / "scans.csv"
    yield from _from_table(root, table) if table.is_file() else _from_folders(root)


def _from_table(root: Path, table: Path) -> Iterator[Entry]:
    """Scans of the columns path, label and, where given, scan_id, patient_id, split and masks."""
    line_of: dict[str, str] = {}
    for source, row in read_table(table, ("path", "label")):
        name = row.get("scan_id") or row["path"]
        first = line_of.setdefault(name, source)
        if first != source:
            raise DataSetProblem(f"{source}: the scan of {first} again.")
        file = inside(root, row["path"], source)
        label, split = parse_label(row["label"], source), parse_split(row.get("split", ""), source)
        masks = {
            c: inside(root, row[c], source) for c in ("lung_mask", "lesion_mask") if row.get(c)
        }
        yield from (
            ListingProblem(Reason.FILE_MISSING, table, f"{source}, {column}")
            for column, path in {"path": file, **masks}.items()
            if not path.exists()
        )
        if file.exists():
            present = {column: (path,) for column, path in masks.items() if path.exists()}
            yield ScanSource(
                *_ids(name, row.get("patient_id", "")), (file,), label, split, **present
            )


def _from_folders(root: Path) -> Iterator[Entry]:
    """Scans of one folder per label; a scan is a file or a folder of slices."""
    for folder in subfolders(root):
        label = parse_label(folder.name, f"folder {folder}")
        for scan in (*subfolders(folder), *files_in(folder, SCAN_FILES)):
            yield ScanSource(*_ids(f"{folder.name}/{scan.name}", ""), (scan,), label)


def _ids(scan: str, patient: str) -> tuple[str, str]:
    """Pseudonymous scan and patient id; a scan without a named patient is a patient of its own."""
    return f"scan-{pseudonym(scan)}", f"patient-{pseudonym(patient or scan)}"


OWN = DataSet(
    name="own",
    title="your own scans",
    where="your own archive",
    licence="yours",
    layout="scans.csv with the columns path, label and optionally scan_id, patient_id, split, "
    "lung_mask, lesion_mask; or <label>/<scan>",
    citation="your own",
    find=find_own,
    lung_values=ANY_NONZERO,
    lesion_values={
        GROUND_GLASS_OPACITY: GROUND_GLASS_OPACITY,
        CONSOLIDATION: CONSOLIDATION,
    },
)
