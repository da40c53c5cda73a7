"""Pictures: JPEG and PNG files, and TIFF files of one or more pages (FACTS 7.1, 7.3-7.7).

They carry no geometry. Slices keep the order in which they are given, the numeric order of their
names for a folder, and are taken to run from head to feet in the usual radiological view.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageOps

from lib.data.readers.findings import Findings, faults_of, skipping
from lib.data.readers.geometry import LARGEST_SCAN, check_size
from lib.data.readers.intensities import as_intensities
from lib.data.scan import ScanError

COLOUR_DIFFERENCE = 32  # grey levels between channels; JPEG noise of grey pictures stays below
COLOUR_FRACTION = 0.001
COLOUR_STEP = 4


def read_pictures(files: list[Path], place: Path, findings: Findings) -> tuple[np.ndarray, None]:
    """Stack JPEG and PNG files, one slice each.

    Args:
        files: in the order of the slices, head first.
        place: the file or folder to name when the scan as a whole is at fault.
        findings: says whether it is a mask; takes up flags and the number of slices left out.

    Returns:
        8-bit grey values or labels, uint8, (slices, height, width); and None, for no known spacing.

    Raises:
        ScanError: with one of `lib.data.readers.findings.REASONS`.
    """
    return _stacked(_decoded_files(files, _picture, findings), len(files), place, findings), None


def read_tiff(files: list[Path], place: Path, findings: Findings) -> tuple[np.ndarray, None]:
    """Stack TIFF slices, or the pages of one TIFF file.

    Args:
        files: in the order of the slices, head first.
        place: the file or folder to name when the scan as a whole is at fault.
        findings: says whether it is a mask; takes up flags and the number of slices left out.

    Returns:
        Hounsfield units (int16), 8-bit grey values or labels (uint8), (slices, height, width); and
        None, for no known spacing.

    Raises:
        ScanError: with one of `lib.data.readers.findings.REASONS`.
    """
    if len(files) > 1:
        slices = _decoded_files(files, _tiff_slice, findings)
        return _stacked(slices, len(files), place, findings), None
    file = files[0]
    with faults_of(file), file.open("rb") as stream, tifffile.TiffFile(stream) as tiff:
        pages = (_page_values(page, file, findings) for page in tiff.pages)
        return _stacked(pages, len(tiff.pages), file, findings), None


def _decoded_files(
    files: list[Path], decode: Callable[[Path, Findings], np.ndarray], findings: Findings
) -> Iterator[np.ndarray]:
    for file in files:
        with skipping(findings), faults_of(file):
            yield decode(file, findings)


def _tiff_slice(file: Path, findings: Findings) -> np.ndarray:
    with file.open("rb") as stream, tifffile.TiffFile(stream) as tiff:
        if len(tiff.pages) != 1:
            raise ScanError("several volumes", file, f"{len(tiff.pages)} pages beside other files")
        return _page_values(tiff.pages[0], file, findings)


def _page_values(page: tifffile.TiffPage, file: Path, findings: Findings) -> np.ndarray:
    check_size(page.shape, file)
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
        values = _grey_values(Image.fromarray(values), file, findings)
    if values.ndim != 2:
        raise ScanError("unsupported pixel type", file, f"a page has shape {values.shape}")
    return as_intensities(values, file, findings)


def _picture(file: Path, findings: Findings) -> np.ndarray:
    """Decode a JPEG or PNG file, turned as its EXIF orientation asks a viewer to show it."""
    with Image.open(file, formats=("JPEG", "PNG")) as image:
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or LARGEST_SCAN):
            raise ScanError("too large", file, f"{image.width} x {image.height} pixels")
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            findings.flags.add("turned as EXIF says")
            ImageOps.exif_transpose(image, in_place=True)
        return as_intensities(_grey_values(image, file, findings), file, findings)


def _grey_values(image: Image.Image, file: Path, findings: Findings) -> np.ndarray:
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
    if _is_coloured(image if image.mode == "RGB" else image.convert("RGB")):
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
    channels = np.ascontiguousarray(np.moveaxis(np.asarray(sample), -1, 0))  # np.ptp is slow else
    return np.mean(np.ptp(channels, axis=0) >= COLOUR_DIFFERENCE) > COLOUR_FRACTION


def _stacked(
    images: Iterable[np.ndarray], count: int, place: Path, findings: Findings
) -> np.ndarray:
    """Stack at most ``count`` slices; those of unusual size are resized to the most common one."""
    voxels, odd, sizes = None, {}, Counter()
    for index, image in enumerate(images):
        if voxels is None:
            check_size((count, *image.shape), place)
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
