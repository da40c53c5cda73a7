import gzip
import hashlib
import struct
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    generate_uid,
)

from lib.data import readers
from lib.data.readers import (
    FLAGS,
    REASONS,
    describe_source,
    read_label_volume,
    read_scan,
    source_files,
    source_sha256,
)
from lib.data.scan import HOUNSFIELD_AIR, ScanError

SERIES = generate_uid()
PATIENT = "Secret^Patient"


def phantom(slices=4, height=10, width=12) -> np.ndarray:
    """HU in the convention; no two flips or turns of it are alike."""
    volume = np.full((slices, height, width), -1000, np.int16)
    volume[:, 2:-2, 2:-2] = 40
    volume[:, 2:4, 3] = 700  # anterior, right
    volume += np.arange(slices, dtype=np.int16)[:, None, None]
    return volume


def dicom_header(pixels, position=(0, 0, 0), **fields) -> pydicom.Dataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    header = pydicom.Dataset()
    header.file_meta = meta
    header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    header.PatientName, header.PatientID, header.StudyDate = PATIENT, "id-4711", "20200131"
    header.Modality, header.SeriesInstanceUID = "CT", SERIES
    header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    header.ImagePositionPatient = [float(value) for value in position]
    header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    header.PixelSpacing, header.SliceThickness = [0.7, 0.8], 5
    header.RescaleSlope, header.RescaleIntercept = 1, -1024
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
    header.PixelRepresentation = int(pixels.dtype.kind == "i")
    header.Rows, header.Columns = pixels.shape[-2:]
    header.PixelData = pixels.tobytes()
    for name, value in fields.items():
        if value is None:
            delattr(header, name)
        else:
            setattr(header, name, value)
    return header


def write_dicom(file: Path, pixels, position=(0, 0, 0), **fields) -> Path:
    dicom_header(pixels, position, **fields).save_as(file, enforce_file_format=True)
    return file


def write_series(folder: Path, volume=None, step=5.0, **fields) -> Path:
    """One file per slice; names in feet-to-head order, so that the reader has to sort."""
    volume = phantom() if volume is None else volume
    folder.mkdir(exist_ok=True)
    for index, pixels in enumerate(volume):
        stored = (pixels.astype(np.int32) + 1024).astype(np.uint16)
        name = f"secret_patient_{len(volume) - index}.dcm"
        write_dicom(
            folder / name, stored, (0, 0, -index * step), InstanceNumber=index + 1, **fields
        )
    return folder


def nifti_of(volume, spacing=(0.8, 0.7, 5.0)) -> nib.Nifti1Image:
    """The volume in the axes (L, P, I), which is its transpose."""
    affine = np.diag([-spacing[0], -spacing[1], -spacing[2], 1.0])
    return nib.Nifti1Image(np.ascontiguousarray(volume.T), affine)


def write_nifti(file: Path, volume, **options) -> Path:
    nib.save(nifti_of(volume, **options), file)
    return file


def write_pictures(folder: Path, names=("1.jpg", "2.jpg", "10.jpg"), size=(12, 10)) -> Path:
    folder.mkdir(exist_ok=True)
    for level, name in enumerate(names):
        Image.new("L", size, 40 * level).save(folder / name)
    return folder


def cut(file: Path, fraction=0.5) -> Path:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * fraction)])
    return file


def put(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


# ---------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "RPI", "LPI", "PIR", "SRA", "ASL", "ILP"])
def test_nifti_orientations(tmp_path, axes, suffix):
    image = nifti_of(phantom())
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes)
    )
    nib.save(image.as_reoriented(turn), tmp_path / f"scan{suffix}")
    scan = read_scan(tmp_path / f"scan{suffix}")
    np.testing.assert_array_equal(scan.voxels, phantom())
    assert scan.spacing_mm == pytest.approx((5.0, 0.7, 0.8))
    assert scan.flags == ()
    labels = read_label_volume(
        write_nifti(tmp_path / "mask.nii.gz", (phantom() > 0).astype(np.uint8))
    )
    np.testing.assert_array_equal(labels, phantom() > 0)


DICOM_TURNS = {
    "supine, head first": ([1, 0, 0, 0, 1, 0], lambda image: image),
    "prone, head first": ([-1, 0, 0, 0, -1, 0], lambda image: image[::-1, ::-1]),
    "mirrored": ([-1, 0, 0, 0, 1, 0], lambda image: image[:, ::-1]),
    "upside down": ([1, 0, 0, 0, -1, 0], lambda image: image[::-1]),
    "transposed": ([0, 1, 0, 1, 0, 0], lambda image: image.T),
}


