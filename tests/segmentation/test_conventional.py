import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from skimage import measure, morphology
from skimage.draw import disk, ellipse
from skimage.filters import roberts

from lib.data.scan import LEFT_LUNG, RIGHT_LUNG, Scan, to_grey
from lib.data.store import open_volume, save_volume
from lib.segmentation import conventional
from lib.segmentation.morphology import published_lungs

SIZE = 96
AIR, LUNG, WATER = -1000, -850, 40


def chest(scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """A slice in HU and its lungs, smaller where the scale is; 0 leaves them out."""
    voxels, mask = np.full((SIZE, SIZE), AIR, np.int16), np.zeros((SIZE, SIZE), np.uint8)
    voxels[ellipse(48, 48, 36, 44)] = WATER
    for lung, column in ((RIGHT_LUNG, 27), (LEFT_LUNG, 69)) if scale else ():
        shape = ellipse(48, column, 24 * scale, 14 * scale)
        voxels[shape], mask[shape] = LUNG, lung
    return voxels, mask


def scan_and_mask(*scales: float) -> tuple[Scan, np.ndarray]:
    slices = [chest(scale) for scale in scales]
    return Scan(np.stack([voxels for voxels, _ in slices])), np.stack([mask for _, mask in slices])


def refined_by_scikit_image(lungs: np.ndarray, radius: int) -> np.ndarray:
    """The published sequence in scikit-image's words, holes found as regions off the border."""
    closed = morphology.closing(np.pad(lungs, radius), morphology.disk(radius))
    regions = measure.label(closed[radius:-radius, radius:-radius], connectivity=2)
    largest = sorted(measure.regionprops(regions), key=lambda region: -region.area)[:2]
    edges = roberts(np.isin(regions, [region.label for region in largest]).astype(float)) > 0
    outside = measure.label(~edges, connectivity=1, background=0)
    border = np.unique(np.concatenate([outside[0], outside[-1], outside[:, 0], outside[:, -1]]))
    return edges | ~np.isin(outside, border)


@pytest.mark.parametrize("seed", range(4))
def test_refining_is_the_published_sequence(seed):
    random = np.random.default_rng(seed)
    lungs = chest()[1] > 0
    lungs[30:34, 25:29] = False  # a vessel
    lungs[48, 20:30] = False  # a gap
    lungs[random.integers(4, SIZE - 4, 5), random.integers(4, SIZE - 4, 5)] = True  # specks
    radius = round(10 * SIZE / 512)
    np.testing.assert_array_equal(
        conventional.refine_slice(lungs), refined_by_scikit_image(lungs, radius)
    )


def test_a_lung_that_the_picture_cuts_off_stays_whole():
    lungs = np.zeros((SIZE, SIZE), bool)
    lungs[30:70, :40] = True
    refined = conventional.refine_slice(lungs)
    assert refined[lungs].mean() > 0.99 and refined.sum() < 1.1 * lungs.sum()


def test_refining_scans_fills_holes_and_drops_specks_slice_by_slice():
    _, truth = scan_and_mask(1, 0.6, 0)
    mask = truth.copy()
    mask[0, 40:46, 24:30] = 0
    mask[1, 90, 90] = RIGHT_LUNG
    refined = conventional.refine(mask)
    assert refined.dtype == np.uint8
    assert not refined[1, 85:].any() and not refined[2].any()
    assert refined[0, 40:46, 24:30].all()
    for lung in (RIGHT_LUNG, LEFT_LUNG):
        changed = (refined == lung) != (truth == lung)
        assert changed.sum() < 0.15 * (truth == lung).sum()  # the rim of Roberts' operator
    np.testing.assert_array_equal(conventional.refine(np.zeros_like(mask)), 0)


def test_slices_below_the_share_of_the_largest_are_small():
    mask = np.zeros((5, 1, 10), np.uint8)
    for place, area in enumerate((0, 3, 4, 5, 10)):
        mask[place, 0, :area] = 1
    np.testing.assert_array_equal(conventional.small_slices(mask, 0.4), [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(conventional.small_slices(mask, 0), False)
    assert conventional.small_slices(np.zeros_like(mask), 0.4).all()


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="lies between 0 and 1, got"):
        conventional.small_slices(np.ones((1, 2, 2), np.uint8), share)


def test_a_failed_slice_is_segmented_again_and_the_others_stay():
    scan, truth = scan_and_mask(1, 1, 1, 0.8)
    mask = truth.copy()
    mask[1] = 0
    mask[1, 30:40, 25:30] = RIGHT_LUNG  # a fragment
    mask[2, 0, 0] = LEFT_LUNG  # nonsense in a large slice is not the rule's business
    replaced = conventional.replace_small_slices(mask, scan, share=0.4)
    np.testing.assert_array_equal(replaced[[0, 2, 3]], mask[[0, 2, 3]])
    np.testing.assert_array_equal(replaced[1] > 0, published_lungs(to_grey(scan.voxels[1])))
    assert (replaced[1] == truth[1]).mean() > 0.97


def test_without_any_lung_every_slice_is_segmented_again():
    scan, truth = scan_and_mask(1, 0.9)
    replaced = conventional.replace_small_slices(np.zeros_like(truth), scan, share=0.4)
    for slice_, voxels in zip(replaced, scan.voxels, strict=True):
        np.testing.assert_array_equal(slice_ > 0, published_lungs(to_grey(voxels)))
    assert set(np.unique(replaced)) == {0, RIGHT_LUNG, LEFT_LUNG}


def test_a_mask_of_another_scan_is_refused():
    scan, mask = scan_and_mask(1, 1)
    with pytest.raises(ValueError, match="does not fit the scan"):
        conventional.replace_small_slices(mask[:1], scan, share=0.4)


@settings(max_examples=40, deadline=None)
@given(
    mask=arrays.arrays(np.uint8, (4, 12, 14), elements=st.integers(0, 2)),
    voxels=arrays.arrays(np.uint8, (4, 12, 14)),
    keep=st.lists(st.integers(0, 168), min_size=4, max_size=4),
    share=st.floats(0, 1),
)
def test_the_rule_never_changes_a_slice_above_the_share(mask, voxels, keep, share):
    for slice_, count in zip(mask, keep, strict=True):
        slice_.ravel()[count:] = 0
    before = mask.copy()
    replaced = conventional.replace_small_slices(mask, Scan(voxels), share=share)
    areas = [(slice_ > 0).sum() for slice_ in before]
    for place, area in enumerate(areas):
        if area and area >= share * max(areas):
            np.testing.assert_array_equal(replaced[place], before[place])
    np.testing.assert_array_equal(mask, before)


def test_stored_masks_tell_on_how_many_slices_was_acted(tmp_path):
    scan, truth = scan_and_mask(1, 1, 1)
    mask = truth.copy()
    mask[1:] = 0
    mask[2, 30:34, 25:29] = RIGHT_LUNG
    for name, voxels in (("scan", scan.voxels), ("mask", mask)):
        save_volume(tmp_path / name, voxels, spacing_mm=(8.0, 1.5, 1.5))
    files = tmp_path / "scan", tmp_path / "mask"
    record = conventional.conventional_stored(files, tmp_path / "result", share=0.4)
    result = open_volume(tmp_path / "result")
    assert result.spacing_mm == (8.0, 1.5, 1.5)
    counts = ("slices_small", "slices_were_empty", "slices_got_lung", "slices_changed", "slices")
    assert [record[name] for name in counts] == [2, 1, 1, 2, 3]
    assert record["voxels_added"] == ((result.load() > 0) & (mask == 0)).sum()

    record = conventional.refine_stored(tmp_path / "mask", tmp_path / "refined")
    np.testing.assert_array_equal(
        open_volume(tmp_path / "refined").load(), conventional.refine(mask)
    )
    assert record["slices_changed"] == 2 and record["slices"] == 3


def test_fallback_takes_air_that_is_no_lung():
    voxels = np.full((SIZE, SIZE), AIR, np.int16)
    voxels[ellipse(48, 48, 36, 44)] = WATER
    voxels[disk((40, 48), 9)] = AIR  # trachea or bowel
    scan, mask = scan_and_mask(1, 0)
    scan = Scan(np.stack([scan.voxels[0], voxels]))
    replaced = conventional.replace_small_slices(mask, scan, share=0.4)
    assert replaced[1].any()  # what the docstring warns of
