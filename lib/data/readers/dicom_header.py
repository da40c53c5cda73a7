"""DICOM headers: what they say of the pixels and of the place of each slice (FACTS 7.2, 7.6).

Of a header only the fields in `DICOM_FIELDS` are kept; name, dates and ids of the patient are not
among them. Their values are taken from the raw bytes: the objects that pydicom makes of them cost
as much time as the pixels, and its warnings about them would quote the header.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pydicom
from pydicom.tag import Tag

from lib.data.readers.findings import Findings
from lib.data.readers.geometry import check_size
from lib.data.scan import ScanError

DICOM_FIELDS = [
    *("Modality", "ImageType", "SeriesInstanceUID", "InstanceNumber", "NumberOfFrames"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
    *("RescaleSlope", "RescaleIntercept", "PixelPaddingValue"),
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation"),
    *("SamplesPerPixel", "PhotometricInterpretation", "PixelData"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]
"""The only DICOM fields that are kept: geometry, pixels, series. None identifies a patient."""

TAGS = {name: Tag(name) for name in DICOM_FIELDS}  # looked up once: for each file it takes longer

FUNCTIONAL_GROUPS = (
    *("PlanePositionSequence", "PlaneOrientationSequence"),
    *("PixelMeasuresSequence", "PixelValueTransformationSequence"),
)

ORIENTATION_ROUNDING = 0.01  # of the products of direction cosines


@dataclass(frozen=True)
class Encoding:
    """How a file stores its pixel values; the names are those of the DICOM fields."""

    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    pixel_representation: int  # 1 for signed values
    photometric_interpretation: str
    number_of_frames: int
    padding: int | None


@dataclass(frozen=True)
class SliceHeader:
    """What the header of one slice says. Lengths in mm, axes of DICOM (LPS)."""

    file: Path
    series: str
    directions: np.ndarray  # (2, 3): along a row, down a column
    pixel_spacing: tuple[float, float] | None  # between rows, between columns
    size: tuple[int, int]
    position: np.ndarray | None  # (3,)
    instance: float | None
    thickness: float | None
    slope: float
    intercept: float


def pixel_encoding(header: pydicom.Dataset, file: Path) -> Encoding:
    """Check that a file holds monochrome CT, and how."""
    if texts(header, "Modality") not in ([], ["CT"]):
        raise ScanError("not CT", file)
    photometric = "".join(texts(header, "PhotometricInterpretation"))
    if _integer(header, "SamplesPerPixel") != 1 or "MONOCHROME" not in photometric:
        raise ScanError("unsupported pixel type", file, "the pixels are not monochrome")
    frames = _numbers(header, "NumberOfFrames", 1, file)
    signed = _integer(header, "PixelRepresentation")
    encoding = Encoding(
        rows=_integer(header, "Rows"),
        columns=_integer(header, "Columns"),
        bits_allocated=_integer(header, "BitsAllocated"),
        bits_stored=_integer(header, "BitsStored"),
        pixel_representation=signed,
        photometric_interpretation=photometric,
        number_of_frames=1 if frames is None else int(frames[0]) or 1,
        padding=_integer(header, "PixelPaddingValue", signed=bool(signed)),
    )
    check_size((encoding.rows, encoding.columns), file)
    return encoding


def texts(header: pydicom.Dataset, name: str) -> list[str]:
    """The values of a text field (CS, UI); none where the field is missing."""
    element = header.get_item(TAGS[name])
    if element is None:
        return []
    return [part.strip(" \0") for part in (element.value or b"").decode("latin-1").split("\\")]


def _integer(header: pydicom.Dataset, name: str, *, signed: bool = False) -> int | None:
    """The number in a binary field (US, SS), or None where it is missing or empty."""
    element = header.get_item(TAGS[name])
    if element is None or not element.value:
        return None
    order = "little" if element.is_little_endian else "big"
    return int.from_bytes(element.value, order, signed=signed)


def _numbers(header: pydicom.Dataset, name: str, count: int, file: Path) -> np.ndarray | None:
    """The numbers in a text field (DS, IS), or None where it is missing or empty."""
    element = header.get_item(TAGS[name])
    if element is None or not element.value:
        return None
    numbers = _parsed(element.value)
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ScanError("unusable geometry", file, f"{name} is not {count} numbers")
    return np.array(numbers)


@lru_cache(maxsize=256)  # slices of a series share most of their fields
def _parsed(text: bytes) -> tuple[float, ...]:
    return tuple(float(part) for part in text.strip(b" \0").split(b"\\"))


def _number(header: pydicom.Dataset, name: str, file: Path) -> float | None:
    numbers = _numbers(header, name, 1, file)
    return None if numbers is None else float(numbers[0])


def frame_headers(header: pydicom.Dataset, count: int, file: Path) -> list[pydicom.Dataset]:
    """The header of each frame: the file's own, or the functional groups of enhanced CT."""
    frames = header.get("PerFrameFunctionalGroupsSequence") or []
    if not frames and count == 1:
        return [header]
    if len(frames) != count:
        raise ScanError("missing frame positions", file)
    shared = list(header.get("SharedFunctionalGroupsSequence") or [])
    return [_flattened([*shared, frame]) for frame in frames]


def _flattened(groups: list[pydicom.Dataset]) -> pydicom.Dataset:
    """The fields of the functional groups that describe the geometry and scale of one frame."""
    flat = pydicom.Dataset()
    for group in groups:
        for name in FUNCTIONAL_GROUPS:
            if sequence := group.get(name):
                flat.update(sequence[0])
    return flat


def slice_header(
    file: Path,
    header: pydicom.Dataset,
    encoding: Encoding,
    frame: pydicom.Dataset,
    findings: Findings,
) -> SliceHeader:
    """What is said of one slice by the header of its frame and, for the series, of its file."""
    slope, intercept = (_number(frame, f"Rescale{name}", file) for name in ("Slope", "Intercept"))
    if slope is None or intercept is None:
        raise ScanError("missing rescale", file)
    return SliceHeader(
        file=file,
        series="".join(texts(header, "SeriesInstanceUID")),
        directions=_directions(frame, file, findings),
        pixel_spacing=_pixel_spacing(frame, file),
        size=(encoding.rows, encoding.columns),
        position=_numbers(frame, "ImagePositionPatient", 3, file),
        instance=_number(frame, "InstanceNumber", file),
        thickness=_number(frame, "SliceThickness", file) or None,
        slope=slope,
        intercept=intercept,
    )


def _directions(frame: pydicom.Dataset, file: Path, findings: Findings) -> np.ndarray:
    """Unit vectors along a row and down a column, shape (2, 3)."""
    directions = _numbers(frame, "ImageOrientationPatient", 6, file)
    if directions is None:
        findings.flags.add("orientation assumed")
        return np.eye(2, 3)
    directions = directions.reshape(2, 3)
    if np.abs(directions @ directions.T - np.eye(2)).max() > ORIENTATION_ROUNDING:
        raise ScanError(
            "unusable geometry", file, "the directions are no right-angled unit vectors"
        )
    return directions


def _pixel_spacing(frame: pydicom.Dataset, file: Path) -> tuple[float, float] | None:
    spacing = _numbers(frame, "PixelSpacing", 2, file)
    if spacing is None:
        return None
    if spacing.min() <= 0:
        raise ScanError("unusable geometry", file, "the pixel spacing is not positive")
    return tuple(spacing.tolist())
