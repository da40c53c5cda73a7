"""COVIDNet-CT, an approximation: blocks that project, replicate, project and expand (FACTS 6.7).

The published network (Gunraj et al. 2020) was designed by a machine, and its layers are known only
from a TensorFlow graph that is not at hand. What is known is the name of its blocks and that it
takes 512 x 512 pixels between 0 and 1. Everything else here is our reading: the meaning of the four
steps, widths, depth and number of parameters. Published figures must not be expected of it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lib.classification.pictures import predict, shown, train_pictures
from lib.classification.task import Card, Task, Trained

__all__ = ["CARD", "VARIANTS", "build", "predict", "shown", "train"]

VARIANTS = {
    "paper": {"stem": 32, "widths": [64, 128, 256, 512], "blocks": [3, 4, 6, 3]},
    # The same blocks, fewer, for the phantom on two CPU cores. Deviation: two stages, so features
    # see a part of the slice; with four, trials learned the anatomy of few patients, not lesions.
    "small": {"stem": 16, "widths": [64, 128], "blocks": [2, 2]},
}

CARD = Card(
    name="COVIDNet-CT",
    source="Gunraj et al. 2020; FACTS 6.7",
    published="a network designed by a machine from blocks of projection, replication, projection "
    "and expansion, on slices of 512 x 512 pixels; momentum SGD, classes in equal numbers, slices "
    "cut to the body, turned, sheared, shifted and scaled at random",
    ours="its layers could not be read: blocks after their name, in four stages with residual "
    "connections; widths and depth are ours, so neither size nor scores are those of the "
    "publication; whole slices, not cut to the body, and nothing outside it blackened",
    parameters=780_803,
    approximation=True,
)


def build(
    *,
    stem: int = 32,
    widths: Sequence[int] = (64, 128, 256, 512),
    blocks: Sequence[int] = (3, 4, 6, 3),
    classes: int = 3,
) -> nn.Sequential:
    """The approximation, from pictures (pictures, 3, size, size), 0 to 1, to logits.

    Args:
        stem: channels behind the first convolution.
        widths: channels of each stage; every stage halves height and width.
        blocks: of each stage.
        classes: number of outputs.

    Raises:
        ValueError: if there are not as many numbers of blocks as widths.
    """
    if len(widths) != len(blocks):
        raise ValueError(f"{len(widths)} stages need as many numbers of blocks, got {list(blocks)}")
    layers = OrderedDict(stem=nn.Sequential(*_convolution(3, stem, 7, stride=2), nn.ReLU()))
    before = stem
    for number, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
        first, *rest = [before] + (count - 1) * [width]
        layers[f"stage{number}"] = nn.Sequential(
            ReplicationBlock(first, width, stride=2), *(ReplicationBlock(w, width) for w in rest)
        )
        before = width
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    layers["output"] = nn.Linear(before, classes)
    return nn.Sequential(layers).to(memory_format=torch.channels_last)


class ReplicationBlock(nn.Module):
    """Projection, replication, projection, expansion, with a shortcut where shapes allow.

    Our reading: 1 x 1 to a quarter of the width; two 3 x 3 kernels for each of these channels,
    which replicate it; 1 x 1 back to a quarter; 1 x 1 to the full width.

    Projections are linear, as in inverted residuals, for a ReLU on so few channels loses much; in
    trials on the phantom networks with it hardly learned.

    Args:
        before: channels of the input.
        width: channels of the output, divisible by 4.
        stride: of the replication.
    """

    def __init__(self, before: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        narrow = width // 4
        self.steps = nn.Sequential(
            OrderedDict(
                projection=nn.Sequential(*_convolution(before, narrow, 1)),
                replication=nn.Sequential(
                    *_convolution(narrow, 2 * narrow, 3, stride=stride, groups=narrow), nn.ReLU()
                ),
                second_projection=nn.Sequential(*_convolution(2 * narrow, narrow, 1)),
                expansion=nn.Sequential(*_convolution(narrow, width, 1)),
            )
        )
        self.residual = before == width and stride == 1

    def forward(self, features: Tensor) -> Tensor:
        """Apply it: (pictures, before, h, w) to (pictures, width, h / stride, w / stride)."""
        made = self.steps(features)
        return torch.relu(features + made if self.residual else made)


def _convolution(
    before: int, width: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, nn.Module]:
    """A convolution and its batch normalisation."""
    convolution = nn.Conv2d(
        before, width, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
    )
    return convolution, nn.BatchNorm2d(width)


def train(task: Task) -> Trained:
    """Train it on a task by SGD with momentum (FACTS 6.7).

    Deviation: the whole slice is taken, not the published box around the body, which only
    COVIDx-CT lists; so jitter of the box moves the edges of the slice. Nothing outside the body is
    blackened.

    Args:
        task: settings are momentum and those of ``train_pictures``.
    """
    sgd = partial(torch.optim.SGD, momentum=task.settings["momentum"])
    return train_pictures(task, build, name=CARD.name, optimizer=sgd)
