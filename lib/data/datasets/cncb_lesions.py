"""CNCB lesion segmentation: 750 slices of 150 patients with COVID-19 (FACTS 7.4, 5.1)."""

import re
from collections.abc import Iterator
from pathlib import Path

from lib.data.datasets.folders import (
    files_in,
    find_layout,
    read_split_lists,
    subfolders,
    unlisted,
)
from lib.data.datasets.source import COVID, DataSet, Entry, ListingProblem, Reason, ScanSource
from lib.data.scan import CONSOLIDATION, GROUND_GLASS_OPACITY
from lib.data.splits import TEST, TRAIN

SPLIT_LISTS = {TRAIN: "train_split_segmentation.txt", TEST: "test_split_segmentation.txt"}
_SLICE_NAME = re.compile(r"(\d+)_\d+")


def find_cncb_lesions(root: Path) -> Iterator[Entry]:
    """Every slice as a scan of its own, paired with its mask by patient and slice number.

    The five slices of a patient are not neighbours, so that a volume made of them would show
    lesions and lungs touching that do not touch. The published lists never tear a patient apart.
    Read from ``image/<patient>/<slice>.jpg`` and ``mask/<patient>/<slice>.png``, or from paper
    002's flat ``imgs/<patient>_<slice>.jpg`` and ``masks/<patient>_<slice>.png``.
    """
    folder = find_layout(root, {"image", "imgs"})
    pictures = _by_slice(folder / "image") | _by_slice(folder / "imgs")
    masks = _by_slice(folder / "mask") | _by_slice(folder / "masks")
    splits = read_split_lists(SPLIT_LISTS, root, folder, key=lambda name: Path(name).stem)
    for scan_id, picture in pictures.items():
        match = _SLICE_NAME.fullmatch(scan_id)
        if not match:
            yield ListingProblem(Reason.UNRECOGNISED, picture)
            continue
        mask = (masks[scan_id],) if scan_id in masks else None
        if mask is None:
            yield ListingProblem(Reason.SCAN_WITHOUT_MASK, picture)
        yield ScanSource(
            scan_id, f"patient-{match[1]}", (picture,), COVID, splits.get(scan_id), mask, mask
        )
    for scan_id in sorted(masks.keys() - pictures.keys()):
        yield ListingProblem(Reason.MASK_WITHOUT_SCAN, masks[scan_id])
    yield from unlisted(splits, pictures.keys(), folder)


def _by_slice(folder: Path) -> dict[str, Path]:
    """Pictures by ``<patient>_<slice>``, from one folder per patient and from flat names."""
    nested = {f"{c.name}_{f.stem}": f for c in subfolders(folder) for f in files_in(c)}
    return nested | {file.stem: file for file in files_in(folder)}


CNCB_LESIONS = DataSet(
    name="cncb-lesions",
    title="CNCB lesion segmentation (CC-CCII)",
    where="http://ncov-ai.big.ac.cn/download",
    licence="see its page",
    layout="image/<patient>/<slice>.jpg with mask/<patient>/<slice>.png, or flat in imgs/ and "
    "masks/ as <patient>_<slice>",
    citation="Zhang 2020",
    find=find_cncb_lesions,
    lung_values=(1, 2, 3),  # 1 lung, 2 ground glass, 3 consolidation: lesions lie in the lung
    lesion_values={2: GROUND_GLASS_OPACITY, 3: CONSOLIDATION},
)
