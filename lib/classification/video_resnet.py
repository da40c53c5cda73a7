"""Trunks of the 18-layer video networks of Tran et al. 2018 (R3D, MC3), of any width.

Torchvision's ``r3d_18`` and ``mc3_18`` fix the widths and three colour channels; here their blocks
are put together for CT, one channel, as narrow as a laptop needs. At the published widths the
layers and their names are torchvision's own, so that its weights can be loaded.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torchvision.models.video.resnet import BasicBlock

WIDTHS = (64, 128, 256, 512)

ConvolutionBuilder = Callable[..., nn.Conv3d]


def video_trunk(
    convolutions: Sequence[ConvolutionBuilder],
    *,
    widths: Sequence[int] = WIDTHS,
    blocks: int = 2,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Stem and stages, without pooling and output.

    Takes volumes of shape (scans, 1, slices, height, width), gives features of shape (scans,
    widths[-1], ...). The stem and each stage but the first halve height and width; a stage of full
    3-D convolutions but the first halves the slices too.

    Args:
        convolutions: of each stage, ``Conv3DSimple`` or ``Conv3DNoTemporal`` of torchvision.
        widths: channels of each stage; the stem has those of the first.
        blocks: residual blocks of a stage.
        dropout: probability of a dropout behind every stage; 0 leaves these layers out.

    Raises:
        ValueError: if there are not as many widths as convolutions.
    """
    if len(widths) != len(convolutions):
        raise ValueError(f"{len(convolutions)} stages need as many widths, got {list(widths)}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=_stem(widths[0]))
    before = widths[0]
    for number, (convolution, width) in enumerate(zip(convolutions, widths, strict=True), start=1):
        layers[f"layer{number}"] = _stage(
            convolution, before, width, blocks=blocks, stride=1 if number == 1 else 2
        )
        if dropout:
            layers[f"dropout{number}"] = nn.Dropout(dropout)
        before = width
    trunk = nn.Sequential(layers)
    for layer in trunk.modules():
        if isinstance(layer, nn.Conv3d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return trunk


def _stem(width: int) -> nn.Sequential:
    """First convolution: 3 slices by 7 by 7, halving height and width."""
    return nn.Sequential(
        nn.Conv3d(1, width, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False),
        nn.BatchNorm3d(width),
        nn.ReLU(inplace=True),
    )


def _stage(
    convolution: ConvolutionBuilder, before: int, width: int, *, blocks: int, stride: int
) -> nn.Sequential:
    """Residual blocks, the first of which changes size and width."""
    shortcut = None
    if stride != 1 or before != width:
        steps = convolution.get_downsample_stride(stride)
        shortcut = nn.Sequential(
            nn.Conv3d(before, width, 1, stride=steps, bias=False), nn.BatchNorm3d(width)
        )
    first = BasicBlock(before, width, convolution, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(width, width, convolution) for _ in range(blocks - 1)))


def grey_stem(weights: torch.Tensor) -> torch.Tensor:
    """First convolution for one channel that answers a grey picture as the colour one does.

    Args:
        weights: of a convolution of three channels, shape (width, 3, ...).

    Returns:
        Their sum over the channels, shape (width, 1, ...).
    """
    return weights.sum(1, keepdim=True)