@pytest.mark.parametrize("name", DICOM_TURNS)
@pytest.mark.parametrize("feet_first", [False, True])
def test_dicom_orientations(tmp_path, name, feet_first):
    directions, turn = DICOM_TURNS[name]
    stored = np.stack([turn(image) for image in phantom()])
    spacing = [0.8, 0.7] if name == "transposed" else [0.7, 0.8]
    folder = write_series(
        tmp_path / "scan",
        stored,
        ImageOrientationPatient=directions,
        PixelSpacing=spacing,
        PatientPosition="FFS" if feet_first else "HFS",
    )
    scan = read_scan(folder)
    np.testing.assert_array_equal(scan.voxels, phantom())
    assert scan.spacing_mm == pytest.approx((5.0, 0.7, 0.8))


def test_dicom_turned_by_ninety_degrees(tmp_path):
    # Rows run to posterior, columns to the patient's right: row r, column c is at x = -r, y = c.
    stored = np.stack([image.T[::-1] for image in phantom()])
    folder = write_series(
        tmp_path / "s", stored, ImageOrientationPatient=[0, 1, 0, -1, 0, 0], PixelSpacing=[0.8, 0.7]
    )
    np.testing.assert_array_equal(read_scan(folder).voxels, phantom())


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


def test_gantry_tilt_and_uneven_spacing_are_flagged(tmp_path):
    folder = write_series(tmp_path / "s")
    write_dicom(folder / "far.dcm", np.zeros((10, 12), np.uint16), (0, 8, -40))
    assert read_scan(folder).flags == ("tilted gantry", "uneven slice spacing")


