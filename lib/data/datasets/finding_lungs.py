"""Kaggle's "Finding lungs in CT data": slices and volumes with lung masks (FACTS 7.6)."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from lib.data.datasets.folders import NIFTI, files_in, find_layout, stem
from lib.data.datasets.source import (
    ANY_NONZERO,
    DataSet,
    Entry,
    ListingProblem,
    Reason,
    ScanSource,
)
from lib.data.splits import TEST, TRAIN, VALIDATION

TRAIN_SHARE, VALIDATION_SHARE = 0.7, 0.1  # the rest is the test part
_SLICE_NAME = re.compile(r"ID_(\d{4})_Z_\d{4}")
_VOLUME_NAME = re.compile(r"IMG_(\d{4})")


def fixed_split(patient_id: str) -> str:
    """The study's own split of this data set, which was published without one.

    A patient's part follows from the SHA-256 of its id alone, so it is the same for everybody,
    whichever files are present: of the hash read as a fraction of 2^256, below 0.7 is train, below
    0.8 validation, the rest test.

    Args:
        patient_id: such as ``ID_0042``.
    """
    digest = hashlib.sha256(patient_id.encode()).digest()
    fraction = int.from_bytes(digest) / 2 ** (8 * len(digest))
    if fraction < TRAIN_SHARE:
        return TRAIN
    return VALIDATION if fraction < TRAIN_SHARE + VALIDATION_SHARE else TEST


def find_finding_lungs(root: Path) -> Iterator[Entry]:
    """Slices of ``2d_images`` with ``2d_masks``, volumes and masks of ``3d_images``.

    Whether ``IMG_0042`` and ``ID_0042`` are one patient is not stated; they are kept together.
    """
    folder = find_layout(root, {"2d_images", "3d_images"})
    slices = {file.stem: file for file in files_in(folder / "2d_images")}
    masks = {file.stem: file for file in files_in(folder / "2d_masks")}
    yield from _pairs(slices, masks, _SLICE_NAME)
    files = {stem(file): file for file in files_in(folder / "3d_images", NIFTI)}
    volumes = {name: file for name, file in files.items() if not name.startswith("MASK_")}
    volume_masks = {
        name.replace("MASK_", "IMG_"): file
        for name, file in files.items()
        if name.startswith("MASK_")
    }
    yield from _pairs(volumes, volume_masks, _VOLUME_NAME)


def _pairs(images: dict[str, Path], masks: dict[str, Path], pattern: re.Pattern) -> Iterator[Entry]:
    """Images with the masks of the same name."""
    for name, image in images.items():
        match = pattern.fullmatch(name)
        if not match:
            yield ListingProblem(Reason.UNRECOGNISED, image)
            continue
        if name not in masks:
            yield ListingProblem(Reason.SCAN_WITHOUT_MASK, image)
        patient_id = f"ID_{match[1]}"
        mask = (masks[name],) if name in masks else None
        yield ScanSource(name, patient_id, (image,), split=fixed_split(patient_id), lung_mask=mask)
    for name in sorted(masks.keys() - images.keys()):
        yield ListingProblem(Reason.MASK_WITHOUT_SCAN, masks[name])


FINDING_LUNGS = DataSet(
    name="finding-lungs",
    title="Finding lungs in CT data",
    where="https://www.kaggle.com/datasets/kmader/finding-lungs-in-ct-data",
    licence="see its page",
    layout="2d_images/ID_<4 digits>_Z_<4 digits>.tif with 2d_masks/ of the same names, and "
    "3d_images/IMG_<4 digits>.nii.gz with MASK_<4 digits>.nii.gz",
    citation="Mader 2017",
    find=find_finding_lungs,
    lung_values=ANY_NONZERO,  # 255 in the slices, not stated for the volumes
)
