import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.interpolate import CubicSpline
from torch import nn
from torchvision.models.video import r3d_18

from lib.classification import mdap
from lib.classification.inputs import ScanItem
from lib.classification.mdap import (
    UNKNOWN,
    VARIANTS,
    build,
    coordinates,
    load_distorted,
    mirrored_logits,
    normalised_view,
    presence_and_severity_loss,
    severity_index,
    shown,
    spline_weights,
    training_loss,
)
from lib.classification.volumes import VolumeBatch
from lib.data.store import save_volume

TINY = {"widths": [4, 8, 8, 8], "hidden_width": 8, "dropout": 0.05}
SETTINGS = {
    "depth": 8,
    "image_size": 16,
    "distorted": True,
    "mean": 0.4,
    "deviation": 0.3,
    "mirrored": True,
    "batch_scans": 6,
    "rounds": 1,
    "learning_rate": 1.0e-2,
    "weight_decay": 0.01,
    "label_smoothing": 0.1,
    "severity_share": 0.5,
    "epochs": 8,
    "patience": None,
    "chosen_by": "loss",
    "schedule": {"kind": "one-cycle", "total_steps": 8, "pct_start": 0.25},
    "loader_processes": 0,
    "cache_volumes": True,
}


# ---------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("preset", ["small", "paper"])
def test_shapes(preset):
    with torch.device("meta"):
        model = build(**VARIANTS[preset])
        for shape in [(2, 1, 24, 64, 64), (2, 1, 1, 32, 32)]:
            assert model(torch.empty(shape)).shape == (2, 5)
    dropouts = [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)]
    assert dropouts == 5 * [VARIANTS[preset]["dropout"]]


def test_colour_weights_answer_grey_as_they_did(tmp_path):
    torch.manual_seed(0)
    theirs = r3d_18().eval()
    save_file(theirs.state_dict(), tmp_path / "kinetics.safetensors")
    ours = build(trunk_weights=tmp_path / "kinetics.safetensors").eval()
    theirs.fc = nn.Identity()
    grey = torch.randn(1, 1, 2, 16, 16)
    with torch.inference_mode():
        found = ours.trunk(grey).mean((2, 3, 4))
        torch.testing.assert_close(found, theirs(grey.expand(-1, 3, -1, -1, -1)))


def test_weights_of_another_network_are_refused(tmp_path):
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"other\.safetensors does not hold the weights of an r3d_18"
    ):
        build(widths=[2, 2, 2, 2], trunk_weights=tmp_path / "other.safetensors")


# ------------------------------------------------------------------------------ the preparation


@given(count=st.integers(2, 300), distorted=st.booleans())
def test_coordinates_go_from_end_to_end_and_are_symmetrical(count, distorted):
    places = coordinates(count, distorted=distorted)
    assert (places[0], places[-1]) == (0, 1)
    assert (np.diff(places) > 0).all()
    np.testing.assert_allclose(places, 1 - places[::-1], atol=1e-12)


def test_the_distortion_enlarges_the_middle_twofold():
    plain, distorted = (coordinates(1001, distorted=d) for d in (False, True))
    steps = np.diff(distorted) / np.diff(plain)
    assert steps[500] == pytest.approx(0.5, abs=1e-4)
    assert steps[0] == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize("length", [4, 5, 40])
def test_splines_are_scipys_cubic_ones(length):
    samples = np.random.default_rng(length).random((length, 3))
    places = coordinates(17, distorted=True)
    expected = CubicSpline(np.linspace(0, 1, length), samples, bc_type="not-a-knot")(places)
    np.testing.assert_allclose(spline_weights(length, places) @ samples, expected, atol=1e-5)


@given(length=st.integers(1, 60), grey=st.floats(0, 1))
def test_splines_keep_what_is_flat_and_pass_through_the_samples(length, grey):
    flat = spline_weights(length, coordinates(9, distorted=True)) @ np.full(length, grey)
    np.testing.assert_allclose(flat, grey, atol=1e-4)
    there = spline_weights(length, np.linspace(0, 1, length))
    np.testing.assert_allclose(there, np.eye(length), atol=1e-4)


