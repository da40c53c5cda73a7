"""Whole scans and masks: from the files of any format to voxels in one convention."""

from pathlib import Path

import numpy as np

from lib.data.readers.dicom import read_dicom
from lib.data.readers.files import Source, kind_of, source_files
from lib.data.readers.findings import Findings, skipping
from lib.data.readers.intensities import check_hounsfield
from lib.data.readers.nifti import read_nifti
from lib.data.readers.pictures import read_pictures, read_tiff
from lib.data.scan import Scan, ScanError

READERS = {"nifti": read_nifti, "dicom": read_dicom, "tiff": read_tiff, "picture": read_pictures}
"""The kinds of files, and for each what turns its files into voxels and spacing."""


def read_scan(source: Source, *, root: Path | None = None, skip_unreadable: bool = False) -> Scan:
    """Read one scan in the convention of `lib.data.scan`.

    Hounsfield units are rounded and clipped to int16; values below `HOUNSFIELD_LOWEST` lie outside
    the field of view and become air. Intensities without any air are refused, unless they are
    plainly a CT stored without its offset of -1024: nothing below 0, something above
    `UNSIGNED_BONE`, and both air near 0 and soft tissue near 1024.

    Args:
        source: a file (NIfTI, DICOM, TIFF of one or more pages, JPEG, PNG), a folder of slices, or
            the list of the files of one scan.
        root: the data folder; nothing outside it is read, links resolved.
        skip_unreadable: leave damaged slices of a folder out instead of raising.

    Returns:
        The scan: int16 Hounsfield units, or uint8 where the source is 8-bit.

    Raises:
        ScanError: with one of `REASONS`.
    """
    files = source_files(source, root=root)
    findings = Findings(skip_unreadable and len(files) > 1)
    place = _place(source)
    kind, files = _readable_files(files, place, findings)
    voxels, spacing = READERS[kind](files, place, findings)
    if voxels.dtype == np.int16:
        check_hounsfield(voxels, place, findings)
    return Scan(voxels, spacing, findings.as_flags())


def read_label_volume(source: Source, *, root: Path | None = None) -> np.ndarray:
    """Read a mask with the geometry handling of the scan that it belongs to.

    Args:
        source: a NIfTI, TIFF, PNG or JPEG file, a folder or a list of pictures. Palette pictures
            give their palette indices; of mixed sizes, the unusual ones are resized (nearest).
        root: the data folder; nothing outside it is read, links resolved.

    Returns:
        uint8, shape (slices, height, width), labels exactly as stored.

    Raises:
        ScanError: with one of `REASONS`.
    """
    files = source_files(source, root=root)
    findings, place = Findings(labels=True), _place(source)
    kind, files = _readable_files(files, place, findings)
    if kind == "dicom":
        raise ScanError("not a label mask", place, "masks in DICOM are not supported")
    voxels, _ = READERS[kind](files, place, findings)
    return voxels


def _place(source: Source) -> Path:
    """The file or folder to name when a scan as a whole is at fault."""
    if isinstance(source, str | Path):
        return Path(source)
    return Path(source[0]).parent if len(source) else Path()


def _readable_files(files: list[Path], place: Path, findings: Findings) -> tuple[str, list[Path]]:
    """The one kind that all files share, and the files."""
    kinds = {}
    for file in files:
        with skipping(findings):
            kinds[file] = kind_of(file)
    different = sorted(set(kinds.values()))
    if not different:
        raise ScanError("no readable slices", place)
    if len(different) > 1:
        raise ScanError("mixed formats", place, " and ".join(different))
    return different[0], list(kinds)
