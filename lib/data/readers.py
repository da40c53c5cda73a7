"""Readers: NIfTI, DICOM, TIFF, JPEG and PNG files or folders to one `Scan` (FACTS 7.1-7.7).

What a file is follows from its first bytes, never from its name. Volumes with a geometry (NIfTI,
DICOM) are brought to the convention of `lib.data.scan`. Pictures and TIFF slices carry none: they
keep the numeric order of their names and are taken to be in the usual radiological view.

Every volume is decoded slice by slice into one preallocated array, so that reading needs the
memory of the scan itself and little more. Of a DICOM header only the fields in `DICOM_FIELDS` are
ever parsed; name, dates and ids of the patient are not among them.
"""

import gzip
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
import pydicom
import tifffile
from PIL import ExifTags, Image, ImageOps
from pydicom.config import disable_value_validation
from pydicom.pixels import iter_pixels, pixel_array

from lib.data.scan import HOUNSFIELD_AIR, HOUNSFIELD_LOWEST, Scan, ScanError

REASONS = {
    "no such file": "The file, folder or link target does not exist.",
    "no permission": "The operating system refuses to open the file or folder.",
    "outside the data folder": "The path, links resolved, leaves the data folder.",
    "no readable slices": "The folder or file holds no slice that can be read.",
    "empty file": "The file has zero bytes.",
    "unknown format": "The content is none of NIfTI, DICOM, TIFF, JPEG and PNG.",
    "damaged file": "The file ends early, or its content cannot be decoded.",
    "mixed formats": "The slices of one scan have different formats or pixel types.",
    "several volumes": "The folder holds more than one file with a whole volume in it.",
    "too large": "The size that the header declares is beyond any scan.",
    "unsupported compression": "No installed decoder knows the compression of the pixels.",
    "unsupported pixel type": "The pixels are of a kind that no CT has (colour, complex, ...).",
    "16-bit picture": "How the grey values of a 16-bit PNG map to Hounsfield units is unknown.",
    "4-D": "The volume has more than three dimensions.",
    "NaN intensities": "Some voxels are not a number.",
    "infinite intensities": "Some voxels are infinite.",
    "intensity not in Hounsfield units": "The intensities hold no air at about -1000 HU.",
    "missing rescale": "The DICOM header lacks the rescale slope or intercept.",
    "not CT": "The DICOM header names another modality.",
    "missing slice position": "A DICOM slice has neither a position nor an instance number.",
    "missing frame positions": "A multi-frame DICOM file says nothing about its single frames.",
    "unusable geometry": "The orientation, position or spacing in the header is impossible.",
    "not axial": "The slices do not lie across the long axis of the body.",
    "mixed series": "The folder holds several DICOM series.",
    "mixed slice geometry": "The DICOM slices differ in size, orientation or pixel spacing.",
    "duplicate slice positions": "Two DICOM slices lie at the same place.",
    "not a label mask": "The mask holds something else than whole numbers from 0 to 255.",
}
"""Every reason that a reader gives in a `ScanError`, with its meaning."""

FLAGS = {
    "padding": "Values below -1024 HU or marked as padding were set to air.",
    "unsigned intensities, offset -1024 assumed": "Soft tissue lay at about 1024 instead of 0.",
    "uneven slice spacing": "The distances between slices differ.",
    "tilted gantry": "The slices are sheared; they are not straightened.",
    "ordered by instance number": "Positions were missing; instance 1 is taken as nearest to head.",
    "orientation assumed": "The header has no orientation; the usual one was assumed.",
    "localizers left out": "Scout views in the folder were not read.",
    "files without an image left out": "DICOM objects without pixels were not read.",
    "inverted grey scale": "MONOCHROME1 pixels were inverted.",
    "mixed slice sizes": "Slices of an unusual size were resized to the most common one.",
    "coloured picture": "Parts of a picture have a colour, as an overlay or arrow has.",
    "turned as EXIF says": "A picture was turned or mirrored as its EXIF orientation asks.",
    "unreadable slices left out": "Damaged slices were dropped; their number stands before this.",
}
"""Every flag that a reader sets on a `Scan`, with its meaning."""

