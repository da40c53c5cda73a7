"""Mask R-CNN for ground-glass opacity and consolidation (Ter-Sarkisov 2022, 3.1; FACTS 5.1).

Torchvision's own parts, in the sizes of the public code, which differ between two dates:
``paper2020`` is the code that the paper's numbers come from, ``head2023`` its last state.

Parameters for two classes: 31,728,744 = body 23,508,032 + FPN 3,344,384 + RPN 628,630 + box head
1,622,272 + its output 1,935 + mask head 2,360,320 + its output 263,171; with 53,120 statistics of
the body's norms 31.78 M, as published.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from lib.foundation.checkpoints import CheckpointError, load_checkpoint
from lib.segmentation.lesion_instances import LesionInstances

BOX_GRID, MASK_GRID, SAMPLES = 7, 14, 2  # RoIAlign of the box and the mask head

# Of RPN and RoI layers, in torchvision's names; what is not named here is torchvision's default,
# which the public code leaves too. Scores and detections of the test are those of the README's
# command and of the script that gave the published precisions (FACTS 5.3).
_THRESHOLDS = {
    "rpn_fg_iou_thresh": 0.7,
    "rpn_bg_iou_thresh": 0.3,
    "rpn_nms_thresh": 0.75,
    "rpn_positive_fraction": 0.75,
    "box_fg_iou_thresh": 0.75,
    "box_bg_iou_thresh": 0.5,
    "box_positive_fraction": 0.75,
    "box_nms_thresh": 0.75,
    "box_score_thresh": 0.75,
    "box_detections_per_img": 128,
}
_LARGE = {
    "body": "resnet50",
    "stages": [1, 2, 3, 4],
    "width": 256,
    "box_width": 128,
    "mask_widths": [256, 256, 256, 256],
    "anchor_sizes": [2, 4, 8, 16, 32],
    "anchor_ratios": [0.1, 0.25, 0.5, 1.0, 1.5, 2.0],
    "side": 512,
    "longest": 1024,
}
_LIGHT = _LARGE | {
    "stages": [3],
    "pool_level": False,
    "mask_widths": [128],
    "settings": _THRESHOLDS | {"rpn_batch_size_per_image": 256, "box_batch_size_per_image": 256},
}

VARIANTS = {
    "paper2020": _LARGE
    | {
        "pool_level": True,
        "settings": _THRESHOLDS
        | {"rpn_batch_size_per_image": 1024, "box_batch_size_per_image": 1024},
    },
    # The level P6, every second pixel of P5, is left out: it sees the picture in steps of 64
    # pixels, between which anchors of 32 pixels and less leave half of it uncovered. It has 0.3 %
    # of the anchors and nothing that learns, so that weights of one variant fit the other.
    "head2023": _LARGE
    | {
        "pool_level": False,
        "settings": _THRESHOLDS
        | {"rpn_batch_size_per_image": 256, "box_batch_size_per_image": 256},
    },
    # The light models of the public README: a ResNet without its last stage, one level (P4), one
    # convolution in the mask head; one class. Of ResNet34 the 11,449,186 numbers (with statistics)
    # are the published 11.45 M. ResNet18 built alike has 6,056,290, published are 6.12 M; which
    # layer differs is not known (256 channels in the mask's output would fit: 6,122,210).
    "light34": _LIGHT | {"body": "resnet34"},
    "light18": _LIGHT | {"body": "resnet18"},
    # For phantoms on two CPU cores, from a random start: two stages of the body, which see 8 pixels
    # as one at the coarsest, a narrower FPN and heads, fewer anchors and proposals. Slices of 192
    # pixels. Deviations, for a training of a minute:
    # - Anchors over the sizes that the phantom's lesions have (half of them 9 to 22 pixels), half
    #   of the ratios: an IoU of 0.7 with some anchor for 38 % of the lesions, with the published
    #   ones for 27 %, at half the cost.
    # - An IoU of 0.5 is enough for an anchor or RoI to be learnt as a lesion (92 % reach it).
    # - Scores from 0.05 on are kept: few reach 0.75.
    # - RoI NMS of about 0.25, the other value of figure 6. Of one model, validation slices had an
    #   AP@0.5 by the paper's rule of 0.57 at 0.2, 0.53 at 0.3 and 0.40 at 0.5: it punishes doubles.
    "small": {
        "body": "resnet18",
        "stages": [1, 2],
        "pool_level": False,
        "width": 32,
        "box_width": 128,
        "mask_widths": [64, 64],
        "anchor_sizes": [6, 10, 17, 28, 46],
        "anchor_ratios": [0.5, 1.0, 2.0],
        "side": 192,
        "longest": 384,
        "settings": _THRESHOLDS
        | {
            "rpn_fg_iou_thresh": 0.5,
            "rpn_batch_size_per_image": 128,
            "rpn_pre_nms_top_n_train": 400,
            "rpn_post_nms_top_n_train": 200,
            "rpn_pre_nms_top_n_test": 300,
            "rpn_post_nms_top_n_test": 200,
            "box_batch_size_per_image": 64,
            "box_fg_iou_thresh": 0.5,
            "box_positive_fraction": 0.5,
            "box_score_thresh": 0.05,
            "box_nms_thresh": 0.25,
        },
    },
}

HEADS, FULL = "heads", "full"
FROZEN_IN_2020 = ("conv1", "bn1", "layer1")  # of the body, in the code of the paper's numbers
_BACKBONE, _BODY = "backbone.", "backbone.body."


class Losses(NamedTuple):
    """Parts of the training loss, each a mean over a batch of pictures.

    Attributes:
        objectness: binary cross-entropy of the RPN's scores.
        proposals: smooth L1 of the RPN's boxes.
        classes: cross-entropy of the RoIs' classes.
        boxes: smooth L1 of their boxes.
        masks: binary cross-entropy of their masks.
    """

    objectness: Tensor
    proposals: Tensor
    classes: Tensor
    boxes: Tensor
    masks: Tensor

    @property
    def total(self) -> Tensor:
        """What training minimises: the sum, all with equal weight."""
        return torch.stack(self).sum()


class Detections(NamedTuple):
    """Lesions found in one picture, best first.

    Attributes:
        boxes: (x1, y1, x2, y2) in pixels of the picture, float32, shape (lesions, 4).
        labels: class, from 1 on, int64, shape (lesions,).
        scores: 0 to 1, shape (lesions,).
        masks: bool, shape (lesions, height, width).
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor


