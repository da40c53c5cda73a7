import time

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from monai.metrics.utils import get_mask_edges, get_surface_distance
from skimage.metrics import hausdorff_distance
from sklearn.metrics import f1_score, jaccard_score

from lib.data.scan import LEFT_LUNG, RIGHT_LUNG, Scan
from lib.data.store import save_volume
from lib.evaluation import lung_errors
from lib.evaluation.segmentation import (
    overlap,
    read_scores,
    score_masks,
    score_stored,
    surface_agreement,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*get_mask_edges.*:FutureWarning")


def pair_of_masks(min_dims, max_dims, max_side):
    shapes = hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, min_side=2, max_side=max_side)
    return shapes.flatmap(lambda shape: st.tuples(*[hnp.arrays(bool, shape)] * 2))


def blobs(seed, shape=(6, 24, 20)):
    random = np.random.default_rng(seed)
    volume = np.zeros(shape, np.uint8)
    for lung, half in ((RIGHT_LUNG, np.s_[..., :10]), (LEFT_LUNG, np.s_[..., 10:])):
        volume[half][random.random(volume[half].shape) < random.uniform(0.1, 0.9)] = lung
    return volume


def as_batch(mask):
    return torch.tensor(mask)[None, None]


@settings(max_examples=100, deadline=None)
@given(pair_of_masks(1, 3, 6))
def test_overlap_is_that_of_scikit_learn(masks):
    predicted, true = (mask.ravel() for mask in masks)
    dice, iou = overlap(predicted, true)
    assert dice == pytest.approx(f1_score(true, predicted, zero_division=1.0))
    expected = jaccard_score(true, predicted, zero_division=0.0) if (predicted | true).any() else 1
    assert iou == pytest.approx(expected)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (8.0, 0.7, 0.7)])
@pytest.mark.parametrize("seed", range(4))
def test_surface_distances_are_those_of_monai(seed, spacing):
    predicted, true = blobs(seed) > 0, blobs(seed + 100) > 0
    options = {"include_background": True, "spacing": spacing}
    pair = as_batch(predicted), as_batch(true)
    hd95, assd = surface_agreement(predicted, true, np.array(spacing))
    assert hd95 == pytest.approx(
        compute_hausdorff_distance(*pair, percentile=95, **options).item(), rel=1e-5
    )
    assert assd == pytest.approx(
        compute_average_surface_distance(*pair, symmetric=True, **options).item(), rel=1e-5
    )


