import hashlib

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from lib.data.scan import CONSOLIDATION, GROUND_GLASS_OPACITY
from lib.evaluation.detection import mask_overlaps
from lib.foundation.checkpoints import CheckpointError
from lib.segmentation.lesion_instances import lesion_instances
from lib.segmentation.mask_rcnn import (
    FROZEN_IN_2020,
    VARIANTS,
    build,
    choose_trained,
    detections,
    training_losses,
)

torch.set_num_threads(1)

PUBLISHED = ("paper2020", "head2023")
TINY = VARIANTS["small"] | {
    "width": 16,
    "box_width": 32,
    "mask_widths": [16],
    "side": 64,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build(classes=2, **TINY)


def described(variant, classes=2):
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build(classes=classes, **VARIANTS[variant])


def parameters(part):
    return sum(values.numel() for values in part.parameters())


def statistics(part):
    """Running means and variances, without the counters of batches."""
    return sum(values.numel() for values in part.buffers() if values.ndim)


def example():
    mask = np.zeros((64, 64), np.uint8)
    mask[8:28, 10:30] = GROUND_GLASS_OPACITY
    mask[36:56, 30:60] = CONSOLIDATION
    return torch.from_numpy(mask * 0.45), lesion_instances(mask)


def nothing():
    return torch.rand(64, 64), lesion_instances(np.zeros((64, 64), np.uint8))


@pytest.mark.parametrize("variant", PUBLISHED)
def test_each_part_has_the_published_number_of_parameters(variant):
    network = described(variant)
    heads = network.roi_heads
    assert parameters(network.backbone.body) == 23_508_032
    assert parameters(network.backbone.fpn) == 3_344_384
    assert parameters(network.rpn) == 628_630
    assert parameters(heads.box_head) == 1_622_272
    assert parameters(heads.box_predictor) == 1_935
    assert parameters(heads.mask_head) == 2_360_320
    assert parameters(heads.mask_predictor) == 263_171
    assert parameters(network) == 31_728_744
    assert statistics(network) == 53_120


@pytest.mark.parametrize(("variant", "numbers"), [("light34", 11_449_186), ("light18", 6_056_290)])
def test_light_networks_have_few_parameters_and_statistics(variant, numbers):
    network = described(variant, classes=1)
    assert parameters(network) + statistics(network) == numbers


@pytest.mark.parametrize(("variant", "batch"), [("paper2020", 1024), ("head2023", 256)])
def test_thresholds_and_sizes_are_the_published_ones(variant, batch):
    network = described(variant)
    rpn, heads, scaling = network.rpn, network.roi_heads, network.transform
    assert (scaling.min_size, scaling.max_size) == ((512,), 1024)
    assert (scaling.image_mean, scaling.image_std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    matcher, sampler = rpn.proposal_matcher, rpn.fg_bg_sampler
    assert (matcher.high_threshold, matcher.low_threshold, rpn.nms_thresh) == (0.7, 0.3, 0.75)
    assert (sampler.batch_size_per_image, sampler.positive_fraction) == (batch, 0.75)
    assert rpn._pre_nms_top_n == rpn._post_nms_top_n == {"training": 2000, "testing": 1000}
    matcher, sampler = heads.proposal_matcher, heads.fg_bg_sampler
    assert (matcher.high_threshold, matcher.low_threshold, heads.nms_thresh) == (0.75, 0.5, 0.75)
    assert (sampler.batch_size_per_image, sampler.positive_fraction) == (batch, 0.75)
    assert (heads.score_thresh, heads.detections_per_img) == (0.75, 128)
    assert heads.box_coder.weights == (10, 10, 5, 5)
    for pool, grid in ((heads.box_roi_pool, 7), (heads.mask_roi_pool, 14)):
        assert (pool.output_size, pool.sampling_ratio) == ((grid, grid), 2)


def test_norms_of_the_published_network_learn():
    norms = [part for part in described("paper2020").modules() if hasattr(part, "running_mean")]
    assert len(norms) == 53
    assert all(type(norm) is nn.BatchNorm2d and norm.weight.requires_grad for norm in norms)


@pytest.mark.parametrize(
    ("variant", "levels", "anchors"),
    [("paper2020", 5, 30), ("head2023", 4, 30), ("light18", 1, 30), ("small", 2, 15)],
)
def test_levels_and_anchors(variant, levels, anchors):
    network = described(variant)
    assert network.rpn.anchor_generator.num_anchors_per_location() == [anchors] * levels
    with torch.device("meta"):
        features = network.backbone(torch.zeros(1, 3, 128, 128))
    sides = [16] if variant == "light18" else [4, 8, 16, 32, 64][:levels]
    assert [128 // values.shape[-1] for values in features.values()] == sides


def test_weights_of_one_published_variant_fit_the_other():
    first, second = (described(variant).state_dict() for variant in PUBLISHED)
    assert {n: w.shape for n, w in first.items()} == {n: w.shape for n, w in second.items()}


def test_anchors_have_all_sizes_and_ratios_at_every_level():
    on_meta = described("head2023").rpn.anchor_generator
    generator = AnchorGenerator(on_meta.sizes, on_meta.aspect_ratios)
    maps = [torch.zeros(1, 8, 1, 1)] * 4
    (anchors,) = generator(ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)]), maps)
    width, height = (anchors[:, 2:] - anchors[:, :2]).T
    sides = torch.tensor([2.0, 4, 8, 16, 32]).repeat(6)
    ratios = torch.tensor([0.1, 0.25, 0.5, 1, 1.5, 2]).repeat_interleave(5)
    # torchvision rounds the corners of an anchor to whole pixels
    assert ((height - (sides * ratios.sqrt()).repeat(4)).abs() <= 1).all()
    assert ((width - (sides / ratios.sqrt()).repeat(4)).abs() <= 1).all()


