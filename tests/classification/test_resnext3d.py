import re

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from lib.classification.resnext3d import resnext3d_trunk

SMALL = {"widths": [16, 32, 48, 64], "blocks": [1, 2, 1, 1], "cardinality": 4}


def trunk_of_slices(blocks: list[int]) -> ResNet:
    """Torchvision's ResNeXt of 32 groups for pictures, whose widths are the same."""
    return ResNet(Bottleneck, blocks, groups=32, width_per_group=4)


def test_the_published_trunk_is_that_for_pictures_with_deeper_kernels():
    with torch.device("meta"):
        trunk, flat = resnext3d_trunk(), trunk_of_slices([3, 4, 23, 3])
    flat.fc = nn.Identity()
    flat_count = sum(weights.numel() for weights in flat.parameters())
    assert flat_count == 44_177_704 - 2_049_000  # as published for 1000 classes, without them
    grouped = sum(
        blocks * 18 * (width // 32) * width  # 27 weights where there were 9, per pair of channels
        for blocks, width in zip([3, 4, 23, 3], [128, 256, 512, 1024], strict=True)
    )
    expected = flat_count + grouped + (7**3 - 7**2) * 3 * 64
    assert sum(weights.numel() for weights in trunk.parameters()) == expected == 47_521_216


def test_the_published_clip_gives_2_steps_of_7_by_7():
    with torch.device("meta"):
        features = resnext3d_trunk()(torch.empty(1, 3, 32, 224, 224))
    assert features.shape == (1, 2048, 2, 7, 7)


def test_on_a_still_clip_it_computes_what_torchvisions_does_on_the_picture():
    torch.manual_seed(0)
    flat, trunk = trunk_of_slices([1, 1, 1, 1]), resnext3d_trunk(blocks=[1, 1, 1, 1])
    flat.fc = nn.Identity()
    for layer in flat.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    # both list their layers in the order of computing, the shortcut last in a block
    weights = {}
    for name, flat_weights in zip(trunk.state_dict(), flat.state_dict().values(), strict=True):
        weights[name] = flat_weights
        if flat_weights.ndim == 4:  # into the middle slice of a kernel that is else 0
            weights[name] = torch.zeros_like(trunk.state_dict()[name])
            weights[name][:, :, weights[name].shape[2] // 2] = flat_weights
    trunk.load_state_dict(weights)
    picture = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        features = trunk.eval()(picture[:, :, None].expand(-1, -1, 16, -1, -1)).mean((2, 3, 4))
        torch.testing.assert_close(features, flat.eval()(picture))


@pytest.mark.parametrize(
    ("clips", "expected"),
    [((2, 3, 16, 64, 64), (2, 64, 1, 2, 2)), ((1, 3, 40, 33, 64), (1, 64, 3, 2, 2))],
)
def test_small_trunks_and_clips_of_other_sizes(clips, expected):
    trunk = resnext3d_trunk(**SMALL)
    assert trunk(torch.zeros(clips)).shape == expected
    assert {layer.groups for layer in trunk.modules() if isinstance(layer, nn.Conv3d)} == {1, 4}


def test_wrong_arguments_and_clips_are_refused():
    with pytest.raises(ValueError, match="4 groups do not share half of the width 20 evenly"):
        resnext3d_trunk(**SMALL | {"widths": [16, 20, 48, 64]})
    with pytest.raises(ValueError, match="4 stages need as many numbers of blocks"):
        resnext3d_trunk(**SMALL | {"blocks": [1, 1]})
    trunk = resnext3d_trunk(**SMALL)
    with pytest.raises(ValueError, match="at least 16 slices for one time step, got 15"):
        trunk(torch.zeros(1, 3, 15, 32, 32))
    with pytest.raises(ValueError, match=re.escape("got (3, 16, 32, 32)")):
        trunk(torch.zeros(3, 16, 32, 32))
