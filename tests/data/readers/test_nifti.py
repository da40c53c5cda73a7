import struct

import nibabel as nib
import numpy as np
import pytest

from lib.data.readers import read_label_volume, read_scan
from tests.data.readers.made_files import nifti_of, phantom, put, write_nifti


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


def test_nifti_scaling_is_applied(tmp_path):
    file = write_nifti(tmp_path / "scan.nii", (2 * phantom() + 2048).astype(np.int16))
    content = bytearray(file.read_bytes())
    content[112:120] = struct.pack("<ff", 0.5, -1024.0)  # slope, intercept
    scan = read_scan(put(file, bytes(content)))
    np.testing.assert_array_equal(scan.voxels, phantom())


def test_eight_bit_nifti_stays_eight_bit(tmp_path):
    volume = (phantom() > 0).astype(np.uint8) * 200
    scan = read_scan(write_nifti(tmp_path / "a.nii.gz", volume))
    assert scan.voxels.dtype == np.uint8
    np.testing.assert_array_equal(scan.voxels, volume)


@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        *(("u1", (10, -1000)), ("i1", (10, 400)), ("u2", (0.7, -1000.3))),
        *(("i2", (1, 0)), ("i4", (1, 0)), ("f4", (1, 0)), ("f8", (1.02, 1))),
    ],
)
def test_values_equal_those_of_nibabel(tmp_path, kind, endianness, dtype, scale):
    values = np.random.default_rng(0).integers(-1000, 250, (12, 10, 4))
    header = kind.header_class(endianness=endianness)
    header.set_data_dtype(dtype)
    image = kind(values, np.diag([-1.0, -1.0, -1.0, 1.0]), header)
    image.header.set_slope_inter(*scale)
    nib.save(image, tmp_path / "a.nii")
    opened = nib.load(tmp_path / "a.nii")
    assert (opened.header.endianness, opened.get_data_dtype().str[1:]) == (endianness, dtype)
    assert (opened.dataobj.slope, opened.dataobj.inter) == pytest.approx(scale)
    np.testing.assert_array_equal(
        read_scan(tmp_path / "a.nii").voxels, np.rint(opened.get_fdata()).T
    )
