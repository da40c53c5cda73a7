import pytest
import torch
from torch import nn
from torchvision.models.video import mc3_18, r3d_18
from torchvision.models.video.resnet import Conv3DNoTemporal, Conv3DSimple

from lib.classification.video_resnet import grey_stem, time_steps, video_trunk

R3D = 4 * [Conv3DSimple]
MC3 = [Conv3DSimple] + 3 * [Conv3DNoTemporal]


@pytest.mark.parametrize(("factory", "convolutions"), [(r3d_18, R3D), (mc3_18, MC3)])
def test_a_trunk_of_published_width_computes_what_torchvisions_does(factory, convolutions):
    torch.manual_seed(0)
    theirs, ours = factory(num_classes=2).eval(), video_trunk(convolutions).eval()
    weights = {n: w for n, w in theirs.state_dict().items() if not n.startswith("fc.")}
    weights["stem.0.weight"] = grey_stem(weights["stem.0.weight"])
    ours.load_state_dict(weights)
    grey = torch.randn(1, 1, 2, 16, 16)
    with torch.inference_mode():
        features = ours(grey).mean((2, 3, 4))
        torch.testing.assert_close(theirs.fc(features), theirs(grey.expand(-1, 3, -1, -1, -1)))


def test_it_starts_as_torchvisions_does():
    torch.manual_seed(0)
    theirs, ours = mc3_18().layer4.state_dict(), video_trunk(MC3).layer4.state_dict()
    for name, weights in theirs.items():
        if weights.ndim == 5:
            assert ours[name].std().item() == pytest.approx(weights.std().item(), rel=0.02)
        else:
            assert torch.equal(ours[name], weights)


@pytest.mark.parametrize(
    ("convolutions", "expected"), [(R3D, (2, 16, 1, 2, 2)), (MC3, (2, 16, 8, 2, 2))]
)
def test_mc3_keeps_all_slices_and_r3d_halves_them_three_times(convolutions, expected):
    trunk = video_trunk(convolutions, widths=[2, 4, 8, 16], blocks=1)
    assert trunk(torch.randn(2, 1, 8, 32, 32)).shape == expected


def test_dropout_follows_every_stage_when_asked():
    kinds = [type(layer) for layer in video_trunk(R3D, widths=[2] * 4, dropout=0.5)]
    assert kinds == [nn.Sequential] + 4 * [nn.Sequential, nn.Dropout]
    assert nn.Dropout not in [type(layer) for layer in video_trunk(R3D, widths=[2] * 4)]


def test_stages_without_widths_are_refused():
    with pytest.raises(ValueError, match="4 stages need as many widths, got \\[8, 16\\]"):
        video_trunk(R3D, widths=[8, 16])
    with pytest.raises(ValueError, match="4 stages need as many numbers of blocks, got \\[2\\]"):
        video_trunk(R3D, blocks=[2])


def test_every_stage_has_its_own_number_of_blocks():
    trunk = video_trunk(R3D, widths=[2] * 4, blocks=[1, 3, 2, 1])
    assert [len(stage) for stage in list(trunk)[1:]] == [1, 3, 2, 1]


@pytest.mark.parametrize(("slices", "steps"), [(8, 1), (9, 2), (16, 2), (32, 4), (33, 5)])
def test_time_steps_are_those_of_the_trunk(slices, steps):
    trunk = video_trunk(R3D, widths=[1] * 4, blocks=1).eval()
    assert time_steps(slices, stride=8) == steps
    assert trunk(torch.zeros(1, 1, slices, 16, 16)).shape[2] == steps
    with pytest.raises(ValueError, match="at least 8 slices for one time step, got 7"):
        time_steps(7, stride=8)