@pytest.mark.parametrize("transfer_syntax", [RLELossless, JPEG2000Lossless])
def test_compressed_dicom(tmp_path, transfer_syntax):
    stored = (phantom()[0].astype(np.int32) + 1024).astype(np.uint16)
    header = dicom_header(stored)
    if transfer_syntax == RLELossless:
        header.compress(transfer_syntax, generate_instance_uid=False)
    else:
        jpeg2000 = tmp_path / "slice.j2k"
        try:
            Image.fromarray(stored).save(jpeg2000, irreversible=False)
        except (OSError, KeyError) as error:
            pytest.skip(f"no JPEG 2000 encoder: {error}")
        header.PixelData = pydicom.encaps.encapsulate([jpeg2000.read_bytes()])
        header["PixelData"].is_undefined_length = True
        header.file_meta.TransferSyntaxUID = transfer_syntax
    header.save_as(tmp_path / "slice.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(read_scan(tmp_path / "slice.dcm").voxels[0], phantom()[0])


def test_enhanced_dicom(tmp_path):
    volume = phantom()
    stored = (volume[::-1].astype(np.int32) + 1024).astype(np.uint16)  # feet first
    header = dicom_header(stored, NumberOfFrames=len(volume), SOPClassUID=EnhancedCTImageStorage)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(header, name)
    del header.RescaleSlope, header.RescaleIntercept, header.SliceThickness

    def group(sequence, **fields):
        item, outer = pydicom.Dataset(), pydicom.Dataset()
        for name, value in fields.items():
            setattr(item, name, value)
        setattr(outer, sequence, pydicom.Sequence([item]))
        return outer

    shared = group("PixelMeasuresSequence", PixelSpacing=[0.7, 0.8], SliceThickness=5)
    shared.update(group("PlaneOrientationSequence", ImageOrientationPatient=[1, 0, 0, 0, 1, 0]))
    shared.update(group("PixelValueTransformationSequence", RescaleSlope=1, RescaleIntercept=-1024))
    header.SharedFunctionalGroupsSequence = pydicom.Sequence([shared])
    header.PerFrameFunctionalGroupsSequence = pydicom.Sequence(
        group("PlanePositionSequence", ImagePositionPatient=[0, 0, 5 * index])
        for index in range(len(volume))
    )
    header.save_as(tmp_path / "enhanced.dcm", enforce_file_format=True)
    scan = read_scan(tmp_path / "enhanced.dcm")
    np.testing.assert_array_equal(scan.voxels, volume)
    assert scan.spacing_mm == pytest.approx((5.0, 0.7, 0.8))


# ---------------------------------------------------------------------------- intensities


def test_rescale_rounds_clips_and_removes_padding(tmp_path):
    stored = np.array([[-2000, -1000, 3, 30000], [-5000, 0, 1, 2]], np.int16)
    write_dicom(tmp_path / "s.dcm", stored, RescaleSlope=1.5, RescaleIntercept=0)
    scan = read_scan(tmp_path / "s.dcm")
    expected = [[-1000, -1000, 4, 32767], [-1000, 0, 2, 3]]
    np.testing.assert_array_equal(scan.voxels[0], expected)
    assert scan.flags == ("padding",)
    assert scan.spacing_mm == pytest.approx((5, 0.7, 0.8))


@pytest.mark.parametrize("intercept", [-1024.0, -0.5, 40000.0])
@given(
    st.lists(st.integers(0, 65535), min_size=4, max_size=4).map(lambda v: np.array(v, np.uint16))
)
def test_fast_rescale_equals_floats(intercept, stored):
    one = readers._Slice(Path(), "", np.eye(2, 3), None, (2, 2), None, None, None, 1.0, intercept)
    exact = stored.astype(float) + intercept
    np.testing.assert_array_equal(readers._rescaled(stored.reshape(2, 2), one).ravel(), exact)


def test_pixel_padding_value_becomes_air(tmp_path):
    stored = (phantom()[0].astype(np.int32) + 1024).astype(np.uint16)
    stored[0, 0] = 1024  # 0 HU
    write_dicom(tmp_path / "s.dcm", stored, PixelPaddingValue=1024)
    scan = read_scan(tmp_path / "s.dcm")
    assert scan.voxels[0, 0, 0] == HOUNSFIELD_AIR
    assert scan.flags == ("padding",)


@pytest.mark.parametrize("inverted", [True, False])
def test_monochrome1(tmp_path, inverted):
    stored = (phantom()[0].astype(np.int32) + 1024).astype(np.uint16)
    stored = 4095 - stored if inverted else stored
    write_dicom(
        tmp_path / "s.dcm",
        stored,
        PhotometricInterpretation="MONOCHROME1",
        BitsStored=12,
        HighBit=11,
    )
    scan = read_scan(tmp_path / "s.dcm")
    np.testing.assert_array_equal(scan.voxels[0], phantom()[0])
    assert scan.flags == (("inverted grey scale",) if inverted else ())


def test_nifti_scaling_is_applied(tmp_path):
    file = write_nifti(tmp_path / "scan.nii", (2 * phantom() + 2048).astype(np.int16))
    content = bytearray(file.read_bytes())
    content[112:120] = struct.pack("<ff", 0.5, -1024.0)  # slope, intercept
    scan = read_scan(put(file, bytes(content)))
    np.testing.assert_array_equal(scan.voxels, phantom())


def test_missing_offset_is_mended_only_when_unmistakable(tmp_path):
    scan = read_scan(write_nifti(tmp_path / "a.nii", (phantom() + 1024).astype(np.uint16)))
    np.testing.assert_array_equal(scan.voxels, phantom())
    assert scan.flags == ("unsigned intensities, offset -1024 assumed",)
    with pytest.raises(ScanError, match="not in Hounsfield units"):
        read_scan(write_nifti(tmp_path / "b.nii", np.full((3, 9, 9), 900, np.int16)))


def test_eight_bit_nifti_stays_eight_bit(tmp_path):
    volume = (phantom() > 0).astype(np.uint8) * 200
    scan = read_scan(write_nifti(tmp_path / "a.nii.gz", volume))
    assert scan.voxels.dtype == np.uint8
    np.testing.assert_array_equal(scan.voxels, volume)


# ---------------------------------------------------------------------------- pictures


GREY = np.arange(120, dtype=np.uint8).reshape(10, 12)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_grey_pictures_of_every_mode_are_exact(tmp_path, mode):
    Image.fromarray(GREY).convert(mode).save(tmp_path / "a.png")
    scan = read_scan(tmp_path / "a.png")
    np.testing.assert_array_equal(scan.voxels[0], GREY)
    assert (scan.voxels.dtype, scan.spacing_mm, scan.flags) == (np.uint8, None, ())


def test_transparent_pixels_are_black(tmp_path):
    pixels = np.dstack([np.full((4, 4), 255, np.uint8)] * 3 + [np.eye(4, dtype=np.uint8) * 255])
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_scan(tmp_path / "a.png").voxels[0], pixels[..., 3])


def test_exif_orientation_is_followed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    Image.fromarray(GREY).save(tmp_path / "a.png", exif=exif)
    scan = read_scan(tmp_path / "a.png")
    np.testing.assert_array_equal(scan.voxels[0], GREY[::-1, ::-1])
    assert scan.flags == ("turned as EXIF says",)