@pytest.mark.parametrize(("length", "power"), [(2, 1), (3, 2), (4, 3), (9, 3)])
def test_few_slices_are_joined_by_the_curve_that_they_determine(length, power):
    places = coordinates(11, distorted=False)
    samples = np.linspace(0, 1, length) ** power
    np.testing.assert_allclose(spline_weights(length, places) @ samples, places**power, atol=1e-5)


def stored(folder, voxels, lungs=None):
    save_volume(folder / "scan.b2nd", voxels)
    if lungs is not None:
        save_volume(folder / "lungs.b2nd", lungs)
    return ScanItem(
        "scan", folder / "scan.b2nd", None if lungs is None else folder / "lungs.b2nd", 0
    )


def test_without_distortion_a_volume_of_the_right_size_stays_as_it_is(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (9, 12, 12), dtype=np.uint8)
    found = load_distorted(stored(tmp_path, grey), depth=9, size=12, distorted=False)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, grey / 255, atol=1e-5)


def test_a_single_slice_is_repeated(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (1, 12, 12), dtype=np.uint8)
    found = load_distorted(stored(tmp_path, grey), depth=5, size=12, distorted=False)
    np.testing.assert_allclose(found, np.repeat(grey / 255, 5, axis=0), atol=1e-5)


def test_the_distortion_acts_on_all_three_axes(tmp_path):
    ramps = np.meshgrid(*3 * [np.linspace(0, 255, 16)], indexing="ij")
    expected = coordinates(16, distorted=True)
    for axis, ramp in enumerate(ramps):
        scan = stored(tmp_path, np.rint(ramp).astype(np.uint8))
        found = load_distorted(scan, depth=16, size=16, distorted=True)
        others = tuple(other for other in range(3) if other != axis)
        np.testing.assert_allclose(found.mean(others), expected, atol=0.01)
        assert found.std(others).max() < 1e-4


def test_outside_the_lungs_it_is_black(tmp_path):
    voxels = np.full((4, 12, 12), 100, np.int16)
    lungs = np.zeros(voxels.shape, np.uint8)
    lungs[:, :, :6] = 1
    scan = stored(tmp_path, voxels, lungs)
    found = load_distorted(scan, depth=4, size=12, distorted=False)
    assert (found[:, :, :6] > 0.9).all()
    np.testing.assert_allclose(found[:, :, 6:], 0, atol=1e-6)


def test_scan_and_mask_of_different_shape_are_refused(tmp_path):
    scan = stored(tmp_path, np.zeros((4, 12, 12), np.int16), np.ones((4, 12, 11), np.uint8))
    with pytest.raises(ValueError, match="scan: scan and lung mask differ in shape"):
        load_distorted(scan, depth=4, size=12, distorted=False)


def test_half_of_the_random_views_are_mirrored():
    volume = np.random.default_rng(0).random((3, 4, 4), dtype=np.float32)
    numbers = {"mean": 0.5, "deviation": 0.25}
    plain = normalised_view(volume, None, mirrored=True, **numbers)
    np.testing.assert_allclose(plain[0], (volume - 0.5) / 0.25, rtol=1e-5)
    views = [
        normalised_view(volume, np.random.default_rng(seed), mirrored=True, **numbers)
        for seed in range(200)
    ]
    mirrored = [torch.equal(view, plain.flip(-1)) for view in views]
    assert all(m or torch.equal(view, plain) for m, view in zip(mirrored, views, strict=True))
    assert 70 < sum(mirrored) < 130
    never = normalised_view(volume, np.random.default_rng(2), mirrored=False, **numbers)
    assert torch.equal(never, plain)


# -------------------------------------------------------------------------- the loss, the outputs


