from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric import Fabric

from lib.classification import mask_net
from lib.reporting.mask_net_benchmarks import (
    STEP,
    compare_training,
    draw_pictures,
    expected_ratio,
    gigaflops,
    largest_difference,
    part_times,
    random_order,
    ranked_alone,
    ratio_figure,
    train_head,
)

FABRIC = Fabric(accelerator="cpu", devices=1)
SETTINGS = {
    "image_size": 64,
    "batch_scans": 4,
    "learning_rate": 1e-3,
    "weight_decay": 1e-3,
    "loader_processes": 0,
}
SMALL = mask_net.VARIANTS["small"]
TINY = SMALL | {"detector": SMALL["detector"] | {"side": 64, "longest": 64}}


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return draw_pictures(2, tmp_path_factory.mktemp("pictures"), size=64)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return mask_net.build(**TINY)


def test_pictures_are_of_every_class(items):
    assert [item.target for item in items] == [0, 0, 1, 1, 2, 2]
    assert all(item.volume.is_file() for item in items)
    assert len({item.image_id for item in items}) == 6


def test_boxes_are_those_that_the_classifier_trains_on(model, items):
    found = ranked_alone(model, items, size=64, fabric=FABRIC)
    alone = SETTINGS | {"batch_scans": 1}
    assert torch.equal(found, mask_net.rank_pictures(model, items, settings=alone, fabric=FABRIC))


def test_both_ways_end_in_the_same_bits(model, items):
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    kept, again = (
        train_head(model, items, epochs=3, keep=keep, settings=SETTINGS, fabric=FABRIC)
        for keep in (True, False)
    )
    assert largest_difference(kept, again) == 0
    assert largest_difference(kept, model.head.state_dict()) > 1e-4  # it did learn
    assert all(torch.equal(weights, before[name]) for name, weights in model.state_dict().items())


def test_a_difference_is_found():
    one, other = ({"a": torch.zeros(2), "b": torch.tensor([0.0, number])} for number in (1.0, 1.5))
    assert largest_difference(one, other) == 0.5
    assert largest_difference(one, one) == 0


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_an_epoch_holds_every_picture_once(count, batch, epoch):
    batches = list(random_order(count, batch, epoch=epoch))
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    assert all(len(one) == batch for one in batches[:-1]) and 1 <= len(batches[-1]) <= batch
    again = list(random_order(count, batch, epoch=epoch))
    assert all(np.array_equal(one, other) for one, other in zip(batches, again, strict=True))


@given(st.floats(1e-3, 10), st.floats(1e-6, 10), st.integers(1, 1000))
def test_the_gain_keeps_its_bounds(lesion_model, step, epochs):
    ratio = expected_ratio(lesion_model, step, epochs)
    again = sum([lesion_model + step] * epochs)  # by adding up, epoch after epoch
    kept = lesion_model + sum([step] * epochs)
    assert ratio == pytest.approx(again / kept)
    assert 1 - 1e-9 <= ratio <= min(epochs, 1 + lesion_model / step) * (1 + 1e-9)


def test_results_tell_speed_and_equality(model, items):
    common = {"settings": SETTINGS, "fabric": FABRIC}
    result = compare_training(model, items, epochs=2, repetitions=1, **common)
    assert (result["pictures"], result["epochs"], result["slices"]) == (6, 2, 12)
    assert result["largest_difference"] == 0
    assert result["pictures_per_second"] == pytest.approx(
        result["ratio"] * result["reference_pictures_per_second"], rel=0.01
    )
    parts = part_times(model, items, epochs=2, **common)
    spent = sum(seconds for name, seconds in parts.items() if name != "all")
    assert spent == pytest.approx(parts["all"], rel=0.01)
    assert all(parts[name] > 0 for name in ("read and resize", "backbone", "RPN", "ranking", STEP))
    assert "forward" not in vars(model.detector.backbone)
    figure = ratio_figure([result], parts, wanted=10)
    assert figure.axes[0].get_xlabel() == "Epochs"


def test_operations_are_counted(model, items):
    counted = gigaflops(model, items[0], settings=SETTINGS, fabric=FABRIC)
    # forward, and backward for all weights and for the inputs of all layers but the first
    widths = [320, 128, 128, 3]
    products = [2 * a * b for a, b in pairwise(widths)]
    assert counted["step_of_S"] == pytest.approx((3 * sum(products) - products[0]) / 1e9, abs=1e-6)
    assert counted["lesion_model"] > 100 * counted["step_of_S"]
