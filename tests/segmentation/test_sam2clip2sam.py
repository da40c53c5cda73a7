from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from lib.data.scan import Scan
from lib.foundation.clip import build_clip
from lib.foundation.mask_generator import MaskGenerator, Proposals
from lib.foundation.sam import build_sam
from lib.inference import file_sha256
from lib.segmentation import sam2clip2sam
from lib.segmentation.plain_sam2clip2sam import plain_lungs
from lib.segmentation.sam2clip2sam import (
    Choice,
    Sam2Clip2SamSegmenter,
    boxes_around,
    build_segmenter,
    passes_area_filter,
    pieces_in_boxes,
    preset,
    regions_of_interest,
    union,
    weight_files,
)

SENTENCES = ("a dark lung filled with air", "a lung with branching vessels")
SETTINGS = {
    "points_per_side": 6,
    "pred_iou_thresh": 0.3,
    "stability_score_thresh": 0.8,
    "stability_score_offset": 0.05,
}


def block(rows, columns, size=(20, 20)):
    mask = np.zeros(size, bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


def proposals_of(masks):
    masks = np.stack(masks)
    boxes = boxes_around(masks)
    count = len(masks)
    ones = np.ones(count, np.float32)
    return Proposals(masks, boxes, ones, ones, np.zeros((count, 2)), np.zeros((count, 4)))


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(1)
    return build_clip("small").requires_grad_(False)


@pytest.fixture(scope="module")
def scan():
    rng = np.random.default_rng(3)
    small = rng.integers(0, 255, (3, 8, 8), np.uint8)
    return Scan(small.repeat(12, 1).repeat(12, 2))


def segmenter_of(sam, clip, mode="exact", **choice):
    return Sam2Clip2SamSegmenter(
        MaskGenerator(sam, mode=mode, **SETTINGS), clip, Choice(sentences=SENTENCES, **choice)
    )


def test_equation_2_keeps_masks_of_a_lungs_size_that_touch_few_borders():
    masks = [
        block((5, 11), (5, 11)),  # 9 %
        block((5, 7), (5, 7)),  # 1 %
        block((1, 19), (1, 19)),  # 81 %
        block((0, 6), (0, 6)),  # touches two borders
        block((0, 6), (5, 11)),  # touches one
    ]
    passed = passes_area_filter(proposals_of(masks), area=(0.02, 0.3), most_borders=1)
    assert passed.tolist() == [True, False, False, False, True]
    literal = passes_area_filter(proposals_of(masks), area=(0.02, 1.0), most_borders=4)
    assert literal.tolist() == [True, False, True, True, True]


def test_equation_6_is_an_arg_max_and_more_regions_lie_apart():
    masks = np.stack(
        [
            block((2, 18), (2, 8)),
            block((2, 10), (2, 8)),
            block((2, 18), (11, 18)),
            block((0, 2), (0, 2)),
        ]
    )
    similarities = np.array([0.9, 0.8, 0.7, 0.1])
    choose = lambda regions, floor=None: regions_of_interest(  # noqa: E731
        similarities, masks, regions=regions, floor=floor
    ).tolist()
    assert choose(1) == [int(similarities.argmax())]
    assert choose(2) == [0, 2]  # the second lies within the first
    assert choose(3) == [0, 2, 3]
    assert choose(3, floor=0.5) == [0, 2]
    assert choose(2, floor=0.95) == []


def test_equation_7_is_the_tight_box():
    boxes = boxes_around(np.stack([block((3, 9), (5, 6)), block((0, 20), (0, 20))]))
    assert boxes.tolist() == [[5, 3, 5, 8], [0, 0, 19, 19]]
    assert boxes_around(np.zeros((0, 4, 4), bool)).shape == (0, 4)


def test_a_stray_island_stretches_no_box():
    mask = block((2, 12), (2, 8)) | block((15, 18), (15, 18))
    assert boxes_around(mask[None], largest_piece=True).tolist() == [[2, 2, 7, 11]]
    assert boxes_around(mask[None]).tolist() == [[2, 2, 17, 17]]


def test_pieces_wholly_outside_a_box_go_and_others_stay_whole():
    lung, gas = block((2, 12), (2, 8)), block((15, 18), (15, 18))
    masks = np.stack([lung | gas, lung | gas, np.zeros_like(lung)])
    boxes = np.array([[2, 2, 5, 6], [10, 10, 16, 16], [0, 0, 3, 3]], float)
    kept = pieces_in_boxes(masks, boxes)
    assert np.array_equal(kept, np.stack([lung, gas, np.zeros_like(lung)]))


def test_equation_8_is_a_union():
    masks = np.stack([block((0, 2), (0, 2)), block((5, 7), (5, 7))])
    assert np.array_equal(union(masks, (20, 20)), masks[0] | masks[1])
    assert not union(np.zeros((0, 4, 4), bool), (4, 4)).any()


@pytest.mark.parametrize("least", [0, 40])
def test_exact_equals_the_plain_reading(lively_sam, clip, scan, least):
    settings = SETTINGS | {"min_mask_region_area": least}
    choice = Choice(sentences=SENTENCES, area=(0.001, 0.6), most_borders=4)
    segmenter = Sam2Clip2SamSegmenter(MaskGenerator(lively_sam, **settings), clip, choice)
    journeys = segmenter.choose(segmenter.look(scan.voxels))
    found = 0
    for grey, journey in zip(scan.voxels, journeys, strict=True):
        plain = plain_lungs(grey, lively_sam, clip, choice, settings)
        np.testing.assert_array_equal(journey.lungs, plain)
        found += plain.any()
    assert found


def test_a_scan_is_its_slices(lively_sam, clip, scan):
    segmenter = segmenter_of(lively_sam, clip, mode="fast", area=(0.001, 0.6), most_borders=4)
    whole = segmenter(scan)
    assert whole.shape == scan.voxels.shape and whole.dtype == np.uint8
    alone = [segmenter(Scan(one[None]))[0] > 0 for one in scan.voxels]
    np.testing.assert_array_equal(whole > 0, alone)


def test_a_mask_beside_a_lung_needs_only_the_lower_floor(lively_sam, clip, scan):
    floors = {"similarity_floor": 0.99, "continued_floor": -1.0}
    segmenter = segmenter_of(lively_sam, clip, area=(0.001, 0.6), most_borders=4, **floors)
    sights = segmenter.look(scan.voxels[:1])
    everywhere, nowhere = (
        np.ones(scan.voxels.shape[1:], bool),
        np.zeros(scan.voxels.shape[1:], bool),
    )
    (alone,), (inside,), (outside,) = (
        segmenter.choose(sights, beside) for beside in (None, [everywhere], [nowhere])
    )
    assert len(inside.chosen) and inside.lungs.any()
    segmenter.choice = replace(segmenter.choice, continued_floor=None)
    assert not len(segmenter.choose(sights, [everywhere])[0].chosen)
    assert not len(alone.chosen) and not len(outside.chosen)


def test_lungs_are_followed_from_slice_to_slice_both_ways(lively_sam, clip, monkeypatch):
    """Slices of which each shows one mask, whose similarity is known."""
    similarities = [0.4, 0.4, 0.7, 0.4, 0.2, 0.4]
    voxels = np.zeros((6, 8, 8), np.int16)
    voxels[:, 0, 0] = np.arange(6)
    segmenter = segmenter_of(lively_sam, clip, similarity_floor=0.6, continued_floor=0.3, regions=1)

    def choose(numbers, beside=None):
        for number in numbers:
            value = similarities[number]
            taken = value >= (0.6 if beside is None else 0.3)
            yield SimpleNamespace(
                sight=SimpleNamespace(proposals=[number]),
                similarities=np.array([value]),
                chosen=[0] if taken else [],
                lungs=np.full((8, 8), taken),
            )

    monkeypatch.setattr(segmenter, "look", lambda voxels, bodies: voxels[:, 0, 0].tolist())
    monkeypatch.setattr(segmenter, "choose", lambda *asked: list(choose(*asked)))
    found = segmenter(Scan(voxels)).any(axis=(1, 2))
    assert found.tolist() == [True, True, True, True, False, False]


def test_each_mask_may_have_a_floor_of_its_own():
    masks = np.stack([block((0, 4), (0, 4)), block((8, 12), (8, 12)), block((15, 19), (0, 4))])
    chosen = regions_of_interest(
        np.array([0.6, 0.5, 0.4]), masks, regions=2, floor=np.array([0.7, 0.5, 0.3])
    )
    assert chosen.tolist() == [1, 2]


def test_slices_without_a_similar_mask_are_empty(lively_sam, clip, scan):
    segmenter = segmenter_of(lively_sam, clip, similarity_floor=1.0)
    assert not segmenter(scan).any()


def test_a_constant_slice_is_no_fault(lively_sam, clip):
    constant = Scan(np.full((1, 40, 40), -1000, np.int16))
    assert segmenter_of(lively_sam, clip, similarity_floor=1.0)(constant).sum() == 0


def test_a_model_that_returns_no_mask_is_said(lively_sam, clip, scan):
    generator = MaskGenerator(lively_sam, points_per_side=2, stability_score_thresh=1.0)
    segmenter = Sam2Clip2SamSegmenter(generator, clip, Choice(sentences=SENTENCES))
    with pytest.warns(UserWarning, match="SAM returned no mask for any slice"):
        assert not segmenter(scan).any()


WRONG = [
    ({"area": (0.3, 0.1)}, "area is a smaller and a larger share"),
    ({"area": (0.0, 1.2)}, "area is a smaller and a larger share"),
    ({"regions": 0}, "regions is at least 1"),
    ({"most_borders": 5}, "most_borders 0 to 4"),
    ({"similarity_floor": 1.5}, r"similarity_floor lies in \[-1, 1\]"),
    ({"continued_floor": -1.5}, r"continued_floor lies in \[-1, 1\]"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_choices_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Choice(sentences=SENTENCES, **fields)


def test_an_empty_list_of_sentences_is_refused(lively_sam, clip):
    with pytest.raises(ValueError, match="sentences"):
        Sam2Clip2SamSegmenter(MaskGenerator(lively_sam), clip, Choice(sentences=()))


SECTION = {
    "hashes": {},
    "sentences": list(SENTENCES),
    "readings": {"top-2": {"regions": 2}, "literal": {"regions": 1, "similarity_floor": None}},
    "small": {
        "sam": "small", "clip": "small", "generator": {"mode": "fast", "points_per_side": 4},
        "choice": {"similarity_floor": 0.2},
    },
    "paper": {"sam": "vit_h", "clip": "ViT-L-14", "generator": {}, "choice": {}},
}  # fmt: skip


def test_a_preset_joins_size_reading_and_overrides():
    settings = preset(SECTION, "small", "literal", {"generator": {"points_per_side": 8}})
    assert settings["generator"] == {"mode": "fast", "points_per_side": 8}
    assert settings["choice"] == {
        "sentences": list(SENTENCES),
        "similarity_floor": None,
        "regions": 1,
    }
    with pytest.raises(ValueError, match="reading is one of"):
        preset(SECTION, "small", "loose", {})


@pytest.fixture
def weights(tmp_path):
    """Random weights of both small networks, where the stages leave them."""
    torch.manual_seed(0)
    for kind, build in (("sam", build_sam), ("clip", build_clip)):
        folder = tmp_path / "lungs" / kind / "made"
        folder.mkdir(parents=True)
        safetensors.torch.save_model(build("small"), folder / "best.safetensors")
    return tmp_path


def test_the_segmenter_is_built_from_plain_settings(weights):
    settings = preset(SECTION, "small", "top-2", {})
    files = weight_files(weights, settings, "made")
    segmenter = build_segmenter(*files, **settings)
    assert segmenter.choice.similarity_floor == 0.2
    again = build_segmenter(*files, **settings)
    assert again.clip is segmenter.clip  # read once
    files[1].write_bytes(b"damaged")
    with pytest.raises(ValueError, match="does not fit the network"):
        build_segmenter(*files, **settings)


def test_absent_weights_name_what_to_do(tmp_path):
    settings = preset(SECTION, "small", "top-2", {})
    with pytest.raises(FileNotFoundError, match="run the stage that trains it first"):
        build_segmenter(*weight_files(tmp_path, settings, "made"), **settings)
    paper = preset(SECTION, "paper", "top-2", {})
    with pytest.raises(RuntimeError, match=r"sam_vit_h_4b8939.pth is absent: put there https"):
        weight_files(tmp_path, paper, "made")


def test_an_official_checkpoint_is_read_after_its_hash(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    file = tmp_path / "own.pth"
    torch.save(model.state_dict(), file)
    build = lambda variant: torch.nn.Linear(2, 2)  # noqa: E731
    loaded = sam2clip2sam._network(build, "vit_b", file, file_sha256(file), 0)
    assert torch.equal(loaded.weight, model.weight)
    with pytest.raises(RuntimeError, match="does not have the SHA-256"):
        sam2clip2sam._network(build, "vit_b", file, "0" * 64, 1)
