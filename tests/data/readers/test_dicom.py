from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.config import WARN, disable_value_validation
from pydicom.tag import Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    RTPlanStorage,
    generate_uid,
)

from lib.data.readers import dicom, read_scan, source_files
from lib.data.scan import HOUNSFIELD_AIR, ScanError
from tests.data.readers.made_files import dicom_header, phantom, write_dicom, write_series

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


def write_enhanced(file: Path, volume, syntax=ExplicitVRLittleEndian) -> Path:
    """One multi-frame file, feet first."""
    stored = (volume[::-1].astype(np.int32) + 1024).astype(np.uint16)
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
    if syntax == RLELossless:
        header.compress(syntax, generate_instance_uid=False)
    header.file_meta.TransferSyntaxUID = syntax
    header.save_as(file, enforce_file_format=True)
    return file


@pytest.mark.parametrize("frame_by_frame", [False, True])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless])
def test_enhanced_dicom(tmp_path, monkeypatch, syntax, frame_by_frame):
    if frame_by_frame:
        monkeypatch.setattr(dicom, "DEFERRED_BYTES", 100)
    scan = read_scan(write_enhanced(tmp_path / "enhanced.dcm", phantom(), syntax))
    np.testing.assert_array_equal(scan.voxels, phantom())
    assert scan.spacing_mm == pytest.approx((5.0, 0.7, 0.8))


def test_deflated_files_cannot_be_read_frame_by_frame(tmp_path, monkeypatch):
    syntax = DeflatedExplicitVRLittleEndian
    file = write_enhanced(tmp_path / "enhanced.dcm", phantom(), syntax)
    np.testing.assert_array_equal(read_scan(file).voxels, phantom())
    monkeypatch.setattr(dicom, "DEFERRED_BYTES", 100)
    with pytest.raises(ScanError, match="unsupported compression"):
        read_scan(file)


@pytest.mark.parametrize(
    "syntax",
    [
        *(ExplicitVRLittleEndian, ImplicitVRLittleEndian),
        *(ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
@pytest.mark.parametrize("unused_bits", [0, 4])
def test_uncompressed_pixels_equal_those_of_pydicom(tmp_path, syntax, dtype, unused_bits):
    bits = np.iinfo(dtype).bits
    stored = np.random.default_rng(0).integers(0, 2**bits, (10, 12)).astype(dtype)
    header = dicom_header(
        stored,
        **{"BitsAllocated": bits, "BitsStored": bits - unused_bits, "RescaleIntercept": -1000},
        **{"HighBit": bits - unused_bits - 1, "RescaleSlope": 0.5},
    )
    if syntax == ExplicitVRBigEndian:
        header.PixelData = stored.byteswap().tobytes()
    header["PixelData"].VR = "OB" if bits == 8 else "OW"
    header.file_meta.TransferSyntaxUID = syntax
    header.save_as(tmp_path / "s.dcm", enforce_file_format=True)
    expected = np.rint(pydicom.dcmread(tmp_path / "s.dcm").pixel_array * 0.5 - 1000)
    expected[expected < -1024] = HOUNSFIELD_AIR
    np.testing.assert_array_equal(read_scan(tmp_path / "s.dcm").voxels[0], expected)


@pytest.mark.filterwarnings("ignore:The number of bytes of pixel data")
def test_a_file_with_more_pixels_than_it_says_is_left_out_as_a_whole(tmp_path):
    folder = write_series(tmp_path / "s")
    two = np.zeros((2, 10, 12), np.uint16)
    write_dicom(folder / "x.dcm", two, (0, 0, 50))
    scan = read_scan(folder, skip_unreadable=True)
    np.testing.assert_array_equal(scan.voxels, phantom())
    assert scan.flags == ("1 unreadable slices left out",)


@pytest.mark.filterwarnings("error")
def test_no_warning_quotes_a_header_and_no_setting_is_touched(tmp_path, monkeypatch):
    header = dicom_header(np.zeros((10, 12), np.uint16))
    with disable_value_validation():  # to write what the standard forbids
        for name in ("ImageType", "SeriesInstanceUID"):
            header[name] = pydicom.DataElement(Tag(name), header[name].VR, "secret^" + "x" * 80)
        header.save_as(tmp_path / "s.dcm", enforce_file_format=True)
    with pytest.warns(UserWarning, match="secret"):
        str(pydicom.dcmread(tmp_path / "s.dcm").SeriesInstanceUID)
    settings = type(pydicom.config.settings)
    monkeypatch.setattr(settings, "reading_validation_mode", property(lambda self: WARN))
    assert read_scan(tmp_path / "s.dcm").flags == ()


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
    exact = stored.astype(float) + intercept
    np.testing.assert_array_equal(
        dicom._rescaled(stored.reshape(2, 2), 1.0, intercept).ravel(), exact
    )


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


def test_localizers_and_objects_without_pixels_are_left_out(tmp_path):
    folder = write_series(tmp_path / "s")
    scout = np.zeros((30, 30), np.uint16)
    write_dicom(
        folder / "0.dcm",
        scout,
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
        SeriesInstanceUID=generate_uid(),
    )
    plan = dicom_header(scout, (0, 0, 0), PixelData=None)
    plan.SOPClassUID = plan.file_meta.MediaStorageSOPClassUID = RTPlanStorage
    plan.save_as(folder / "00.dcm", enforce_file_format=True)
    scan = read_scan(folder)
    np.testing.assert_array_equal(scan.voxels, phantom())
    assert scan.flags == ("files without an image left out", "localizers left out")


def test_an_image_that_lost_its_pixels_is_damaged(tmp_path):
    folder = write_series(tmp_path / "s")
    write_dicom(folder / "00.dcm", np.zeros((30, 30), np.uint16), PixelData=None)
    with pytest.raises(ScanError, match="damaged file"):
        read_scan(folder)


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
    dicom._reorder(volume, np.array(order))
    np.testing.assert_array_equal(volume, expected)


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
