"""Networks of the papers as figures: 2 of 3-D CNN with BERT, 4 and 5 of COVID-CT-Mask-Net.

Everything in them is asked of the modules themselves, see `lib.reporting.architecture_figures`.
"""

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lib.classification import cnn_bert, mask_net, mask_net_head
from lib.classification.mask_net_head import MaskNet, one_hot_loss
from lib.classification.ranked_boxes import ROW, ranked_features
from lib.reporting.architecture_figures import (
    COLUMN_INCHES,
    ROW_INCHES,
    WHOLE,
    architecture_figure,
    architecture_steps,
    draw_architecture,
    shape_text,
    trained_counts,
    trained_figure,
)
from lib.reporting.pictures import STYLE, new_figure

CLIP_SIDE = 224  # pixels of the clips of 3-D CNN with BERT
PICTURE_SIDE = 512
TAUGHT_SIDE = 64  # of the picture that tells which parameters get a gradient: any would do
RANKED = "ranking, see figure 5"  # a function, so taken from what module S is given first
CNN_BERT_PARTS = {
    "trunk.stem": "stem",
    "trunk.layer1": "R(2+1)D stage 1",
    "trunk.layer2": "R(2+1)D stage 2",
    "trunk.layer3": "R(2+1)D stage 3",
    "trunk.layer4": "R(2+1)D stage 4",
    "head": "BERT layer, class token",
    "output": "class scores",
}
MASK_NET_PARTS = {
    "detector.transform": "normalisation and size",
    "detector.backbone.body": "ResNet-50",
    "detector.backbone.fpn": "feature pyramid (FPN)",
    "detector.rpn": "region proposals (RPN)",
    "detector.roi_heads.box_roi_pool": "RoIAlign",
    "detector.roi_heads.box_head": "RoI: box head",
    "detector.roi_heads.box_predictor": "RoI: scores and encoded boxes",
    "head.0": RANKED,
    "head": "module S",
}
TRAINED_TITLES = {"head": "S", "head_and_norms": "S + norms", "everything": "everything"}
S_PARTS = {
    "0": "one row after the other",
    "1": "first fully connected, ReLU",
    "3": "second fully connected, ReLU",
    "5": "class scores",
}
ROW_TITLES = ("score", "dx", "dy", "dw", "dh")


def cnn_bert_architecture() -> Figure:
    """3-D CNN with BERT as published (Tan and Liu 2021, figure 2)."""
    sizes = cnn_bert.VARIANTS["paper"]
    with torch.device("meta"):
        network = cnn_bert.build(**sizes)
        clip = torch.empty(1, 3, sizes["slices"], CLIP_SIDE, CLIP_SIDE)
    steps = architecture_steps(network, clip, CNN_BERT_PARTS)
    return architecture_figure(
        {"3-D CNN with BERT": steps}, axes="channels x slices x height x width"
    )


def mask_net_architecture(variant: Mapping[str, Any], *, side: int = PICTURE_SIDE) -> Figure:
    """COVID-CT-Mask-Net, and what each of its three ways of training trains (figure 4, table 1).

    Args:
        variant: of `lib.classification.mask_net`.
        side: pixels of the picture that runs through it.
    """
    model = mask_net.build(**variant)
    picture = torch.zeros(1, 3, side, side)
    steps = architecture_steps(model, picture, MASK_NET_PARTS)
    steps.loc[steps["part"] == RANKED, "output"] = steps["input"]
    steps.loc[steps["part"] == RANKED, "input"] = ""
    model.detector.transform.min_size = (TAUGHT_SIDE,)  # the same parameters, sooner
    trained = {}
    for choice in mask_net_head.TRAINED:
        mask_net_head.trainable(model, choice)
        trained[TRAINED_TITLES[choice]] = trained_counts(
            model, lambda: one_hot_loss(model(picture), torch.zeros(1, dtype=int)), MASK_NET_PARTS
        )
    return trained_figure(
        "COVID-CT-Mask-Net", steps, trained, axes="channels x height x width, regions x numbers"
    )


# --------------------------------------------------------------------------------- ranked boxes


