"""COVID-SemiSeg: lung crops with one lesion class, from Inf-Net's repository."""

from collections.abc import Iterator
from pathlib import Path

from lib.data.datasets.folders import files_in, find_layout
from lib.data.datasets.source import COVID, DataSet, Entry, ListingProblem, Reason, ScanSource
from lib.data.scan import GROUND_GLASS_OPACITY
from lib.data.splits import TEST, TRAIN

PARTS = {
    TRAIN: Path("TrainingSet/LungInfection-Train/Doctor-label"),
    TEST: Path("TestingSet/LungInfection-Test"),
}


def find_covid_semiseg(root: Path) -> Iterator[Entry]:
    """Every picture as a scan of one slice; its patient is not stated, so each is its own.

    Read from ``Imgs`` and ``GT`` in the root (no split), or from the published tree, whose
    training part is numbered anew, so that the part is in the id.
    """
    folder = find_layout(root, {"imgs", "trainingset", "testingset"})
    yield from _part(folder, None)
    for split, part in PARTS.items():
        yield from _part(folder / part, split)


def _part(folder: Path, split: str | None) -> Iterator[Entry]:
    """Pictures of ``Imgs`` with the masks of the same name in ``GT``."""
    pictures = {file.stem: file for file in files_in(folder / "Imgs")}
    masks = {file.stem: file for file in files_in(folder / "GT")}
    for name, picture in pictures.items():
        if name not in masks:
            yield ListingProblem(Reason.SCAN_WITHOUT_MASK, picture)
        scan_id = f"{split or 'slice'}-{name}"
        mask = (masks[name],) if name in masks else None
        yield ScanSource(scan_id, scan_id, (picture,), COVID, split, lesion_mask=mask)
    for name in sorted(masks.keys() - pictures.keys()):
        yield ListingProblem(Reason.MASK_WITHOUT_SCAN, masks[name])


COVID_SEMISEG = DataSet(
    name="covid-semiseg",
    title="COVID-SemiSeg",
    where="https://github.com/DengPingFan/Inf-Net",
    licence="see its page",
    layout="Imgs/<k>.jpg with GT/<k>.png, in the root or in TrainingSet/LungInfection-Train/"
    "Doctor-label and TestingSet/LungInfection-Test",
    citation="Fan 2020",
    find=find_covid_semiseg,
    lesion_values={255: GROUND_GLASS_OPACITY},  # ground glass or consolidation, not told apart
    # Seen in the pictures: after swapping rows and columns the spine is below, the liver on the
    # left and the descending aorta on the right; a rotation by 90 degrees would mirror the patient.
    transposed=True,
)