def test_the_loss_is_the_sum_of_five_parts(model):
    picture, lesions = example()
    model.train()
    torch.manual_seed(1)
    losses = training_losses(model, [picture], [lesions])
    torch.manual_seed(1)
    parts = model([picture.float().expand(3, -1, -1)], [lesions._asdict()])
    values = torch.stack(losses).tolist()
    assert sorted(values) == pytest.approx(sorted(part.item() for part in parts.values()))
    assert len(values) == 5
    assert min(values) > 0
    assert losses.total.item() == pytest.approx(sum(values), rel=1e-6)


def test_a_picture_without_lesions_teaches_what_is_no_lesion(model):
    pictures, lesions = zip(nothing(), nothing(), strict=True)
    model.train().zero_grad()
    losses = training_losses(model, pictures, lesions)
    losses.total.backward()
    objectness, proposals, classes, boxes, masks = torch.stack(losses).tolist()
    assert objectness > 0 and classes > 0
    assert proposals == boxes == masks == 0
    assert all(values.grad.isfinite().all() for values in model.parameters())


def test_a_lesion_of_one_pixel_has_a_finite_loss(model):
    mask = np.zeros((64, 64), np.uint8)
    mask[63, 63] = CONSOLIDATION
    model.train()
    losses = training_losses(model, [torch.rand(64, 64)], [lesion_instances(mask)])
    assert torch.stack(losses).isfinite().all()


def test_found_lesions_have_the_size_of_their_picture_and_the_model_stays_as_it_was(model):
    pictures = [torch.rand(40, 60), torch.rand(3, 64, 64)]
    model.train()
    thresholds = model.roi_heads.score_thresh, model.roi_heads.nms_thresh
    before = {name: values.clone() for name, values in model.state_dict().items()}
    found = detections(model, pictures, score_threshold=0.0, nms_threshold=0.9)
    for picture, lesions in zip(pictures, found, strict=True):
        count = len(lesions.labels)
        assert 0 < count <= 128
        assert lesions.boxes.shape == (count, 4)
        assert lesions.masks.shape == (count, *picture.shape[-2:])
        assert lesions.masks.dtype == torch.bool
        assert lesions.scores.tolist() == sorted(lesions.scores.tolist(), reverse=True)
    assert model.training
    assert (model.roi_heads.score_thresh, model.roi_heads.nms_thresh) == thresholds
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


