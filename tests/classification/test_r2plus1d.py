import hashlib
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem, VideoResNet

from lib.classification.r2plus1d import (
    TEMPORAL_STRIDE,
    AcrossSlices,
    middle_width,
    r2plus1d_trunk,
)
from lib.foundation.checkpoints import CheckpointError

SMALL = {"widths": [4, 6, 8, 10], "blocks": [1, 2, 1, 1]}


def published_network() -> VideoResNet:
    """Torchvision's network with the layers that IG-65M's has otherwise, on no memory."""
    with torch.device("meta"):
        network = VideoResNet(BasicBlock, 4 * [Conv2Plus1D], [3, 4, 6, 3], R2Plus1dStem, 359)
        network.layer2[0].conv2[0] = Conv2Plus1D(128, 128, 288)
        network.layer3[0].conv2[0] = Conv2Plus1D(256, 256, 576)
        network.layer4[0].conv2[0] = Conv2Plus1D(512, 512, 1152)
    return network


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_the_published_trunk_has_the_names_shapes_and_number_of_the_public_checkpoint():
    with torch.device("meta"):
        trunk = r2plus1d_trunk()
    expected = {n: s for n, s in shapes(published_network()).items() if not n.startswith("fc.")}
    assert shapes(trunk) == expected
    assert sum(weights.numel() for weights in trunk.parameters()) == 63_491_975


def test_the_published_clip_gives_4_steps_of_14_by_14():
    with torch.device("meta"):
        features = r2plus1d_trunk()(torch.empty(1, 3, 32, 224, 224))
    assert features.shape == (1, 512, 4, 14, 14)


def test_it_computes_what_torchvisions_network_does():
    torch.manual_seed(0)
    theirs = VideoResNet(BasicBlock, 4 * [Conv2Plus1D], [1, 1, 1, 1], R2Plus1dStem, 2)
    for number, width in ((2, 128), (3, 256), (4, 512)):
        block = getattr(theirs, f"layer{number}")[0]
        block.conv2[0] = Conv2Plus1D(width, width, middle_width(width, width))
    ours = r2plus1d_trunk(blocks=[1, 1, 1, 1]).eval()
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm3d):
            layer.eps = 1e-3
            layer.running_var.uniform_(0.5, 2)
            layer.running_mean.normal_()
    ours.load_state_dict({n: w for n, w in theirs.state_dict().items() if n[:3] != "fc."})
    clips = torch.randn(1, 3, 8, 16, 16)
    theirs.eval()
    with torch.inference_mode():
        torch.testing.assert_close(theirs.fc(ours(clips).mean((2, 3, 4))), theirs(clips))


@pytest.mark.parametrize("before", [4, 64, 128])
@pytest.mark.parametrize("after", [4, 128, 512])
def test_a_factored_convolution_has_the_weights_of_a_full_one(before, after):
    full, per_channel = 27 * before * after, 9 * before + 3 * after
    assert full - per_channel < middle_width(before, after) * per_channel <= full


@pytest.mark.parametrize(
    ("clips", "expected"),
    [((2, 3, 16, 64, 64), (2, 10, 2, 4, 4)), ((1, 3, 20, 40, 48), (1, 10, 3, 3, 3))],
)
def test_clips_of_other_sizes(clips, expected):
    assert r2plus1d_trunk(**SMALL)(torch.zeros(clips)).shape == expected


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_across_slices_is_a_3_d_convolution_with_the_same_gradients(stride, layout):
    torch.manual_seed(0)
    ours = AcrossSlices(5, 4, stride)
    plain = nn.Conv3d(5, 4, (3, 1, 1), stride=(stride, 1, 1), padding=(1, 0, 0), bias=False)
    plain.load_state_dict(ours.state_dict())
    clips = torch.randn(2, 5, 7, 6, 3).to(memory_format=layout).requires_grad_()
    found, expected = ours.to(memory_format=layout)(clips), plain(clips)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), [clips, ours.weight]),
        torch.autograd.grad((expected * weights).sum(), [clips, plain.weight]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_norms_have_caffes_epsilon_and_its_momentum_as_pytorch_counts():
    norms = [m for m in r2plus1d_trunk(**SMALL).modules() if isinstance(m, nn.BatchNorm3d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.1)}
    copied = r2plus1d_trunk(**SMALL, norm_momentum=0.9)
    assert copied.stem[1].momentum == 0.9


def test_wrong_clips_are_refused():
    trunk = r2plus1d_trunk(**SMALL)
    with pytest.raises(ValueError, match=f"at least {TEMPORAL_STRIDE} slices .*, got 7"):
        trunk(torch.zeros(1, 3, 7, 16, 16))
    with pytest.raises(ValueError, match=re.escape("got (1, 1, 8, 16, 16)")):
        trunk(torch.zeros(1, 1, 8, 16, 16))


def checkpoint(path: Path, **kwargs) -> str:
    """A file as the published one, with a class layer; gives its SHA-256."""
    weights = r2plus1d_trunk(**kwargs).state_dict()
    weights |= {"fc.weight": torch.zeros(359, 10), "fc.bias": torch.zeros(359)}
    save = safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save
    save(dict(weights), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("digits", [8, 64])
def test_a_checkpoint_is_loaded_without_its_class_layer(tmp_path, suffix, digits):
    path = tmp_path / f"weights{suffix}"
    torch.manual_seed(1)
    known = checkpoint(path, **SMALL)[:digits]
    torch.manual_seed(1)
    expected = r2plus1d_trunk(**SMALL).state_dict()
    torch.manual_seed(2)
    loaded = r2plus1d_trunk(**SMALL, weights=path, sha256=known).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_wrong_and_damaged_checkpoints_are_one_sentence(tmp_path):
    path = tmp_path / "weights.pth"
    known = checkpoint(path, **SMALL)
    with pytest.raises(CheckpointError, match="does not have the SHA-256 449a7af9; it was not"):
        r2plus1d_trunk(**SMALL, weights=path)  # not the published one
    with pytest.raises(CheckpointError, match=r"of these widths and blocks$"):
        r2plus1d_trunk(**SMALL | {"blocks": [1, 1, 1, 1]}, weights=path, sha256=known)
    with pytest.raises(CheckpointError, match=r"of these widths and blocks$"):
        r2plus1d_trunk(**SMALL | {"widths": [4, 6, 8, 12]}, weights=path, sha256=known)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="does not have the SHA-256"):
        r2plus1d_trunk(**SMALL, weights=path, sha256=known)
    with pytest.raises(CheckpointError, match="is absent"):
        r2plus1d_trunk(**SMALL, weights=tmp_path / "none.pth")
    torch.save([1, 2], path)
    known = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(CheckpointError, match=r"of these widths and blocks$"):
        r2plus1d_trunk(**SMALL, weights=path, sha256=known)
