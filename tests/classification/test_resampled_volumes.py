import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lib.classification.inputs import ScanItem
from lib.classification.resampled_volumes import (
    load_middle,
    nearest_middle,
    resampled_view,
    shown,
    standardised,
)
from lib.classification.resampling import symmetrical_positions
from lib.data.store import save_volume

# ------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(("length", "size"), [(500, 128), (250, 64), (200, 40), (50, 64), (7, 4)])
def test_middle_of_a_nearest_resize_as_pillow_does_it(length, size):
    """Sizes at which no middle of a pixel falls between two, where floating point decides."""
    picture = np.random.default_rng(length).integers(0, 256, (length, length), dtype=np.uint8)
    resized = size * 5 // 4
    first = (resized - size) // 2
    whole = Image.fromarray(picture).resize((resized, resized), Image.Resampling.NEAREST)
    expected = np.asarray(whole)[first : first + size, first : first + size]
    chosen = nearest_middle(length, size)
    np.testing.assert_array_equal(picture[np.ix_(chosen, chosen)], expected)


@pytest.mark.parametrize(("dtype", "air"), [(np.int16, -1000), (np.uint8, 0)])
def test_outside_the_lungs_there_is_air(tmp_path, dtype, air):
    volume = np.random.default_rng(0).integers(1, 200, (3, 40, 40)).astype(dtype)
    mask = np.zeros(volume.shape, np.uint8)
    mask[1, 10:30, 10:20], mask[1, 10:30, 20:30] = 1, 2
    save_volume(tmp_path / "scan.b2nd", volume)
    save_volume(tmp_path / "lungs.b2nd", mask)
    rows = nearest_middle(40, 16)
    here = np.ix_(range(3), rows, rows)
    plain = load_middle(ScanItem("scan", tmp_path / "scan.b2nd", None, 0), size=16)
    masked = load_middle(
        ScanItem("scan", tmp_path / "scan.b2nd", tmp_path / "lungs.b2nd", 0), size=16
    )
    assert plain.dtype == masked.dtype == dtype
    np.testing.assert_array_equal(plain, volume[here])
    np.testing.assert_array_equal(masked, np.where(mask > 0, volume, air)[here])


# ----------------------------------------------------------------------------------------- views


@given(seed=st.integers(0, 1000), scale=st.sampled_from([1, 50, 1000]))
def test_standardising_gives_mean_0_and_deviation_1(seed, scale):
    volume = np.random.default_rng(seed).normal(-600, scale, (4, 9, 9)).astype(np.int16)
    found = standardised(volume)
    assert found.dtype == np.float32
    assert abs(found.mean()) < 1e-4
    assert found.std() == pytest.approx(1, abs=1e-4)


def test_a_volume_without_contrast_becomes_zero():
    assert (standardised(np.full((2, 3, 3), -1000, np.int16)) == 0).all()


def test_no_window_is_laid_over_hounsfield_units():
    volume = np.array([-1000, 0, 3000], np.int16).reshape(3, 1, 1)
    found = standardised(volume).ravel()
    assert (found[2] - found[1]) / (found[1] - found[0]) == pytest.approx(3)


def test_plain_views_are_symmetrical_and_random_ones_follow_their_generator():
    volume = np.random.default_rng(0).integers(-1000, 400, (11, 8, 8), dtype=np.int16)
    plain = resampled_view(volume, None, slices=5)
    expected = standardised(volume[symmetrical_positions(11, 5)])
    np.testing.assert_array_equal(plain[0].numpy(), expected)
    views = [resampled_view(volume, np.random.default_rng(n), slices=5) for n in (1, 1, 2)]
    assert views[0].shape == plain.shape == (1, 5, 8, 8)
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


def test_each_axis_is_flipped_half_of_the_time():
    volume = np.arange(4 * 3 * 3, dtype=np.int16).reshape(4, 3, 3)
    flipped = np.zeros(3)
    for seed in range(400):
        view = resampled_view(volume, np.random.default_rng(seed), slices=4)[0].numpy()
        ends = [np.take(view, -1, axis).mean() - np.take(view, 0, axis).mean() for axis in range(3)]
        flipped += np.array(ends) < 0
    np.testing.assert_allclose(flipped / 400, 0.5, atol=0.08)


def test_what_is_shown_is_the_plain_view_in_grey(tmp_path):
    volume = np.random.default_rng(0).integers(-1000, 400, (2, 20, 20), dtype=np.int16)
    save_volume(tmp_path / "scan.b2nd", volume)
    scan = ScanItem("scan", tmp_path / "scan.b2nd", None, 0)
    pictures = shown(scan, {"slices": 5, "image_size": 8})
    assert pictures.dtype == np.uint8
    assert pictures.shape == (5, 8, 8)
    view = resampled_view(load_middle(scan, size=8), None, slices=5)[0].numpy()
    np.testing.assert_allclose(pictures, np.clip((view + 2) / 5, 0, 1) * 255, atol=1)
