"""Writing a phantom data set in its raw layout.

``<root>/scans.csv`` holds the plan. ``<root>/scans/<scan_id>/`` holds one scan: ``scan.nii.gz``
(int16 HU) or, for 8-bit pictures, ``slices/<k>.jpg`` from the head down; beside it ``lungs.nii.gz``
and ``lesions.nii.gz`` (uint8).
"""

import gzip
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image

from lib.data.files import save_csv
from lib.data.phantom.drawing import make_phantom
from lib.data.phantom.plan import PhantomRecord
from lib.data.phantom.scanners import SCANNERS

JPEG_QUALITY = 92
GZIP_LEVEL = 1  # noise hardly compresses; higher levels only cost time


def write_plan(records: Sequence[PhantomRecord], root: Path | str) -> Path:
    """Write ``scans.csv``, one row per scan.

    Args:
        records: from `plan_phantoms`.
        root: of the data set, made if absent.

    Returns:
        The path of the file.
    """
    path = Path(root) / "scans.csv"
    save_csv(pd.DataFrame([asdict(record) for record in records]), path)
    return path


def record_text(record: PhantomRecord) -> tuple[str]:
    """All that a phantom depends on, as text, for ``map_scans``: its own record, no file."""
    return (json.dumps(asdict(record), sort_keys=True),)


def draw_phantom(
    record: PhantomRecord, path: Path, *, size: int, hounsfield: bool
) -> dict[str, Any]:
    """Draw one scan and write it in the raw layout; the work of ``map_scans`` with ``suffix=""``.

    The same record gives the same bytes.

    Args:
        record: from `plan_phantoms`.
        path: folder of this scan, new and empty.
        size: pixels per side.
        hounsfield: see `make_phantom`.

    Returns:
        Label, number of slices, and voxels of lung and lesion, for tables.
    """
    phantom = make_phantom(record, size=size, hounsfield=hounsfield)
    volumes = {"lungs": phantom.lungs, "lesions": phantom.lesions}
    if hounsfield:
        volumes["scan"] = phantom.scan.voxels
    else:
        _save_pictures(phantom.scan.voxels, path / "slices")
    for name, voxels in volumes.items():
        content = _nifti_bytes(
            voxels, phantom.scan.spacing_mm, SCANNERS[record.scanner].orientation
        )
        (path / f"{name}.nii.gz").write_bytes(content)
    return {
        "label": record.label,
        "slices": record.slices,
        "lung_voxels": int(np.count_nonzero(phantom.lungs)),
        "lesion_voxels": int(np.count_nonzero(phantom.lesions)),
    }


def _nifti_bytes(
    voxels: np.ndarray, spacing: tuple[float, float, float], orientation: str
) -> bytes:
    """A gzipped NIfTI file whose bytes depend on nothing else, axes in the given orientation."""
    affine = np.zeros((4, 4))
    # Our axes run to the feet, the back and the left; NIfTI's world to the right, front and head.
    affine[2, 0], affine[1, 1], affine[0, 2] = -np.array(spacing)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(voxels.shape) - 1) / 2)
    affine[3, 3] = 1.0
    image = nibabel.Nifti1Image(voxels, affine)
    change = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(orientation)))
    image = image.as_reoriented(change)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=GZIP_LEVEL, mtime=0)


def _save_pictures(voxels: np.ndarray, folder: Path) -> None:
    folder.mkdir()
    for index, picture in enumerate(voxels):
        Image.fromarray(picture).save(folder / f"{index}.jpg", quality=JPEG_QUALITY)
