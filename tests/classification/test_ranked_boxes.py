import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from lib.classification.ranked_boxes import ranked_boxes, ranked_features

SIZE = (20, 30)  # height and width


def made_predictions(regions, *, classes=3, seed=0, levels=None):
    """Logits, deltas, boxes; the boxes overlap, leave the picture, and some lie outside of it.

    With `levels` the scores take only so many values, so that many are equal.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(regions, classes, generator=generator)
    if levels:
        logits = torch.randint(levels, (regions, 1), generator=generator).float().repeat(1, classes)
        logits[:, 0] = 0
    deltas = torch.randn(regions, 4 * classes, generator=generator)
    corner = torch.rand(regions, classes, 2, generator=generator) * 40 - 8
    sides = torch.rand(regions, classes, 2, generator=generator) * 15
    return logits, deltas, torch.cat([corner, corner + sides], dim=2)


def slow_ranking(logits, deltas, boxes, *, count, nms_threshold, score_threshold=-0.01):
    """FACTS 5.2 word by word, one prediction after another, in plain Python."""
    height, width = SIZE
    scores = logits.softmax(1).tolist()
    candidates = []
    for region, (row, places) in enumerate(zip(scores, boxes.tolist(), strict=True)):
        for label in range(1, len(row)):
            x1, y1, x2, y2 = places[label]
            x1, x2 = (min(max(x, 0), width) for x in (x1, x2))
            y1, y2 = (min(max(y, 0), height) for y in (y1, y2))
            if row[label] > score_threshold and x2 - x1 >= 0.01 and y2 - y1 >= 0.01:
                candidates.append((-row[label], region, label, (x1, y1, x2, y2)))
    kept = []
    for candidate in sorted(candidates):
        rivals = [box for _, _, label, box in kept if label == candidate[2]]
        if all(iou(candidate[3], box) <= nms_threshold for box in rivals):
            kept.append(candidate)
    kept = kept[:count]
    rows = [
        [-score, *deltas[region, 4 * label : 4 * label + 4].tolist()]
        for score, region, label, _ in kept
    ]
    return [rows[int(place * len(rows) / count + 1e-9)] for place in range(count)] if rows else []


def iou(first, second):
    """Intersection over union of two boxes."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    common = max(width, 0) * max(height, 0)
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return common / (sum(areas) - common)


@settings(max_examples=60, deadline=None)
@given(
    regions=st.integers(0, 40),
    classes=st.integers(2, 4),
    count=st.integers(1, 50),
    nms_threshold=st.sampled_from([0.1, 0.25, 0.75, 1.0]),
    score_threshold=st.sampled_from([-0.01, 0.3]),
    levels=st.sampled_from([None, 2]),
    seed=st.integers(0, 1000),
)
def test_the_rows_are_those_of_the_words(regions, classes, count, levels, seed, **thresholds):
    predictions = made_predictions(regions, classes=classes, seed=seed, levels=levels)
    rows = ranked_boxes(*predictions, image_size=SIZE, count=count, **thresholds)
    expected = slow_ranking(*predictions, count=count, **thresholds) or count * [5 * [0.0]]
    torch.testing.assert_close(rows, torch.tensor(expected))
    assert rows.shape == (count, 5)
    assert (rows[:, 0].diff() <= 0).all()


def far_apart(regions):
    """Boxes of one class that do not overlap."""
    left = torch.arange(regions, dtype=torch.float32) * 10
    box = torch.stack([left, left * 0, left + 8, left * 0 + 8], dim=1)
    return box[:, None].repeat(1, 2, 1)


def test_equal_scores_stand_in_the_order_of_the_regions():
    deltas = torch.arange(24.0).view(3, 8)
    rows = ranked_boxes(
        torch.zeros(3, 2), deltas, far_apart(3), image_size=(10, 40), count=3, nms_threshold=0.5
    )
    assert rows[:, 0].tolist() == [0.5, 0.5, 0.5]
    assert torch.equal(rows[:, 1:], deltas[:, 4:])


