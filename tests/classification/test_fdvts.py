import numpy as np
import pytest
import timm
import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file
from timm.layers import SelectAdaptivePool2d
from torch import nn

from lib.classification import fdvts
from lib.classification.fdvts import VARIANTS, ReplicateDepth, build, inflate
from lib.classification.task import Task
from lib.data.store import open_volume

TINY = {"layers": [1, 1, 1, 1], "stem_width": 4, "channels": [4, 4, 8, 8]}
LEAST = 48  # pixels: what is left of fewer is smaller than the last pooling
SETTINGS = {
    "depth": 32,
    "slices_per_segment": 1,
    "image_size": LEAST,
    "batch_scans": 4,
    "rounds": 8,
    "learning_rate": 5.0e-3,
    "weight_decay": 1.0e-5,
    "temperature": 0.1,
    "mixers": {"mixup": 0.1},
    "test_views": 3,
    "epochs": 3,
    "patience": None,
    "chosen_by": "loss",
    "schedule": None,
    "loader_processes": 0,
    "cache_volumes": True,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def lively(network):
    """Statistics and weights of batch norm drawn at random, so that they must be carried over."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    return network.eval()


# --------------------------------------------------------------------------------------- inflation


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("resnest50d", TINY),
        ("resnest26d", {"stem_width": 4, "channels": [4, 4, 8, 8]}),
        ("resnet18", {}),
        ("resnet50d", {"stem_width": 4, "channels": [4, 4, 8, 8]}),
        ("resnest50d_4s2x40d", TINY | {"channels": [32] * 4}),
    ],
)
def test_a_volume_of_equal_slices_gives_the_features_of_the_slice(name, numbers):
    network = lively(timm.create_model(name, in_chans=2, num_classes=3, **numbers))
    slices = torch.randn(2, 2, LEAST, LEAST)
    with torch.inference_mode():
        expected = network(slices)
        found = inflate(network)(slices[:, :, None].expand(-1, -1, 32, -1, -1))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 6, 5, padding=4, dilation=2, bias=False),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.AvgPool2d(3, stride=2, padding=1),
        nn.AvgPool2d(2, stride=2, ceil_mode=True, count_include_pad=False),
    ],
    ids=str,
)
def test_an_inflated_layer_keeps_equal_slices_equal_and_strides_in_depth(layer):
    slices = torch.randn(2, 4, 9, 9)
    expected = layer(slices)
    found = inflate(layer)(slices[:, :, None].expand(-1, -1, 9, -1, -1))
    torch.testing.assert_close(found, expected[:, :, None].expand_as(found))
    assert found.shape[2] == found.shape[3]


def test_a_3d_convolution_sees_neighbouring_slices():
    convolution = inflate(nn.Conv2d(1, 1, 3, padding=1, bias=False))
    volumes = torch.zeros(1, 1, 5, 5, 5)
    volumes[0, 0, 2, 2, 2] = 1
    assert convolution(volumes)[0, 0].abs().sum((1, 2)).gt(0).tolist() == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_depth_is_padded_by_the_slices_at_its_ends():
    volumes = torch.randn(2, 3, 4, 5, 5)
    expected = nn.functional.pad(volumes, (0, 0, 0, 0, 2, 2), mode="replicate")
    assert torch.equal(ReplicateDepth(2)(volumes), expected)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.ConvTranspose2d(1, 1, 3), "no 3-D form of the layer ConvTranspose2d"),
        (nn.Sequential(nn.LPPool2d(2, 2)), "no 3-D form of the layer LPPool2d"),
        (nn.Conv2d(1, 1, (3, 5)), r"only square layers are inflated, got \(3, 5\)"),
        (SelectAdaptivePool2d(pool_type="max"), "no 3-D form of the global pooling 'max'"),
    ],
)
def test_what_cannot_be_inflated_is_refused(layer, message):
    with pytest.raises(ValueError, match=message):
        inflate(layer)


# --------------------------------------------------------------------------------------- variants


def test_parameters_of_the_papers_network():
    """ResNeSt-50 has 25,434,240 weights in 2-D; ours in 3-D are 48,124,032, the heads the rest."""
    with torch.device("meta"):
        model = build(**VARIANTS["paper"])
    heads = (2048 * 2048 + 2048) + (2048 * 128 + 128) + (2048 * 2 + 2) + 2
    assert count(model.encoder) == 48_124_032
    assert count(model) == 48_124_032 + heads == 52_586_756
    plane = timm.create_model("resnest50d", in_chans=1, num_classes=0)
    deep = sum(
        weights.numel() * (weights.shape[-1] - 1)
        for weights in plane.parameters()
        if weights.ndim == 4
    )
    assert count(plane) + deep == 48_124_032  # each k x k kernel k times


def count(module):
    return sum(weights.numel() for weights in module.parameters())


def test_parameters_of_the_small_network():
    assert count(build(**VARIANTS["small"])) == 1_218_012


def test_weights_of_a_2d_network_are_taken_over(tmp_path):
    colour = lively(timm.create_model("resnest50d", num_classes=5, **TINY))
    save_file(colour.state_dict(), tmp_path / "imagenet.safetensors")
    model = build(backbone_weights=tmp_path / "imagenet.safetensors", **TINY).eval()
    grey = torch.randn(2, 1, LEAST, LEAST)
    with torch.inference_mode():
        colour.reset_classifier(0)
        expected = colour(grey.expand(-1, 3, -1, -1))
        found = model.encoder(grey.expand(-1, 32, -1, -1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------ training, judging


def make_task(scans, folder, settings):
    return Task(
        scans=scans,
        splits=["train"] * 8 + ["validation"] * 2 + ["test"] * 2,
        variant=TINY,
        settings=settings,
        fabric=Fabric(accelerator="cpu", devices=1),
        folder=folder,
        seed=0,
    )


def test_a_tiny_network_learns_and_judges_scans_it_has_not_seen(made_scans, black_scan, tmp_path):
    task = make_task(made_scans(12, size=40), tmp_path / "model", SETTINGS)
    model, histories, _ = fdvts.train(task)
    (history,) = histories.values()
    assert history[-1]["validation_loss"] < history[0]["validation_loss"]
    assert (model.log_weights != 1).all()
    scans = [*task.part("test"), black_scan, task.train[0]]
    assert len(open_volume(task.train[0].volume)) == 1
    found = fdvts.predict(model, scans, settings=SETTINGS, fabric=task.fabric)
    assert found.shape == (4, 2) and np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    assert found[:2].argmax(1).tolist() == [0, 1]


def test_the_same_seed_gives_the_same_weights(made_scans, tmp_path):
    scans, settings = made_scans(12), SETTINGS | {"epochs": 1, "rounds": 1}
    first, second = (
        fdvts.train(make_task(scans, tmp_path / name, settings)).model.state_dict()
        for name in ("first", "second")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
