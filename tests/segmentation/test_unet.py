import numpy as np
import pytest
import torch
from torch import nn

from lib.data.scan import LEFT_LUNG, RIGHT_LUNG, Scan
from lib.segmentation import unet
from lib.segmentation.unet import UNet

PUBLISHED = {"widths": (64, 128, 256, 512, 1024), "dropout": 0.5}
SMALL = {"widths": (2, 4, 8), "dropout": 0.5}


def parameters(network: nn.Module) -> int:
    return sum(values.numel() for values in network.parameters())


def test_the_published_network_has_the_published_number_of_parameters():
    with torch.device("meta"):
        assert parameters(UNet(**PUBLISHED)) == 34_512_193


@pytest.mark.parametrize(
    ("widths", "shape"),
    [((2, 4), (1, 1, 2, 6)), ((2, 4, 8), (3, 1, 16, 8)), ((2, 3, 5, 7), (1, 1, 8, 24))],
)
def test_one_score_per_pixel(widths, shape):
    assert UNet(widths=widths, dropout=0.5)(torch.rand(shape)).shape == shape


@pytest.mark.parametrize("shape", [(1, 1, 16, 6), (1, 3, 16, 16), (1, 16, 16)])
def test_pictures_that_do_not_fit_are_refused_in_one_sentence(shape):
    with pytest.raises(ValueError, match="with sides divisible by 4, got"):
        UNet(**SMALL)(torch.zeros(shape))


def test_dropout_works_at_the_deepest_level_in_training_only():
    network, picture = UNet(**SMALL), torch.rand(1, 1, 16, 16)
    dropouts = [name for name, part in network.named_modules() if isinstance(part, nn.Dropout)]
    assert [name.split(".")[0] for name in dropouts] == ["deepest", "deepest"]
    torch.manual_seed(0)
    assert not torch.equal(network(picture), network(picture))
    network.eval()
    assert torch.equal(network(picture), network(picture))


def test_a_skip_carries_what_the_deeper_levels_cannot():
    torch.manual_seed(0)
    network = UNet(**SMALL).eval()
    network.deepest.apply(lambda part: part.weight.data.zero_() if hasattr(part, "weight") else 0)
    checked = torch.zeros(1, 1, 16, 16)
    checked[..., ::2] = 1
    scores = network(checked)
    assert (scores[..., 1:] - scores[..., :-1]).abs().max() > 1e-3


def test_weights_start_with_the_variance_of_he_et_al():
    torch.manual_seed(0)
    network = UNet(widths=(32, 64), dropout=0.5)
    layers = [network.encoder[0][2], network.doubling[0][0], network.decoder[0][0]]
    for layer, inputs in zip(layers, (32, 64, 64), strict=True):
        assert layer.weight.std().item() == pytest.approx((2 / (9 * inputs)) ** 0.5, rel=0.05)
        assert not layer.bias.any()


def test_each_slice_is_stretched_from_black_to_white():
    hounsfield = np.array([[[-600, -300]], [[-3000, 3000]], [[40, 40]]], np.int16)
    shown = unet.pictures(Scan(hounsfield))
    assert shown.dtype == np.uint8
    np.testing.assert_array_equal(shown, [[[0, 255]], [[0, 255]], [[0, 0]]])
    grey = np.array([[[10, 20, 30]]], np.uint8)
    np.testing.assert_array_equal(unet.pictures(Scan(grey)), [[[0, 128, 255]]])


def test_target_and_lungs_are_both_lungs():
    scan = Scan(np.zeros((1, 1, 3), np.int16))
    mask = np.array([[[0, RIGHT_LUNG, LEFT_LUNG]]], np.uint8)
    target = unet.target(scan, mask)
    np.testing.assert_array_equal(target, [[[False, True, True]]])
    np.testing.assert_array_equal(unet.lungs(scan, target), target)
