import numpy as np
import pytest

from lib.data.scan import ScanError
from lib.data.scan_map import map_scans
from lib.data.store import open_volume, save_volume
from lib.segmentation import given


@pytest.fixture
def pair(tmp_path):
    """A stored scan with its lung mask."""
    scan, mask = np.zeros((3, 4, 5), np.int16), np.zeros((3, 4, 5), np.uint8)
    mask[1, :, 1], mask[1, :, 3] = 1, 2
    files = tmp_path / "scan.b2nd", tmp_path / "mask.b2nd"
    for path, voxels in zip(files, (scan, mask), strict=True):
        save_volume(path, voxels, spacing_mm=(8.0, 0.7, 0.6))
    return files


def test_the_mask_is_taken_as_it_came(pair, tmp_path):
    record = given.keep_given(pair, tmp_path / "kept.b2nd")
    kept = open_volume(tmp_path / "kept.b2nd")
    np.testing.assert_array_equal(kept.load(), open_volume(pair[1]).load())
    assert kept.spacing_mm == (8.0, 0.7, 0.6)
    assert record == {"slices": 3, "slices_with_lung": 1, "right_voxels": 4, "left_voxels": 4}


def test_a_scan_without_a_mask_says_so_and_spoils_no_other(pair, tmp_path):
    items = {"good": pair, "bare": (pair[0], tmp_path / "absent.b2nd")}
    results = map_scans(
        given.keep_given, items, tmp_path / "given", suffix=".b2nd", inputs=given.existing_files,
        code=[given], parameters={}, description="given",
    )  # fmt: skip
    failed = {result.scan_id: result.error for result in results}
    assert failed["good"] is None and (tmp_path / "given/good.b2nd").is_file()
    assert "no lung mask came with this scan" in failed["bare"].message


def test_a_mask_of_another_shape_is_refused(pair, tmp_path):
    save_volume(tmp_path / "small.b2nd", np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"mask uint8 \(3, 4, 4\) for a scan of shape \(3, 4, 5\)"):
        given.keep_given((pair[0], tmp_path / "small.b2nd"), tmp_path / "kept.b2nd")


def test_the_reason_is_a_scan_error(pair, tmp_path):
    with pytest.raises(ScanError, match="no lung mask"):
        given.existing_files((pair[0], tmp_path / "absent.b2nd"))
