import numpy as np
import pytest
from skimage.draw import disk, ellipse

from lib.data.scan import LEFT_LUNG, RIGHT_LUNG, Scan, apply_window
from lib.segmentation.morphology import (
    MorphologySegmenter,
    body_box,
    body_box_and_lung_ratio,
    body_foreground,
    costal_bays,
    fill_holes,
    lung_ratio,
)

SIZE = 256
SLICES = 7
AIR, LUNG, WATER, BONE = -1000, -850, 40, 700


def paint(image, shape, value):
    rows, columns = shape
    keep = (rows >= 0) & (rows < SIZE) & (columns >= 0) & (columns < SIZE)
    image[rows[keep], columns[keep]] = value


def thorax_slice(kind="chest"):
    """One slice in HU and its true lungs: body, spine, trachea and gas, table."""
    image, truth = np.full((SIZE, SIZE), AIR), np.zeros((SIZE, SIZE), np.uint8)
    paint(image, ellipse(125, 128, 82, 112), WATER)
    paint(image, disk((178, 128), 12), BONE)
    if kind == "chest":
        for lung, column in ((RIGHT_LUNG, 76), (LEFT_LUNG, 180)):
            shape = ellipse(122, column, 58, 34)
            paint(image, shape, LUNG)
            paint(truth, shape, lung)
            paint(image, disk((110, column), 3), WATER)  # a vessel
    if kind in ("chest", "neck"):
        paint(image, disk((110, 128), 7), AIR)  # trachea
    if kind == "abdomen":
        paint(image, ellipse(100, 160, 15, 25), AIR)  # stomach
        paint(image, disk((95, 90), 5), AIR)  # colon
    image[222:225] = WATER  # table
    return image, truth


def thorax(kinds=("neck", *["chest"] * (SLICES - 2), "abdomen"), noise=20, seed=0):
    slices = [thorax_slice(kind) for kind in kinds]
    voxels = np.stack([image for image, _ in slices]).astype(float)
    voxels += np.random.default_rng(seed).normal(0, noise, voxels.shape)
    return voxels.astype(np.int16), np.stack([truth for _, truth in slices])


def dice(mask, truth):
    return 2 * (mask & truth).sum() / (mask.sum() + truth.sum())


def assert_lungs(mask, truth, least=0.97):
    assert mask.dtype == np.uint8 and mask.shape == truth.shape
    for lung in (RIGHT_LUNG, LEFT_LUNG):
        assert dice(mask == lung, truth == lung) > least


@pytest.mark.parametrize("to_source", [lambda voxels: voxels, apply_window], ids=["HU", "8-bit"])
def test_default_leaves_out_airways_gas_table_and_slices_without_lungs(to_source):
    voxels, truth = thorax()
    mask = MorphologySegmenter()(Scan(to_source(voxels)))
    assert_lungs(mask, truth)
    assert not mask[[0, -1]].any()
    assert not mask[:, 105:115, 124:132].any()  # trachea
    assert not mask[:, 215:].any()  # table


@pytest.mark.parametrize("reading", ["default", "published"])
def test_single_slice(reading):
    voxels, truth = thorax(["chest"])
    assert_lungs(MorphologySegmenter(reading=reading)(Scan(voxels)), truth, least=0.94)


def test_published_takes_whatever_air_is_largest():
    mask = MorphologySegmenter(reading="published")(Scan(thorax(["neck", "abdomen"])[0]))
    assert mask[0].any() and mask[1].any()


@pytest.mark.parametrize(
    "region",
    [
        pytest.param(np.s_[:, 40:210, 60:200], id="lungs cut off on both sides"),
        pytest.param(np.s_[:, :, :150], id="one lung"),
        pytest.param(np.s_[:, 1:, 3:], id="odd size"),
        pytest.param(np.s_[:, ::2, ::2], id="small"),
    ],
)
def test_default_on_crops(region):
    voxels, truth = thorax(["chest"] * 3)
    mask = MorphologySegmenter()(Scan(np.ascontiguousarray(voxels[region])))
    assert dice(mask > 0, truth[region] > 0) > 0.95


def test_large_pictures_are_chosen_coarsely_but_bordered_finely():
    voxels, truth = (one.repeat(2, 1).repeat(2, 2)[:, :-1] for one in thorax(["chest"] * 2))
    assert_lungs(MorphologySegmenter()(Scan(voxels)), truth, least=0.985)