UNREADABLE = ("empty file", "unknown format", "damaged file")
"""Reasons for which `skip_unreadable` drops a slice."""

DICOM_FIELDS = [
    *("Modality", "ImageType", "SeriesInstanceUID", "InstanceNumber", "NumberOfFrames"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
    *("RescaleSlope", "RescaleIntercept", "PixelPaddingValue"),
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "PixelData"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]
"""The only DICOM fields that are parsed: geometry, pixels, series. None identifies a patient."""

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima", "")
DEFERRED_BYTES = 64 * 2**20  # the pixels of longer DICOM files are read frame by frame
SYSTEM_FILES = ("Thumbs.db", "desktop.ini")
INT16 = np.iinfo(np.int16)
LARGEST_SCAN = 2**31  # voxels: 8,192 slices of 512 x 512
LARGEST_TILT = math.radians(30)  # between slice normal and long axis of the body
LARGEST_PIXEL_RATIO = 2  # height to width; beyond, a volume has thick sagittal or coronal slices
GANTRY_TILT = math.radians(1)  # smaller shifts are rounding of the positions
ORIENTATION_ROUNDING = 0.01  # of the products of direction cosines
DUPLICATE_MM = 0.01
UNEVEN_MM, UNEVEN_FRACTION = 0.1, 0.1  # positions are often rounded to 0.1 mm
COLOUR_DIFFERENCE = 32  # grey levels between channels; JPEG noise of grey pictures stays below
COLOUR_FRACTION = 0.001
COLOUR_STEP = 4
AIR_AT_MOST = -500  # every chest CT holds darker voxels, in the lungs if not around the body
UNSIGNED_OFFSET = 1024
UNSIGNED_BONE = 1500  # an unsigned chest CT reaches beyond
UNSIGNED_AIR_AT_MOST = 300
UNSIGNED_TISSUE = (900, 1150)  # fat to muscle, -124 to 126 HU
UNSIGNED_FRACTION = 0.05  # of the voxels, at least, in air and in soft tissue each

NIFTI_HEADER_BYTES = 348
GZIP_MAGIC = b"\x1f\x8b"
PICTURE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])  # DICOM's axes to those of NIfTI

Source = Path | Sequence[Path]


@dataclass
class _Findings:
    """How one scan or mask is to be read, and what came up while reading it."""

    skip_unreadable: bool = False
    labels: bool = False
    flags: set[str] = field(default_factory=set)
    unreadable: int = 0

    def as_flags(self) -> tuple[str, ...]:
        dropped = (f"{self.unreadable} unreadable slices left out",) if self.unreadable else ()
        return (*sorted(self.flags), *dropped)


@dataclass(frozen=True)
class _Slice:
    """What the header of one DICOM slice says. Lengths in mm, axes of DICOM (LPS)."""

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


# ---------------------------------------------------------------------------- public


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
    findings = _Findings(skip_unreadable and len(files) > 1)
    place = _place(source)
    kind, files = _readable_files(files, place, findings)
    if kind == "nifti":
        voxels, spacing = _read_nifti(files[0], findings)
    elif kind == "dicom":
        voxels, spacing = _read_dicom(files, place, findings)
    else:
        voxels, spacing = _read_pictures(files, kind, place, findings), None
    if voxels.dtype == np.int16:
        _check_hounsfield(voxels, place, findings)
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
    findings, place = _Findings(labels=True), _place(source)
    kind, files = _readable_files(files, place, findings)
    if kind == "dicom":
        raise ScanError("not a label mask", place, "masks in DICOM are not supported")
    if kind == "nifti":
        return _read_nifti(files[0], findings)[0]
    return _read_pictures(files, kind, place, findings)


