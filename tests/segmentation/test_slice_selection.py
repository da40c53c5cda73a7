import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from skimage.draw import disk, ellipse

from lib.data.readers import read_scan
from lib.data.scan import Scan, apply_window, to_grey
from lib.data.selection import Selection
from lib.data.store import save_volume
from lib.segmentation.morphology import MorphologySegmenter
from lib.segmentation.slice_selection import (
    BOX,
    kept_range,
    label_word,
    measure_slices,
    measure_stored,
    select_scans,
    selections,
    volume_box,
)

PUBLISHED = {"thresholds": [0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], "fewest_hits": 2}
TRAINING, TEST = PUBLISHED | {"least_distance": 8}, PUBLISHED | {"least_distance": 0}
AIR, LUNG, WATER, BONE = -1000, -850, 40, 700

shares = st.floats(0, 1).map(lambda ratio: round(ratio, 3))
ratios_of_a_scan = arrays(np.float64, st.integers(1, 40), elements=shares)


def chest(size=512, *, openness=1.0, seed=0):
    """A slice in HU: body, spine, table, and lungs that are smaller where they are less open."""
    unit = size / 512
    picture = np.full((size, size), AIR, np.float64)
    picture[ellipse(250 * unit, 256 * unit, 164 * unit, 224 * unit)] = WATER
    picture[disk((356 * unit, 256 * unit), 24 * unit)] = BONE
    for column in (152, 360) if openness else ():
        lung = ellipse(244 * unit, column * unit, 116 * unit * openness, 68 * unit * openness)
        picture[lung] = LUNG
    picture[int(450 * unit) : int(456 * unit)] = WATER
    noise = np.random.default_rng(seed).normal(0, 20, picture.shape)
    return (picture + noise).astype(np.int16)