def build(
    *,
    classes: int,
    body: str,
    stages: Sequence[int],
    pool_level: bool,
    width: int,
    box_width: int,
    mask_widths: Sequence[int],
    anchor_sizes: Sequence[int],
    anchor_ratios: Sequence[float],
    side: int,
    longest: int,
    settings: Mapping[str, Any],
    weights: str | Path | None = None,
    sha256: str | None = None,
) -> MaskRCNN:
    """Mask R-CNN of one of the `VARIANTS`.

    Pictures, 0 to 1, are normalised by ImageNet's means and deviations inside of it.

    Args:
        classes: kinds of lesions, without background.
        body: torchvision's name of a ResNet.
        stages: of it, whose features the FPN takes; later ones are left out.
        pool_level: whether one more level is made from the FPN's coarsest.
        width: channels of the FPN.
        box_width: features of the box head's two layers.
        mask_widths: channels of the mask head's convolutions; its output has the last one's.
        anchor_sizes: square roots of the areas of the RPN's anchors, in pixels of the scaled
            picture; all of them at every level.
        anchor_ratios: of their heights to widths.
        side: pixels that the shorter side of a picture is scaled to.
        longest: pixels that the longer side may have then.
        settings: thresholds and sizes of RPN and RoI layers, in torchvision's names.
        weights: file of the ResNet's ImageNet weights, torchvision's own (.pth or .safetensors).
            None starts at random.
        sha256: that the file must have, or its first digits; None takes those of torchvision.

    Raises:
        CheckpointError: if the file is absent, has another hash, or is not of this ResNet.
    """
    backbone = _backbone(body, stages, width, pool_level=pool_level, weights=weights, sha256=sha256)
    levels = [str(number) for number in range(len(stages))]
    anchors = len(levels) + pool_level
    return MaskRCNN(
        backbone,
        min_size=side,
        max_size=longest,
        rpn_anchor_generator=AnchorGenerator(
            (tuple(anchor_sizes),) * anchors, (tuple(anchor_ratios),) * anchors
        ),
        box_roi_pool=MultiScaleRoIAlign(levels, BOX_GRID, SAMPLES),
        box_head=TwoMLPHead(width * BOX_GRID**2, box_width),
        box_predictor=FastRCNNPredictor(box_width, classes + 1),
        mask_roi_pool=MultiScaleRoIAlign(levels, MASK_GRID, SAMPLES),
        mask_head=MaskRCNNHeads(width, mask_widths, dilation=1),
        mask_predictor=MaskRCNNPredictor(mask_widths[-1], mask_widths[-1], classes + 1),
        **settings,
    )


