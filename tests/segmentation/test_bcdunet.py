import numpy as np
import pytest
import torch
from skimage.draw import ellipse
from torch import nn

from lib.data.scan import RIGHT_LUNG, Scan, apply_window
from lib.segmentation import bcdunet
from lib.segmentation.bcdunet import BCDUNet, ConvLSTM2d

PUBLISHED = {"widths": (64, 128, 256, 512), "dropout": 0.5}
SMALL = {"widths": (2, 4, 8), "dropout": 0.5}
AIR, LUNG, WATER = -1000, -850, 40


def test_the_published_network_has_the_published_number_of_parameters():
    with torch.device("meta"):
        network = BCDUNet(**PUBLISHED)
    count = sum(values.numel() for values in network.parameters())
    assert count == 20_658_821  # FACTS 0: 20.66 million
    moving = sum(part.num_features for part in network.modules() if hasattr(part, "running_mean"))
    assert count + 2 * moving == 20_659_717  # as Keras counts, with the moving averages


@pytest.mark.parametrize(
    ("widths", "shape"),
    [((2, 4), (1, 1, 2, 6)), ((2, 4, 8), (3, 1, 16, 8)), ((2, 4, 6, 8), (1, 1, 8, 24))],
)
def test_one_score_per_pixel(widths, shape):
    assert BCDUNet(widths=widths, dropout=0.5)(torch.rand(shape)).shape == shape


def test_pictures_that_do_not_fit_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match="sides divisible by 4, got"):
        BCDUNet(**SMALL)(torch.zeros(1, 1, 16, 6))


def test_dropout_acts_on_the_last_skip_and_between_the_deepest_pairs():
    network, seen = BCDUNet(**SMALL), []
    network.dropout.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1:]))
    network(torch.rand(1, 1, 16, 16))
    assert seen == [(4, 8, 8), (8, 4, 4), (8, 4, 4), (8, 4, 4)]


def test_a_memory_reads_the_doubled_features_first_and_the_skip_last():
    network, read = BCDUNet(**SMALL).eval(), []
    network.memory[0].register_forward_hook(lambda _, given, __: read.extend(given[0]))
    made = {}
    network.doubling[0].register_forward_hook(lambda _, __, out: made.update(doubled=out))
    network.encoder[-1].register_forward_hook(lambda _, __, out: made.update(skip=out))
    network(torch.rand(1, 1, 16, 16))
    assert torch.equal(read[0], made["doubled"]) and torch.equal(read[1], made["skip"])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_convolutional_lstm_on_single_pixels_is_an_lstm(steps):
    torch.manual_seed(steps)
    ours, theirs = ConvLSTM2d(3, 5, kernel=1), nn.LSTMCell(3, 5)
    with torch.no_grad():
        theirs.weight_ih.copy_(ours.of_input.weight[:, :, 0, 0])
        theirs.weight_hh.copy_(ours.of_state.weight[:, :, 0, 0])
        theirs.bias_ih.copy_(ours.of_input.bias)
        theirs.bias_hh.zero_()
    sequence, state = torch.randn(steps, 7, 3), None
    for values in sequence:
        state = theirs(values, state)
    output = ours([values[:, :, None, None] for values in sequence])
    torch.testing.assert_close(output[:, :, 0, 0], state[0])


def test_a_convolutional_lstm_sees_neighbours_in_input_and_state():
    memory = ConvLSTM2d(1, 2)
    empty, spot = torch.zeros(1, 1, 7, 7), torch.zeros(1, 1, 7, 7)
    spot[..., 3, 3] = 1

    def reach(*sequence):
        differs = memory(sequence) != memory([empty] * len(sequence))
        return int(differs.any((0, 1, 2)).sum())

    assert (reach(spot), reach(spot, empty)) == (3, 5)


def test_the_forget_gate_starts_open():
    bias = BCDUNet(**SMALL).memory[0].of_input.bias
    assert [part.unique().tolist() for part in bias.chunk(4)] == [[0], [1], [0], [0]]
    with pytest.raises(ValueError, match="at least one picture"):
        ConvLSTM2d(1, 1)([])


def test_pictures_show_soft_tissue():
    hounsfield = np.array([[[-2000, -512, 0, 512, 3000]]], np.int16)
    np.testing.assert_array_equal(bcdunet.pictures(Scan(hounsfield)), [[[0, 0, 128, 255, 255]]])


def test_8_bit_pictures_look_like_hounsfield_units_within_the_lung_window():
    hounsfield = np.linspace(-1300, 140, 60).astype(np.int16).reshape(1, 6, 10)
    of_grey = bcdunet.pictures(Scan(apply_window(hounsfield))).astype(int)
    np.testing.assert_allclose(of_grey, bcdunet.pictures(Scan(hounsfield)), atol=1)


def thorax(wall: int, shape: tuple[int, int] = (128, 160)) -> tuple[Scan, np.ndarray]:
    """A body with one lung whose chest wall is so many pixels thick on one side."""
    voxels, lungs = np.full((1, *shape), AIR, np.int16), np.zeros((1, *shape), np.uint8)
    voxels[0][ellipse(64, 80, 50, 70)] = WATER
    lungs[0][ellipse(64, 10 + wall + 25, 30, 25)] = RIGHT_LUNG
    voxels[lungs > 0] = LUNG
    return Scan(voxels), lungs


@pytest.mark.parametrize("wall", [4, 20])
def test_field_of_view_holds_the_lungs_even_behind_a_thin_wall(wall):
    scan, lungs = thorax(wall)
    field = bcdunet.field_of_view(scan)
    body = scan.voxels[0] == WATER
    assert field[lungs > 0].all()
    assert 0 < field.sum() < (body | (lungs[0] > 0)).sum()
    assert not field[0, :15].any()


def test_a_bay_of_the_skin_is_outside_the_body():
    scan, lungs = thorax(20)
    bay = np.s_[0, 10:40, 70:90]  # tissue on its left and right and below it
    scan.voxels[bay] = AIR
    body = bcdunet.body(scan)
    assert not body[bay].any() and body[lungs > 0].all()


def test_lungs_are_the_field_of_view_less_the_target():
    scan, lungs = thorax(20)
    target = bcdunet.target(scan, lungs)
    assert target.any() and not target[lungs > 0].any()
    np.testing.assert_array_equal(bcdunet.lungs(scan, target), lungs > 0)
    assert not bcdunet.lungs(scan, np.ones(scan.voxels.shape, bool)).any()


@pytest.mark.parametrize("value", [AIR, WATER])
def test_a_slice_of_one_value_has_no_lungs_to_lose(value):
    scan = Scan(np.full((1, 32, 48), value, np.int16))
    nothing = np.zeros(scan.voxels.shape, np.uint8)
    target = bcdunet.target(scan, nothing)
    assert not bcdunet.lungs(scan, target).any()