def box_and_ratio_by_opencv(grey):
    """FACTS 4.1 in OpenCV's words, for slices of 512 x 512."""
    blurred = cv2.GaussianBlur(grey, (5, 5), 0)
    otsu, _ = cv2.threshold(blurred[blurred > 0], 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    tissue = cv2.erode((blurred > otsu).astype(np.uint8), np.ones((7, 7), np.uint8))
    contours, _ = cv2.findContours(tissue, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    points = max(contours, key=cv2.contourArea).reshape(-1, 2)
    (xmin, ymin), (xmax, ymax) = points.min(0), points.max(0) + 1
    crop = np.where(tissue, grey, 0)[ymin:ymax, xmin:xmax].copy()
    for x in (0, crop.shape[1] - 1):
        for y in (0, crop.shape[0] - 1):
            cv2.floodFill(crop, None, (x, y), 255)
    return (xmin, ymin, xmax, ymax), float((crop < 10).mean())


@pytest.mark.parametrize("openness", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_ratio_and_box_are_those_of_opencv(openness):
    slices = np.stack([chest(openness=openness, seed=seed) for seed in range(2)])
    for row in measure_slices(slices).itertuples():
        box, ratio = box_and_ratio_by_opencv(apply_window(slices[row.slice]))
        np.testing.assert_allclose([row.xmin, row.ymin, row.xmax, row.ymax], box, atol=1)
        assert row.ratio == pytest.approx(ratio, abs=0.004)


def test_the_ratio_grows_with_the_lungs_and_hardly_depends_on_the_size_of_the_picture():
    large, small = (
        measure_slices(np.stack([chest(size, openness=share) for share in (0, 0.3, 0.6, 1)]))
        for size in (512, 256)
    )
    assert large["ratio"].is_monotonic_increasing and large["ratio"].iloc[0] < 0.01
    np.testing.assert_allclose(small["ratio"], large["ratio"], atol=0.02)
    np.testing.assert_allclose(2 * small[BOX], large[BOX], atol=6)


def test_grey_pictures_are_measured_as_the_hounsfield_units_that_they_show():
    slices = np.stack([chest(256), chest(256, openness=0.5)])
    pd.testing.assert_frame_equal(measure_slices(slices), measure_slices(apply_window(slices)))


@given(
    arrays(np.uint8, st.tuples(st.just(2), st.integers(1, 30), st.integers(1, 30))),
)
def test_whatever_the_picture_the_box_lies_inside_and_the_ratio_is_a_share(voxels):
    measured = measure_slices(voxels)
    assert measured["ratio"].between(0, 1).all()
    assert (measured[["xmin", "ymin"]].to_numpy() >= 0).all()
    assert (measured["xmin"] < measured["xmax"]).all() and (
        measured["xmax"] <= voxels.shape[2]
    ).all()
    assert (measured["ymin"] < measured["ymax"]).all() and (
        measured["ymax"] <= voxels.shape[1]
    ).all()


def test_a_stored_scan_is_measured_into_a_file(tmp_path):
    voxels = np.stack([chest(128), chest(128, openness=0)])
    save_volume(tmp_path / "scan.b2nd", voxels)
    record = measure_stored(tmp_path / "scan.b2nd", tmp_path / "scan.csv")
    expected = measure_slices(voxels)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "scan.csv"), expected)
    assert record == {"slices": 2, "largest_ratio": expected["ratio"].max()}


# ------------------------------------------------------------------------------- the kept range
def kept_by_search(ratios, *, thresholds, fewest_hits, least_distance):
    """The rule word by word, one slice after another."""
    if max(ratios) == 0:
        return 0, len(ratios) - 1
    for threshold in thresholds:
        hits = [place for place, ratio in enumerate(ratios) if ratio >= threshold * max(ratios)]
        if len(hits) >= fewest_hits and max(hits) - min(hits) >= least_distance:
            break
    return min(hits), max(hits)


@given(ratios_of_a_scan, st.sampled_from([TRAINING, TEST]))
@example(np.zeros(5), TRAINING)
@example(np.ones(1), TEST)
def test_the_range_is_the_one_that_the_rule_finds(ratios, rule):
    kept = kept_range(ratios, **rule)
    assert (kept.first, kept.last) == kept_by_search(ratios.tolist(), **rule)
    assert 0 <= kept.first <= kept.last < len(ratios)
    assert kept.first <= ratios.argmax() <= kept.last
    if kept.accepted:
        assert kept.last - kept.first >= rule["least_distance"]


@given(ratios_of_a_scan, st.floats(0.05, 1), st.floats(0.05, 1))
def test_a_lower_threshold_never_keeps_less(ratios, one, other):
    assume(ratios.any())
    low, high = sorted((one, other))
    free = {"fewest_hits": 1, "least_distance": 0}
    wide, narrow = (kept_range(ratios, thresholds=[share], **free) for share in (low, high))
    assert wide.first <= narrow.first <= narrow.last <= wide.last


@given(ratios_of_a_scan, st.integers(0, 12), st.integers(0, 12))
def test_a_larger_distance_never_keeps_less(ratios, one, other):
    near, far = (
        kept_range(ratios, **PUBLISHED, least_distance=distance)
        for distance in sorted((one, other))
    )
    assert far.first <= near.first <= near.last <= far.last


@given(ratios_of_a_scan, st.sampled_from([TRAINING, TEST]))
def test_a_scan_from_feet_to_head_keeps_the_same_slices(ratios, rule):
    kept, turned = kept_range(ratios, **rule), kept_range(ratios[::-1], **rule)
    end = len(ratios) - 1
    assert (turned.first, turned.last) == (end - kept.last, end - kept.first)


@pytest.mark.parametrize(
    ("ratios", "rule", "expected"),
    [
        # enough at once: the slice of 0.69 is closed, the hole in the middle is kept
        ([0.1, 0.69, *[1] * 4, 0, *[0.8] * 4, 0.2], TRAINING, (2, 10, 0.7, True)),
        # 7 apart at 0.7: one step down
        ([0.1, 0.65, *[1] * 8, 0.2], TRAINING, (1, 9, 0.6, True)),
        ([0.1, 0.65, *[1] * 8, 0.2], TEST, (2, 9, 0.7, True)),
        # 8 slices remain, as the paper asks, yet they lie 7 apart: the code goes on
        ([0.3, *[1] * 8, 0.1], TRAINING, (0, 8, 0.3, True)),
        # one hit only
        ([0.1, 1, 0.5, 0.1], TEST, (1, 2, 0.5, True)),
        # no threshold is accepted: the range of the lowest
        ([0.05, 0.1, 1, 0.4], TRAINING, (1, 3, 0.1, False)),
        ([0.3], TRAINING, (0, 0, 0.1, False)),
        ([0.3], TEST, (0, 0, 0.1, False)),
    ],
)
def test_the_rule_by_examples(ratios, rule, expected):
    assert kept_range(np.array(ratios), **rule) == expected


@pytest.mark.parametrize("slices", [1, 3, 30])
def test_a_scan_without_any_lung_is_kept_whole_and_flagged(slices):
    first, last, threshold, accepted = kept_range(np.zeros(slices), **TEST)
    assert (first, last, accepted) == (0, slices - 1, False) and np.isnan(threshold)


def test_a_scan_without_slices_is_refused():
    with pytest.raises(ValueError, match="a scan without slices has no range to keep"):
        kept_range(np.empty(0), **TEST)


@pytest.mark.parametrize("thresholds", [[], [0.5, 0.6], [0.5, 0.5], [1.1, 0.5], [0.5, 0.0]])
def test_thresholds_that_do_not_fall_are_refused(thresholds):
    with pytest.raises(ValueError, match="thresholds fall from at most 1 to above 0, got"):
        kept_range(np.ones(3), thresholds=thresholds, fewest_hits=2, least_distance=0)


# --------------------------------------------------------------------------------- whole data sets
boxes = arrays(np.int64, (4,), elements=st.integers(0, 500)).map(
    lambda box: np.concatenate([box[:2], box[:2] + box[2:] + 1])
)


@given(st.lists(boxes, min_size=1, max_size=9))
def test_the_box_of_a_volume_is_the_smallest_around_all(found):
    xmin, ymin, xmax, ymax = volume_box(np.array(found))
    covered = np.zeros((1002, 1002), bool)
    for box in found:
        covered[box[1] : box[3], box[0] : box[2]] = True
    rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
    assert (xmin, ymin, xmax, ymax) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def measured(ratios):
    """Measures of a scan whose boxes tell its slices apart."""
    return pd.DataFrame(
        [(place, ratio, 10 - place, 20, 90 + place, 80) for place, ratio in enumerate(ratios)],
        columns=["slice", "ratio", *BOX],
    )


def test_every_scan_is_selected_by_the_rule_of_its_split():
    manifest = pd.DataFrame(
        [("b", "test", None), ("a", "train", "pneumonia"), ("c", "train", "covid")],
        columns=["scan_id", "split", "label"],
    )
    ratios = [0.1, 0.65, *[1] * 7, 0.2]
    scans = {"a": measured(ratios), "b": measured(ratios), "c": measured([0, 0])}
    table = select_scans(
        manifest, scans, positive=["covid"], **PUBLISHED, least_distance={"train": 8, "test": 0}
    )
    assert selections(table) == [
        Selection("b", "unknown", 2, 8, (2, 20, 98, 80)),
        Selection("a", "non-covid", 1, 9, (1, 20, 99, 80)),
        Selection("c", "covid", 0, 1, (9, 20, 91, 80)),
    ]
    assert table["slices"].tolist() == [10, 10, 2]
    assert table["threshold"].tolist()[:2] == [0.7, 0.2] and np.isnan(table["threshold"][2])
    assert table["accepted"].tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("label", "word"), [("covid", "covid"), ("normal", "non-covid"), (None, "unknown")]
)
def test_labels_are_the_published_words(label, word):
    assert label_word(label, ["covid"]) == word


