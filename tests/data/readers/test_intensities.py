import numpy as np
import pytest

from lib.data.readers import read_label_volume, read_scan
from lib.data.scan import ScanError
from tests.data.readers.made_files import phantom, write_nifti


def test_missing_offset_is_mended_only_when_unmistakable(tmp_path):
    scan = read_scan(write_nifti(tmp_path / "a.nii", (phantom() + 1024).astype(np.uint16)))
    np.testing.assert_array_equal(scan.voxels, phantom())
    assert scan.flags == ("unsigned intensities, offset -1024 assumed",)
    with pytest.raises(ScanError, match="not in Hounsfield units"):
        read_scan(write_nifti(tmp_path / "b.nii", np.full((3, 9, 9), 900, np.int16)))


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
