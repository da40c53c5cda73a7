import gzip
import struct
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image
from pydicom.uid import generate_uid

from lib.data.readers import FLAGS, REASONS, read_label_volume, read_scan, source_files
from lib.data.scan import ScanError
from tests.data.readers.made_files import (
    GREY,
    cut,
    dicom_header,
    phantom,
    put,
    write_dicom,
    write_nifti,
    write_pictures,
    write_series,
)


def test_a_scan_is_the_same_from_every_format(tmp_path):
    series = read_scan(write_series(tmp_path / "dicom")).voxels
    nifti = read_scan(write_nifti(tmp_path / "scan.nii.gz", phantom())).voxels
    tifffile.imwrite(tmp_path / "pages.tif", phantom(), photometric="minisblack")
    pages = read_scan(tmp_path / "pages.tif").voxels
    (tmp_path / "tiff").mkdir()
    for index, image in enumerate(phantom()):
        tifffile.imwrite(tmp_path / "tiff" / f"{index}.tif", image)
    folder = read_scan(tmp_path / "tiff").voxels
    for voxels in (series, nifti, pages, folder):
        np.testing.assert_array_equal(voxels, phantom())


@pytest.mark.parametrize("make", [write_pictures, write_series])
def test_unreadable_slices_are_left_out_on_request(tmp_path, make):
    folder = make(tmp_path / "s")
    good = len(source_files(folder))
    put(folder / "7", b"")
    put(folder / "8", b"nonsense")
    put(folder / "9", source_files(folder)[0].read_bytes()[:200])
    with pytest.raises(ScanError):
        read_scan(folder)
    scan = read_scan(folder, skip_unreadable=True)
    assert len(scan.voxels) == good
    assert scan.flags[-1] == "3 unreadable slices left out"


def png_claiming(width, height) -> bytes:
    def chunk(name, content):
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def with_value(value) -> np.ndarray:
    volume = phantom().astype(np.float32)
    volume[1, 1, 1] = value
    return volume


def broken_gzip(folder: Path) -> Path:
    file = write_nifti(folder / "a.nii.gz", phantom())
    content = bytearray(gzip.compress(gzip.decompress(file.read_bytes())))
    content[-6] ^= 0xFF  # checksum
    return put(file, bytes(content))


def series_with(folder: Path, count=1, **fields) -> Path:
    write_series(folder / "s")
    for index in range(count):
        write_dicom(folder / "s" / f"x{index}.dcm", np.zeros((10, 12), np.uint16), **fields)
    return folder / "s"


def one_dicom(folder: Path, **fields) -> Path:
    return write_dicom(folder / "a.dcm", np.zeros((10, 12), np.uint16), **fields)


def one_picture(folder: Path, name: str, **options) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)).save(
        folder / name, **options
    )
    return folder / name


def one_tiff(folder: Path, values, **options) -> Path:
    tifffile.imwrite(folder / "a.tif", values, **options)
    return folder / "a.tif"


def unknown_syntax(folder: Path) -> Path:
    header = dicom_header(np.zeros((10, 12), np.uint16))
    header.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG-2 video
    header.PixelData = pydicom.encaps.encapsulate([b"\0\0"])
    header["PixelData"].is_undefined_length = True
    header.save_as(folder / "a.dcm", enforce_file_format=True)
    return folder / "a.dcm"


def affine_nifti(folder: Path, affine) -> Path:
    nib.save(nib.Nifti1Image(np.ascontiguousarray(phantom().T), affine), folder / "a.nii")
    return folder / "a.nii"


def flat_nifti(folder: Path) -> Path:
    file = write_nifti(folder / "a.nii", phantom())
    content = bytearray(file.read_bytes())
    content[312:328] = bytes(16)  # third row of the affine
    return put(file, bytes(content))


def tilted(degrees: float) -> np.ndarray:
    turn = np.eye(4)
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn[1:3, 1:3] = [[c, -s], [s, c]]
    return turn


def damaged_slice(folder: Path, name="2.jpg", content: bytes | None = b"") -> Path:
    return put(write_pictures(folder / "s") / name, content)


def mixed_kinds(folder: Path) -> Path:
    write_series(folder / "s")
    return write_pictures(folder / "s")


def folder_of(folder: Path, *volumes) -> Path:
    (folder / "s").mkdir()
    for index, volume in enumerate(volumes):
        write_nifti(folder / "s" / f"{index}.nii", volume)
    return folder / "s"


