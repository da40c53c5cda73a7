"""LightCNN, an approximation: SqueezeNet 1.1 with batch normalisation (FACTS 6.9).

Polsinelli et al. 2020 vary SqueezeNet; which layers they change could not be found out. So this is
torchvision's SqueezeNet 1.1 with batch normalisation behind every convolution but the last.
Deviation: without the ReLU behind that last convolution, which keeps class scores from falling
below 0, and the gradient of a class from flowing once it is there.

Parameters at the published width, 3 classes: 724,035 of SqueezeNet 1.1 (1,235,496 at 1,000 classes)
and 5,888 of the norms.
"""

from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import nn
from torchvision.models.squeezenet import Fire

from lib.classification.pictures import predict, shown, train_pictures
from lib.classification.task import Card, Task, Trained

__all__ = ["CARD", "VARIANTS", "build", "predict", "shown", "train"]

# Channels that the eight Fire modules squeeze to; each expands to eight times as many. The three
# poolings stand before the modules with these numbers.
SQUEEZED = (16, 16, 32, 32, 48, 48, 64, 64)
POOLED_BEFORE = (0, 2, 4)
STEM_WIDTH = 64
EXPANSION = 4  # of each of the two kinds of kernel

VARIANTS = {
    "paper": {"width": 1.0, "dropout": 0.5},
    # The same layers, half as wide, for the phantom on two CPU cores.
    "small": {"width": 0.5, "dropout": 0.2},
}

CARD = Card(
    name="LightCNN",
    source="Polsinelli, Cinque and Placidi 2020; FACTS 6.9",
    published="a variant of SqueezeNet for two classes; the paper of Mask R-CNN lists its best "
    "model among those for three classes",
    ours="its changes of SqueezeNet are unknown: torchvision's SqueezeNet 1.1 with batch "
    "normalisation, without the ReLU behind the class layer",
    parameters=729_923,
    approximation=True,
)


def build(*, width: float = 1.0, dropout: float = 0.5, classes: int = 3) -> nn.Sequential:
    """The approximation, from pictures (pictures, 3, size, size), 0 to 1, to logits.

    Args:
        width: factor of all numbers of channels.
        dropout: probability of dropping a value before the class layer.
        classes: number of outputs.
    """
    features = nn.Sequential(*_features(width))
    last = 2 * EXPANSION * round(SQUEEZED[-1] * width)
    output = nn.Conv2d(last, classes, kernel_size=1)
    for layer in features.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight)  # as torchvision's
            nn.init.zeros_(layer.bias)
    nn.init.normal_(output.weight, std=0.01)
    nn.init.zeros_(output.bias)
    return nn.Sequential(
        OrderedDict(
            features=features,
            dropout=nn.Dropout(dropout),
            output=output,
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
        )
    ).to(memory_format=torch.channels_last)


def _features(width: float) -> Iterator[nn.Module]:
    """Stem, Fire modules and poolings, in order."""
    before = round(STEM_WIDTH * width)
    yield normalised(nn.Conv2d(3, before, kernel_size=3, stride=2))
    yield nn.ReLU(inplace=True)
    for index, channels in enumerate(SQUEEZED):
        if index in POOLED_BEFORE:
            yield nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
        squeezed = round(channels * width)
        expanded = EXPANSION * squeezed
        fire = Fire(before, squeezed, expanded, expanded)
        for name in ("squeeze", "expand1x1", "expand3x3"):
            setattr(fire, name, normalised(getattr(fire, name)))
        yield fire
        before = 2 * expanded


def normalised(convolution: nn.Conv2d) -> nn.Sequential:
    """A convolution with batch normalisation behind it.

    Args:
        convolution: becomes part of what is returned.
    """
    return nn.Sequential(
        OrderedDict(convolution=convolution, norm=nn.BatchNorm2d(convolution.out_channels))
    )


def train(task: Task) -> Trained:
    """Train LightCNN on a task; settings as for ``train_pictures``, Adam."""
    return train_pictures(task, build, name=CARD.name)
