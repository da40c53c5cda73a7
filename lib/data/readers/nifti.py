"""NIfTI-1 and NIfTI-2 files, plain or gzipped (FACTS 7.2)."""

import gzip
import math
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.volumeutils import apply_read_scaling

from lib.data.readers.findings import Findings, faults_of
from lib.data.readers.geometry import in_convention
from lib.data.readers.intensities import as_intensities
from lib.data.scan import ScanError

GZIP_MAGIC = b"\x1f\x8b"


def read_nifti(
    files: list[Path], place: Path, findings: Findings
) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Read a NIfTI volume slab by slab, scaling each on its own, so that none is held twice.

    Args:
        files: one NIfTI file, plain or gzipped; more are refused.
        place: the folder to name when it holds more than one.
        findings: says whether it is a mask; takes up flags.

    Returns:
        Hounsfield units (int16), 8-bit grey values or labels (uint8), (slices, height, width) in
        the convention of `lib.data.scan`, and the spacing of slices, rows and columns in mm.

    Raises:
        ScanError: with one of `lib.data.readers.findings.REASONS`.
    """
    if len(files) > 1:
        raise ScanError("several volumes", place, f"{len(files)} NIfTI files")
    file = files[0]
    with faults_of(file), file.open("rb") as raw, closing(_plain(raw)) as stream:
        image = _nifti_image(stream)
        shape = _volume_shape(image.shape, file)
        scaled = (image.dataobj.slope, image.dataobj.inter) != (1, 0)
        pictures = image.get_data_dtype() == np.uint8 and not scaled
        dtype = np.uint8 if findings.labels or pictures else np.int16
        voxels, stored, spacing = in_convention(shape, image.affine, dtype, file)
        stream.seek(image.dataobj.offset)
        for index in range(shape[2]):
            stored[:, :, index] = as_intensities(_slab(stream, image, shape), file, findings)
        stream.read(1)  # only at its end does gzip compare the checksum
        if not image.header["sform_code"] and not image.header["qform_code"]:
            findings.flags.add("orientation assumed")
    return voxels, spacing


def _slab(stream: BinaryIO, image: nib.Nifti1Image, shape: tuple[int, int, int]) -> np.ndarray:
    """The next slab of a volume, scaled, with the first two axes of ``shape``."""
    dtype = image.get_data_dtype()
    content = stream.read(shape[0] * shape[1] * dtype.itemsize)
    values = np.frombuffer(content, dtype).reshape(shape[:2], order="F")  # fails on a short read
    slope, inter = np.float64(image.dataobj.slope), np.float64(image.dataobj.inter)
    return apply_read_scaling(values, slope, inter)


def _plain(raw: BinaryIO) -> BinaryIO:
    """The uncompressed content of an open NIfTI file."""
    compressed = raw.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if compressed else raw


def _nifti_image(stream: BinaryIO) -> nib.Nifti1Image:
    version_two = stream.read(8)[4:] == b"n+2\0"
    stream.seek(0)
    return (nib.Nifti2Image if version_two else nib.Nifti1Image).from_stream(stream)


def _volume_shape(shape: tuple[int, ...], file: Path) -> tuple[int, int, int]:
    if math.prod(shape[3:]) != 1:
        raise ScanError("4-D", file, f"the shape is {' x '.join(map(str, shape))}")
    return (*shape, 1)[:3] if len(shape) == 2 else shape[:3]