def test_jpeg_named_png_is_read(tmp_path):
    Image.new("L", (9, 8), 77).save(tmp_path / "a.png", format="JPEG")
    assert (read_scan(tmp_path / "a.png").voxels == 77).all()


def test_folder_order_is_numeric_and_ignores_hidden_files(tmp_path):
    folder = write_pictures(tmp_path / "s")
    put(folder / "._1.jpg", b"x")
    put(folder / ".DS_Store", b"x")
    put(folder / "Thumbs.db", b"x")
    (folder / "3").mkdir()
    assert [file.name for file in source_files(folder)] == ["1.jpg", "2.jpg", "10.jpg"]
    assert read_scan(folder).voxels[:, 0, 0].tolist() == [0, 40, 80]
    listed = [folder / "10.jpg", folder / "2.jpg"]
    assert read_scan(listed).voxels[:, 0, 0].tolist() == [40, 80]


@pytest.mark.parametrize("odd_name", ["0.png", "5.png"])
def test_mixed_sizes_become_the_most_common_size(tmp_path, odd_name):
    folder = write_pictures(tmp_path / "s", ("1.png", "2.png"))
    Image.new("L", (24, 20), 200).save(folder / odd_name)
    scan = read_scan(folder)
    assert scan.voxels.shape == (3, 10, 12)
    assert sorted(scan.voxels[:, 5, 5].tolist()) == [0, 40, 200]
    assert scan.flags == ("mixed slice sizes",)
    assert read_label_volume(folder).shape == (3, 10, 12)


def test_coloured_picture_is_flagged(tmp_path):
    picture = Image.new("RGB", (40, 40), (90, 90, 90))
    picture.paste((255, 0, 0), (4, 4, 16, 16))
    picture.save(tmp_path / "a.png")
    assert read_scan(tmp_path / "a.png").flags == ("coloured picture",)


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


def test_localizers_and_objects_without_pixels_are_left_out(tmp_path):
    folder = write_series(tmp_path / "s")
    scout = np.zeros((30, 30), np.uint16)
    write_dicom(
        folder / "0.dcm",
        scout,
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
        SeriesInstanceUID=generate_uid(),
    )
    write_dicom(folder / "00.dcm", scout, PixelData=None)
    scan = read_scan(folder)
    np.testing.assert_array_equal(scan.voxels, phantom())
    assert scan.flags == ("files without an image left out", "localizers left out")


def test_instance_numbers_replace_missing_positions(tmp_path):
    scan = read_scan(write_series(tmp_path / "s", ImagePositionPatient=None))
    np.testing.assert_array_equal(scan.voxels, phantom())
    assert scan.flags == ("ordered by instance number",)


@pytest.mark.parametrize("count", [1, 2])
def test_very_short_scans(tmp_path, count):
    scan = read_scan(write_series(tmp_path / "s", phantom(count)))
    assert scan.voxels.shape[0] == count
    assert scan.spacing_mm == pytest.approx((5, 0.7, 0.8))


@given(st.permutations(range(7)))
def test_reorder_equals_indexing(order):
    volume = np.arange(7)[:, None, None] * np.ones((1, 2, 2))
    expected = volume[list(order)]
    readers._reorder(volume, np.array(order))
    np.testing.assert_array_equal(volume, expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "1"])
def test_label_pictures_are_exact(tmp_path, mode):
    labels = (GREY % 3).astype(np.uint8)
    if mode == "1":
        labels = (labels > 0).astype(np.uint8)
        picture = Image.fromarray(labels.astype(bool))
    elif mode == "P":
        picture = Image.fromarray(labels).convert("P")
        picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    else:
        picture = Image.fromarray(labels).convert(mode)
    picture.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_label_volume(tmp_path / "m.png")[0], labels)


# ---------------------------------------------------------------------------- naming


def test_sha256_of_one_file_and_of_a_folder(tmp_path):
    folder = write_pictures(tmp_path / "s")
    content = [(folder / name).read_bytes() for name in ("1.jpg", "2.jpg", "10.jpg")]
    assert source_sha256(folder / "1.jpg") == hashlib.sha256(content[0]).hexdigest()
    assert source_sha256(folder) == hashlib.sha256(b"".join(content)).hexdigest()


