"""DICOM slices and multi-frame files: pixels to Hounsfield units, slices to a volume."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pydicom
from pydicom.pixels import get_decoder
from pydicom.uid import DeflatedExplicitVRLittleEndian

from lib.data.readers.dicom_header import (
    ORIENTATION_ROUNDING,
    TAGS,
    Encoding,
    SliceHeader,
    frame_headers,
    pixel_encoding,
    slice_header,
    texts,
)
from lib.data.readers.findings import Findings, faults_of, skipping
from lib.data.readers.geometry import check_axial, in_convention
from lib.data.readers.intensities import INT16, as_hounsfield
from lib.data.scan import HOUNSFIELD_AIR, ScanError

DEFERRED_BYTES = 64 * 2**20  # longer pixel data are read frame by frame
IMAGE_CLASS = "Image Storage"  # how the names of the storage classes of images end
GANTRY_TILT = math.radians(1)  # smaller shifts are rounding of the positions
DUPLICATE_MM = 0.01
UNEVEN_MM, UNEVEN_FRACTION = 0.1, 0.1  # positions are often rounded to 0.1 mm
LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])  # DICOM's axes to those of NIfTI


def read_dicom(
    files: list[Path], place: Path, findings: Findings
) -> tuple[np.ndarray, tuple[float, float, float] | None]:
    """Decode each slice while its header is at hand; sort from head to feet in the end.

    Args:
        files: the files of one series, in any order, or one multi-frame file.
        place: the file or folder to name when the scan as a whole is at fault.
        findings: takes up flags and the number of slices left out.

    Returns:
        int16 Hounsfield units (slices, height, width) in the convention of `lib.data.scan`, and the
        spacing of slices, rows and columns in mm where the headers tell it.

    Raises:
        ScanError: with one of `lib.data.readers.findings.REASONS`.
    """
    voxels, slices = None, []
    for one, count, hounsfield in _slices_of(files, findings):
        if voxels is None:
            shape = (max(count, len(files)), *one.size)
            voxels, stored, spacing = in_convention(shape, _affine(one), np.int16, place)
        if count > 1 and len(files) > 1:
            raise ScanError("several volumes", one.file, "a multi-frame file beside others")
        _check_same_series(slices[0] if slices else one, one, place)
        stored[len(slices)] = hounsfield
        slices.append(one)
    if voxels is None:
        raise ScanError("no readable slices", place)
    heights = _heights(slices, findings)
    order = np.argsort(-heights, kind="stable")
    gap = _slice_spacing(slices, heights[order], place, findings)
    _reorder(voxels, order)
    known = gap is not None and slices[0].pixel_spacing is not None
    return voxels[: len(slices)], (gap, *spacing[1:]) if known else None


def _slices_of(
    files: list[Path], findings: Findings
) -> Iterator[tuple[SliceHeader, int, np.ndarray]]:
    for file in files:
        with skipping(findings):
            yield from _slices_in(file, findings)


def _slices_in(file: Path, findings: Findings) -> Iterator[tuple[SliceHeader, int, np.ndarray]]:
    """Header, number of frames and Hounsfield units of each slice in a file, if it has any."""
    with faults_of(file), file.open("rb") as stream:
        header = pydicom.dcmread(stream, defer_size=DEFERRED_BYTES, specific_tags=TAGS.values())
        if "PixelData" not in header:
            if header.file_meta.MediaStorageSOPClassUID.name.endswith(IMAGE_CLASS):
                raise ScanError("damaged file", file, "an image without its pixels")
            findings.flags.add("files without an image left out")
            return
        if "LOCALIZER" in texts(header, "ImageType"):
            findings.flags.add("localizers left out")
            return
        encoding = pixel_encoding(header, file)
        frames = frame_headers(header, encoding.number_of_frames, file)
        pixels = _stored_pixels(header, encoding, stream)
        for frame, stored in zip(frames, pixels, strict=True):
            one = slice_header(file, header, encoding, frame, findings)
            yield one, len(frames), _slice_hounsfield(one, encoding, stored, findings)


# ---------------------------------------------------------------------------- pixels


def _stored_pixels(
    header: pydicom.Dataset, encoding: Encoding, stream: BinaryIO
) -> Iterable[np.ndarray]:
    """Pixel values of each frame as stored; views of the file's bytes where they are plain."""
    syntax = header.file_meta.TransferSyntaxUID
    pixels = header.get_item(TAGS["PixelData"], keep_deferred=True)
    source = pixels.value
    if source is None:
        if syntax == DeflatedExplicitVRLittleEndian:
            raise NotImplementedError  # positions in the inflated content are none in the file
        stream.seek(pixels.value_tell)
        source = stream
    decoder, options = get_decoder(syntax), _decoder_options(encoding, pixels.VR)
    if encoding.number_of_frames == 1:
        return [decoder.as_array(source, **options)[0]]
    return (values for values, _ in decoder.iter_array(source, **options))


def _decoder_options(encoding: Encoding, value_representation: str) -> dict:
    same = ("rows", "columns", "bits_allocated", "bits_stored", "pixel_representation")
    same += ("photometric_interpretation", "number_of_frames")
    return {name: getattr(encoding, name) for name in same} | {
        "samples_per_pixel": 1,
        "pixel_keyword": "PixelData",
        "pixel_vr": value_representation,
        "raw": True,
        "view_only": encoding.bits_stored == encoding.bits_allocated,
    }


