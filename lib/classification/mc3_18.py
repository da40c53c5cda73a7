"""MC3_18: full 3-D convolutions in the first stage, slice by slice behind it (Tran et al. 2018).

The MosMed baseline of HKBU's benchmark; preparation, training and inference are those of
`lib.classification.resampled_volumes` (FACTS 6.4).
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn
from torchvision.models.video.resnet import Conv3DNoTemporal, Conv3DSimple

from lib.classification.resampled_volumes import predict, shown, train_resampled
from lib.classification.task import Card, Task, Trained
from lib.classification.video_resnet import WIDTHS, video_trunk

__all__ = ["CARD", "VARIANTS", "build", "predict", "shown", "train"]

VARIANTS = {
    "paper": {"widths": list(WIDTHS)},
    # The same layers, a quarter as wide, for the phantom on two CPU cores.
    "small": {"widths": [16, 32, 64, 128]},
}

CARD = Card(
    name="MC3_18",
    source="Tran et al. 2018; MosMed baseline of HKBU's benchmark; FACTS 6.4",
    published="MC3-18 from random weights on 64 slices of 128 x 128, chosen at random in training "
    "and symmetrically in judging; cross entropy, Adam 1e-3 with weight decay 5e-4, cosine "
    "schedule",
    ours="one input channel is inferred from the published loader; the validation part that picks "
    "the best epoch is ours",
    parameters=11_472_450,
)


def build(*, widths: Sequence[int] = WIDTHS, classes: int = 2) -> nn.Sequential:
    """MC3_18 for volumes of one channel, shape (scans, 1, slices, height, width).

    Args:
        widths: channels of the four stages.
        classes: number of outputs.
    """
    return nn.Sequential(
        OrderedDict(
            trunk=video_trunk([Conv3DSimple] + 3 * [Conv3DNoTemporal], widths=widths),
            pool=nn.AdaptiveAvgPool3d(1),
            flatten=nn.Flatten(),
            output=nn.Linear(widths[-1], classes),
        )
    ).to(memory_format=torch.channels_last_3d)  # same numbers, up to twice as fast


def train(task: Task) -> Trained:
    """Train MC3_18 on a task; settings as for ``train_resampled``."""
    return train_resampled(task, build, name=CARD.name)