def _backbone(
    name: str,
    stages: Sequence[int],
    width: int,
    *,
    pool_level: bool,
    weights: str | Path | None,
    sha256: str | None,
) -> BackboneWithFPN:
    """ResNet with norms that learn (torchvision's detectors freeze them) under an FPN."""
    body = get_model(name, weights=None)
    if weights is not None:
        _load_weights(body, Path(weights), sha256 or _published_hash(name))
    backbone = BackboneWithFPN(
        body,
        return_layers={f"layer{stage}": str(level) for level, stage in enumerate(stages)},
        in_channels_list=[body.inplanes * 2**stage // 16 for stage in stages],
        out_channels=width,
    )
    if not pool_level:
        backbone.fpn.extra_blocks = None
    return backbone


def _published_hash(name: str) -> str:
    """First digits of the SHA-256 of torchvision's ImageNet weights, which their file name ends in.

    Those of version 1, the only ones when the paper was written.
    """
    return Path(get_model_weights(name)["IMAGENET1K_V1"].url).stem.rpartition("-")[2]


def _load_weights(body: nn.Module, path: Path, sha256: str) -> None:
    """ImageNet weights without the class layer, which is cut off here."""
    loaded = load_checkpoint(path, sha256)
    body.fc = nn.Identity()
    try:
        body.load_state_dict({n: w for n, w in loaded.items() if not n.startswith("fc.")})
    except (RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} does not hold the weights of this ResNet") from error


def choose_trained(model: MaskRCNN, part: str, *, frozen: Sequence[str] = ()) -> list[str]:
    """Let some of the parameters train and freeze the others.

    Args:
        model: of `build`.
        part: ``heads`` trains RPN and RoI layers; ``full`` the backbone too. The FPN counts to the
            backbone, as section 3.1 has it, so that heads alone learn on an FPN drawn at random.
        frozen: layers of the ResNet that stay as they are all the same; the code of the paper's
            numbers has `FROZEN_IN_2020`. Their norms' statistics go on adapting there and here.

    Returns:
        Names of the parameters that train.

    Raises:
        ValueError: for another part, or a layer that the ResNet does not have.
    """
    if part not in (HEADS, FULL):
        raise ValueError(f"what trains is {HEADS} or {FULL}, got {part!r}")
    unknown = sorted(set(frozen) - set(model.backbone.body))
    if unknown:
        raise ValueError(f"the ResNet has no layer {unknown[0]!r}")
    held = tuple(f"{_BODY}{layer}." for layer in frozen)
    still = held if part == FULL else (_BACKBONE,)
    for name, values in model.named_parameters():
        values.requires_grad_(not name.startswith(still))
    return [name for name, values in model.named_parameters() if values.requires_grad]


def training_losses(
    model: MaskRCNN, pictures: Sequence[Tensor], targets: Sequence[LesionInstances]
) -> Losses:
    """Loss of a batch. Pictures without lesions take part; upstream leaves them out.

    The RPN and the RoI layers sample anchors and boxes from torch's generator.

    Args:
        model: of `build`, in training mode.
        pictures: float, 0 to 1, shape (height, width) or (3, height, width) each.
        targets: lesions of each, on the same device.

    Raises:
        ValueError: if the model is not in training mode, or the pictures cannot be used.
    """
    if not model.training:
        raise ValueError("losses need the model in training mode")
    if len(pictures) != len(targets):
        raise ValueError(f"{len(pictures)} pictures, but lesions of {len(targets)}")
    parts = model(_in_colour(pictures), [target._asdict() for target in targets])
    return Losses(
        parts["loss_objectness"],
        parts["loss_rpn_box_reg"],
        parts["loss_classifier"],
        parts["loss_box_reg"],
        parts["loss_mask"],
    )


@torch.no_grad()
def detections(
    model: MaskRCNN,
    pictures: Sequence[Tensor],
    *,
    mask_threshold: float = 0.5,
    score_threshold: float | None = None,
    nms_threshold: float | None = None,
) -> list[Detections]:
    """Lesions in pictures, by the model in evaluation mode, in which it is left as it was.

    Args:
        model: of `build`.
        pictures: float, 0 to 1, shape (height, width) or (3, height, width) each.
        mask_threshold: probability from which on a pixel belongs to a lesion.
        score_threshold: score that a lesion must exceed; None is the variant's.
        nms_threshold: IoU of boxes of one class from which on the weaker one is dropped (figure 6
            compares 0.25 and 0.75); None is the variant's.

    Raises:
        ValueError: if the pictures cannot be used.
    """
    with _evaluating(model, score_threshold, nms_threshold):
        found = model(_in_colour(pictures))
    return [
        Detections(f["boxes"], f["labels"], f["scores"], f["masks"][:, 0] >= mask_threshold)
        for f in found
    ]


@contextmanager
def _evaluating(
    model: MaskRCNN, score_threshold: float | None, nms_threshold: float | None
) -> Iterator[None]:
    """Evaluation mode and other thresholds for a while."""
    heads, training = model.roi_heads, model.training
    before = heads.score_thresh, heads.nms_thresh
    heads.score_thresh = before[0] if score_threshold is None else score_threshold
    heads.nms_thresh = before[1] if nms_threshold is None else nms_threshold
    try:
        model.eval()
        yield
    finally:
        model.train(training)
        heads.score_thresh, heads.nms_thresh = before


def _in_colour(pictures: Sequence[Tensor]) -> list[Tensor]:
    """Grey pictures three times over, as ImageNet weights want them."""
    for picture in pictures:
        fits = picture.ndim == 2 or (picture.ndim == 3 and len(picture) == 3)
        if not fits or not picture.is_floating_point():
            raise ValueError(
                "a picture is float of shape (height, width) or (3, height, width), got "
                f"{picture.dtype} of {tuple(picture.shape)}"
            )
    return [picture.float().expand(3, *picture.shape[-2:]) for picture in pictures]
