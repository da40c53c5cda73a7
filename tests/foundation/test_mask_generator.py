"""The generator against segment-anything's own, on the same weights."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.utils.amg import remove_small_regions

from lib.data.readers import read_scan
from lib.data.scan import to_grey
from lib.foundation.mask_generator import (
    GeneratorSettings,
    MaskGenerator,
    _filled,
    enlarging_matrix,
)

# Thresholds that some of the random network's masks pass and others do not.
LIVELY = {
    "pred_iou_thresh": 0.3,
    "stability_score_thresh": 0.8,
    "stability_score_offset": 0.05,
    "points_per_side": 6,
}


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert type(one[key]) is type(other[key]), key
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


CASES = [
    ({}, (96, 96)),
    ({}, (70, 130)),  # padded below
    ({}, (300, 200)),  # larger than the network's input, padded on the right
    ({"points_per_batch": 5, "points_per_side": 7}, (96, 96)),
    ({"crop_n_layers": 1}, (96, 96)),
    ({"crop_n_layers": 2, "crop_n_points_downscale_factor": 2, "crop_nms_thresh": 0.5}, (90, 120)),
    ({"crop_n_layers": 1, "crop_overlap_ratio": 0.1}, (96, 96)),
    ({"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}, (64, 64)),
    ({"box_nms_thresh": 0.95}, (96, 96)),
    ({"min_mask_region_area": 60}, (96, 96)),
    ({"min_mask_region_area": 60, "crop_n_layers": 1}, (96, 96)),
    ({"output_mode": "uncompressed_rle"}, (96, 96)),
    ({"output_mode": "coco_rle"}, (96, 96)),
    (
        {"points_per_side": None, "point_grids": [np.random.default_rng(0).random((30, 2))]},
        (96, 96),
    ),
]


@pytest.mark.parametrize(("changes", "size"), CASES)
def test_exact_equals_the_original_mask_for_mask(lively_sam, make_picture, changes, size):
    keywords = LIVELY | changes
    picture = make_picture(1, *size)
    ours = MaskGenerator(lively_sam, mode="exact", **keywords).generate(picture)
    theirs = SamAutomaticMaskGenerator(lively_sam, **keywords).generate(picture)
    assert_same(ours, theirs)
    assert ours


@pytest.mark.real
@pytest.mark.parametrize("layers", [0, 1])
def test_exact_equals_the_original_on_real_slices(lively_sam, real_data, layers):
    keywords = LIVELY | {"crop_n_layers": layers, "crop_n_points_downscale_factor": 2}
    files = sorted((real_data / "finding-lungs/2d_images").iterdir())[::60]
    ours = MaskGenerator(lively_sam, mode="exact", **keywords)
    theirs = SamAutomaticMaskGenerator(lively_sam, **keywords)
    found = 0
    for file in files:
        picture = np.repeat(to_grey(read_scan(file).voxels)[0][..., None], 3, axis=2)
        records = ours.generate(picture)
        assert_same(records, theirs.generate(picture))
        found += len(records)
    assert found


def test_box_prompts_equal_the_original_predictor(lively_sam, make_picture):
    picture = make_picture(2, 80, 100)
    boxes = np.array([[10, 20, 60, 70], [5, 5, 95, 40]], float)
    generator = MaskGenerator(lively_sam, mode="exact")
    (embedding,) = generator.embed([picture])
    ours = generator.segment_boxes(embedding, boxes, (80, 100))
    predictor = SamPredictor(lively_sam)
    predictor.set_image(picture)
    theirs = [predictor.predict(box=box, multimask_output=False)[0][0] for box in boxes]
    np.testing.assert_array_equal(ours, theirs)


def test_fast_finds_the_masks_of_exact(lively_sam, make_picture):
    """All but masks at the edge of a threshold, and pixels at the border."""
    picture = make_picture(3, 128, 128)
    keywords = LIVELY | {"stability_score_thresh": 0.0, "box_nms_thresh": 0.9}
    exact = MaskGenerator(lively_sam, mode="exact", **keywords)
    fast = MaskGenerator(lively_sam, mode="fast", **keywords)
    masks = [g.propose(picture, g.embed([picture])[0]).masks for g in (exact, fast)]
    shared = masks[0].reshape(len(masks[0]), -1).astype(int) @ masks[1].reshape(
        len(masks[1]), -1
    ).T.astype(int)
    areas = [m.sum((1, 2)) for m in masks]
    overlaps = shared / (areas[0][:, None] + areas[1] - shared)
    assert np.median(overlaps.max(1)) > 0.98
    assert (overlaps.max(1) > 0.8).mean() > 0.9


def test_fast_asks_no_point_outside_the_body(lively_sam, make_picture):
    picture = make_picture(3, 96, 96)
    body = np.zeros((96, 96), bool)
    body[30:70, 20:60] = True
    fast = MaskGenerator(lively_sam, mode="fast", **LIVELY)
    (embedding,) = fast.embed([picture])
    found = fast.propose(picture, embedding, body=body)
    columns, rows = found.points.astype(int).T
    assert len(found) and body[rows, columns].all()
    nothing = fast.propose(picture, embedding, body=np.zeros_like(body))
    assert len(nothing) == 0 and nothing.masks.shape == (0, 96, 96)


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("layers", [0, 1])
def test_no_mask_good_enough_is_an_empty_answer(lively_sam, make_picture, mode, layers):
    generator = MaskGenerator(
        lively_sam, mode=mode, points_per_side=3, stability_score_thresh=1.0, crop_n_layers=layers
    )
    assert generator.generate(make_picture(1, 64, 64)) == []
    assert isinstance(generator.generate(np.full((64, 64, 3), 80, np.uint8)), list)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batches_change_no_mask(lively_sam, make_picture, batch):
    keywords = LIVELY | {"mode": "fast"}
    picture = make_picture(4, 96, 96)
    whole = MaskGenerator(lively_sam, **keywords, points_per_batch=36).generate(picture)
    parts = MaskGenerator(lively_sam, **keywords, points_per_batch=batch).generate(picture)
    assert [one["area"] for one in parts] == pytest.approx([one["area"] for one in whole], abs=2)


def test_bfloat16_finds_masks_close_to_those_of_float32(lively_sam, make_picture):
    picture = make_picture(5, 128, 128)
    generators = [
        MaskGenerator(lively_sam, mode="fast", precision=precision, **LIVELY)
        for precision in ("float32", "bfloat16")
    ]
    boxes = np.array([[20, 20, 100, 90]], float)
    full, half = (g.segment_boxes(g.embed([picture])[0], boxes, (128, 128))[0] for g in generators)
    assert (full != half).mean() < 0.05
    assert generators[1].generate(picture)


def test_running_out_of_memory_halves_the_batch_and_goes_on(lively_sam, make_picture, monkeypatch):
    picture = make_picture(1, 96, 96)
    generator = MaskGenerator(lively_sam, **LIVELY)
    expected = generator.generate(picture)
    candidates = generator._candidates

    def small_memory(points, *rest):
        if len(points) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return candidates(points, *rest)

    monkeypatch.setattr(generator, "_candidates", small_memory)
    with pytest.warns(UserWarning, match="going on in batches of 8"):
        assert_same(generator.generate(picture), expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_small_regions_go_as_in_the_original(seed, least):
    mask = np.random.default_rng(seed).random((24, 24)) < 0.55
    theirs, _ = remove_small_regions(mask, least, mode="holes")
    theirs, _ = remove_small_regions(theirs, least, mode="islands")
    np.testing.assert_array_equal(_filled(mask, least), theirs)


@pytest.mark.parametrize("case", [(32, 128, 128, 200), (32, 128, 70, 90), (16, 64, 64, 16)])
def test_the_enlarging_matrix_is_two_interpolations(lively_sam, case):
    values, side, used, pixels = case
    logits = torch.randn(1, 1, values, values)
    resize = torch.nn.functional.interpolate
    large = resize(logits, (side, side), mode="bilinear", align_corners=False)
    expected = resize(large[..., :used, :used], (pixels, pixels), mode="bilinear")
    matrix = enlarging_matrix(*case)
    torch.testing.assert_close(matrix @ logits[0, 0] @ matrix.T, expected[0, 0])


WRONG = [
    ({"points_per_side": None}, "either points_per_side or point_grids"),
    ({"point_grids": [np.zeros((1, 2))]}, "either points_per_side or point_grids"),
    ({"points_per_side": 0}, "points_per_side is at least 1"),
    ({"pred_iou_thresh": 1.5}, "pred_iou_thresh lies between 0 and 1"),
    ({"box_nms_thresh": -0.1}, "box_nms_thresh lies between 0 and 1"),
    ({"points_per_batch": 0}, "points_per_batch is at least 1"),
    ({"output_mode": "png"}, "output_mode is one of"),
]


@pytest.mark.parametrize(("keywords", "message"), WRONG)
def test_settings_out_of_range_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        GeneratorSettings(**keywords)


def test_wrong_modes_and_pictures_are_refused(lively_sam):
    with pytest.raises(ValueError, match="the mode is one of"):
        MaskGenerator(lively_sam, mode="quick")
    with pytest.raises(ValueError, match="exact mode runs in float32"):
        MaskGenerator(lively_sam, mode="exact", precision="bfloat16")
    generator = MaskGenerator(lively_sam)
    with pytest.raises(ValueError, match="uint8 of shape"):
        generator.generate(np.zeros((8, 8), np.uint8))
    picture = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="the body has shape"):
        generator.propose(picture, generator.embed([picture])[0], body=np.ones((4, 4), bool))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_encoder_gives_the_same_embedding(lively_sam, make_picture):
    picture = make_picture(6, 96, 96)
    plain = MaskGenerator(lively_sam, mode="fast", **LIVELY).embed([picture])[0]
    compiled = MaskGenerator(lively_sam, mode="fast", compiled=True, **LIVELY).embed([picture])[0]
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)
