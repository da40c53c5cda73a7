"""Geometry of a volume: from the axes of its file to the convention of `lib.data.scan`."""

import math
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from lib.data.scan import ScanError

LARGEST_SCAN = 2**31  # voxels: 8,192 slices of 512 x 512
LARGEST_TILT = math.radians(30)  # between slice normal and long axis of the body
LARGEST_PIXEL_RATIO = 2  # height to width; beyond, a volume has thick sagittal or coronal slices


def in_convention(
    shape: tuple[int, ...], affine: np.ndarray, dtype: type, place: Path
) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Make an empty volume in the convention, and a view of it in the order of the file.

    Args:
        shape: of the volume as stored.
        affine: (4, 4), from indices as stored to mm, axes of NIfTI (RAS).
        dtype: of the volume.
        place: file or folder to name in an error.

    Returns:
        The volume (slices, height, width), the view with ``shape``, the spacing in mm.
    """
    directions = affine[:3, :3]
    if not np.isfinite(affine).all() or abs(np.linalg.det(directions)) < np.finfo(np.float32).eps:
        raise ScanError("unusable geometry", place)
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt("IPL")
    )
    axes = turn[:, 0].astype(int)  # where each stored axis goes
    order = np.argsort(axes)  # which stored axis comes to slices, rows and columns
    check_axial(directions[:, order], place)
    check_size(shape, place)
    voxels = np.empty([shape[axis] for axis in order], dtype)
    flips = tuple(slice(None, None, int(step)) for step in turn[:, 1])
    spacing = nib.affines.voxel_sizes(affine)[order]
    return voxels, voxels.transpose(axes)[flips], tuple(map(float, spacing))


def check_axial(directions: np.ndarray, place: Path) -> None:
    """Refuse slices that are tilted too far, or whose pixels are plainly not those of an axial CT.

    Args:
        directions: (3, 3); columns are one step along slices, rows and columns in mm.
        place: file or folder to name in an error.
    """
    normal = np.cross(directions[:, 1], directions[:, 2])
    tilt = math.acos(min(1.0, abs(normal[2]) / np.linalg.norm(normal)))
    if tilt > LARGEST_TILT:
        raise ScanError("not axial", place, f"tilted by {math.degrees(tilt):.0f} degrees")
    pixel = np.linalg.norm(directions[:, 1:], axis=0)
    if pixel.max() > LARGEST_PIXEL_RATIO * pixel.min():
        raise ScanError("not axial", place, "pixels of axial slices would be far from square")


def check_size(shape: Sequence[int], place: Path) -> None:
    """Refuse a size that no scan has, before memory for it is asked for."""
    if math.prod(shape) > LARGEST_SCAN:
        raise ScanError("too large", place, f"{' x '.join(map(str, shape))} voxels")
    if math.prod(shape) < 1:
        raise ScanError("no readable slices", place)