def tiff_dtypes(folder: Path) -> Path:
    (folder / "s").mkdir()
    tifffile.imwrite(folder / "s" / "1.tif", phantom()[0])
    tifffile.imwrite(folder / "s" / "2.tif", np.zeros((10, 12), np.uint8))
    return folder / "s"


def lzw_tiff(folder: Path) -> Path:
    Image.fromarray(GREY).save(folder / "a.tif", compression="tiff_lzw")
    return folder / "a.tif"


def wrong_size(folder: Path) -> Path:
    write_series(folder / "s")
    write_dicom(folder / "s" / "x.dcm", np.zeros((8, 8), np.uint16), (0, 0, 50))
    return folder / "s"


def empty(folder: Path) -> Path:
    (folder / "s").mkdir()
    put(folder / "s" / ".hidden.jpg", b"x")
    return folder / "s"


MALFORMED = {
    "missing file": ("no such file", lambda d: d / "nothing.nii"),
    "empty folder": ("no readable slices", empty),
    "zero-byte NIfTI": ("empty file", lambda d: put(d / "a.nii", b"")),
    "zero-byte gzip": ("empty file", lambda d: put(d / "a.nii.gz", gzip.compress(b""))),
    "zero-byte DICOM": ("empty file", lambda d: put(d / "a.dcm", b"")),
    "zero-byte JPEG": ("empty file", lambda d: put(d / "a.jpg", b"")),
    "zero-byte TIFF": ("empty file", lambda d: put(d / "a.tif", b"")),
    "text named .dcm": ("unknown format", lambda d: put(d / "a.dcm", b"hello " * 99)),
    "text named .nii.gz": ("unknown format", lambda d: put(d / "a.nii.gz", b"hello " * 99)),
    "gzip of text": ("unknown format", lambda d: put(d / "a.nii.gz", gzip.compress(b"hi" * 999))),
    "GIF": ("unknown format", lambda d: one_picture(d, "a.gif")),
    "truncated NIfTI": ("damaged file", lambda d: cut(write_nifti(d / "a.nii", phantom()))),
    "truncated gzip": ("damaged file", lambda d: cut(write_nifti(d / "a.nii.gz", phantom()), 0.9)),
    "wrong gzip checksum": ("damaged file", broken_gzip),
    "truncated DICOM": ("damaged file", lambda d: cut(one_dicom(d), 0.9)),
    "truncated JPEG": ("damaged file", lambda d: cut(one_picture(d, "a.jpg"))),
    "truncated PNG": ("damaged file", lambda d: cut(one_picture(d, "a.png"))),
    "truncated TIFF": ("damaged file", lambda d: cut(one_picture(d, "a.tif"))),
    "PNG of magic only": ("damaged file", lambda d: put(d / "a.png", b"\x89PNG\r\n\x1a\n")),
    "zero-byte slice": ("empty file", damaged_slice),
    "text slice": ("unknown format", lambda d: damaged_slice(d, content=b"hello")),
    "NaN": ("NaN intensities", lambda d: write_nifti(d / "a.nii", with_value(np.nan))),
    "infinite": ("infinite intensities", lambda d: write_nifti(d / "a.nii", with_value(np.inf))),
    "4-D": ("4-D", lambda d: affine_4d(d, 2)),
    "NIfTI of zeros": (
        "intensity not in Hounsfield units",
        lambda d: write_nifti(d / "a.nii", np.zeros((3, 9, 9), np.int16)),
    ),
    "NIfTI of fractions": (
        "intensity not in Hounsfield units",
        lambda d: write_nifti(d / "a.nii", np.linspace(0, 1, 300, dtype="f4").reshape(3, 10, 10)),
    ),
    "complex NIfTI": (
        "unsupported pixel type",
        lambda d: write_nifti(d / "a.nii", phantom().astype(np.complex64)),
    ),
    "singular affine": ("unusable geometry", flat_nifti),
    "oblique DICOM": (
        "not axial",
        lambda d: one_dicom(d, ImageOrientationPatient=[1, 0, 0, 0, 0.8, 0.6]),
    ),
    "oblique NIfTI": ("not axial", lambda d: affine_nifti(d, tilted(40))),
    "thick sagittal NIfTI": ("not axial", lambda d: affine_nifti(d, np.diag([8, 1, 1, 1.0]))),
    "two NIfTI files": ("several volumes", lambda d: folder_of(d, phantom(), phantom())),
    "mixed series": ("mixed series", lambda d: series_with(d, SeriesInstanceUID=generate_uid())),
    "duplicate positions": ("duplicate slice positions", lambda d: series_with(d, 2)),
    "slice of other size": ("mixed slice geometry", wrong_size),
    "no slope": ("missing rescale", lambda d: one_dicom(d, RescaleSlope=None)),
    "no intercept": ("missing rescale", lambda d: one_dicom(d, RescaleIntercept=None)),
    "MR": ("not CT", lambda d: one_dicom(d, Modality="MR")),
    "no position": (
        "missing slice position",
        lambda d: one_dicom(d, ImagePositionPatient=None),
    ),
    "coronal DICOM": (
        "not axial",
        lambda d: one_dicom(d, ImageOrientationPatient=[1, 0, 0, 0, 0, -1]),
    ),
    "zero directions": (
        "unusable geometry",
        lambda d: one_dicom(d, ImageOrientationPatient=[0, 0, 0, 0, 0, 0]),
    ),
    "negative spacing": ("unusable geometry", lambda d: one_dicom(d, PixelSpacing=[1, -1])),
    "multi-frame without positions": (
        "missing frame positions",
        lambda d: write_dicom(d / "a.dcm", np.zeros((3, 4, 4), np.uint16), NumberOfFrames=3),
    ),
    "colour DICOM": (
        "unsupported pixel type",
        lambda d: one_dicom(d, SamplesPerPixel=3, PhotometricInterpretation="RGB"),
    ),
    "video DICOM": ("unsupported compression", unknown_syntax),
    "only a scout": (
        "no readable slices",
        lambda d: one_dicom(d, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
    ),
    "JPEG beside DICOM": ("mixed formats", mixed_kinds),
    "8-bit beside 16-bit TIFF": ("mixed formats", tiff_dtypes),
    "LZW TIFF": ("unsupported compression", lzw_tiff),
    "complex TIFF": (
        "unsupported pixel type",
        lambda d: one_tiff(d, np.zeros((9, 9), np.complex64)),
    ),
    "16-bit PNG": ("16-bit picture", lambda d: sixteen_bit_png(d)),
    "decompression bomb": ("too large", lambda d: put(d / "a.png", png_claiming(60000, 60000))),
    "large picture": ("too large", lambda d: put(d / "a.png", png_claiming(10000, 10000))),
    "huge NIfTI": ("too large", lambda d: huge_nifti(d)),
}


def affine_4d(folder: Path, volumes: int) -> Path:
    values = np.stack([np.ascontiguousarray(phantom().T)] * volumes, axis=-1)
    nib.save(nib.Nifti1Image(values, np.diag([-1, -1, -1, 1.0])), folder / "a.nii.gz")
    return folder / "a.nii.gz"


def sixteen_bit_png(folder: Path) -> Path:
    Image.fromarray(np.full((9, 9), 32768 - 1000, np.uint16)).save(folder / "a.png")
    return folder / "a.png"


def huge_nifti(folder: Path) -> Path:
    file = write_nifti(folder / "a.nii", phantom())
    content = bytearray(file.read_bytes())
    content[40:48] = struct.pack("<4h", 3, 30000, 30000, 30000)
    return put(file, bytes(content))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_inputs_give_their_reason(tmp_path, name):
    reason, make = MALFORMED[name]
    path = make(tmp_path)
    source = path.parent if path.parent.name == "s" else path  # a damaged slice of a folder
    with pytest.raises(ScanError) as caught:
        read_scan(source, root=tmp_path)
    assert caught.value.reason == reason
    assert reason in REASONS
    assert caught.value.file in (path, source)
    message = str(caught.value)
    assert "\n" not in message and path.name in message
    assert "Secret" not in message and "4711" not in message


def test_last_axis_of_one_is_squeezed(tmp_path):
    np.testing.assert_array_equal(read_scan(affine_4d(tmp_path, 1)).voxels, phantom())


def test_coloured_and_dicom_masks_are_refused(tmp_path):
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "m.png")
    for source in (tmp_path / "m.png", write_series(tmp_path / "s")):
        with pytest.raises(ScanError, match="not a label mask"):
            read_label_volume(source)


def test_every_reason_is_provoked_and_every_text_is_one_sentence():
    elsewhere = {"no permission", "outside the data folder", "not a label mask"}
    assert {reason for reason, _ in MALFORMED.values()} | elsewhere == set(REASONS)
    for name, meaning in {**REASONS, **FLAGS}.items():
        assert meaning.endswith(".") and "\n" not in name + meaning