def loss_of(outputs, presence, severity, **changes):
    numbers = {"positive_weight": 3.0, "label_smoothing": 0.1, "severity_share": 0.25, **changes}
    return presence_and_severity_loss(
        torch.tensor(outputs), torch.tensor(presence), torch.tensor(severity), **numbers
    ).item()


def test_the_loss_is_the_published_sum():
    outputs = [[0.7, 1.0, 0.0, -1.0, 2.0], [-0.3, 0.5, 0.5, 0.5, 0.5]]
    chance = 1 / (1 + np.exp(-np.array([0.7, -0.3])))
    there = [
        -(3 * 0.9 * np.log(chance[0]) + 0.1 * np.log(1 - chance[0])),
        -(3 * 0.1 * np.log(chance[1]) + 0.9 * np.log(1 - chance[1])),
    ]
    scores = np.exp(outputs[0][1:])
    severe = -np.log(scores[3] / scores.sum())
    expected = 0.75 * np.mean(there) + 0.25 * severe  # the second scan has no severity
    assert loss_of(outputs, [1, 0], [3, UNKNOWN]) == pytest.approx(expected, rel=1e-5)


def test_without_known_severities_only_presence_counts():
    outputs = [[0.7, 9.0, 0.0, -1.0, 2.0]]
    alone = loss_of(outputs, [1], [UNKNOWN], severity_share=0.0)
    assert loss_of(outputs, [1], [UNKNOWN]) == pytest.approx(0.75 * alone)


@pytest.mark.parametrize(
    ("severity", "index"), [("mild", 0), ("critical", 3), (None, UNKNOWN), ("CT-1", UNKNOWN)]
)
def test_severities_of_cov19_ct_db_are_known(severity, index):
    assert severity_index(severity) == index


def test_the_training_loss_finds_weight_and_severities_by_itself(made_scans):
    scans = made_scans(4)
    scans = [scans[0], scans[2], dataclasses.replace(scans[1], severity="severe")]
    outputs = torch.tensor([[0.3, 1.0, 0.0, -1.0, 2.0], [-0.2, 1.0, 2.0, 3.0, 4.0]])
    batch = VolumeBatch(outputs, torch.tensor([1, 0]), [scans[2].scan_id, scans[0].scan_id])
    numbers = {"label_smoothing": 0.1, "severity_share": 0.25}
    found = training_loss(scans, numbers)(nn.Identity(), batch).item()
    expected = loss_of(outputs.tolist(), [1, 0], [2, UNKNOWN], positive_weight=2.0)
    assert found == pytest.approx(expected)


def test_scores_are_those_of_a_scan_and_its_mirror_image():
    class LeftSide(nn.Module):
        def forward(self, volumes):
            return volumes[..., 0].mean((1, 2, 3))[:, None].expand(-1, 5)

    volumes = torch.arange(2.0 * 3 * 4 * 5).view(2, 1, 3, 4, 5)
    scores = mirrored_logits(LeftSide(), VolumeBatch(volumes, torch.zeros(2), ["a", "b"]))
    mean = (volumes[..., 0].mean((1, 2, 3)) + volumes[..., -1].mean((1, 2, 3))) / 2
    torch.testing.assert_close(scores.softmax(1)[:, 1], mean.sigmoid())
    mirrored = VolumeBatch(volumes.flip(-1), torch.zeros(2), ["a", "b"])
    torch.testing.assert_close(mirrored_logits(LeftSide(), mirrored), scores)


# ------------------------------------------------------------------------------------- all of it


def test_it_learns_and_predicts_the_same_again(assert_it_learns):
    assert_it_learns(mdap, TINY, SETTINGS)


def test_what_is_shown_is_the_distorted_scan_in_grey(made_scans):
    scan = made_scans(2)[1]
    pictures = shown(scan, SETTINGS)
    assert pictures.dtype == np.uint8
    loaded = load_distorted(scan, depth=8, size=16, distorted=True)
    np.testing.assert_allclose(pictures, np.clip(loaded, 0, 1) * 255, atol=0.51)