def source_files(source: Source, *, root: Path | None = None) -> list[Path]:
    """The files that make up a scan, in numeric order of their names (2.jpg before 10.jpg).

    Args:
        source: a file, a folder (hidden files, system files and folders in it are ignored) or a
            list of files.
        root: the data folder, if nothing may lie outside it.

    Returns:
        The files; empty for an empty folder.

    Raises:
        ScanError: "no such file", "no permission" or "outside the data folder".
    """
    if not isinstance(source, str | Path):
        files = [Path(file) for file in source]
    elif Path(source).is_dir():
        _check_inside(Path(source), root)
        files = _folder_files(Path(source))
    else:
        files = [Path(source)]
    for file in files:
        _check_inside(file, root)
    return sorted(files, key=_numeric_name)


def source_sha256(source: Source, *, root: Path | None = None) -> str:
    """SHA-256 over the contents of a scan's files, one after the other in `source_files` order.

    Args:
        source: as for `source_files`.
        root: the data folder, if nothing may lie outside it.

    Returns:
        Hexadecimal digest; for a single file the same as that of ``sha256sum``.

    Raises:
        ScanError: if a file is missing or cannot be opened.
    """
    digest = hashlib.sha256()
    for file in source_files(source, root=root):
        with _faults_of(file), file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)  # streams into the running digest
    return digest.hexdigest()


def describe_source(path: Path, root: Path) -> str:
    """How reports name a file: relative to the data folder, never by a DICOM file name.

    DICOM file names often hold the patient's name or id, so such a file is named by its place:
    ``"<folder>, file 17 of 37 in name order"``.

    Args:
        path: a file or folder, existing or not.
        root: the data folder.

    Returns:
        One line.
    """
    if path.is_dir() or not _name_may_identify(path):
        return _relative(path, root)
    siblings = sorted(_folder_files(path.parent), key=_numeric_name) if path.parent.is_dir() else []
    if path not in siblings:
        return f"{_relative(path.parent, root)}, a file not listed"
    place = f"file {siblings.index(path) + 1} of {len(siblings)} in name order"
    return f"{_relative(path.parent, root)}, {place}"


# ---------------------------------------------------------------------------- files


@contextmanager
def _faults_of(file: Path) -> Iterator[None]:
    """Turn whatever a decoder raises on a bad file into a `ScanError`.

    Decoders raise almost anything on hostile bytes, so all exceptions count. Their texts are
    dropped, because they can quote the header of a patient.
    """
    try:
        yield
    except ScanError:
        raise
    except FileNotFoundError:
        raise ScanError("no such file", file) from None
    except PermissionError:
        raise ScanError("no permission", file) from None
    except (MemoryError, Image.DecompressionBombError):
        raise ScanError("too large", file) from None
    except NotImplementedError:
        raise ScanError("unsupported compression", file) from None
    except Exception as error:
        detail = f"the decoder raised {type(error).__name__}"
        raise ScanError("damaged file", file, detail) from None


def _place(source: Source) -> Path:
    """The file or folder to name when a scan as a whole is at fault."""
    if isinstance(source, str | Path):
        return Path(source)
    return Path(source[0]).parent if len(source) else Path()


def _folder_files(folder: Path) -> list[Path]:
    with _faults_of(folder):
        return [
            entry
            for entry in folder.iterdir()
            if not (entry.name.startswith(".") or entry.name in SYSTEM_FILES or entry.is_dir())
        ]


def _numeric_name(file: Path) -> tuple:
    """Sort key under which 2.jpg comes before 10.jpg; the name itself settles ties."""
    parts = re.split("([0-9]+)", file.name)  # text and digits in turn
    return [int(part) if part.isdecimal() else part for part in parts], file.name, str(file)


def _check_inside(path: Path, root: Path | None) -> None:
    with _faults_of(path):
        if root is not None and not path.resolve().is_relative_to(root.resolve()):
            raise ScanError("outside the data folder", path)


def _relative(path: Path, root: Path) -> str:
    try:
        inside = path.absolute().relative_to(root.absolute()).as_posix()
    except ValueError:
        return "outside the data folder"
    return root.absolute().name if inside == "." else inside


