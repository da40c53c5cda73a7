import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.classification.picture_augmentation import Augmentation, augmented

EVERYTHING = Augmentation(
    probability=0.5,
    rotation=15,
    shear=0.2,
    shift=0.05,
    scale=0.15,
    box_jitter=0.075,
    mirrored=True,
    upside_down=True,
    elastic=100,
    noise_variance=0.015,
)
CERTAIN = {"probability": 1.0}


def bright_square(size=64, *, top=24, left=24, side=16):
    """One slice, black but for a square."""
    picture = np.zeros((1, size, size), np.uint8)
    picture[:, top : top + side, left : left + side] = 200
    return picture


def middle(picture):
    """Row and column of the centre of mass."""
    weights = picture[0].astype(float)
    rows, columns = np.indices(weights.shape)
    return np.array([(rows * weights).sum(), (columns * weights).sum()]) / weights.sum()


@pytest.mark.parametrize("ranges", [Augmentation(), dataclasses.replace(EVERYTHING, probability=0)])
def test_nothing_asked_or_never_changes_nothing(ranges):
    ranges = dataclasses.replace(ranges, noise_variance=0.0)
    picture = bright_square()
    found = augmented(picture, np.random.default_rng(0), ranges)
    np.testing.assert_array_equal(found, picture)


@given(seed=st.integers(0, 2**31))
def test_a_view_depends_on_its_seed_alone_and_leaves_what_it_was_made_from(seed):
    picture = bright_square(size=24, top=8, left=6, side=9)
    before = picture.copy()
    first, second = (augmented(picture, np.random.default_rng(seed), EVERYTHING) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(picture, before)
    assert (first.shape, first.dtype) == (picture.shape, np.uint8)


def test_seeds_differ():
    views = [
        augmented(bright_square(), np.random.default_rng(seed), EVERYTHING).tobytes()
        for seed in range(8)
    ]
    assert len(set(views)) == 8


@pytest.mark.parametrize("axis, name", [(2, "mirrored"), (1, "upside_down")])
def test_flips_are_those_of_numpy(axis, name):
    picture = np.random.default_rng(0).integers(0, 256, (2, 9, 9), dtype=np.uint8)
    found = augmented(picture, np.random.default_rng(0), Augmentation(**CERTAIN, **{name: True}))
    np.testing.assert_array_equal(found, np.flip(picture, axis))


@pytest.mark.parametrize("seed", range(5))
def test_a_shift_stays_within_its_share_and_goes_both_ways(seed):
    ranges = Augmentation(**CERTAIN, shift=0.1)
    found = augmented(bright_square(), np.random.default_rng(seed), ranges)
    moved = middle(found) - middle(bright_square())
    assert (np.abs(moved) <= 6.4 + 0.5).all() and np.abs(moved).max() > 0


@pytest.mark.parametrize("seed", range(5))
def test_scale_changes_the_area_and_not_the_middle(seed):
    found = augmented(
        bright_square(), np.random.default_rng(seed), Augmentation(**CERTAIN, scale=0.2)
    )
    ratio = found.sum() / bright_square().sum()
    assert 0.8**2 - 0.1 < ratio < 1.2**2 + 0.1 and abs(ratio - 1) > 0.01
    np.testing.assert_allclose(middle(found), middle(bright_square()), atol=0.6)


def test_rotation_turns_around_the_middle_and_shear_leans():
    bar = bright_square(top=4, left=30, side=4) + bright_square(top=56, left=30, side=4)
    for ranges in (Augmentation(**CERTAIN, rotation=30), Augmentation(**CERTAIN, shear=0.5)):
        found = augmented(bar, np.random.default_rng(1), ranges)
        above, below = middle(found[:, :32])[1], middle(found[:, 32:])[1]
        assert abs(above - below) > 3
        np.testing.assert_allclose(above + below, 2 * 31.5, atol=1.5)


def test_jitter_of_the_box_lets_black_in_or_cuts_off():
    white = np.full((1, 40, 40), 255, np.uint8)
    ranges = Augmentation(**CERTAIN, box_jitter=0.2)
    views = [augmented(white, np.random.default_rng(seed), ranges)[0] for seed in range(12)]
    edges = np.array([[v[0, 20], v[-1, 20], v[20, 0], v[20, -1]] for v in views])
    assert {0, 255} <= set(edges.flatten().tolist())
    assert (edges.min(0) == 0).all() and (edges.max(0) == 255).all()
    assert all(view[20, 20] == 255 for view in views)


def test_an_elastic_distortion_is_the_same_for_all_slices_and_local():
    picture = np.repeat(bright_square(), 2, axis=0)
    ranges = Augmentation(**CERTAIN, elastic=100, elastic_smoothness=(3, 3))
    found = augmented(picture, np.random.default_rng(0), ranges)
    assert (found != picture).any()
    np.testing.assert_array_equal(found[0], found[1])
    assert abs(found[0].sum() / picture[0].sum() - 1) < 0.3


def test_noise_has_at_most_the_variance_and_differs_from_slice_to_slice():
    grey = np.full((2, 64, 64), 128, np.uint8)
    ranges = Augmentation(probability=0.0, noise_variance=0.01)
    found = augmented(grey, np.random.default_rng(0), ranges)
    assert 0 < (found / 255).std() <= 0.1 + 0.01
    assert (found[0] != found[1]).any()
