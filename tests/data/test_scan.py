import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.data.scan import LUNG_WINDOW, Scan, ScanError, Window, apply_window, to_grey


@pytest.mark.parametrize(
    ("hounsfield", "grey"),
    [(-3000, 0), (-1350, 0), (-600, 128), (150, 255), (3000, 255)],
)
def test_lung_window_is_centre_minus_600_width_1500(hounsfield, grey):
    assert apply_window(np.int16([hounsfield])) == grey


@given(
    st.lists(st.integers(-4000, 4000), min_size=1), st.integers(-1000, 1000), st.integers(1, 3000)
)
def test_windowing_keeps_order_and_range(values, centre, width):
    grey = apply_window(np.sort(np.int16(values)), Window(centre, width))
    assert grey.dtype == np.uint8
    assert (np.diff(grey.astype(int)) >= 0).all()


def test_pictures_stay_as_they_are():
    picture = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    assert to_grey(picture) is picture
    assert to_grey(picture.astype(np.int16)).max() == 255  # HU 0..255 is near the window's top
    assert LUNG_WINDOW.low == -1350


@pytest.mark.parametrize(
    "voxels", [np.zeros((2, 2), np.int16), np.zeros((2, 2, 2)), np.zeros((2, 2, 2), np.int32)]
)
def test_a_scan_holds_three_axes_of_int16_or_uint8(voxels):
    with pytest.raises(TypeError, match="slices, height, width"):
        Scan(voxels)


def test_scan_error_survives_a_worker_process_and_prints_on_one_line():
    error = pickle.loads(pickle.dumps(ScanError("truncated file", "a/b.jpg", "12 of 90 bytes")))
    assert str(error) == "truncated file: a/b.jpg (12 of 90 bytes)"
    assert error.reason == "truncated file"
