import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

from lib.data.store import save_volume
from lib.evaluation.segmentation import overlap
from lib.foundation.clip import build_clip
from lib.segmentation.ablation import ablate_stored, changed_settings, read_ablation
from lib.segmentation.sam2clip2sam import build_segmenter

SETTINGS = {
    "sam": "small",
    "clip": "small",
    "hashes": {},
    "generator": {
        "mode": "fast", "points_per_side": 4, "pred_iou_thresh": 0.3,
        "stability_score_thresh": 0.5, "stability_score_offset": 0.05,
    },
    "choice": {"sentences": ["a lung", "air"], "area": [0.001, 0.7], "most_borders": 4},
}  # fmt: skip
VARIANTS = {
    "standard": {},
    "one mask": {"choice": {"regions": 1}},
    "dense grid": {"generator": {"points_per_side": 6}},
    "one sentence": {"choice": {"sentences": 1}},
}


@pytest.fixture(scope="module")
def made(lively_sam, tmp_path_factory):
    """Weights, a stored scan with its mask, and the ablation of it."""
    folder = tmp_path_factory.mktemp("ablation")
    torch.manual_seed(1)
    weights = {
        "sam_weights": folder / "sam.safetensors",
        "clip_weights": folder / "clip.safetensors",
    }
    safetensors.torch.save_model(lively_sam, weights["sam_weights"])
    safetensors.torch.save_model(build_clip("small"), weights["clip_weights"])
    rng = np.random.default_rng(0)
    voxels = rng.integers(0, 255, (5, 8, 8), np.uint8).repeat(8, 1).repeat(8, 2)
    truth = np.zeros(voxels.shape, np.uint8)
    truth[:, 10:40, 5:25], truth[:, 10:40, 35:60] = 1, 2
    files = folder / "scan.b2nd", folder / "truth.b2nd"
    for file, values in zip(files, (voxels, truth), strict=True):
        save_volume(file, values)
    path = folder / "s1.csv"
    record = ablate_stored(
        files, path, **weights, settings=SETTINGS, variants=VARIANTS, slices_per_scan=3
    )
    return weights, voxels, truth, path, record


def test_every_variant_sees_the_same_slices(made):
    _, _, _, path, record = made
    rows = pd.read_csv(path)
    assert record == {"slices": 3}
    assert rows["variant"].tolist() == [name for name in VARIANTS for _ in range(3)]
    assert rows["slice"].tolist() == [0, 2, 4] * len(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_scores_as_its_own_segmenter(made, name):
    """Sharing what SAM saw between variants changes no result."""
    weights, voxels, truth, path, _ = made
    segmenter = build_segmenter(*weights.values(), **changed_settings(SETTINGS, VARIANTS[name]))
    rows = pd.read_csv(path)
    rows = rows[rows["variant"] == name].set_index("slice")
    for index in (0, 2, 4):
        (journey,) = segmenter.choose(segmenter.look(voxels[[index]]))
        dice, iou = overlap(journey.lungs, truth[index] > 0)
        assert rows.loc[index, ["dice", "iou"]].tolist() == pytest.approx([dice, iou])
        assert rows.loc[index, "empty"] == (not journey.lungs.any())


def test_scans_are_averaged_with_their_patients(made, tmp_path):
    *_, path, _ = made
    manifest = pd.DataFrame(
        {"scan_id": ["s1"], "patient_id": ["p"], "split": ["test"], "label": ["covid"]}
    )
    table = read_ablation([path], manifest)
    assert table["variant"].tolist() == list(VARIANTS)
    rows = pd.read_csv(path)
    assert table["dice"][0] == pytest.approx(rows[rows["variant"] == "standard"]["dice"].mean())


def test_wrong_variants_are_refused():
    with pytest.raises(ValueError, match=r"changes generator and choice, got \['sam'\]"):
        changed_settings(SETTINGS, {"sam": {}})
    with pytest.raises(ValueError, match="there are 2 sentences, got 3"):
        changed_settings(SETTINGS, {"choice": {"sentences": 3}})