def _name_may_identify(file: Path) -> bool:
    """Whether a file is DICOM, or is unreadable and lies next to DICOM."""
    try:
        return _kind_of(file) == "dicom"
    except ScanError:
        siblings = _folder_files(file.parent) if file.parent.is_dir() else []
        return file.suffix.lower() in DICOM_SUFFIXES or any(map(_is_dicom, siblings))


def _is_dicom(file: Path) -> bool:
    try:
        return _kind_of(file) == "dicom"
    except ScanError:
        return False


def _kind_of(file: Path) -> str:
    """Tell "nifti", "dicom", "tiff" or "picture" by the first bytes of a file."""
    with _faults_of(file):
        if file.exists() and not file.is_file():
            raise ScanError("unknown format", file, "it is no ordinary file")
        with file.open("rb") as stream:
            start = stream.read(NIFTI_HEADER_BYTES)
            if start.startswith(GZIP_MAGIC):
                stream.seek(0)
                start = gzip.GzipFile(fileobj=stream).read(NIFTI_HEADER_BYTES)
    if not start:
        raise ScanError("empty file", file)
    if start.startswith(PICTURE_MAGIC):
        return "picture"
    if start.startswith(TIFF_MAGIC):
        return "tiff"
    if start[128:132] == b"DICM":
        return "dicom"
    if start[344:348] == b"n+1\0" or start[4:8] == b"n+2\0":
        return "nifti"
    raise ScanError("unknown format", file)


@contextmanager
def _skipping(findings: _Findings) -> Iterator[None]:
    """Count a slice that turns out to be unreadable, where the caller allows that."""
    try:
        yield
    except ScanError as error:
        if not findings.skip_unreadable or error.reason not in UNREADABLE:
            raise
        findings.unreadable += 1


def _readable_files(files: list[Path], place: Path, findings: _Findings) -> tuple[str, list[Path]]:
    """The one kind that all files share, and the files."""
    kind_of = {}
    for file in files:
        with _skipping(findings):
            kind_of[file] = _kind_of(file)
    kinds = sorted(set(kind_of.values()))
    if not kinds:
        raise ScanError("no readable slices", place)
    if len(kinds) > 1:
        raise ScanError("mixed formats", place, " and ".join(kinds))
    if kinds == ["nifti"] and len(kind_of) > 1:
        raise ScanError("several volumes", place, f"{len(kind_of)} NIfTI files")
    return kinds[0], list(kind_of)


# ---------------------------------------------------------------------------- intensities


def _as_intensities(values: np.ndarray, file: Path, findings: _Findings) -> np.ndarray:
    """One decoded slice as labels, as 8-bit grey values or as Hounsfield units."""
    if findings.labels:
        return _as_labels(values, file)
    return values if values.dtype == np.uint8 else _as_hounsfield(values, file, findings)


def _as_hounsfield(values: np.ndarray, file: Path, findings: _Findings) -> np.ndarray:
    """Round and clip one slice of Hounsfield units to int16; padding becomes air."""
    if values.dtype.kind not in "iuf":
        raise ScanError("unsupported pixel type", file, f"pixels are {values.dtype}")
    if values.dtype.kind == "f":
        _check_finite(values, file)
        values = np.rint(values)
    if values.min() < HOUNSFIELD_LOWEST:
        findings.flags.add("padding")
        values = np.where(values < HOUNSFIELD_LOWEST, values.dtype.type(HOUNSFIELD_AIR), values)
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


def _check_hounsfield(voxels: np.ndarray, place: Path, findings: _Findings) -> None:
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


# ---------------------------------------------------------------------------- geometry


