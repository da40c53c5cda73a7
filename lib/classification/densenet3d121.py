"""DenseNet3D121: a densely connected network of 121 layers in 3-D (Huang et al. 2017, in 3-D).

The MosMed baseline of HKBU's benchmark; preparation, training and inference are those of
`lib.classification.resampled_volumes` (FACTS 6.4). The paper cites Diba et al. 2017 (T3D) for it,
but its numbers are those of HKBU's network, which is this one.
"""

from collections.abc import Sequence

import torch
from monai.networks.nets import DenseNet
from torch import nn

from lib.classification.resampled_volumes import predict, shown, train_resampled
from lib.classification.task import Card, Task, Trained

__all__ = ["CARD", "VARIANTS", "build", "predict", "shown", "train"]

VARIANTS = {
    "paper": {
        "init_features": 64,
        "growth_rate": 32,
        "block_config": [6, 12, 24, 16],
        "bn_size": 4,
    },
    # Four dense blocks as well, of fewer and narrower layers, for the phantom on two CPU cores.
    "small": {"init_features": 16, "growth_rate": 8, "block_config": [2, 4, 4, 2], "bn_size": 4},
}

CARD = Card(
    name="DenseNet3D121",
    source="Huang et al. 2017 in 3-D; MosMed baseline of HKBU's benchmark; FACTS 6.4",
    published="DenseNet-121 in 3-D from random weights on 64 slices of 128 x 128, chosen at random "
    "in training and symmetrically in judging; cross entropy, Adam 1e-3 with weight decay 5e-4, "
    "cosine schedule",
    ours="MONAI's layers with the published stride of the stem; the validation part that picks the "
    "best epoch is ours",
    parameters=11_244_674,
)


def build(
    *,
    init_features: int = 64,
    growth_rate: int = 32,
    block_config: Sequence[int] = (6, 12, 24, 16),
    bn_size: int = 4,
    classes: int = 2,
) -> DenseNet:
    """DenseNet3D121 for volumes of one channel, shape (scans, 1, slices, height, width).

    It halves the slices four times and height and width five times, so it needs 16 x 32 x 32.

    Args:
        init_features: channels behind the stem.
        growth_rate: channels that a layer adds.
        block_config: layers of each dense block.
        bn_size: width of a layer's bottleneck, in growth rates.
        classes: number of outputs.
    """
    model = DenseNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=classes,
        init_features=init_features,
        growth_rate=growth_rate,
        block_config=tuple(block_config),
        bn_size=bn_size,
    )
    # MONAI's stem halves the slices too; the published one, made for few slices, does not.
    model.features.conv0 = nn.Conv3d(1, init_features, 7, stride=(1, 2, 2), padding=3, bias=False)
    nn.init.kaiming_normal_(model.features.conv0.weight)  # as MONAI's
    return model.to(memory_format=torch.channels_last_3d)  # same numbers, up to twice as fast


def train(task: Task) -> Trained:
    """Train DenseNet3D121 on a task; settings as for ``train_resampled``."""
    return train_resampled(task, build, name=CARD.name)
