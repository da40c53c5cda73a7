from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch

from lib.foundation.clip import build_clip
from lib.reporting import segmentation_benchmarks
from lib.reporting.segmentation_benchmarks import (
    compare_generators,
    compare_lungs,
    compare_modes,
    compare_random,
    parts_figure,
    quality_quantile,
    random_sam,
    spread_slices,
)

SETTINGS = {
    "points_per_side": 4, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.5,
    "stability_score_offset": 0.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def greys():
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 255, (2, 8, 8), np.uint8).repeat(8, 1).repeat(8, 2))


def test_exact_is_counted_as_equal_and_fast_is_not_forced_to(lively_sam, greys):
    exact = compare_generators(lively_sam, greys=greys, repetitions=1, mode="exact", **SETTINGS)
    assert exact["equal_masks"] == exact["masks"] > 0
    for parts in (exact["reference_parts"], exact["our_parts"]):
        assert set(parts) >= {"encoder", "decoder", "upscaling", "bringing masks to size", "all"}
        assert parts["decoder"] > 0 and parts["upscaling"] > 0
    fast = compare_generators(lively_sam, greys=greys, repetitions=1, mode="fast", **SETTINGS)
    assert fast["equal_masks"] <= fast["masks"]
    assert parts_figure({"exact": exact, "fast": fast}).axes[0].get_title().startswith("exact")


def test_lungs_of_both_modes_agree(lively_sam, greys, tmp_path):
    torch.manual_seed(1)
    files = tmp_path / "sam.safetensors", tmp_path / "clip.safetensors"
    safetensors.torch.save_model(lively_sam, files[0])
    safetensors.torch.save_model(build_clip("small"), files[1])
    settings = {
        "sam": "small", "clip": "small", "hashes": {}, "generator": {"mode": "fast"} | SETTINGS,
        "choice": {"sentences": ["a lung"], "area": (0.001, 0.7), "most_borders": 4},
    }  # fmt: skip
    results = compare_lungs(files, settings, greys=greys, slices=greys, repetitions=1)
    assert results["lungs, exact"]["agreement_least"] == 1.0
    assert 0 <= results["lungs, fast"]["agreement_mean"] <= 1.0
    assert results["lungs, fast"]["our_parts"]["segment everything"] > 0


def test_a_share_of_a_random_sams_masks_passes_its_quantile(greys):
    sam = random_sam("small")
    assert 0 <= quality_quantile(sam, greys[0], share=1 / 3) <= 1
    assert torch.equal(random_sam("small").image_encoder.pos_embed, sam.image_encoder.pos_embed)


def test_modes_and_crops_are_compared_on_the_slices_that_are_asked(monkeypatch, greys):
    asked = []

    def note(sam, *, greys, **settings):
        asked.append((sam, len(greys), settings))
        return {}

    monkeypatch.setattr(segmentation_benchmarks, "compare_generators", note)
    found = compare_modes("sam", greys=greys, repetitions=3, pred_iou_thresh=0.3)
    assert list(found) == ["small, exact", "small, fast", "small, exact, 1 layer of crops"]
    shared = {"pred_iou_thresh": 0.3}
    assert asked == [
        ("sam", 2, shared | {"repetitions": 3, "mode": "exact"}),
        ("sam", 2, shared | {"repetitions": 3, "mode": "fast"}),
        ("sam", 1, shared | {"repetitions": 1, "mode": "exact", "crop_n_layers": 1}),
    ]


def test_a_random_sam_is_compared_at_a_threshold_that_leaves_masks(greys, monkeypatch):
    sixteen = partial(segmentation_benchmarks.compare_generators, points_per_side=4)
    monkeypatch.setattr(segmentation_benchmarks, "compare_generators", sixteen)
    found = compare_random("small", greys[0], repetitions=1)
    assert found["equal_masks"] == found["masks"] > 0


def test_spread_slices_run_from_end_to_end():
    volumes = [np.arange(5)[:, None, None], np.arange(9)[:, None, None]]
    assert [one.item() for one in spread_slices(volumes, 3)] == [0, 2, 4, 0, 4, 8]