# -------------------------------------------------------------------------------------- real scans
REAL = (
    "covid-ct-md/COVID-19 subjects/P001",
    "covid-ct-md/Cap subjects/cap001",
    "covid-ct-md/Normal subjects/normal001",
    "cov19-ct-db-sample/validation/covid/ct_scan_77",
)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("place", REAL)
def test_real_scans_lose_closed_lungs_at_both_ends(real_data, place):
    voxels = read_scan(real_data / place).voxels
    found = measure_slices(voxels)
    by_opencv = [box_and_ratio_by_opencv(to_grey(one)) for one in voxels]
    np.testing.assert_allclose(found["ratio"], [ratio for _, ratio in by_opencv], atol=0.002)
    np.testing.assert_allclose(found[BOX], [box for box, _ in by_opencv], atol=4)

    kept = kept_range(found["ratio"].to_numpy(), **TRAINING)
    assert kept.threshold == 0.7 and kept.accepted
    assert kept.first > 0 and kept.last < len(voxels) - 1  # something is dropped at both ends
    inside = found["slice"].between(kept.first, kept.last).to_numpy()
    areas = MorphologySegmenter()(Scan(voxels)).astype(bool).sum((1, 2))  # another way to see lungs
    assert np.median(areas[~inside]) < 0.25 * np.median(areas[inside])
    assert areas[[0, -1]].max() < 0.1 * areas.max()  # the outermost slices are closed or no lung
    xmin, ymin, xmax, ymax = volume_box(found.loc[inside, BOX].to_numpy())
    share = (xmax - xmin) * (ymax - ymin) / np.prod(voxels.shape[1:])
    assert 0.4 < share < 1
