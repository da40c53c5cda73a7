"""The study's own phantom data set, as `lib.data.phantom` writes it."""

from collections.abc import Iterator
from pathlib import Path

from lib.data.datasets.folders import (
    NIFTI,
    files_in,
    is_safe_id,
    parse_label,
    parse_split,
    read_table,
    stem,
    subfolders,
)
from lib.data.datasets.source import (
    DataSet,
    DataSetProblem,
    Entry,
    ListingProblem,
    Reason,
    ScanSource,
)
from lib.data.scan import CONSOLIDATION, GROUND_GLASS_OPACITY, LEFT_LUNG, RIGHT_LUNG

IDENTITY = ("scan_id", "patient_id", "label", "split")  # any other column is an attribute


def find_phantoms(root: Path) -> Iterator[Entry]:
    """Scans of ``scans.csv``, with their masks where there are any."""
    table = root / "scans.csv"
    if not table.is_file():
        return
    scans = _by_id(root / "scans")
    lungs, lesions = _by_id(root / "lungs"), _by_id(root / "lesions")
    listed = set()
    for source, row in read_table(table, IDENTITY):
        scan_id = row["scan_id"]
        listed.add(scan_id)
        if not is_safe_id(scan_id):
            raise DataSetProblem(f"{source}: scan_id may hold letters, digits and ._- only.")
        if scan_id not in scans:
            yield ListingProblem(Reason.LABEL_WITHOUT_SCAN, table, scan_id)
            continue
        yield ScanSource(
            scan_id=scan_id,
            patient_id=row["patient_id"],
            files=scans[scan_id],
            label=parse_label(row["label"], source),
            split=parse_split(row["split"], source),
            lung_mask=lungs.get(scan_id),
            lesion_mask=lesions.get(scan_id),
            attributes={name: row[name] for name in row if name not in IDENTITY},
        )
    for scan_id in sorted(scans.keys() - listed):
        yield ListingProblem(Reason.SCAN_WITHOUT_LABEL, *scans[scan_id])


def _by_id(folder: Path) -> dict[str, tuple[Path]]:
    """NIfTI files, and folders of 8-bit slices, by the scan's id."""
    return {stem(p): (p,) for p in files_in(folder, NIFTI)} | {
        p.name: (p,) for p in subfolders(folder)
    }


PHANTOM = DataSet(
    name="phantom",
    title="thorax phantoms of this study",
    where="the first stage of the study, which generates it",
    licence="MIT, as this repository",
    layout="scans.csv with scans/<scan_id>.nii.gz or scans/<scan_id>/<k>.jpg, and lungs/, lesions/",
    citation="this study",
    find=find_phantoms,
    lung_values=(RIGHT_LUNG, LEFT_LUNG),
    lung_sides_known=True,
    lesion_values={
        GROUND_GLASS_OPACITY: GROUND_GLASS_OPACITY,
        CONSOLIDATION: CONSOLIDATION,
    },
)
