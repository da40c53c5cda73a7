"""What a picture's diagnosis is made of: its 256 best box predictions, ranked (FACTS 5.2).

COVID-CT-Mask-Net (Ter-Sarkisov 2022, section 3.2) reads the boxes of a Mask R-CNN as features of
the whole picture. Every region of interest gives one prediction for each class of lesion; those
that survive the suppression of overlaps are ranked by score, and of the best the score and the box
are kept. The box is *encoded*: its offset from the proposal, as the head puts it out, not the box
in pixels. Which lesion it is, is dropped.

Scores and encoded boxes carry gradient into the heads and the features below them. Which
predictions are kept, and where the proposals lie, does not: torchvision detaches the proposals, so
that a loss on the ranked boxes never reaches the weights of the proposal network.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.ops import clip_boxes_to_image, nms

BACKGROUND = 0
ROW = 5  # a score and four deltas: dx, dy, dw, dh
SMALLEST_SIDE = 1e-2  # pixels; torchvision counts a box with a shorter side as empty
PADDINGS = ("spread", "none")


def ranked_boxes(
    class_logits: Tensor,
    deltas: Tensor,
    boxes: Tensor,
    *,
    image_size: tuple[int, int],
    count: int = 256,
    score_threshold: float = -0.01,
    nms_threshold: float = 0.75,
    padding: str = "spread",
) -> Tensor:
    """The best predictions of one picture, in the order of their scores (section 3.2).

    Boxes are clipped to the picture, empty ones dropped, overlaps suppressed among the boxes of the
    same class. The threshold below 0 accepts every score, so that a picture without lesions gives
    rows too. Equal scores stand in the order of the regions, then of the classes.

    Where fewer than ``count`` predictions survive, ``"spread"`` repeats all of them equally often,
    give or take one, each next to itself, so that the order of the scores holds. Deviation: the
    public code draws at random which to repeat (preset ``head2023``); here the same picture always
    gives the same rows. ``"none"`` refuses such a picture, as the code of the published result does
    by failing (preset ``paper2020``). A picture of which nothing survives becomes rows of zeros:
    score 0 says that nothing was found; no source says what to do with it.

    Args:
        class_logits: of the box head, background first, shape (regions, classes).
        deltas: encoded boxes of the box head, shape (regions, 4 * classes).
        boxes: the same, decoded: x1, y1, x2, y2 in pixels, shape (regions, classes, 4).
        image_size: height and width of the picture that the boxes lie in.
        count: number of rows.
        score_threshold: predictions must have a higher score.
        nms_threshold: of two boxes of a class with a larger IoU the lower score is dropped.
        padding: ``"spread"`` or ``"none"``.

    Returns:
        Score and dx, dy, dw, dh of each prediction, shape (count, 5).

    Raises:
        ValueError: if the shapes do not belong together, the padding is unknown, a logit is not a
            number, or too few predictions survive with padding ``"none"``.
    """
    regions, classes = class_logits.shape
    _check(class_logits, deltas, boxes, padding)
    scores = class_logits.softmax(dim=1)
    kept = _kept(
        scores.detach(),
        clip_boxes_to_image(boxes.detach(), image_size),
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
    )
    rows = torch.cat([scores[..., None], deltas.view(regions, classes, 4)], dim=2)
    rows = rows.flatten(0, 1)[kept]
    order = rows[:, 0].argsort(descending=True, stable=True)[:count]
    return _padded(rows[order], count, padding)


def _check(class_logits: Tensor, deltas: Tensor, boxes: Tensor, padding: str) -> None:
    """Complain about what cannot be ranked."""
    regions, classes = class_logits.shape
    if deltas.shape != (regions, 4 * classes) or boxes.shape != (regions, classes, 4):
        raise ValueError(
            f"class logits {tuple(class_logits.shape)} do not go with deltas "
            f"{tuple(deltas.shape)} and boxes {tuple(boxes.shape)}"
        )
    if padding not in PADDINGS:
        raise ValueError(f"padding is one of {PADDINGS}, got {padding!r}")
    if not class_logits.isfinite().all():
        raise ValueError("the class logits are not finite, so they have no order")


def _kept(scores: Tensor, boxes: Tensor, *, score_threshold: float, nms_threshold: float) -> Tensor:
    """Indices region * classes + class of the predictions that survive, ascending."""
    classes = scores.shape[1]
    sides = boxes[..., 2:] - boxes[..., :2]  # (regions, classes, 2)
    valid = (scores > score_threshold) & (sides >= SMALLEST_SIDE).all(dim=2)
    kept = []
    for label in range(BACKGROUND + 1, classes):
        regions = valid[:, label].nonzero()[:, 0]
        survivors = nms(boxes[regions, label], scores[regions, label], nms_threshold)
        kept.append(regions[survivors] * classes + label)
    return torch.cat(kept).sort().values if kept else scores.new_empty(0, dtype=torch.int64)


def _padded(rows: Tensor, count: int, padding: str) -> Tensor:
    """As many rows as asked, from at most as many."""
    if padding == "none" and len(rows) < count:
        raise ValueError(f"only {len(rows)} of {count} predictions are left, and none is repeated")
    if not len(rows):
        return rows.new_zeros(count, ROW)
    return rows[torch.arange(count, device=rows.device) * len(rows) // count]


def ranked_features(
    detector: MaskRCNN,
    pictures: Sequence[Tensor],
    *,
    rpn_nms_threshold: float = 0.75,
    **ranking: Any,
) -> Tensor:
    """Ranked boxes of pictures from a Mask R-CNN: proposals, box heads, ranking.

    Args:
        detector: in evaluation mode; its mask branch is not used.
        pictures: colours 0 to 1, each of shape (3, height, width); the detector normalises and
            resizes them.
        rpn_nms_threshold: largest IoU of two proposals, for this call only.
        ranking: other arguments of `ranked_boxes`.

    Returns:
        Shape (pictures, count, 5), differentiable by the weights of box heads and backbone.

    Raises:
        ValueError: if the detector is in training mode, or see `ranked_boxes`.
    """
    if detector.training:
        raise ValueError("the Mask R-CNN must be in evaluation mode: call eval() first")
    images, _ = detector.transform(list(pictures))
    features = detector.backbone(images.tensors)
    features = {"0": features} if isinstance(features, Tensor) else features  # as torchvision
    # A copy with the same weights takes the threshold, so that the detector keeps its own.
    proposer, heads = copy.copy(detector.rpn), detector.roi_heads
    proposer.nms_thresh = rpn_nms_threshold
    proposals, _ = proposer(images, features)
    # All regions of all pictures go through the heads together.
    pooled = heads.box_roi_pool(features, proposals, images.image_sizes)
    class_logits, deltas = heads.box_predictor(heads.box_head(pooled))
    boxes = heads.box_coder.decode(deltas.detach(), proposals)
    regions = [len(proposal) for proposal in proposals]
    parts = zip(*(each.split(regions) for each in (class_logits, deltas, boxes)), strict=True)
    return torch.stack(
        [
            ranked_boxes(*part, image_size=size, **ranking)
            for part, size in zip(parts, images.image_sizes, strict=True)
        ]
    )