def ranking_steps(model: MaskNet, picture: Tensor) -> pd.DataFrame:
    """How the ranked boxes of a picture come about, with the numbers that are left at each step.

    Args:
        model: the classifier.
        picture: colours 0 to 1, shape (3, height, width).

    Returns:
        As of ``architecture_steps``; nothing in it has parameters.
    """
    predicted: list[tuple[Tensor, Tensor]] = []
    predictor = model.detector.roi_heads.box_predictor
    hook = predictor.register_forward_hook(lambda *run: predicted.append(run[-1]))
    with torch.inference_mode():
        batch = model.detector, [picture]
        ranked = ranked_features(*batch, count=model.head.boxes, **model.ranking)
        hook.remove()
        regions, classes = predicted[0][0].shape
        every = regions * (classes - 1)
        kept = ranked_features(*batch, count=every, **model.ranking)[0].unique(dim=0)
    every_text, kept_text, ranked_text = map(
        shape_text, (ranked.new_empty(every, ROW), kept, ranked)
    )
    left = "best kept" if len(kept) >= len(ranked[0]) else "repeated where too few"
    steps = [
        ("RoI: scores and encoded boxes", f"{regions} regions", shape_text(predicted[0])),
        ("a row for each class of lesion", "", every_text),
        ("no empty ones, no overlaps", every_text, kept_text),
        (f"ranked by score, {left}", kept_text, ranked_text),
        (WHOLE, f"{regions} regions", ranked_text),
    ]
    return pd.DataFrame(steps, columns=["part", "input", "output"]).assign(parameters=0)


@matplotlib.rc_context(STYLE)
def ranked_batch_figure(model: MaskNet, picture: Tensor, *, title: str = "") -> Figure:
    """Module S, and how the batch of ranked boxes that it reads is made (figure 5).

    Args:
        model: the classifier.
        picture: an example, colours 0 to 1, shape (3, height, width).
        title: what the picture is.
    """
    with torch.inference_mode():
        boxes = ranked_features(model.detector, [picture], count=model.head.boxes, **model.ranking)
    columns = {
        "Ranked boxes": ranking_steps(model, picture),
        "Module S": architecture_steps(model.head, boxes, S_PARTS),
    }
    widths = [COLUMN_INCHES, 2.8, COLUMN_INCHES]
    longest = max(len(steps) - 1 for steps in columns.values())
    figure = new_figure((sum(widths), ROW_INCHES * (longest + 1.4)))
    left, middle, right = figure.subfigures(1, 3, width_ratios=widths)
    for part, (name, steps) in zip((left, right), columns.items(), strict=True):
        axis = part.subplots()
        axis.set(xlim=(0, 1), ylim=(longest, -0.5))
        axis.set_axis_off()
        draw_architecture(axis, name, steps)
    draw_ranked(middle, boxes[0].numpy())
    middle.suptitle(title)
    return figure


def draw_ranked(figure: Figure, rows: np.ndarray) -> None:
    """A ranked batch as a picture, the best box on top: its score, and its four encoded offsets.

    Args:
        figure: where to draw.
        rows: shape (boxes, 5).
    """
    scores, offsets = figure.subplots(1, 2, width_ratios=(1, 3), sharey=True)
    largest = max(1e-6, float(np.abs(rows[:, 1:]).max()))
    for axis, values, names, look in (
        (scores, rows[:, :1], ROW_TITLES[:1], {"cmap": "Blues", "vmin": 0, "vmax": 1}),
        (offsets, rows[:, 1:], ROW_TITLES[1:], {"cmap": "RdBu", "vmin": -largest, "vmax": largest}),
    ):
        shown = axis.imshow(values, aspect="auto", interpolation="nearest", **look)
        axis.set_xticks(range(len(names)), names)
        axis.tick_params(length=0)
        bar = {"orientation": "horizontal", "aspect": 5 * len(names), "format": "{x:.2g}"}
        figure.colorbar(shown, ax=axis, ticks=[look["vmin"], look["vmax"]], **bar)
    scores.set_ylabel("Rank")
    scores.set_yticks([0, len(rows) - 1], [1, len(rows)])
