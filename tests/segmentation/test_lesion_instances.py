import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from torchvision.ops import box_area, masks_to_boxes

from lib.data.scan import CONSOLIDATION, GROUND_GLASS_OPACITY
from lib.segmentation.lesion_instances import CLASSES, IGNORED_AREAS, lesion_instances

torch.set_num_threads(1)

MASKS = hnp.arrays(
    np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 2)
)


def drawn():
    mask = np.zeros((8, 10), np.uint8)
    mask[1:3, 1:5] = GROUND_GLASS_OPACITY
    mask[2:6, 6:9] = CONSOLIDATION
    mask[6, 0] = GROUND_GLASS_OPACITY
    return mask


def test_boxes_labels_and_masks_of_a_drawn_slice():
    boxes, labels, masks = lesion_instances(drawn())
    assert boxes.tolist() == [[1, 1, 5, 3], [0, 6, 1, 7], [6, 2, 9, 6]]
    assert labels.tolist() == [1, 1, 2]
    assert masks.sum((1, 2)).tolist() == [8, 1, 12]
    assert (boxes.dtype, labels.dtype, masks.dtype) == (torch.float32, torch.int64, torch.uint8)


@pytest.mark.parametrize(
    ("mask_type", "labels", "areas"),
    [("both", [1, 1, 2], [8, 1, 12]), ("merged", [1] * 3, [8, 12, 1]), ("ggo", [1, 1], [8, 1])],
)
def test_mask_types(mask_type, labels, areas):
    found = lesion_instances(drawn(), mask_type=mask_type)
    assert found.labels.tolist() == labels
    assert found.masks.sum((1, 2)).tolist() == areas


def test_consolidation_alone_is_not_learnt_as_ground_glass():
    mask = np.full((3, 3), CONSOLIDATION, np.uint8)  # no background either
    assert lesion_instances(mask).labels.tolist() == [2]


def test_merged_lesions_that_touch_are_one():
    mask = np.array([[GROUND_GLASS_OPACITY, CONSOLIDATION, 0]], np.uint8)
    assert lesion_instances(mask).boxes.tolist() == [[0, 0, 1, 1], [1, 0, 2, 1]]
    assert lesion_instances(mask, mask_type="merged").boxes.tolist() == [[0, 0, 2, 1]]


def test_pixels_that_touch_by_a_corner_are_one_lesion():
    assert lesion_instances(np.eye(4, dtype=np.uint8)).boxes.tolist() == [[0, 0, 4, 4]]


@pytest.mark.parametrize("mask_type", CLASSES)
def test_no_lesion_gives_empty_tensors_of_the_right_shapes(mask_type):
    boxes, labels, masks = lesion_instances(np.zeros((5, 7), np.uint8), mask_type=mask_type)
    assert (boxes.shape, labels.shape, masks.shape) == ((0, 4), (0,), (0, 5, 7))
    assert (boxes.dtype, labels.dtype, masks.dtype) == (torch.float32, torch.int64, torch.uint8)


@pytest.mark.parametrize("corner", [(0, 0), (0, 6), (4, 0), (4, 6)])
def test_a_lesion_of_one_pixel_has_a_box_of_one_pixel(corner):
    mask = np.zeros((5, 7), np.uint8)
    mask[corner] = CONSOLIDATION
    assert box_area(lesion_instances(mask).boxes).tolist() == [1]


@pytest.mark.parametrize(("side", "kept"), [(512, 101), (256, 26), (128, 7)])
def test_the_ignored_area_is_that_of_a_slice_of_512_pixels(side, kept):
    mask = np.zeros((side, side), np.uint8)
    mask[0, :kept] = mask[2, : kept - 1] = GROUND_GLASS_OPACITY
    found = lesion_instances(mask, ignored_area=IGNORED_AREAS["head2023"])
    assert found.masks.sum((1, 2)).tolist() == [kept]


def test_single_pixels_are_ignored_as_in_2020():
    mask = np.zeros((512, 512), np.uint8)
    mask[0, 0] = mask[4, 4:6] = CONSOLIDATION
    found = lesion_instances(mask, ignored_area=IGNORED_AREAS["paper2020"])
    assert found.boxes.tolist() == [[4, 4, 6, 5]]


@settings(max_examples=100, deadline=None)
@given(MASKS)
def test_instances_share_out_the_mask(mask):
    boxes, labels, masks = lesion_instances(mask)
    values = (masks * labels[:, None, None].to(torch.uint8)).sum(0).numpy()
    np.testing.assert_array_equal(values, mask)
    corners = masks_to_boxes(masks) if len(masks) else torch.zeros(0, 4)
    assert torch.equal(boxes, corners + torch.tensor([0.0, 0, 1, 1]))  # torchvision's are inclusive
    count = sum(ndimage.label(mask == value, np.ones((3, 3)))[1] for value in (1, 2))
    assert len(labels) == count


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (np.array([[0, 1, 3, 9]], np.uint8), {}, "and 2 .consolidation., got 3, 9$"),
        (np.array([[-1, 2]]), {"mask_type": "ggo"}, "got -1$"),
        (np.zeros((1, 4, 4), np.uint8), {}, r"\(height, width\), got \(1, 4, 4\)"),
        (np.zeros((0, 4), np.uint8), {}, r"\(height, width\), got \(0, 4\)"),
        (np.zeros((4, 4), np.uint8), {"mask_type": "merge"}, "both, merged, ggo, got 'merge'"),
    ],
)
def test_what_is_no_lesion_mask_is_refused_in_one_sentence(mask, options, message):
    with pytest.raises(ValueError, match=message):
        lesion_instances(mask, **options)
