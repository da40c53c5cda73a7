import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from skimage.draw import ellipse

from lib.data.masks import (
    body_mask,
    both_lungs,
    largest_regions,
    separate_lungs,
    tissue_threshold,
)
from lib.data.scan import LEFT_LUNG, RIGHT_LUNG

SIZE = 128


def lung(column, *, row=64, height=40, width=22, turned=0.0):
    mask = np.zeros((SIZE, SIZE), bool)
    mask[ellipse(row, column, height, width, mask.shape, np.deg2rad(turned))] = True
    return mask


def labelled(right, left):
    return np.where(right, RIGHT_LUNG, 0).astype(np.uint8) + np.where(left & ~right, LEFT_LUNG, 0)


def agreement(mask, truth):
    return (mask == truth)[truth > 0].mean()


def turned(mask, degrees):
    return ndimage.rotate(mask, degrees, reshape=False, order=0)


PAIR = labelled(lung(35), lung(93))
TOUCHING = labelled(lung(38, width=27, turned=-10), lung(90, width=27, turned=10))


@pytest.mark.parametrize(
    "truth",
    [
        pytest.param(PAIR, id="apart"),
        pytest.param(TOUCHING, id="touching"),
        pytest.param(turned(PAIR, 30), id="patient turned one way"),
        pytest.param(turned(PAIR, -30), id="patient turned the other way"),
        pytest.param(labelled(lung(25), lung(75)), id="patient off centre"),
        pytest.param(labelled(lung(30), np.zeros((SIZE, SIZE), bool)), id="right lung only"),
        pytest.param(labelled(np.zeros((SIZE, SIZE), bool), lung(100)), id="left lung only"),
        pytest.param(
            labelled(lung(30, row=45, height=16) | lung(30, row=85, height=18), lung(93)),
            id="right lung in two pieces",
        ),
    ],
)
def test_slice(truth):
    assert agreement(separate_lungs(truth > 0), truth) > 0.97


def test_touching_lungs_are_one_region_before():
    assert ndimage.label(TOUCHING > 0)[1] == 1


def test_fused_lungs_without_a_neck_are_cut_in_the_middle():
    block = np.zeros((SIZE, SIZE), bool)
    block[40:90, 14:114] = True
    mask = separate_lungs(block)
    assert (mask[:, :64] == np.where(block[:, :64], RIGHT_LUNG, 0)).all()
    assert (mask[:, 64:] == np.where(block[:, 64:], LEFT_LUNG, 0)).all()


def test_volume_settles_slices_with_one_lung():
    # The patient lies far to the left of the picture, so that alone the left lung looks right.
    left_only = labelled(np.zeros((SIZE, SIZE), bool), lung(60))
    both = labelled(lung(15, width=13), lung(60))
    truth = np.stack([left_only, both, both, left_only])
    assert agreement(separate_lungs(truth > 0), truth) == 1
    assert (separate_lungs(left_only > 0)[left_only > 0] == RIGHT_LUNG).all()


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=12)))
def test_separation_keeps_the_mask(lungs):
    mask = separate_lungs(lungs)
    assert mask.dtype == np.uint8 and mask.shape == lungs.shape
    np.testing.assert_array_equal(both_lungs(mask), lungs)


def test_separation_of_a_mirrored_picture_is_mirrored():
    mirrored = separate_lungs((TOUCHING > 0)[:, ::-1])[:, ::-1]
    expected = np.choose(separate_lungs(TOUCHING > 0), (0, LEFT_LUNG, RIGHT_LUNG))
    assert (mirrored == expected).mean() > 0.99


@pytest.mark.parametrize("shape", [(5,), (2, 2, 2, 2)])
def test_wrong_number_of_axes(shape):
    with pytest.raises(ValueError, match="two or three axes"):
        separate_lungs(np.zeros(shape, bool))


@pytest.mark.parametrize(
    ("voxels", "low", "high"),
    [
        (np.array([-1000, 40], np.int16), -900, 0),
        (np.array([0, 0, 0, 60, 60, 200, 200], np.uint8), 59, 200),
        (np.zeros(4, np.uint8), 0, 1),
    ],
)
def test_tissue_threshold(voxels, low, high):
    assert low <= tissue_threshold(voxels) < high


def thorax(columns):
    """Tissue of a body with two lungs on a table, cut to some columns."""
    body = lung(64, height=46, width=58)
    tissue = body & ~lung(36, height=32, width=18) & ~lung(92, height=32, width=18)
    tissue[116:118] = True
    return body[None, :, columns], tissue[None, :, columns]


@pytest.mark.parametrize(
    ("columns", "least"),
    [
        pytest.param(slice(None), 0.99, id="whole"),
        pytest.param(slice(30, None), 0.97, id="right lung cut off"),
    ],
)
def test_body_mask_holds_the_lungs_and_not_the_table(columns, least):
    body, tissue = thorax(columns)
    found = body_mask(tissue)
    assert found[body].mean() > least
    assert not found[:, 114:].any()


def test_largest_regions():
    foreground = np.zeros((10, 10), bool)
    foreground[0, 0] = foreground[2:4, 2:4] = foreground[6:9, 6:9] = True
    assert largest_regions(foreground, 1).sum() == 9
    assert largest_regions(foreground, 2).sum() == 13
    assert largest_regions(foreground, 5).sum() == 14
    assert not largest_regions(np.zeros((3, 3), bool), 2).any()


@pytest.mark.real
def test_real_masks(real_data):
    tifffile = pytest.importorskip("tifffile")
    files = sorted((real_data / "finding-lungs" / "2d_masks").glob("*.tif"))[::12]
    for file in files:
        mask = separate_lungs(tifffile.imread(file) > 0)
        right, left = (np.nonzero(mask == side)[1].mean() for side in (RIGHT_LUNG, LEFT_LUNG))
        assert right < 256 < left, file.name
        assert min((mask == RIGHT_LUNG).sum(), (mask == LEFT_LUNG).sum()) > 0.2 * (mask > 0).sum()
