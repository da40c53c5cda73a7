from functools import partial

import numpy as np
import pytest

from lib.data.scan import LEFT_LUNG, RIGHT_LUNG, Scan, ScanError
from lib.data.scan_map import map_scans
from lib.data.store import open_volume, save_volume
from lib.segmentation import apply
from lib.segmentation.apply import one_file, segment_scan
from lib.segmentation.morphology import MorphologySegmenter
from lib.segmentation.whole_slice import WholeSlice

SPACING = (8.0, 0.7, 0.6)


class Threshold:
    """Marks dark voxels, right of the middle as the left lung; notes what it was given."""

    def __init__(self, *, below=-500, first_slice=0):
        self.below, self.first_slice = below, first_slice

    def __call__(self, scan: Scan) -> np.ndarray:
        mask = (scan.voxels < self.below).astype(np.uint8)
        mask[..., mask.shape[2] // 2 :] *= LEFT_LUNG
        mask[: self.first_slice] = 0
        return mask


@pytest.fixture
def volume(tmp_path):
    """Three slices of water with two dark columns on the right side and one on the left."""
    voxels = np.zeros((3, 6, 8), np.int16)
    voxels[:, :, [1, 2, 6]] = -800
    path = tmp_path / "scan.b2nd"
    save_volume(path, voxels, spacing_mm=SPACING)
    return path


def test_the_mask_is_stored_with_the_spacing_of_its_scan(volume, tmp_path):
    record = segment_scan(Threshold, volume, tmp_path / "mask.b2nd", first_slice=1)
    stored = open_volume(tmp_path / "mask.b2nd")
    expected = np.zeros((3, 6, 8), np.uint8)
    expected[1:, :, [1, 2]], expected[1:, :, 6] = RIGHT_LUNG, LEFT_LUNG
    np.testing.assert_array_equal(stored.load(), expected)
    assert (stored.dtype, stored.spacing_mm) == (np.uint8, SPACING)
    assert record == {"slices": 3, "slices_with_lung": 2, "right_voxels": 24, "left_voxels": 12}


def test_the_settings_reach_the_segmenter(volume, tmp_path):
    record = segment_scan(Threshold, volume, tmp_path / "mask.b2nd", below=-900)
    assert record == {"slices": 3, "slices_with_lung": 0, "right_voxels": 0, "left_voxels": 0}
    assert not open_volume(tmp_path / "mask.b2nd").load().any()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((2, 6, 8), np.uint8), r"mask uint8 \(2, 6, 8\) for a scan of shape \(3, 6, 8\)"),
        (np.zeros((3, 6, 8), bool), r"mask bool \(3, 6, 8\)"),
        (np.zeros((3, 6, 8), np.int64), r"mask int64"),
    ],
    ids=["a slice short", "bool", "int64"],
)
def test_what_is_no_mask_is_refused_and_not_stored(volume, tmp_path, mask, message):
    with pytest.raises(ValueError, match=message):
        segment_scan(lambda: lambda scan: mask, volume, tmp_path / "mask.b2nd")
    assert not (tmp_path / "mask.b2nd").exists()


def test_a_damaged_scan_is_named(volume, tmp_path):
    volume.write_bytes(volume.read_bytes()[:-40])
    with pytest.raises(ScanError, match="damaged store file"):
        segment_scan(Threshold, volume, tmp_path / "mask.b2nd")


@pytest.mark.parametrize("segmenter", [WholeSlice, MorphologySegmenter])
def test_the_segmenters_of_the_study_fit(volume, tmp_path, segmenter):
    record = segment_scan(segmenter, volume, tmp_path / "mask.b2nd")
    stored = open_volume(tmp_path / "mask.b2nd")
    assert stored.shape == (3, 6, 8)
    mask = stored.load()
    assert record["right_voxels"] == (mask == RIGHT_LUNG).sum()
    assert record["left_voxels"] == (mask == LEFT_LUNG).sum()


def test_many_scans_are_segmented_again_when_a_scan_or_setting_changes(volume, tmp_path):
    def run(**settings):
        results = map_scans(
            partial(segment_scan, Threshold),
            {"0001": volume},
            tmp_path / "masks",
            suffix=".b2nd",
            parameters=settings,
            inputs=one_file,
            code=[apply],
            description="test",
            keep_going=False,
        )
        return [(result.record["right_voxels"], result.skipped) for result in results]

    assert run() == [(36, False)]
    assert run() == [(36, True)]
    assert run(first_slice=1) == [(24, False)]
    save_volume(volume, np.full((1, 6, 8), -800, np.int16))
    assert run(first_slice=0) == [(24, False)]