def test_airway_that_opens_into_a_lung_is_followed_from_above():
    voxels, truth = thorax(["neck", "chest", "chest", "chest"])
    voxels[2, 106:114, 110:128] = AIR  # main bronchus into the right lung
    mask = MorphologySegmenter()(Scan(voxels))
    assert not mask[2, 104:116, 121:135].any()
    assert dice(mask > 0, truth > 0) > 0.97


def test_consolidation_at_the_ribs_is_kept():
    voxels, truth = thorax(["chest"] * 3)
    consolidation = np.zeros((SIZE, SIZE), bool)
    consolidation[disk((150, 58), 12)] = True
    consolidation &= truth[0] == RIGHT_LUNG
    voxels[:, consolidation] = WATER
    mask = MorphologySegmenter()(Scan(voxels))
    assert (mask[:, consolidation] == RIGHT_LUNG).mean() > 0.7


@pytest.mark.parametrize("value", [AIR, WATER])
@pytest.mark.parametrize("reading", ["default", "published"])
def test_nothing_in_nothing(reading, value):
    voxels = np.full((2, 64, 48), value, np.int16)
    assert not MorphologySegmenter(reading=reading)(Scan(voxels)).any()
    black = np.zeros((1, 64, 48), np.uint8)
    assert not MorphologySegmenter(reading=reading)(Scan(black)).any()


def test_unknown_reading():
    with pytest.raises(ValueError, match="reading is one of"):
        MorphologySegmenter(reading="other")


@pytest.mark.parametrize("lateral", [-1, 1])
def test_costal_bays_are_filled_towards_the_ribs_only(lateral):
    lung = np.zeros((80, 60), bool)
    lung[ellipse(40, 30, 36, 24)] = True
    bays = {}
    for side, column in ((-1, 8), (1, 52)):
        cut = np.zeros_like(lung)
        cut[disk((40, column), 8, shape=lung.shape)] = True
        bays[side] = cut & lung
        lung &= ~cut
    found = costal_bays(lung, lateral=lateral)
    assert found[bays[lateral]].mean() > 0.5
    assert not found[bays[-lateral]].any()


def test_holes_are_filled_unless_they_are_the_dome():
    lung = np.zeros((4, 64, 64), bool)
    lung[:, 4:60, 4:60] = True
    lung[0, 10:12, 10:12] = False  # a vessel: small
    lung[1:3, 40:55, 8:23] = False  # a consolidation: lung below it
    consolidated = lung.copy()
    for place, radius in enumerate((1, 8, 12, 30)):  # the dome: larger slice by slice, then open
        lung[place][disk((25, 40), radius, shape=(64, 64))] = False
    filled = fill_holes(lung)
    assert filled[0].sum() == 56 * 56
    assert filled[1:3, 40:55, 8:23].all()
    assert not filled[1:3, 24:27, 39:42].any()
    assert not (filled & ~fill_holes(consolidated)).any()


def test_body_box_and_lung_ratio():
    voxels, truth = thorax(["chest"], noise=0)
    grey = apply_window(voxels[0])
    box, ratio = body_box_and_lung_ratio(grey)
    found = [side.start for side in box] + [side.stop for side in box]
    np.testing.assert_allclose(found, [44, 17, 207, 240], atol=5)
    assert ratio == pytest.approx((truth > 0).sum() / truth[0][box].size, rel=0.25)
    assert body_box_and_lung_ratio(apply_window(thorax(["abdomen"])[0][0]))[1] < ratio / 3


def test_lung_ratio_counts_dark_pixels_away_from_the_corners():
    foreground = np.ones((10, 10), bool)
    foreground[0, :3] = False  # touches a corner: outside
    foreground[4:6, 4:9] = False
    assert lung_ratio(np.full((10, 10), 200, np.uint8), foreground) == pytest.approx(0.1)


def test_pictures_of_one_value_have_no_body():
    for value in (0, 77):
        foreground = body_foreground(np.full((32, 20), value, np.uint8))
        assert not foreground.any()
        assert body_box(foreground) == (slice(0, 32), slice(0, 20))


@pytest.mark.real
def test_real_slices(real_data):
    tifffile = pytest.importorskip("tifffile")
    folder = real_data / "finding-lungs"
    scores = []
    for file in sorted((folder / "2d_images").glob("*.tif"))[::9]:
        voxels = tifffile.imread(file).astype(np.int16)
        voxels[voxels < -1024] = AIR
        truth = tifffile.imread(folder / "2d_masks" / file.name) > 0
        scores.append(dice(MorphologySegmenter()(Scan(voxels[None]))[0] > 0, truth))
    assert np.mean(scores) > 0.975 and np.min(scores) > 0.9