def test_a_lower_nms_threshold_leaves_lesions_that_overlap_less(model):
    (found,) = detections(model, [example()[0]], score_threshold=0.0, nms_threshold=0.25)
    overlaps = box_iou(found.boxes, found.boxes).fill_diagonal_(0)
    assert overlaps[found.labels[:, None] == found.labels].max() <= 0.25 + 1e-6
    (more,) = detections(model, [example()[0]], score_threshold=0.0, nms_threshold=0.75)
    assert len(more.labels) >= len(found.labels)


def test_no_score_high_enough_finds_nothing(model):
    (found,) = detections(model, [torch.rand(40, 60)], score_threshold=1.0)
    assert [len(part) for part in found] == [0, 0, 0, 0]
    assert found.masks.shape == (0, 40, 60)


def test_a_few_steps_learn_one_slice():
    torch.manual_seed(0)
    network = build(classes=2, **TINY).train()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    picture, lesions = example()
    for _ in range(40):
        optimizer.zero_grad()
        training_losses(network, [picture], [lesions]).total.backward()
        optimizer.step()
    (found,) = detections(network, [picture])
    for label, mask in zip(lesions.labels, lesions.masks, strict=True):
        best = found.masks[found.labels == label][:1]
        assert mask_overlaps(best.numpy(), mask[None].numpy()).item() > 0.6


def test_heads_alone_or_all_layers_train(model):
    heads, full = choose_trained(model, "heads"), choose_trained(model, "full")
    assert {name.split(".")[0] for name in heads} == {"rpn", "roi_heads"}
    assert full == [name for name, _ in model.named_parameters()]
    frozen = set(full) - set(choose_trained(model, "full", frozen=FROZEN_IN_2020))
    assert {name.split(".")[2] for name in frozen} == set(FROZEN_IN_2020)
    choose_trained(model, "full")


def test_only_the_heads_move_when_they_train_alone():
    torch.manual_seed(0)
    network = build(classes=2, **TINY).train()
    before = {name: values.clone() for name, values in network.named_parameters()}
    trained = choose_trained(network, "heads")
    picture, lesions = example()
    training_losses(network, [picture], [lesions]).total.backward()
    torch.optim.SGD(network.parameters(), 0.1).step()
    moved = {n for n, values in network.named_parameters() if not torch.equal(values, before[n])}
    assert moved <= set(trained)
    assert {name.split(".")[1] for name in moved} >= {"head", "box_head", "mask_head"}


def saved(path, content):
    torch.save(content, path)
    return {"weights": path, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_weights_of_imagenet_start_the_body(tmp_path):
    weights = resnet18().state_dict()
    network = build(classes=2, **TINY, **saved(tmp_path / "resnet18.pth", weights))
    body = network.backbone.body.state_dict()
    assert "layer2.0.conv1.weight" in body
    assert all(torch.equal(values, weights[name]) for name, values in body.items())


def test_weights_must_be_torchvisions_or_have_the_named_hash(tmp_path):
    file = saved(tmp_path / "resnet18.pth", {})["weights"]
    with pytest.raises(CheckpointError, match="does not have the SHA-256 f37072fd; it was not"):
        build(classes=2, **TINY, weights=file)
    with pytest.raises(CheckpointError, match=r"nowhere\.pth is absent"):
        build(classes=2, **TINY, weights=tmp_path / "nowhere.pth")


@pytest.mark.parametrize("content", [{}, {"conv1.weight": torch.zeros(2, 2)}, [1]])
def test_weights_of_something_else_are_refused_in_one_sentence(tmp_path, content):
    file = saved(tmp_path / "other.pth", content)
    with pytest.raises(
        CheckpointError, match=r"other\.pth does not hold the weights of this ResNet"
    ):
        build(classes=2, **TINY, **file)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: choose_trained(m, "body"), "heads or full, got 'body'"),
        (lambda m: choose_trained(m, "full", frozen=["stem"]), "has no layer 'stem'"),
        (lambda m: training_losses(m.eval(), [], []), "need the model in training mode"),
        (lambda m: training_losses(m.train(), [torch.rand(8, 8)], []), "1 pictures, but lesions o"),
        (lambda m: detections(m, [torch.rand(1, 8, 8)]), r"got torch.float32 of \(1, 8, 8\)"),
        (lambda m: detections(m, [torch.ones(8, 8).byte()]), "is float of shape .* torch.uint8"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