def _slice_hounsfield(
    one: SliceHeader, encoding: Encoding, stored: np.ndarray, findings: Findings
) -> np.ndarray:
    """Hounsfield units, int16, of the pixel values of one slice as stored."""
    if stored.shape != one.size:
        raise ScanError("damaged file", one.file, "pixels and header differ in size")
    hounsfield = _rescaled(stored, one.slope, one.intercept)
    if encoding.photometric_interpretation == "MONOCHROME1":
        inverted = _rescaled(_inverted(stored, encoding), one.slope, one.intercept)
        if _border(inverted) < _border(hounsfield):
            findings.flags.add("inverted grey scale")
            hounsfield = inverted
    if encoding.padding is not None and (is_padding := stored == encoding.padding).any():
        findings.flags.add("padding")
        hounsfield[is_padding] = HOUNSFIELD_AIR
    return as_hounsfield(hounsfield, one.file, findings)


def _rescaled(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """Apply slope and intercept; in int16 where the result fits exactly, as nearly always."""
    if slope == 1 and intercept.is_integer():
        lowest, highest = int(stored.min()) + intercept, int(stored.max()) + intercept
        if INT16.min <= lowest and highest <= INT16.max and abs(intercept) < -INT16.min:
            return np.add(stored, np.int16(intercept), dtype=np.int16, casting="unsafe")
    return stored * slope + intercept


def _inverted(stored: np.ndarray, encoding: Encoding) -> np.ndarray:
    if encoding.pixel_representation:
        return ~stored
    return (1 << encoding.bits_stored) - 1 - stored


def _border(values: np.ndarray) -> float:
    """Median of the outermost rows, which show air: black.

    MONOCHROME1 asks for an inverted *display* only, yet files exist whose values are inverted too;
    the border tells the two apart.
    """
    return float(np.median(values[[0, -1]]))


# ---------------------------------------------------------------------------- series


def _affine(one: SliceHeader) -> np.ndarray:
    """From (slice, row, column), head first and 1 mm apart, to mm in the axes of NIfTI."""
    between_rows, between_columns = one.pixel_spacing or (1.0, 1.0)
    along_row, down_column = one.directions
    footward = -_headward(one.directions)
    steps = np.stack([footward, down_column * between_rows, along_row * between_columns], axis=1)
    check_axial(steps, one.file)
    affine = np.eye(4)
    affine[:3, :3] = LPS_TO_RAS[:, None] * steps
    return affine


def _check_same_series(first: SliceHeader, one: SliceHeader, place: Path) -> None:
    if one.series != first.series:
        raise ScanError("mixed series", place)
    turned = np.abs(one.directions - first.directions).max() > ORIENTATION_ROUNDING
    if turned or (one.size, one.pixel_spacing) != (first.size, first.pixel_spacing):
        raise ScanError("mixed slice geometry", place)


def _heights(slices: list[SliceHeader], findings: Findings) -> np.ndarray:
    """Distance of each slice along the normal, towards the head, in mm."""
    if all(one.position is not None for one in slices):
        positions = np.array([one.position for one in slices])
        heights = positions @ _headward(slices[0].directions)
        _flag_tilt(positions, heights, findings)
        return heights
    for one in slices:
        if one.instance is None:
            raise ScanError("missing slice position", one.file)
    findings.flags.add("ordered by instance number")
    return -np.array([one.instance * (slices[0].thickness or 1.0) for one in slices])


def _headward(directions: np.ndarray) -> np.ndarray:
    """Unit normal of the slices, on the side of the head."""
    normal = np.cross(directions[0], directions[1])
    return math.copysign(1.0, normal[2]) * normal


def _flag_tilt(positions: np.ndarray, heights: np.ndarray, findings: Findings) -> None:
    top, bottom = np.argmax(heights), np.argmin(heights)
    rise = heights[top] - heights[bottom]
    length = np.linalg.norm(positions[top] - positions[bottom])
    if rise < math.cos(GANTRY_TILT) * length:
        findings.flags.add("tilted gantry")


def _slice_spacing(
    slices: list[SliceHeader], heights: np.ndarray, place: Path, findings: Findings
) -> float | None:
    """Median distance of the sorted slices in mm, their thickness if there is but one."""
    if len(heights) == 1:
        return slices[0].thickness
    gaps = -np.diff(heights)
    median = float(np.median(gaps))
    if gaps.min() < DUPLICATE_MM:
        raise ScanError("duplicate slice positions", place)
    if np.ptp(gaps) > max(UNEVEN_MM, UNEVEN_FRACTION * median):
        findings.flags.add("uneven slice spacing")
    measured = slices[0].thickness or "ordered by instance number" not in findings.flags
    return median if measured else None


def _reorder(voxels: np.ndarray, order: np.ndarray) -> None:
    """Bring slice ``order[k]`` to place k, in place: there is no memory for a second volume."""
    pending = set(np.flatnonzero(order != np.arange(len(order))).tolist())
    while pending:
        start = place = pending.pop()
        first = voxels[start].copy()
        while (origin := int(order[place])) != start:
            voxels[place] = voxels[origin]
            pending.remove(origin)
            place = origin
        voxels[place] = first
