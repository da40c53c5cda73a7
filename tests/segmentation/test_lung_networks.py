import json

import numpy as np
import pytest
import safetensors.torch
import torch

from lib.data.scan import LEFT_LUNG, RIGHT_LUNG, Scan, apply_window
from lib.segmentation import lung_networks, unet
from lib.segmentation.lung_networks import NetworkSegmenter, build_network

SETTINGS = {"widths": [2, 4], "dropout": 0.5, "size": 16}


@pytest.fixture(params=["unet", "bcdunet"])
def weights(request, tmp_path):
    """A folder as training leaves it, with random weights."""
    return save(tmp_path, SETTINGS | {"network": request.param})


def save(folder, settings, seed=0):
    torch.manual_seed(seed)
    model = build_network(settings["network"], settings)
    tensors = {name: values.contiguous() for name, values in model.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / "best.safetensors")
    summary = {"identity": {"given": settings}}
    (folder / "training.json").write_text(json.dumps(summary))
    return folder / "best.safetensors"


def noise(shape, seed=0):
    voxels = np.random.default_rng(seed).normal(-500, 400, shape)
    return Scan(voxels.astype(np.int16))


@pytest.mark.parametrize("shape", [(5, 32, 32), (1, 33, 20), (3, 12, 47)])
def test_a_mask_of_the_scans_size_whatever_its_shape(weights, shape):
    mask = NetworkSegmenter(weights=weights, batch_size=2)(noise(shape))
    assert mask.shape == shape and mask.dtype == np.uint8
    assert set(np.unique(mask)) <= {0, RIGHT_LUNG, LEFT_LUNG}


def test_the_batch_size_does_not_change_the_probabilities(weights):
    shown = np.random.default_rng(0).integers(0, 256, (7, 24, 20), np.uint8)
    whole = NetworkSegmenter(weights=weights, batch_size=7).probability(shown)
    one = NetworkSegmenter(weights=weights, batch_size=1)
    singly = torch.cat([one.probability(shown[[place]]) for place in range(7)])
    torch.testing.assert_close(singly, whole, atol=1e-6, rtol=0)


def test_8_bit_scans_are_taken(weights):
    scan = noise((2, 32, 32))
    mask = NetworkSegmenter(weights=weights, batch_size=2)(Scan(apply_window(scan.voxels)))
    assert mask.shape == scan.voxels.shape


@pytest.fixture
def bright_is_lung(monkeypatch):
    """A network that takes bright pixels of the picture for lung."""

    class Bright(torch.nn.Module):
        def forward(self, pictures):
            return 20 * (pictures - 0.5)

    loaded = ("unet", 64, Bright())
    monkeypatch.setattr(lung_networks, "_load", lambda weights, changed: loaded)


def test_lungs_keep_their_place_through_resizing_and_are_told_apart(bright_is_lung, tmp_path):
    truth = np.zeros((3, 100, 150), np.uint8)
    truth[:2, 20:80, 20:60], truth[:2, 20:80, 90:130] = RIGHT_LUNG, LEFT_LUNG
    scan = Scan(np.where(truth > 0, 200, 0).astype(np.uint8))
    mask = NetworkSegmenter(weights=tmp_path / "none", batch_size=2)(scan)
    assert (mask != truth).mean() < 0.01
    assert not mask[2].any()  # black from edge to edge


def test_nothing_depends_on_the_number_of_threads(weights):
    scan, before = noise((2, 32, 32)), torch.get_num_threads()
    masks = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        masks.append(NetworkSegmenter(weights=weights, batch_size=2)(scan))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    np.testing.assert_array_equal(*masks)


def test_weights_are_read_once_until_they_change(weights):
    first = NetworkSegmenter(weights=weights, batch_size=1).model
    assert NetworkSegmenter(weights=weights, batch_size=3).model is first
    network = lung_networks.training_settings(weights)["network"]
    save(weights.parent, SETTINGS | {"network": network}, seed=1)
    assert NetworkSegmenter(weights=weights, batch_size=1).model is not first


def test_weights_that_are_missing_damaged_or_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the stage train_lung_network first"):
        NetworkSegmenter(weights=tmp_path / "best.safetensors", batch_size=1)
    weights = save(tmp_path, SETTINGS | {"network": "unet"})
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="does not fit the network"):
        NetworkSegmenter(weights=weights, batch_size=1)
    other = {"identity": {"given": {"network": "racnet"}}}
    weights.with_name("training.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="does not describe one of the networks"):
        NetworkSegmenter(weights=weights, batch_size=1)


def test_unknown_network():
    with pytest.raises(ValueError, match=r"network is one of \['bcdunet', 'unet'\], got 'vnet'"):
        build_network("vnet", SETTINGS)
    assert isinstance(build_network("unet", SETTINGS), unet.UNet)


def test_resizing_averages_and_keeps_positions():
    pictures = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert lung_networks.resized(pictures, (4, 4)).equal(pictures)
    torch.testing.assert_close(
        lung_networks.resized(pictures, (8, 6)).mean(), pictures.mean(), atol=1e-3, rtol=0
    )
    checked = torch.zeros(1, 1, 64, 64)
    checked[..., ::2] = 1
    small = lung_networks.resized(checked, (16, 16))
    torch.testing.assert_close(small, torch.full_like(small, 0.5), atol=0.07, rtol=0)
