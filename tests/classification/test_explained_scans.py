"""Tests of lib/classification/explained_scans.py: one grid for clip, lesions and lungs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lib.classification.clips import judged_clip, load_composed
from lib.classification.explained_scans import explain_scan, masked_pixels, random_network
from lib.classification.inputs import ScanItem
from lib.classification.resampling import symmetrical_positions
from lib.data.selection import Selection
from lib.data.store import save_volume

SETTINGS = {
    "slices": 8, "image_size": 32, "resized_size": 40, "channels": "RML", "cropped": False,
    "channel_statistics": None,
}  # fmt: skip
LESION = (slice(4, 7), slice(16, 32), slice(40, 56))


class Brightness(nn.Module):
    """COVID-19 is what is bright in channel R of the pixels 16:32, 40:56 of the stored slice."""

    def __init__(self):
        super().__init__()
        weights = torch.zeros(1, 3, 1, 40, 40)
        weights[:, 0, :, 8:16, 20:28] = 1
        self.weights = nn.Parameter(weights[..., 4:36, 4:36])

    def forward(self, clips):
        score = (clips * self.weights).sum((1, 2, 3, 4))
        return torch.stack([torch.zeros_like(score), score], 1)


@pytest.fixture
def scan(tmp_path):
    """A scan of 12 slices, of which 1 to 10 are kept, with bright lesions inside its lungs."""
    for folder in ("scans", "lungs", "lesions", "segmented"):
        (tmp_path / folder).mkdir()
    voxels = np.full((12, 80, 80), 40, np.uint8)
    lungs, lesions = np.zeros_like(voxels), np.zeros_like(voxels)
    lungs[:, 12:68, 12:68], lesions[LESION], voxels[LESION] = 1, 2, 240
    files = {"scans": voxels, "lungs": lungs, "lesions": lesions, "segmented": np.ones_like(lungs)}
    for folder, values in files.items():
        save_volume(tmp_path / folder / "a.b2nd", values)
    chosen = Selection("a", "covid", 1, 10, (0, 0, 80, 80))
    return ScanItem("a", tmp_path / "scans/a.b2nd", tmp_path / "segmented/a.b2nd", 1, None, chosen)


def explained(scan, **changes):
    arguments = {
        "truth": scan.volume.parent.parent,
        "trained": Brightness(),
        "untrained": Brightness(),
        "settings": SETTINGS,
        "steps": 2,
        "batch_clips": 2,
    }
    return explain_scan(scan, **(arguments | changes))


def test_attribution_lies_on_the_lesion_and_all_parts_on_one_grid(scan):
    evidence = explained(scan)
    expected = np.unique(symmetrical_positions(10, 8)) + 1
    assert evidence.slices.tolist() == expected.tolist()
    inside = np.zeros((len(expected), 40, 40))
    inside[np.isin(expected, [4, 5, 6]), 8:16, 20:28] = 1
    np.testing.assert_array_equal(evidence.lesions, inside[:, 4:36, 4:36])
    np.testing.assert_array_equal(evidence.grey > 200, inside[:, 4:36, 4:36] > 0)
    assert ((evidence.network != 0).any(0) == (inside[:, 4:36, 4:36] > 0).any(0)).all()
    assert evidence.lungs.mean() == pytest.approx((28 / 32) ** 2)  # the true ones
    assert evidence.network.sum() == pytest.approx(evidence.output_change, rel=1e-4)


def test_a_slice_that_is_repeated_counts_as_often(scan):
    few = replace(scan, selection=Selection("a", "covid", 4, 6, (0, 0, 80, 80)))
    evidence = explained(few)
    per_slice = evidence.network.sum((1, 2))
    places = symmetrical_positions(3, 8)
    np.testing.assert_allclose(per_slice / per_slice.min(), np.bincount(places) / 2, rtol=1e-4)
    assert per_slice.sum() == pytest.approx(evidence.output_change, rel=1e-4)


def test_the_grey_values_are_those_of_the_clip(scan):
    grey, _ = masked_pixels(scan, scan.mask, np.arange(10), settings=SETTINGS)
    sizes = {"size": SETTINGS["resized_size"], "cropped": False}
    clip = judged_clip(load_composed(scan, channels="RRR", **sizes), np.arange(10), size=32)
    lowest, highest = clip[0].min(), clip[0].max()
    rescaled = 40 + (clip[0] - lowest) / (highest - lowest) * 200
    np.testing.assert_allclose(rescaled.numpy(), grey, atol=1e-3)


def test_without_true_lungs_those_of_the_classifier_count(scan):
    (scan.volume.parent.parent / "lungs/a.b2nd").unlink()
    assert explained(scan).lungs.mean() == 1


def test_a_scan_without_lesion_in_what_is_seen_has_no_evidence(scan):
    above = replace(scan, selection=Selection("a", "covid", 7, 10, (0, 0, 80, 80)))
    assert explained(above) is None


def test_masks_that_do_not_fit_or_are_missing_are_named(scan):
    lesions = scan.volume.parent.parent / "lesions/a.b2nd"
    save_volume(lesions, np.ones((12, 80, 79), np.uint8))
    with pytest.raises(ValueError, match=r"has shape \(12, 80, 79\), its scan has \(12, 80, 80\)"):
        explained(scan)
    lesions.unlink()
    with pytest.raises(FileNotFoundError, match="lesions"):
        explained(scan)


def test_a_random_network_depends_on_its_seed_alone():
    state = torch.random.get_rng_state()
    first, again, other = (
        random_network(nn.Linear, seed, in_features=3, out_features=2) for seed in (0, 0, 1)
    )
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(0)
    assert torch.equal(first.weight, nn.Linear(3, 2).weight)
    assert not first.weight.requires_grad and not first.training
