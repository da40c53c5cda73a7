"""From ranked boxes to the diagnosis of a picture: module S, and what of the whole is trained.

COVID-CT-Mask-Net (Ter-Sarkisov 2022, sections 3.2 and 4; FACTS 5.2) is a Mask R-CNN whose mask
branch is left away, and a classification module S on its ranked boxes.

Parameters of S at the published size, 2,364,419: 1280 x 1024 + 1024 = 1,311,744, 1024 x 1024 + 1024
= 1,049,600, 1024 x 3 + 3 = 3,075. The paper prints 2.26M and "two fully connected layers", which no
number of layers gives; the README of its code prints 2.36M.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection import MaskRCNN

from lib.classification.ranked_boxes import ROW, ranked_features

MASK_BRANCH = ("roi_heads.mask_head.", "roi_heads.mask_predictor.")

VARIANTS = {
    "paper": {"boxes": 256, "width": 1024},
    "light": {"boxes": 128, "width": 512},  # of the later code's light models: 0.59M
    # The same layers for the phantom on two CPU cores. Deviations: drawn by fan-in, since by
    # fan-out the three class scores start at tens, and a few hundred pictures are learned by heart
    # from there; and scores are enlarged, deltas reduced. Most scores lie near 0 (deviation 0.2),
    # the deltas of boxes on healthy tissue are noise (deviation 0.7): from 180 pictures S learns
    # that noise as published (test accuracy 0.76 on the phantom), and less so scaled (0.86).
    "small": {
        "boxes": 64,
        "width": 128,
        "fan": "fan_in",
        "score_scale": 4.0,
        "delta_scale": 0.1,
    },
}


class RankedBoxHead(nn.Sequential):
    """Module S: a picture's ranked boxes, flattened, to its class scores.

    Takes shape (pictures, boxes, 5), gives logits (pictures, classes). Weights start as Kaiming
    draws them; not published: from a normal distribution, with biases of 0.

    Args:
        boxes: rows of a ranked batch.
        width: units of both hidden layers.
        classes: number of outputs.
        fan: what the variance of the weights goes by, ``"fan_out"`` (published) or ``"fan_in"``.
        score_scale: factor of the scores before the first layer; 1 is published.
        delta_scale: likewise of the encoded boxes.
    """

    def __init__(
        self,
        *,
        boxes: int = 256,
        width: int = 1024,
        classes: int = 3,
        fan: str = "fan_out",
        score_scale: float = 1.0,
        delta_scale: float = 1.0,
    ) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(boxes * ROW, width),
            nn.ReLU(inplace=True),
            nn.Linear(width, width),
            nn.ReLU(inplace=True),
            nn.Linear(width, classes),
        )
        self.boxes = boxes
        scales = torch.tensor([score_scale, *(ROW - 1) * [delta_scale]])
        self.register_buffer("scales", scales, persistent=False)
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, mode=fan, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """Class scores, shape (pictures, classes), of ranked boxes, shape (pictures, boxes, 5)."""
        return super().forward(rows * self.scales)


class MaskNet(nn.Module):
    """COVID-CT-Mask-Net: pictures in, class scores out.

    The detector stays in evaluation mode while the rest trains: it has no targets, and its batch
    normalisation neither takes nor moves statistics (section 4).

    Args:
        detector: Mask R-CNN, of which a copy without its mask branch is kept.
        head: module S.
        ranking: arguments of `ranked_features`, without count, which is the head's.
    """

    def __init__(self, detector: MaskRCNN, head: RankedBoxHead, **ranking: Any) -> None:
        super().__init__()
        self.detector, self.head, self.ranking = without_masks(detector), head, ranking
        self.train()

    def train(self, mode: bool = True) -> "MaskNet":
        """Set training or evaluation mode of S; the detector stays in evaluation mode."""
        super().train(mode)
        self.detector.eval()
        return self

    def forward(self, pictures: Sequence[Tensor] | Tensor) -> Tensor:
        """Class scores.

        Args:
            pictures: colours 0 to 1, each of shape (3, height, width).

        Returns:
            Logits, shape (pictures, classes).
        """
        return self.head(self.ranked(pictures))

    def ranked(self, pictures: Sequence[Tensor] | Tensor) -> Tensor:
        """What S sees of pictures, shape (pictures, boxes, 5)."""
        return ranked_features(self.detector, pictures, count=self.head.boxes, **self.ranking)


def without_masks(detector: MaskRCNN) -> MaskRCNN:
    """A copy of a Mask R-CNN, with its weights and without its mask branch.

    Args:
        detector: stays as it is.
    """
    copied = copy.deepcopy(detector)
    for name in ("mask_roi_pool", "mask_head", "mask_predictor"):
        setattr(copied.roi_heads, name, None)
    return copied


def copy_weights(model: MaskNet, weights: Mapping[str, Tensor]) -> None:
    """Start a classifier from the weights of a trained segmentation model (section 3.2).

    Args:
        model: its detector takes the weights, statistics of batch normalisation included.
        weights: ``state_dict`` of a Mask R-CNN of the same layers; its mask branch is left out.

    Raises:
        ValueError: naming the first weight that is missing, unknown or of another shape.
    """
    given = {name: value for name, value in weights.items() if not name.startswith(MASK_BRANCH)}
    wanted = model.detector.state_dict()
    for name in (*wanted, *given):
        found, asked = (
            tuple(states[name].shape) if name in states else None for states in (given, wanted)
        )
        if found != asked:
            raise ValueError(
                f"the segmentation model does not fit the classifier: {name} has shape {found} "
                f"in the one and {asked} in the other"
            )
    model.detector.load_state_dict(given)


def trainable(model: MaskNet, variant: str) -> list[nn.Parameter]:
    """Choose what learns (section 4), set ``requires_grad`` accordingly, and give the parameters.

    - ``"head"``: S alone;
    - ``"head_and_norms"``: S, and scale and shift of all batch normalisation (53,120 in ResNet-50,
      so 2,417,539). The public code chooses by "bn" in the name, which misses the norms of the four
      shortcuts (7,680 values) and trains 2,409,859; this is not reproduced;
    - ``"everything"``: all parameters. Those of the proposal network are among them, but get no
      gradient: torchvision detaches proposals, and the choice of boxes has no derivative. The paper
      writes that they learn.

    Statistics of batch normalisation stand still in all of them, see `MaskNet`.

    Args:
        model: the classifier.
        variant: one of the three.

    Returns:
        The parameters to be optimised.

    Raises:
        ValueError: if the variant is unknown, or there is no batch normalisation to train.
    """
    if variant not in TRAINED:
        raise ValueError(f"what learns is one of {tuple(TRAINED)}, got {variant!r}")
    chosen = TRAINED[variant](model)
    model.requires_grad_(False)
    for weights in chosen:
        weights.requires_grad_(True)
    return chosen


def _head(model: MaskNet) -> list[nn.Parameter]:
    """Parameters of S."""
    return list(model.head.parameters())


def _head_and_norms(model: MaskNet) -> list[nn.Parameter]:
    """Parameters of S and of all batch normalisation."""
    layers = [layer for layer in model.detector.modules() if isinstance(layer, nn.BatchNorm2d)]
    norms = [weights for layer in layers for weights in layer.parameters()]
    if not norms:
        raise ValueError("the detector has no batch normalisation with trainable scale and shift")
    return [*_head(model), *norms]


# Parameters of each variant of `trainable`, in the order of table 4.
TRAINED = {
    "head": _head,
    "head_and_norms": _head_and_norms,
    "everything": lambda model: list(model.parameters()),
}


def one_hot_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of each class, the mean over pictures and classes (equation 2).

    Args:
        logits: shape (pictures, classes).
        targets: int64 index of the class, shape (pictures,).
    """
    wanted = functional.one_hot(targets, logits.shape[1]).to(logits.dtype)
    return functional.binary_cross_entropy_with_logits(logits, wanted)