@settings(max_examples=60, deadline=None)
@given(pair_of_masks(2, 2, 9))
def test_surface_distances_of_any_shapes_are_those_of_monai(masks):
    predicted, true = masks
    if not predicted.any() or not true.any():
        return
    hd95, assd = surface_agreement(predicted, true, np.ones(2))
    edges = get_mask_edges(predicted, true, always_return_as_numpy=True)
    ways = [get_surface_distance(*edges), get_surface_distance(*edges[::-1])]
    assert hd95 == pytest.approx(max(np.percentile(way, 95) for way in ways), abs=1e-5)
    assert assd == pytest.approx(np.concatenate(ways).mean(), abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(pair_of_masks(2, 3, 7))
def test_surface_distances_are_bounded_symmetric_and_zero_for_equal_masks(masks):
    predicted, true = masks
    spacing = np.ones(true.ndim)
    hd95, assd = surface_agreement(predicted, true, spacing)
    np.testing.assert_allclose((hd95, assd), surface_agreement(true, predicted, spacing))
    assert surface_agreement(true, true, spacing) == (0.0, 0.0)
    if predicted.any() and true.any() and len(true) > 1:
        edges = get_mask_edges(predicted, true, always_return_as_numpy=True)
        assert hd95 <= hausdorff_distance(*edges) + 1e-9


def test_single_slice_is_compared_in_its_plane():
    predicted, true = blobs(1, (1, 24, 20)), blobs(2, (1, 24, 20))
    volume = score_masks(predicted, true, spacing_mm=(5, 0.7, 0.7))
    np.testing.assert_equal(volume, score_masks(predicted[0], true[0], spacing_mm=(0.7, 0.7)))
    filled = np.ones((1, 9, 9), bool)
    moved = np.pad(filled[0], ((0, 0), (3, 0)))[None], np.pad(filled[0], ((0, 0), (0, 3)))[None]
    assert surface_agreement(*moved, np.ones(3))[1] > 0


def test_known_shift_in_millimetres():
    true = np.zeros((5, 30, 40), np.uint8)
    true[1:4, 5:25, 4:14], true[1:4, 5:25, 24:34] = RIGHT_LUNG, LEFT_LUNG
    scores = score_masks(np.roll(true, 2, axis=2), true, spacing_mm=(5, 1.5, 1.5))
    assert scores["dice_right"] == scores["dice_left"] == scores["dice_both"] == 0.8
    assert scores["hd95_right"] == 3.0
    assert 0 < scores["assd_left"] < 3
    assert score_masks(np.roll(true, 2, axis=2), true)["hd95_both"] == 2.0
    assert not scores["empty"] and not scores["lung_missing"] and "leak" not in scores


def test_errors_are_those_of_the_whole_picture_and_counted_in_the_unit_of_the_distances():
    true, lesions = blobs(3), blobs(4)
    predicted = np.maximum(true, np.roll(true, 1, axis=1))
    predicted[:, ::3] = 0
    voxels = np.where(blobs(5) > 0, 0, -800).astype(np.int16)
    scores = score_masks(
        predicted, true, spacing_mm=(8, 0.5, 0.5), scan=Scan(voxels), lesions=lesions
    )
    expected = lung_errors.rim_error(predicted, true, pixel=0.5)
    expected |= lung_errors.slice_failures(predicted, true)
    expected |= lung_errors.neighbour_dice(predicted, true)
    expected |= lung_errors.lesions_kept(predicted, lesions)
    expected["mediastinum_leakage"] = lung_errors.mediastinum_leakage(predicted, true, voxels == 0)
    np.testing.assert_equal({name: scores[name] for name in expected}, expected)
    assert 0 < scores["mediastinum_leakage"] < 1 and scores["rim_distance"] > 0
    assert "lesions_kept" not in score_masks(predicted, true)


def test_lungs_swapped_is_right_only_for_both():
    true = blobs(3)
    swapped = np.choose(true, (0, LEFT_LUNG, RIGHT_LUNG)).astype(np.uint8)
    scores = score_masks(swapped, true)
    assert (scores["dice_right"], scores["dice_left"], scores["dice_both"]) == (0, 0, 1)


LUNGS = np.zeros((2, 10, 20), np.uint8)
LUNGS[:, 2:8, 2:8], LUNGS[:, 2:8, 12:18] = RIGHT_LUNG, LEFT_LUNG
NOTHING = np.zeros_like(LUNGS)
RIGHT_ONLY = np.where(LUNGS == RIGHT_LUNG, LUNGS, 0)


@pytest.mark.parametrize(
    ("predicted", "true", "dice_left", "hd95_left", "empty", "missing"),
    [
        (NOTHING, NOTHING, 1, 0, False, False),
        (NOTHING, LUNGS, 0, np.nan, True, False),
        (LUNGS, NOTHING, 0, np.nan, False, False),
        (RIGHT_ONLY, LUNGS, 0, np.nan, False, True),
        (RIGHT_ONLY, RIGHT_ONLY, 1, 0, False, False),
        (LUNGS, LUNGS, 1, 0, False, False),
    ],
)
def test_empty_masks_and_flags(predicted, true, dice_left, hd95_left, empty, missing):
    scores = score_masks(predicted, true)
    assert scores["dice_left"] == dice_left
    np.testing.assert_equal(scores["hd95_left"], hd95_left)
    np.testing.assert_equal(scores["assd_left"], hd95_left)
    assert scores["empty"] is empty and scores["lung_missing"] is missing


@pytest.mark.parametrize(
    ("lungs", "leak"),
    [
        (np.s_[:, 20:44, 16:48], False),
        (np.s_[:, 20:44, 0:30], True),
        (np.s_[:, :0], False),
    ],
)
@pytest.mark.parametrize("dtype", [np.int16, np.uint8])
def test_leak(lungs, leak, dtype):
    air, water = (-1000, 0) if dtype == np.int16 else (10, 200)
    voxels = np.full((2, 64, 64), air, dtype)
    voxels[:, 10:54, 10:54] = water
    voxels[:, 20:44, 16:48] = air
    mask = np.zeros(voxels.shape, np.uint8)
    mask[lungs] = RIGHT_LUNG
    scores = score_masks(mask, mask, scan=Scan(voxels))
    assert scores["leak"] is leak
    assert (scores["outside_body_share"] > 0.1) == leak
    assert score_masks(mask[0], mask[0], scan=Scan(voxels[:1]))["leak"] is leak


@pytest.mark.parametrize(
    ("predicted", "true", "options", "message"),
    [
        (LUNGS, LUNGS[:1], {}, "different shapes"),
        (LUNGS, LUNGS, {"spacing_mm": (1, 1)}, "3 positive spacings"),
        (LUNGS, LUNGS, {"spacing_mm": (1, 1, 0)}, "3 positive spacings"),
        (LUNGS, LUNGS, {"scan": Scan(np.zeros((1, 4, 4), np.uint8))}, "does not fit the scan"),
        (LUNGS, LUNGS, {"lesions": LUNGS[0]}, "does not fit the lesions"),
    ],
)
def test_wrong_input(predicted, true, options, message):
    with pytest.raises(ValueError, match=message):
        score_masks(predicted, true, **options)


@pytest.fixture
def stored(tmp_path):
    """Store masks of a scan in HU; gives the files that `score_stored` takes."""

    def store(predicted, true, *, spacing_mm=None):
        voxels = np.where(true > 0, -800, 0).astype(np.int16)
        files = tuple(tmp_path / f"{name}.b2nd" for name in ("predicted", "true", "scan"))
        for file, volume in zip(files, (predicted, true, voxels), strict=True):
            save_volume(file, volume, spacing_mm=spacing_mm if volume is voxels else None)
        return files, Scan(voxels, spacing_mm)

    return store


@pytest.mark.parametrize("spacing", [None, (8.0, 0.7, 0.6)])
def test_stored_masks_are_scored_with_the_spacing_of_the_scan(stored, tmp_path, spacing):
    predicted, true = blobs(1), blobs(2)
    files, scan = stored(predicted, true, spacing_mm=spacing)
    assert score_stored(files, tmp_path / "0001.csv") == {}
    (scores,) = pd.read_csv(tmp_path / "0001.csv").to_dict("records")
    np.testing.assert_equal(scores, score_masks(predicted, true, spacing_mm=spacing, scan=scan))
    assert scores["distance_unit"] == ("mm" if spacing else "pixels")


def test_stored_lesions_are_used_where_there_are_any(stored, tmp_path):
    lungs = blobs(1)
    files, _ = stored(lungs, lungs)
    lesions = np.where(lungs == LEFT_LUNG, 2, 0).astype(np.uint8)
    save_volume(tmp_path / "lesions.b2nd", lesions)
    score_stored((*files, tmp_path / "lesions.b2nd"), tmp_path / "0001.csv")
    (scores,) = pd.read_csv(tmp_path / "0001.csv").to_dict("records")
    assert scores["lesions_kept"] == scores["consolidation_kept"] == 1
    assert np.isnan(scores["ground_glass_kept"])


def test_undefined_distances_are_empty_cells(stored, tmp_path):
    files, _ = stored(np.zeros_like(blobs(1)), blobs(1))
    score_stored(files, tmp_path / "0001.csv")
    (scores,) = pd.read_csv(tmp_path / "0001.csv").to_dict("records")
    assert scores["dice_both"] == 0 and np.isnan(scores["hd95_both"])
    assert scores["empty"] is True and scores["leak"] is False


MANIFEST = pd.DataFrame(
    {
        "scan_id": ["0001", "0002", "0003"],
        "patient_id": ["007", "007", "008"],
        "split": ["train", "train", "test"],
        "label": ["covid", None, "normal"],
        "slices": [3, 4, 5],
    }
)


def test_scores_are_read_beside_what_they_are_grouped_by(tmp_path):
    paths = [tmp_path / f"{name}.csv" for name in ("0003", "0001")]
    for path, dice in zip(paths, (0.3, 0.1), strict=True):
        pd.DataFrame([{"dice_both": dice, "empty": False}]).to_csv(path, index=False)
    scores = read_scores(paths, MANIFEST)
    assert scores.columns.tolist() == [
        *("scan_id", "patient_id", "split", "label", "dice_both", "empty")
    ]
    assert scores.values.tolist() == [
        ["0001", "007", "train", "covid", 0.1, False],
        ["0003", "008", "test", "normal", 0.3, False],
    ]


def test_without_files_there_are_no_scores():
    scores = read_scores([], MANIFEST)
    assert scores.empty
    assert scores.columns.tolist() == ["scan_id", "patient_id", "split", "label"]


def test_one_scan_scored_twice_is_refused(tmp_path):
    paths = [tmp_path / folder / "0001.csv" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text("dice_both\n0.5\n")
    with pytest.raises(pd.errors.MergeError):
        read_scores(paths, MANIFEST)


def test_whole_scan_is_scored_within_a_second():
    rows, columns = np.ogrid[:256, :256]
    true = np.zeros((24, 256, 256), np.uint8)
    for lung, centre in ((RIGHT_LUNG, 75), (LEFT_LUNG, 181)):
        true[:, ((rows - 128) / 75) ** 2 + ((columns - centre) / 45) ** 2 < 1] = lung
    start = time.process_time()
    score_masks(np.roll(true, 3, axis=1), true, spacing_mm=(8, 1.4, 1.4))
    assert time.process_time() - start < 1.0  # 0.3 s on an idle core