def _in_convention(
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
    _check_axial(directions[:, order], place)
    _check_size(shape, place)
    voxels = np.empty([shape[axis] for axis in order], dtype)
    flips = tuple(slice(None, None, int(step)) for step in turn[:, 1])
    spacing = nib.affines.voxel_sizes(affine)[order]
    return voxels, voxels.transpose(axes)[flips], tuple(map(float, spacing))


def _check_axial(directions: np.ndarray, place: Path) -> None:
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


def _check_size(shape: Sequence[int], place: Path) -> None:
    if math.prod(shape) > LARGEST_SCAN:
        raise ScanError("too large", place, f"{' x '.join(map(str, shape))} voxels")
    if math.prod(shape) < 1:
        raise ScanError("no readable slices", place)


# ---------------------------------------------------------------------------- NIfTI


def _read_nifti(file: Path, findings: _Findings) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Read a NIfTI volume slab by slab, scaling each on its own, so that none is held twice."""
    with _faults_of(file), file.open("rb") as raw, closing(_plain(raw)) as stream:
        image = _nifti_image(stream)
        shape = _volume_shape(image.shape, file)
        scaled = (image.dataobj.slope, image.dataobj.inter) != (1, 0)
        pictures = image.get_data_dtype() == np.uint8 and not scaled
        dtype = np.uint8 if findings.labels or pictures else np.int16
        voxels, stored, spacing = _in_convention(shape, image.affine, dtype, file)
        for index in range(shape[2]):
            slab = (slice(None), slice(None), index, 0, 0, 0, 0)[: image.ndim]
            values = np.asarray(image.dataobj[slab])
            stored[:, :, index] = _as_intensities(values, file, findings)
        stream.read(1)  # only at its end does gzip compare the checksum
        if not image.header["sform_code"] and not image.header["qform_code"]:
            findings.flags.add("orientation assumed")
    return voxels, spacing


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


# ---------------------------------------------------------------------------- pictures


def _read_pictures(files: list[Path], kind: str, place: Path, findings: _Findings) -> np.ndarray:
    """Stack pictures, TIFF slices or the pages of one TIFF file."""
    if kind == "tiff" and len(files) == 1:
        return _read_tiff_pages(files[0], findings)
    images = _decoded_files(files, _tiff_page if kind == "tiff" else _picture, findings)
    return _stacked(images, len(files), place, findings)


def _decoded_files(
    files: list[Path], decode: Callable[[Path, _Findings], np.ndarray], findings: _Findings
) -> Iterator[np.ndarray]:
    for file in files:
        with _skipping(findings):
            yield _as_intensities(decode(file, findings), file, findings)


def _read_tiff_pages(file: Path, findings: _Findings) -> np.ndarray:
    with _faults_of(file), tifffile.TiffFile(file) as tiff:
        images = (
            _as_intensities(_page_values(page, file, findings), file, findings)
            for page in tiff.pages
        )
        return _stacked(images, len(tiff.pages), file, findings)


def _tiff_page(file: Path, findings: _Findings) -> np.ndarray:
    with _faults_of(file), tifffile.TiffFile(file) as tiff:
        if len(tiff.pages) != 1:
            raise ScanError("several volumes", file, f"{len(tiff.pages)} pages beside other files")
        return _page_values(tiff.pages[0], file, findings)


def _page_values(page: tifffile.TiffPage, file: Path, findings: _Findings) -> np.ndarray:
    _check_size(page.shape, file)
    try:
        values = page.asarray()
    except ValueError as error:
        if "imagecodecs" in str(error):  # what tifffile says of LZW, JPEG and the like
            raise ScanError(
                "unsupported compression", file, "the package imagecodecs may read it"
            ) from None
        raise
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        values = ~values
    if values.ndim == 3 and values.dtype == np.uint8:  # (height, width, channels)
        return _grey_values(Image.fromarray(values), file, findings)
    if values.ndim != 2:
        raise ScanError("unsupported pixel type", file, f"a page has shape {values.shape}")
    return values


def _picture(file: Path, findings: _Findings) -> np.ndarray:
    """Decode a JPEG or PNG file, turned as its EXIF orientation asks a viewer to show it."""
    with _faults_of(file), Image.open(file, formats=("JPEG", "PNG")) as image:
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or LARGEST_SCAN):
            raise ScanError("too large", file, f"{image.width} x {image.height} pixels")
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            findings.flags.add("turned as EXIF says")
            return _grey_values(ImageOps.exif_transpose(image), file, findings)
        return _grey_values(image, file, findings)


def _grey_values(image: Image.Image, file: Path, findings: _Findings) -> np.ndarray:
    """Grey values of a picture, or the labels of a mask.

    Transparency is composited over black: where nothing is drawn there is no tissue, and the
    colour that is stored under transparent pixels is arbitrary.
    """
    if image.mode == "L":
        return np.asarray(image)
    if findings.labels:
        return _label_values(image, file)
    if image.mode.startswith("I"):
        detail = "take off the data set's own offset and store it as TIFF or NIfTI"
        raise ScanError("16-bit picture", file, detail)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    if _is_coloured(image.convert("RGB")):
        findings.flags.add("coloured picture")
    return np.asarray(image.convert("L"))  # of equal channels, exactly their value


def _label_values(image: Image.Image, file: Path) -> np.ndarray:
    if image.mode in ("1", "P") or image.mode.startswith("I"):
        return np.asarray(image)
    channels = np.asarray(image.convert("RGB"))
    if (channels != channels[..., :1]).any():
        raise ScanError("not a label mask", file, "the mask is coloured")
    return channels[..., 0]


def _is_coloured(image: Image.Image) -> bool:
    """Whether the channels of an RGB picture differ, judged on every fourth row and column."""
    width, height = (math.ceil(side / COLOUR_STEP) for side in image.size)
    sample = image.resize((width, height), Image.Resampling.NEAREST)
    channels = np.stack([np.asarray(channel) for channel in sample.split()])
    return np.mean(np.ptp(channels, axis=0) >= COLOUR_DIFFERENCE) > COLOUR_FRACTION


def _stacked(
    images: Iterable[np.ndarray], count: int, place: Path, findings: _Findings
) -> np.ndarray:
    """Stack at most ``count`` slices; those of unusual size are resized to the most common one."""
    voxels, odd, sizes = None, {}, Counter()
    for index, image in enumerate(images):
        if voxels is None:
            _check_size((count, *image.shape), place)
            voxels = np.empty((count, *image.shape), image.dtype)
        if image.dtype != voxels.dtype:
            raise ScanError("mixed formats", place, f"{voxels.dtype} and {image.dtype} slices")
        sizes[image.shape] += 1
        if image.shape == voxels.shape[1:]:
            voxels[index] = image
        else:
            odd[index] = image
    if voxels is None:
        raise ScanError("no readable slices", place)
    voxels = voxels[: sizes.total()]
    if not odd:
        return voxels
    findings.flags.add("mixed slice sizes")
    return _one_size(voxels, odd, sizes.most_common(1)[0][0], findings.labels)


def _one_size(
    voxels: np.ndarray, odd: dict[int, np.ndarray], size: tuple[int, int], labels: bool
) -> np.ndarray:
    """Bring all slices, those in ``odd`` taken from there, to one size."""
    method = Image.Resampling.NEAREST if labels else Image.Resampling.BILINEAR
    resized = np.empty((len(voxels), *size), voxels.dtype)
    for index, slice_ in enumerate(voxels):
        image = Image.fromarray(odd.get(index, slice_).astype(np.float32))
        resized[index] = np.rint(image.resize(size[::-1], method))
    return resized


# ---------------------------------------------------------------------------- DICOM


def _read_dicom(
    files: list[Path], place: Path, findings: _Findings
) -> tuple[np.ndarray, tuple[float, float, float] | None]:
    """Decode each slice while its header is at hand; sort from head to feet in the end."""
    voxels, slices = None, []
    for one, count, hounsfield in _dicom_files(files, findings):
        if voxels is None:
            shape = (max(count, len(files)), *one.size)
            voxels, stored, spacing = _in_convention(shape, _dicom_affine(one), np.int16, place)
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


def _dicom_files(
    files: list[Path], findings: _Findings
) -> Iterator[tuple[_Slice, int, np.ndarray]]:
    for file in files:
        with _skipping(findings):
            yield from _dicom_slices(file, findings)


def _dicom_slices(file: Path, findings: _Findings) -> Iterator[tuple[_Slice, int, np.ndarray]]:
    """Header, number of frames and Hounsfield units of each slice in a file, if it has any."""
    with _faults_of(file), disable_value_validation():  # its warnings would quote the header
        header = pydicom.dcmread(file, defer_size=DEFERRED_BYTES, specific_tags=DICOM_FIELDS)
        if "PixelData" not in header:
            findings.flags.add("files without an image left out")
            return
        if "LOCALIZER" in (header.get("ImageType") or ()):
            findings.flags.add("localizers left out")
            return
        _check_image(header, file)
        frames = _frame_headers(header, file)
        pixels = _stored_pixels(file, header, len(frames))
        for frame, stored in zip(frames, pixels, strict=True):
            one = _dicom_slice(file, header, frame, findings)
            yield one, len(frames), _slice_hounsfield(one, header, stored, findings)


def _stored_pixels(file: Path, header: pydicom.Dataset, frames: int) -> Iterable[np.ndarray]:
    """Pixel values as stored; those of a multi-frame file are read frame by frame."""
    if frames > 1:
        return iter_pixels(file, view_only=True)
    return [pixel_array(header, view_only=True)]


def _check_image(header: pydicom.Dataset, file: Path) -> None:
    if header.get("Modality", "CT") != "CT":
        raise ScanError("not CT", file)
    if header.SamplesPerPixel != 1 or "MONOCHROME" not in header.PhotometricInterpretation:
        raise ScanError("unsupported pixel type", file, "the pixels are not monochrome")
    _check_size((header.Rows, header.Columns), file)


def _frame_headers(header: pydicom.Dataset, file: Path) -> list[pydicom.Dataset]:
    """The header of each frame: the file's own, or the functional groups of enhanced CT."""
    frames = header.get("PerFrameFunctionalGroupsSequence") or []
    count = int(header.get("NumberOfFrames") or 1)
    if not frames and count == 1:
        return [header]
    if len(frames) != count:
        raise ScanError("missing frame positions", file)
    shared = list(header.get("SharedFunctionalGroupsSequence") or [])
    return [_flattened([*shared, frame]) for frame in frames]


def _flattened(groups: list[pydicom.Dataset]) -> pydicom.Dataset:
    """All fields of functional groups in one header."""
    flat = pydicom.Dataset()
    for group in groups:
        for sequence in group:
            if sequence.VR == "SQ" and sequence.value:
                flat.update(sequence.value[0])
    return flat


def _dicom_slice(
    file: Path, header: pydicom.Dataset, frame: pydicom.Dataset, findings: _Findings
) -> _Slice:
    slope, intercept, thickness, instance = (
        None if (number := _numbers(frame, name, 1, file)) is None else float(number[0])
        for name in ("RescaleSlope", "RescaleIntercept", "SliceThickness", "InstanceNumber")
    )
    if slope is None or intercept is None:
        raise ScanError("missing rescale", file)
    return _Slice(
        file=file,
        series=str(header.get("SeriesInstanceUID")),
        directions=_directions(frame, file, findings),
        pixel_spacing=_pixel_spacing(frame, file),
        size=(header.Rows, header.Columns),
        position=_numbers(frame, "ImagePositionPatient", 3, file),
        instance=instance,
        thickness=thickness or None,
        slope=slope,
        intercept=intercept,
    )


def _directions(frame: pydicom.Dataset, file: Path, findings: _Findings) -> np.ndarray:
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


def _numbers(header: pydicom.Dataset, name: str, count: int, file: Path) -> np.ndarray | None:
    """The numbers in a text field (DS, IS), or None where it is missing or empty.

    Taken from the raw text: the objects that pydicom makes of it cost as much as a slice's pixels.
    """
    element = header.get_item(name) if name in header else None
    value = element.value if element is not None else None
    if value is None or value in (b"", ""):
        return None
    texts = value.strip(b" \0").split(b"\\") if isinstance(value, bytes) else np.atleast_1d(value)
    numbers = np.array([float(text) for text in texts])
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise ScanError("unusable geometry", file, f"{name} is not {count} numbers")
    return numbers


def _check_same_series(first: _Slice, one: _Slice, place: Path) -> None:
    if one.series != first.series:
        raise ScanError("mixed series", place)
    turned = np.abs(one.directions - first.directions).max() > ORIENTATION_ROUNDING
    if turned or (one.size, one.pixel_spacing) != (first.size, first.pixel_spacing):
        raise ScanError("mixed slice geometry", place)


def _heights(slices: list[_Slice], findings: _Findings) -> np.ndarray:
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


def _flag_tilt(positions: np.ndarray, heights: np.ndarray, findings: _Findings) -> None:
    top, bottom = np.argmax(heights), np.argmin(heights)
    rise = heights[top] - heights[bottom]
    length = np.linalg.norm(positions[top] - positions[bottom])
    if rise < math.cos(GANTRY_TILT) * length:
        findings.flags.add("tilted gantry")


def _slice_spacing(
    slices: list[_Slice], heights: np.ndarray, place: Path, findings: _Findings
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


def _dicom_affine(one: _Slice) -> np.ndarray:
    """From (slice, row, column), head first and 1 mm apart, to mm in the axes of NIfTI."""
    between_rows, between_columns = one.pixel_spacing or (1.0, 1.0)
    along_row, down_column = one.directions
    footward = -_headward(one.directions)
    steps = np.stack([footward, down_column * between_rows, along_row * between_columns], axis=1)
    _check_axial(steps, one.file)
    affine = np.eye(4)
    affine[:3, :3] = LPS_TO_RAS[:, None] * steps
    return affine


def _slice_hounsfield(
    one: _Slice, header: pydicom.Dataset, stored: np.ndarray, findings: _Findings
) -> np.ndarray:
    """Hounsfield units, int16, of the pixel values of one slice as stored."""
    if stored.shape != one.size:
        raise ScanError("damaged file", one.file, "pixels and header differ in size")
    hounsfield = _rescaled(stored, one)
    if header.PhotometricInterpretation == "MONOCHROME1":
        inverted = _rescaled(_inverted(stored, header), one)
        if _border(inverted) < _border(hounsfield):
            findings.flags.add("inverted grey scale")
            hounsfield = inverted
    padding = header.get("PixelPaddingValue")
    if padding is not None and (is_padding := stored == padding).any():
        findings.flags.add("padding")
        hounsfield[is_padding] = HOUNSFIELD_AIR
    return _as_hounsfield(hounsfield, one.file, findings)


def _rescaled(stored: np.ndarray, one: _Slice) -> np.ndarray:
    """Apply slope and intercept; in int16 where the result fits exactly, as nearly always."""
    if one.slope == 1 and one.intercept.is_integer():
        lowest, highest = int(stored.min()) + one.intercept, int(stored.max()) + one.intercept
        if INT16.min <= lowest and highest <= INT16.max and abs(one.intercept) < -INT16.min:
            return np.add(stored, np.int16(one.intercept), dtype=np.int16, casting="unsafe")
    return stored * one.slope + one.intercept


def _inverted(stored: np.ndarray, header: pydicom.Dataset) -> np.ndarray:
    return ~stored if header.PixelRepresentation else (1 << header.BitsStored) - 1 - stored


def _border(values: np.ndarray) -> float:
    """Median of the outermost rows, which show air: black.

    MONOCHROME1 asks for an inverted *display* only, yet files exist whose values are inverted too;
    the border tells the two apart.
    """
    return float(np.median(values[[0, -1]]))
