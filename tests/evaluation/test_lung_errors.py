"""Tests of lib/evaluation/lung_errors.py: definitions by brute force, errors of known size."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.metrics import compute_dice
from scipy import ndimage
from skimage.morphology import convex_hull_image, isotropic_dilation, isotropic_erosion
from sklearn.metrics import recall_score

from lib.data.scan import LEFT_LUNG, RIGHT_LUNG
from lib.evaluation.lung_errors import (
    RIM_LIMIT,
    WALL_DEPTH,
    between_lungs,
    lesions_kept,
    mediastinum_leakage,
    neighbour_dice,
    outer_wall,
    rim_error,
    slice_dice,
    slice_failures,
)

ROWS, COLUMNS = np.ogrid[:96, :128]


def ellipse(row, column, height, width):
    return ((ROWS - row) / height) ** 2 + ((COLUMNS - column) / width) ** 2 < 1


def chest(slices=3):
    """Two lungs, the left one dented by a heart."""
    lungs = np.zeros((slices, 96, 128), np.uint8)
    lungs[:, ellipse(48, 34, 34, 20)] = RIGHT_LUNG
    lungs[:, ellipse(48, 94, 34, 20) & ~ellipse(54, 72, 18, 16)] = LEFT_LUNG
    return lungs


LUNGS = chest()
TISSUE = LUNGS == 0
EMPTY = np.zeros_like(LUNGS)
lung_masks = hnp.arrays(np.uint8, (2, 7, 9), elements=st.integers(0, 2))


@settings(max_examples=100, deadline=None)
@given(lung_masks)
def test_between_the_lungs_is_seen_from_each_pixel_along_its_row(lungs):
    expected = np.zeros(lungs.shape, bool)
    for place in np.ndindex(lungs.shape):
        row, column = lungs[place[:2]], place[2]
        towards_right, towards_left = row[:column][::-1], row[column + 1 :]
        first = [next((v for v in side if v), 0) for side in (towards_right, towards_left)]
        expected[place] = lungs[place] == 0 and first == [RIGHT_LUNG, LEFT_LUNG]
    np.testing.assert_array_equal(between_lungs(lungs), expected)
    for one, region in zip(lungs, expected, strict=True):
        assert not region.any() or not (region & ~convex_hull_image(one > 0)).any()


def test_between_the_lungs_leaves_out_vessels_ribs_and_slices_with_one_lung():
    lungs = LUNGS[0].copy()
    lungs[40:44, 30:36] = 0  # a vessel
    lungs[46:50, 10:18] = 0  # a rib
    between = between_lungs(lungs)
    assert between[48, 64] and between[54, 72]
    assert not between[40:44, 30:36].any() and not between[46:50, 10:18].any()
    assert not between_lungs(np.where(lungs == RIGHT_LUNG, lungs, 0)).any()


def test_leakage_is_the_share_of_the_mask_in_the_mediastinum():
    between = between_lungs(LUNGS)
    leaking = np.where(between, 1, LUNGS)
    assert mediastinum_leakage(LUNGS, LUNGS, TISSUE) == 0
    expected = between.sum() / (between.sum() + (LUNGS > 0).sum())
    assert mediastinum_leakage(leaking, LUNGS, TISSUE) == pytest.approx(expected)
    assert mediastinum_leakage(leaking, LUNGS, EMPTY > 0) == 0  # the trachea is air
    outwards = isotropic_dilation(LUNGS[0] > 0, 3) & ~between[0]
    assert mediastinum_leakage(outwards[None], LUNGS[:1], TISSUE[:1]) == 0
    assert np.isnan(mediastinum_leakage(EMPTY, LUNGS, TISSUE))


def test_outer_wall_runs_along_the_ribs_only():
    wall = outer_wall(LUNGS[0])
    surface = (LUNGS[0] > 0) & ~ndimage.binary_erosion(LUNGS[0] > 0)
    assert not (wall & ~surface).any()
    assert wall[48, 15] and wall[48, 113]  # the sides
    assert not wall[48, 40:90].any()  # hilum and heart
    assert not outer_wall(np.where(LUNGS[0] == LEFT_LUNG, LUNGS[0], 0)).any()
    assert not outer_wall(EMPTY[0]).any()


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.uint8, (9, 11), elements=st.integers(0, 2)))
def test_outer_wall_lies_near_the_border_of_the_convex_hull(lungs):
    wall = outer_wall(lungs)
    if not wall.any():
        return
    hull = np.pad(convex_hull_image(lungs > 0), 1)
    depth = ndimage.distance_transform_edt(hull)[1:-1, 1:-1]
    width = np.ptp(np.flatnonzero((lungs > 0).any(axis=0)))
    assert depth[wall].max() <= WALL_DEPTH * width + 2  # the hull of a grid is off by up to one


@pytest.mark.parametrize("pixel", [1.0, 0.7])
@pytest.mark.parametrize("steps", [-4, -2, -1, 0, 1, 2, 4])
def test_rim_error_is_the_distance_that_a_mask_was_grown_or_shrunk_by(steps, pixel):
    change = isotropic_dilation if steps > 0 else isotropic_erosion
    moved = np.stack([change(one > 0, abs(steps)) for one in LUNGS])
    errors = rim_error(moved, LUNGS, pixel=pixel)
    # a disk of pixels reaches a little less far than its radius along a slanting border
    assert errors["rim_error"] == pytest.approx(steps * pixel, abs=0.5 * pixel)
    assert errors["rim_distance"] == pytest.approx(abs(errors["rim_error"]))


def test_rim_error_by_brute_force():
    random = np.random.default_rng(0)
    noisy = ndimage.gaussian_filter(random.normal(size=LUNGS[0].shape), 3) * 3
    depth = ndimage.distance_transform_edt(LUNGS[0] > 0) - ndimage.distance_transform_edt(
        LUNGS[0] == 0
    )
    mask = depth + 8 * noisy > 0
    inside, outside = np.argwhere(np.pad(mask, 12)) - 12, np.argwhere(~np.pad(mask, 12)) - 12
    offsets = []
    for place in np.argwhere(outer_wall(LUNGS[0])):
        others = outside if mask[tuple(place)] else inside
        nearest = np.sqrt(((others - place) ** 2).sum(axis=1)).min()
        offsets.append(np.clip(nearest - 1 if mask[tuple(place)] else -nearest, -10, 10))
    errors = rim_error(mask[None], LUNGS[:1])
    assert errors["rim_error"] == pytest.approx(np.mean(offsets))
    assert errors["rim_distance"] == pytest.approx(np.abs(offsets).mean())
    assert errors["rim_distance"] > abs(errors["rim_error"]) + 0.1


def test_rim_error_does_not_see_the_mediastinum_nor_a_missed_lung_and_is_bounded():
    nothing = {"rim_error": 0.0, "rim_distance": 0.0}
    assert rim_error(LUNGS, LUNGS) == nothing
    assert rim_error(np.where(between_lungs(LUNGS), 1, LUNGS), LUNGS)["rim_error"] < 0.3
    assert rim_error(np.where(LUNGS == RIGHT_LUNG, LUNGS, 0), LUNGS) == nothing
    assert rim_error(np.ones_like(LUNGS), LUNGS)["rim_error"] == pytest.approx(RIM_LIMIT, abs=0.2)
    assert rim_error(np.ones_like(LUNGS), LUNGS, pixel=2.0)["rim_error"] == RIM_LIMIT
    undefined = rim_error(EMPTY, LUNGS)
    assert np.isnan(undefined["rim_error"]) and np.isnan(undefined["rim_distance"])
    assert np.isnan(rim_error(LUNGS, EMPTY)["rim_error"])


@settings(max_examples=60, deadline=None)
@given(lung_masks, lung_masks)
def test_lesions_kept_is_the_sensitivity_of_scikit_learn(mask, lesions):
    kept = lesions_kept(mask, lesions)
    for name, infected in (
        ("lesions", lesions > 0),
        ("ground_glass", lesions == 1),
        ("consolidation", lesions == 2),
    ):
        expected = recall_score(infected.ravel(), mask.ravel() > 0, zero_division=np.nan)
        np.testing.assert_allclose(kept[f"{name}_kept"], expected)


def test_failures_are_counted_per_slice():
    true = chest(6)
    true[[0, 5]] = 0  # no lung at either end
    predicted = true.copy()
    predicted[1] = 0  # nothing found
    predicted[2][predicted[2] == LEFT_LUNG] = 0
    predicted[2, :44] = 0  # Dice below one half
    predicted[5] = true[4]
    assert slice_failures(predicted, true) == {
        "slices_missed": 2,
        "slices_missed_share": 0.5,
        "slices_invented": 1,
        "slices_invented_share": 0.5,
    }
    assert np.isnan(slice_failures(true, true[[1] * 6])["slices_invented_share"])
    assert np.isnan(slice_failures(true, EMPTY.repeat(2, 0))["slices_missed_share"])


def test_flickering_lowers_the_likeness_of_neighbours_and_smearing_raises_it():
    true = np.stack([np.where(8 * k < COLUMNS, chest(1)[0], 0) for k in range(6)])
    flickering, smeared = true.copy(), true.copy()
    flickering[3] = 0
    smeared[:] = true[3]
    assert neighbour_dice(true, true)["neighbour_dice_gap"] == 0
    assert neighbour_dice(flickering, true)["neighbour_dice_gap"] < -0.2
    assert neighbour_dice(smeared, true)["neighbour_dice_gap"] > 0
    assert neighbour_dice(smeared, true)["neighbour_dice"] == 1
    assert np.isnan(list(neighbour_dice(true[:1], true[:1]).values())).all()
    assert np.isnan(neighbour_dice(true * 0, true)["neighbour_dice"])


@settings(max_examples=60, deadline=None)
@given(lung_masks, lung_masks)
def test_slice_dice_is_that_of_monai(first, second):
    pair = [torch.tensor(mask > 0)[:, None] for mask in (first, second)]
    expected = compute_dice(*pair, ignore_empty=False).numpy()[:, 0]
    empty = ~((first > 0) | (second > 0)).any(axis=(1, 2))
    np.testing.assert_allclose(slice_dice(first > 0, second > 0)[~empty], expected[~empty])
    assert np.isnan(slice_dice(first > 0, second > 0)[empty]).all()


@settings(max_examples=60, deadline=None)
@given(lung_masks, hnp.arrays(bool, (2, 7, 9)))
def test_a_perfect_mask_has_no_error(lungs, tissue):
    leakage = mediastinum_leakage(lungs, lungs, tissue)
    errors = rim_error(lungs, lungs) | slice_failures(lungs, lungs)
    kept = lesions_kept(lungs, lungs)  # the whole lung infected
    assert all(np.isnan(v) or v == 0 for v in (leakage, *errors.values()))
    assert all(np.isnan(v) or v == 1 for v in kept.values())
