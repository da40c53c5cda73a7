import copy
import math
import re

import pytest
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from lib.classification.mask_net_head import (
    VARIANTS,
    MaskNet,
    RankedBoxHead,
    copy_weights,
    one_hot_loss,
    trainable,
)


def count(parameters):
    """Number of values."""
    return sum(weights.numel() for weights in parameters)


def made_detector(width=8):
    """A small Mask R-CNN, in training mode, of which no two weights are the same."""
    backbone = nn.Sequential(nn.Conv2d(3, width, 3, stride=4), nn.BatchNorm2d(width), nn.ReLU())
    backbone.out_channels = width
    return MaskRCNN(
        backbone,
        num_classes=3,
        min_size=48,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((4, 8, 16),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
        mask_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
        rpn_post_nms_top_n_test=60,
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MaskNet(made_detector(), RankedBoxHead(boxes=16, width=12))


def pictures(number=2):
    """Random pictures."""
    return torch.rand(number, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "variant, parameters", [("paper", 2_364_419), ("light", 592_387), ("small", 57_987)]
)
def test_parameters_of_s(variant, parameters):
    head = RankedBoxHead(**VARIANTS[variant])
    assert count(head.parameters()) == parameters
    assert head(torch.zeros(2, head.boxes, 5)).shape == (2, 3)


@pytest.mark.parametrize(
    "options, fans", [({}, (256, 256, 3)), ({"fan": "fan_in"}, (320, 256, 256))]
)
def test_s_starts_as_kaiming_draws(options, fans):
    torch.manual_seed(0)
    head = RankedBoxHead(boxes=64, width=256, **options)
    layers = [layer for layer in head if isinstance(layer, nn.Linear)]
    for layer, fan in zip(layers, fans, strict=True):
        assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(2 / fan), rel=0.06)
        assert not layer.bias.any()


def test_the_published_numbers_of_trained_parameters():
    """With the paper's detector: 30 anchors at each place, a box head of 128 units, 3 classes."""
    with torch.device("meta"):
        detector = maskrcnn_resnet50_fpn(
            weights=None,
            weights_backbone=None,
            num_classes=3,
            rpn_anchor_generator=AnchorGenerator(
                5 * ((2, 4, 8, 16, 32),), 5 * ((0.1, 0.25, 0.5, 1.0, 1.5, 2.0),)
            ),
        )
        detector.roi_heads.box_head = TwoMLPHead(256 * 7 * 7, 128)
        detector.roi_heads.box_predictor = FastRCNNPredictor(128, 3)
        model = MaskNet(detector, RankedBoxHead(**VARIANTS["paper"]))
    assert count(detector.parameters()) == 31_728_744
    assert count(trainable(model, "head")) == 2_364_419
    assert count(trainable(model, "head_and_norms")) == 2_417_539
    # The public code's choice by name, which misses the norms of the shortcuts.
    by_name = [weights for name, weights in model.detector.named_parameters() if "bn" in name]
    assert count(by_name) + 2_364_419 == 2_409_859
    assert count(trainable(model, "everything")) == 31_469_672


@pytest.mark.parametrize("variant", ["head", "head_and_norms", "everything"])
def test_what_learns_moves_and_nothing_else(model, variant):
    before = copy.deepcopy(model.state_dict())
    chosen = trainable(model.train(), variant)
    assert {id(weights) for weights in chosen} == {
        id(weights) for weights in model.parameters() if weights.requires_grad
    }
    optimizer = torch.optim.Adam(chosen, lr=1e-2)
    one_hot_loss(model(pictures()), torch.tensor([0, 2])).backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    norms = {"detector.backbone.1.weight", "detector.backbone.1.bias"}
    head = {name for name in before if name.startswith("head.")}
    proposer = {name for name in before if name.startswith("detector.rpn.")}
    statistics = {name for name in before if "running" in name or "batches" in name}
    assert len(statistics) == 3
    assert (
        moved
        == {
            "head": head,
            "head_and_norms": head | norms,
            "everything": set(before) - proposer - statistics,
        }[variant]
    )


def test_the_detector_stays_in_evaluation_mode(model):
    assert model.training and not any(layer.training for layer in model.detector.modules())
    assert model.head.training and not model.eval().head.training


def test_pictures_together_are_judged_as_each_alone(model):
    with torch.no_grad():
        together = model(pictures(3))
        alone = torch.cat([model([picture]) for picture in pictures(3)])
    assert together.shape == (3, 3)
    torch.testing.assert_close(together, alone)


def test_weights_of_the_segmentation_model_are_copied_but_for_its_masks(model):
    torch.manual_seed(5)
    segmentation = made_detector()
    segmentation.backbone[1].running_mean.fill_(0.25)
    copy_weights(model, segmentation.state_dict())
    ours, theirs = model.detector.state_dict(), segmentation.state_dict()
    assert all(value.equal(theirs[name]) for name, value in ours.items())
    assert {name.split(".")[1] for name in theirs.keys() - ours.keys()} == {
        "mask_head",
        "mask_predictor",
    }
    trainable(model, "everything")
    assert (
        segmentation.backbone[0].weight.data_ptr() != model.detector.backbone[0].weight.data_ptr()
    )


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_are_named(model, change):
    before = copy.deepcopy(model.state_dict())
    weights = made_detector(width=9 if change == "shape" else 8).state_dict()
    name = "backbone.0.weight"
    if change == "missing":
        del weights[name]
    if change == "unknown":
        name = "backbone.7.weight"
        weights[name] = torch.zeros(2)
    with pytest.raises(ValueError, match=f"does not fit the classifier: {re.escape(name)} has"):
        copy_weights(model, weights)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_variant_that_does_not_exist_is_named(model):
    with pytest.raises(ValueError, match="'head_and_norms', 'everything'\\), got 'bn'"):
        trainable(model, "bn")


def test_a_detector_without_norms_cannot_train_them():
    with torch.device("meta"):
        detector = made_detector()
        detector.backbone[1] = nn.Identity()
        model = MaskNet(detector, RankedBoxHead(boxes=4, width=4))
    with pytest.raises(ValueError, match="no batch normalisation with trainable scale and shift"):
        trainable(model, "head_and_norms")


def test_the_loss_is_the_mean_over_classes_of_one_hot_targets():
    logits = torch.tensor([[0.5, -1.0, 2.0], [0.0, 3.0, -0.5]])
    terms = []
    for row, target in zip(logits.tolist(), [2, 0], strict=True):
        for index, value in enumerate(row):
            share = 1 / (1 + math.exp(-value))
            terms.append(-math.log(share if index == target else 1 - share))
    expected = sum(terms) / 6
    assert float(one_hot_loss(logits, torch.tensor([2, 0]))) == pytest.approx(expected, rel=1e-5)