def test_reports_never_show_a_dicom_file_name(tmp_path):
    folder = write_series(tmp_path / "s")
    assert describe_source(folder / "secret_patient_2.dcm", tmp_path) == (
        "s, file 2 of 4 in name order"
    )
    put(folder / "secret_zero", b"")
    for name in ("secret_zero", "secret_not_there.dcm"):
        assert "secret" not in describe_source(folder / name, tmp_path)
    assert describe_source(folder, tmp_path) == "s"
    picture = write_pictures(tmp_path / "p") / "2.jpg"
    assert describe_source(picture, tmp_path) == "p/2.jpg"
    assert describe_source(picture, folder) == "outside the data folder"


# ---------------------------------------------------------------------------- malformed


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


@pytest.mark.parametrize("whole_folder", [False, True])
def test_links_out_of_the_root(tmp_path, whole_folder):
    outside = write_pictures(tmp_path / "outside")
    root = tmp_path / "root"
    root.mkdir()
    if whole_folder:
        (root / "s").symlink_to(outside)
    else:
        write_pictures(root / "s")
        (root / "s" / "3.jpg").symlink_to(outside / "1.jpg")
    for read in (read_scan, read_label_volume, source_sha256, source_files):
        with pytest.raises(ScanError, match="outside the data folder"):
            read(root / "s", root=root)
    assert len(read_scan(root / "s").voxels) == (3 if whole_folder else 4)


def test_no_permission(tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "s")

    def refuse(*_, **__):
        raise PermissionError("denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(ScanError, match="no permission"):
            read_scan(folder)
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ScanError, match="no permission"):
        read_scan(folder)


@pytest.mark.parametrize(
    ("values", "detail"),
    [
        (np.full((2, 4, 4), 0.5, np.float32), "fractions"),
        (np.full((2, 4, 4), 300, np.int16), "above 255"),
        (np.full((2, 4, 4), -1, np.int16), "below 0"),
    ],
)
def test_masks_that_hold_no_labels(tmp_path, values, detail):
    with pytest.raises(ScanError, match=detail) as caught:
        read_label_volume(write_nifti(tmp_path / "m.nii", values))
    assert caught.value.reason == "not a label mask"


def test_coloured_and_dicom_masks_are_refused(tmp_path):
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "m.png")
    for source in (tmp_path / "m.png", write_series(tmp_path / "s")):
        with pytest.raises(ScanError, match="not a label mask"):
            read_label_volume(source)


def test_reasons_and_flags_are_documented_in_one_sentence():
    for name, meaning in {**REASONS, **FLAGS}.items():
        assert meaning.endswith(".") and "\n" not in name + meaning


# ---------------------------------------------------------------------------- real data


@pytest.mark.real
@pytest.mark.parametrize("place", ["COVID-19", "Cap", "Normal"])
def test_real_dicom_volumes(real_data, place):
    folder = next((real_data / "covid-ct-md" / f"{place} subjects").iterdir())
    scan = read_scan(folder, root=real_data)
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in source_files(folder)]
    heights = [float(header.ImagePositionPatient[2]) for header in headers]
    for index in (0, len(headers) // 2):
        source = source_files(folder)[int(np.argsort(heights)[::-1][index])]
        expected = pydicom.dcmread(source).pixel_array.astype(int) - 1024
        np.testing.assert_array_equal(scan.voxels[index], expected)
    assert scan.spacing_mm[0] == pytest.approx(8.0)
    assert scan.flags == ()


@pytest.mark.real
def test_real_tiff_slices(real_data):
    folder = real_data / "finding-lungs"
    for file in source_files(folder / "2d_images")[::20]:
        scan = read_scan(file)
        stored = tifffile.imread(file)
        np.testing.assert_array_equal(scan.voxels[0], np.where(stored < -1024, -1000, stored))
        assert scan.flags == (("padding",) if stored.min() < -1024 else ())
        mask = read_label_volume(folder / "2d_masks" / file.name)
        np.testing.assert_array_equal(mask[0], tifffile.imread(folder / "2d_masks" / file.name))


@pytest.mark.real
def test_all_real_pictures_are_readable(real_data):
    files = [file for file in (real_data / "covid-ct").rglob("*") if file.is_file()]
    assert len(files) == 331
    flags = [read_scan(file).flags for file in files]
    assert set(flags) <= {(), ("coloured picture",)}


@pytest.mark.real
def test_real_picture_folder(real_data):
    folder = next((real_data / "cov19-ct-db-sample" / "validation" / "covid").iterdir())
    scan = read_scan(folder)
    assert scan.voxels.shape == (25, 512, 512) and scan.voxels.dtype == np.uint8
