"""Voxel values: whatever a decoder gives to Hounsfield units, 8-bit grey values or labels."""

from pathlib import Path

import numpy as np

from lib.data.readers.findings import Findings
from lib.data.scan import HOUNSFIELD_AIR, HOUNSFIELD_LOWEST, ScanError

INT16 = np.iinfo(np.int16)
AIR_AT_MOST = -500  # every chest CT holds darker voxels, in the lungs if not around the body
UNSIGNED_OFFSET = 1024
UNSIGNED_BONE = 1500  # an unsigned chest CT reaches beyond
UNSIGNED_AIR_AT_MOST = 300
UNSIGNED_TISSUE = (900, 1150)  # fat to muscle, -124 to 126 HU
UNSIGNED_FRACTION = 0.05  # of the voxels, at least, in air and in soft tissue each


def as_intensities(values: np.ndarray, file: Path, findings: Findings) -> np.ndarray:
    """One decoded slice as labels, as 8-bit grey values or as Hounsfield units."""
    if findings.labels:
        return _as_labels(values, file)
    return values if values.dtype == np.uint8 else as_hounsfield(values, file, findings)


def as_hounsfield(values: np.ndarray, file: Path, findings: Findings) -> np.ndarray:
    """Round and clip one slice of Hounsfield units to int16; padding becomes air."""
    if values.dtype.kind not in "iuf":
        raise ScanError("unsupported pixel type", file, f"pixels are {values.dtype}")
    if values.dtype.kind == "f":
        _check_finite(values, file)
        values = np.rint(values)
    if values.min() < HOUNSFIELD_LOWEST:
        findings.flags.add("padding")
        values = values.copy()
        np.copyto(values, HOUNSFIELD_AIR, where=values < HOUNSFIELD_LOWEST)
    if values.dtype == np.int16:
        return values
    return np.minimum(values, INT16.max).astype(np.int16)


def _as_labels(values: np.ndarray, file: Path) -> np.ndarray:
    """Labels of one slice as uint8, refused unless they fit exactly."""
    if values.dtype.kind not in "biuf":
        raise ScanError("not a label mask", file, f"pixels are {values.dtype}")
    if values.dtype.kind == "f":
        _check_finite(values, file)
    if values.min() < 0 or values.max() > np.iinfo(np.uint8).max:
        raise ScanError("not a label mask", file, "some labels are below 0 or above 255")
    labels = values.astype(np.uint8)
    if (labels != values).any():
        raise ScanError("not a label mask", file, "some labels are fractions")
    return labels


def _check_finite(values: np.ndarray, file: Path) -> None:
    if np.isnan(values).any():
        raise ScanError("NaN intensities", file)
    if np.isinf(values).any():
        raise ScanError("infinite intensities", file)


def check_hounsfield(voxels: np.ndarray, place: Path, findings: Findings) -> None:
    """Refuse a volume without air; mend, in place, one that plainly lacks the offset of -1024."""
    lowest, highest = int(voxels.min()), int(voxels.max())
    if lowest <= AIR_AT_MOST:
        return
    sample = voxels[:, ::4, ::4]
    tissue_low, tissue_high = UNSIGNED_TISSUE
    air = np.mean(sample <= UNSIGNED_AIR_AT_MOST)
    tissue = np.mean((sample >= tissue_low) & (sample <= tissue_high))
    if lowest < 0 or highest < UNSIGNED_BONE or min(air, tissue) < UNSIGNED_FRACTION:
        detail = f"intensities run from {lowest} to {highest}"
        raise ScanError("intensity not in Hounsfield units", place, detail)
    voxels -= UNSIGNED_OFFSET
    findings.flags.add("unsigned intensities, offset -1024 assumed")
