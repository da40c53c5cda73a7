"""The study's own phantom data sets, as `lib.data.phantom` writes them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lib.data.datasets.folders import (
    has_slices,
    is_safe_id,
    parse_label,
    parse_split,
    read_table,
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
    listed = set()
    for source, row in read_table(table, IDENTITY):
        scan_id = row["scan_id"]
        listed.add(scan_id)
        if not is_safe_id(scan_id):
            raise DataSetProblem(f"{source}: scan_id may hold letters, digits and ._- only.")
        folder = root / "scans" / scan_id
        scan = _scan_in(folder)
        if scan is None:
            yield ListingProblem(Reason.LABEL_WITHOUT_SCAN, table, scan_id)
            continue
        yield ScanSource(
            scan_id=scan_id,
            patient_id=row["patient_id"],
            files=(scan,),
            label=parse_label(row["label"], source),
            split=parse_split(row["split"], source),
            lung_mask=_mask(folder / "lungs.nii.gz"),
            lesion_mask=_mask(folder / "lesions.nii.gz"),
            attributes={name: row[name] for name in row if name not in IDENTITY},
        )
    for folder in subfolders(root / "scans"):
        if folder.name not in listed:
            yield ListingProblem(Reason.SCAN_WITHOUT_LABEL, folder)


def _scan_in(folder: Path) -> Path | None:
    """The volume or the folder of 8-bit slices in the folder of a scan, or None."""
    volume, slices = folder / "scan.nii.gz", folder / "slices"
    if volume.is_file():
        return volume
    return slices if slices.is_dir() and has_slices(slices) else None


def _mask(file: Path) -> tuple[Path] | None:
    return (file,) if file.is_file() else None


PHANTOM = DataSet(
    name="phantom",
    title="thorax phantoms of this study",
    where="the first stage of the study, which generates it",
    licence="MIT, as this repository",
    layout="scans.csv, and scans/<scan_id>/ with scan.nii.gz or slices/<k>.jpg, and the masks "
    "lungs.nii.gz and lesions.nii.gz",
    citation="this study",
    find=find_phantoms,
    lung_values=(RIGHT_LUNG, LEFT_LUNG),
    lung_sides_known=True,
    lesion_values={
        GROUND_GLASS_OPACITY: GROUND_GLASS_OPACITY,
        CONSOLIDATION: CONSOLIDATION,
    },
)

# Another hospital: other patients, another scanner, two classes, JPEG slices. Stands in for iCTCF,
# which paper 002 fine-tunes on (its tables 8 and 9).
PHANTOM_8_BIT = replace(
    PHANTOM, name="phantom-8-bit", title="thorax phantoms of this study as 8-bit pictures"
)
