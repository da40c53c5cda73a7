import dataclasses
import re

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet50

from lib.classification import covnet
from lib.classification.covnet import CARD, VARIANTS, COVNet, build
from lib.classification.inputs import ScanBatch, scan_logits

SETTINGS = {
    "image_size": 32,
    "batch_scans": 3,
    "rounds": 1,
    "learning_rate": 2e-3,
    "weight_decay": 0.0,
    "class_balanced": True,
    "augmentation": {"mirrored": True, "shift": 0.05},
    "epochs": 10,
    "patience": None,
    "chosen_by": "loss",
    "schedule": None,
    "loader_processes": 0,
    "cache_pictures": True,
}


def made_slices(number, *, size=32, seed=0):
    """Random grey slices."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 1, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return build(**VARIANTS["small"]).eval()


@pytest.mark.parametrize("preset, parameters", [("paper", 23_514_179), ("small", 139_747)])
def test_parameters_and_shapes(preset, parameters):
    with torch.device("meta"):
        model = build(**VARIANTS[preset])
        assert model(made_slices(4).to("meta"), [1, 3]).shape == (2, 3)
    assert sum(weights.numel() for weights in model.parameters()) == parameters


def test_the_published_number_of_parameters():
    """ResNet-50 without its class layer, and a layer of 2,048 features and 3 classes."""
    assert CARD.parameters == 23_508_032 + 2048 * 3 + 3
    assert not CARD.approximation


def test_the_largest_feature_of_the_scan_decides(small):
    slices, lengths = made_slices(6), [1, 3, 2]
    with torch.no_grad():
        features = small.trunk(slices.expand(-1, 3, -1, -1) / 255)
        expected, start = [], 0
        for length in lengths:
            rows = features[start : start + length].tolist()
            expected.append([max(values) for values in zip(*rows, strict=True)])
            start += length
        torch.testing.assert_close(small(slices, lengths), small.output(torch.tensor(expected)))


def test_batches_of_racnet_fit_and_order_of_slices_does_not_matter(small):
    slices = made_slices(5)
    batch = ScanBatch(slices, [2, 3], torch.tensor([0, 1]), ["a", "b"])
    with torch.no_grad():
        scores = scan_logits(small, batch)
        turned = small(slices[[1, 0, 4, 2, 3]], [2, 3])
    torch.testing.assert_close(scores, turned)
    assert scores.shape == (2, 3)


@pytest.mark.parametrize("frozen", [True, False])
def test_norms_are_frozen_if_asked_and_blocks_stay_open(frozen):
    model = build(widths=[4, 4, 4, 4], blocks=[1, 1, 1, 1], frozen_affine=frozen)
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert {weights.requires_grad for layer in norms for weights in layer.parameters()} == {
        not frozen
    }
    assert all(bool(layer.weight.all()) for layer in norms)
    model(made_slices(4), [2, 2]).sum().backward()
    assert all(layer.weight.grad.any() for layer in model.modules() if isinstance(layer, nn.Conv2d))


def test_weights_of_torchvision_are_read(tmp_path):
    theirs = resnet50().eval()
    save_file(theirs.state_dict(), tmp_path / "resnet50.safetensors")
    ours = build(weights=tmp_path / "resnet50.safetensors").eval()
    theirs.fc = nn.Identity()
    pictures = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.trunk(pictures), theirs(pictures), rtol=1e-4, atol=1e-4)


def test_other_weights_are_refused(tmp_path):
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors does not hold the layers of this"):
        build(**VARIANTS["small"], weights=tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "lengths, message",
    [
        ([1, 3], "5 slices, but the lengths sum to 4"),
        ([5, 0], "a scan needs at least one slice, got lengths [5, 0]"),
    ],
)
def test_lengths_that_do_not_fit_are_named(lengths, message):
    model = COVNet(nn.Flatten(), width=3)
    with pytest.raises(ValueError, match=re.escape(message)):
        model(made_slices(5, size=1), lengths)


def test_it_learns(assert_it_separates):
    """Scans of one slice each."""
    torch.manual_seed(0)
    network = build(**VARIANTS["small"])

    class OneSlice(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, pictures):
            return self.network((255 * pictures).clamp(0, 255).byte(), len(pictures) * [1])

    assert_it_separates(OneSlice(), steps=40, learning_rate=5e-3)


def test_it_learns_pictures(assert_it_learns_pictures):
    assert_it_learns_pictures(covnet, covnet.VARIANTS["small"], SETTINGS)


def test_pictures_are_gathered_by_scan_in_their_order(made_pictures):
    first, second, third, fourth = made_pictures(2)
    scans = covnet.listed_scans([third, first, fourth, second])
    assert [scan.pictures for scan in scans] == [(third, fourth), (first, second)]
    assert [scan.target for scan in scans] == [1, 0]
    unlisted = dataclasses.replace(third, target=-1)
    assert covnet.listed_scans([unlisted, fourth])[0].target == 1
    assert covnet.listed_scans([unlisted])[0].target == -1


def test_a_scan_of_several_classes_is_named(made_pictures):
    first, second = made_pictures(1)
    mixed = dataclasses.replace(second, target=2)
    with pytest.raises(ValueError, match="pictures_0 has pictures of several classes"):
        covnet.listed_scans([first, mixed])


def test_all_pictures_of_a_scan_get_its_judgement_from_those_asked_for(made_pictures):
    asked = {"settings": SETTINGS, "fabric": Fabric(accelerator="cpu", devices=1)}
    pictures = made_pictures(2)
    torch.manual_seed(0)
    model = build(**VARIANTS["small"])
    found = covnet.predict(model, pictures, **asked)
    assert (found[0] == found[1]).all() and (found[2] == found[3]).all()
    assert (found[0] != found[2]).any()
    assert (covnet.predict(model, pictures[:1], **asked)[0] != found[0]).any()