def test_too_few_are_repeated_equally_often_beside_themselves():
    logits = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 2.0]])
    deltas = torch.arange(24.0).view(3, 8)
    rows = ranked_boxes(logits, deltas, far_apart(3), image_size=(10, 40), count=7)
    assert [int(row) // 8 for row in rows[:, 1].tolist()] == [1, 1, 1, 2, 2, 0, 0]


def test_without_padding_too_few_are_refused():
    predictions = torch.zeros(3, 2), torch.zeros(3, 8), far_apart(3)
    assert ranked_boxes(*predictions, image_size=(10, 40), count=3, padding="none").shape == (3, 5)
    with pytest.raises(ValueError, match="only 3 of 4 predictions are left"):
        ranked_boxes(*predictions, image_size=(10, 40), count=4, padding="none")


def test_a_picture_of_which_nothing_is_left_becomes_zeros():
    outside = far_apart(3) - 100
    predictions = torch.zeros(3, 2), torch.ones(3, 8), outside
    assert not ranked_boxes(*predictions, image_size=(10, 40)).any()
    with pytest.raises(ValueError, match="only 0 of 256"):
        ranked_boxes(*predictions, image_size=(10, 40), padding="none")


def test_overlaps_count_within_a_class_only():
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 1.0]])
    boxes = torch.tensor([0.0, 0.0, 8.0, 8.0]).expand(2, 3, 4)
    rows = ranked_boxes(logits, torch.zeros(2, 12), boxes, image_size=SIZE, count=2)
    scores = logits.softmax(1)
    torch.testing.assert_close(rows[:, 0], torch.stack([scores[1, 1], scores[0, 2]]))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"deltas": torch.zeros(3, 4)}, "class logits (3, 2) do not go with deltas (3, 4)"),
        ({"boxes": torch.zeros(2, 2, 4)}, "boxes (2, 2, 4)"),
        ({"padding": "random"}, "padding is one of ('spread', 'none'), got 'random'"),
        ({"class_logits": torch.full((3, 2), torch.nan)}, "the class logits are not finite"),
    ],
)
def test_what_cannot_be_ranked_is_named(changed, message):
    right = {
        "class_logits": torch.zeros(3, 2),
        "deltas": torch.zeros(3, 8),
        "boxes": far_apart(3),
        "image_size": (10, 40),
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        ranked_boxes(**right | changed)


@pytest.fixture
def detector():
    """A small Mask R-CNN with three classes, in evaluation mode, with heads that spread scores."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    backbone.out_channels = 8
    model = MaskRCNN(
        backbone,
        num_classes=3,
        min_size=48,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((4, 8, 16),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
        mask_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
        rpn_post_nms_top_n_test=60,
    )
    return model.eval()


def pictures(*shapes):
    """Random pictures."""
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *shape, generator=generator) for shape in shapes]


def test_features_hold_the_scores_that_torchvision_detects(detector):
    """At 0 as threshold, with the proposals that the detector makes itself."""
    heads = detector.roi_heads
    heads.score_thresh, heads.nms_thresh, heads.detections_per_img = -0.01, 0.5, 40
    shown = pictures((48, 48), (40, 60))
    with torch.no_grad():
        found = ranked_features(
            detector, shown, count=40, nms_threshold=0.5, rpn_nms_threshold=0.7, padding="none"
        )
        expected = detector(shown)
    for rows, detections in zip(found, expected, strict=True):
        torch.testing.assert_close(rows[:, 0], detections["scores"])
    assert found.shape == (2, 40, 5)


def test_features_of_pictures_together_are_those_of_each_alone(detector):
    shown = pictures((48, 48), (48, 48))
    with torch.no_grad():
        together = ranked_features(detector, shown, count=20)
        alone = [ranked_features(detector, [picture], count=20)[0] for picture in shown]
    torch.testing.assert_close(together, torch.stack(alone))


def test_the_proposal_threshold_counts_and_the_detector_keeps_its_own(detector):
    few, many = (
        ranked_features(
            detector, pictures((48, 48)), count=120, nms_threshold=1.0, rpn_nms_threshold=threshold
        ).detach()
        for threshold in (0.05, 0.95)
    )
    assert len(few[0].unique(dim=0)) < len(many[0].unique(dim=0))
    assert detector.rpn.nms_thresh == 0.7


@pytest.mark.parametrize("columns", [slice(0, 1), slice(1, 5)])
def test_gradients_of_scores_and_deltas_reach_the_box_heads_and_the_backbone(detector, columns):
    ranked_features(detector, pictures((48, 48)), count=20)[..., columns].square().sum().backward()
    predictor = detector.roi_heads.box_predictor
    layer = predictor.cls_score if columns.start == 0 else predictor.bbox_pred
    for weights in (
        layer.weight,
        detector.roi_heads.box_head.fc6.weight,
        detector.backbone[0].weight,
    ):
        assert weights.grad.abs().sum() > 0
    assert all(weights.grad is None for weights in detector.rpn.parameters())


def test_a_detector_in_training_is_refused(detector):
    with pytest.raises(ValueError, match=re.escape("must be in evaluation mode: call eval()")):
        ranked_features(detector.train(), pictures((48, 48)))
