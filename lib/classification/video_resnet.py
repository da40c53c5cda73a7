"""Trunks of the video networks of Tran et al. 2018 (R3D, MC3, R(2+1)D), of any width and depth.

Torchvision's ``r3d_18`` and ``mc3_18`` fix the widths and three colour channels; here their blocks
are put together for CT, one channel unless another stem is given, as narrow as a laptop needs. At
the published widths the layers and their names are torchvision's own, so that its weights can be
loaded.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torchvision.models.video.resnet import BasicBlock, Bottleneck

WIDTHS = (64, 128, 256, 512)

ConvolutionBuilder = Callable[..., nn.Conv3d]


def video_trunk(
    convolutions: Sequence[ConvolutionBuilder],
    *,
    widths: Sequence[int] = WIDTHS,
    blocks: int | Sequence[int] = 2,
    dropout: float = 0.0,
    stem: nn.Module | None = None,
    stem_width: int | None = None,
    block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
) -> nn.Sequential:
    """Stem and stages, without pooling and output.

    Takes volumes of shape (scans, 1, slices, height, width), gives features of shape (scans,
    widths[-1] * block.expansion, ...). The stem and each stage but the first halve height and
    width; a stage of full or factored 3-D convolutions but the first halves the slices too.

    Args:
        convolutions: of each stage, ``Conv3DSimple``, ``Conv3DNoTemporal`` or ``Conv2Plus1D`` of
            torchvision, or what is built like them.
        widths: channels of each stage, before the expansion of its blocks.
        blocks: residual blocks of each stage; one number is that of all.
        dropout: probability of a dropout behind every stage; 0 leaves these layers out.
        stem: layers before the stages; None is a convolution of volumes of one channel.
        stem_width: channels that the stem gives; None takes widths[0].
        block: kind of residual block.

    Raises:
        ValueError: if there are not as many widths, or numbers of blocks, as convolutions.
    """
    blocks = [blocks] * len(convolutions) if isinstance(blocks, int) else list(blocks)
    for name, given in (("widths", list(widths)), ("numbers of blocks", blocks)):
        if len(given) != len(convolutions):
            raise ValueError(f"{len(convolutions)} stages need as many {name}, got {given}")
    before = stem_width or widths[0]
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=stem or _stem(before))
    stages = zip(convolutions, widths, blocks, strict=True)
    for number, (convolution, width, count) in enumerate(stages, start=1):
        layers[f"layer{number}"] = _stage(
            block, convolution, before, width, blocks=count, stride=1 if number == 1 else 2
        )
        if dropout:
            layers[f"dropout{number}"] = nn.Dropout(dropout)
        before = width * block.expansion
    trunk = nn.Sequential(layers)
    for layer in trunk.modules():
        if isinstance(layer, nn.Conv3d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return trunk


def time_steps(slices: int, *, stride: int) -> int:
    """Time steps that a trunk gives of a clip.

    Args:
        slices: of the clip.
        stride: slices of one step, a power of two; each halving rounds up.

    Raises:
        ValueError: for fewer slices than one step has.
    """
    if slices < stride:
        raise ValueError(f"a clip needs at least {stride} slices for one time step, got {slices}")
    return -(-slices // stride)


def check_clips(trunk: nn.Module, clips: tuple[torch.Tensor], *, stride: int) -> None:
    """Forward pre-hook of a trunk for clips of three channels.

    Args:
        trunk: the trunk, not looked at.
        clips: its inputs, one tensor of shape (scans, 3, slices, height, width).
        stride: slices of one time step.

    Raises:
        ValueError: for another shape, or fewer slices than one time step has.
    """
    shape = tuple(clips[0].shape)
    if len(shape) != 5 or shape[1] != 3:
        raise ValueError(f"clips are (scans, 3, slices, height, width), got {shape}")
    time_steps(shape[2], stride=stride)


def _stem(width: int) -> nn.Sequential:
    """First convolution: 3 slices by 7 by 7, halving height and width."""
    return nn.Sequential(
        nn.Conv3d(1, width, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False),
        nn.BatchNorm3d(width),
        nn.ReLU(inplace=True),
    )


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    convolution: ConvolutionBuilder,
    before: int,
    width: int,
    *,
    blocks: int,
    stride: int,
) -> nn.Sequential:
    """Residual blocks, the first of which changes size and width."""
    shortcut, after = None, width * block.expansion
    if stride != 1 or before != after:
        steps = convolution.get_downsample_stride(stride)
        shortcut = nn.Sequential(
            nn.Conv3d(before, after, 1, stride=steps, bias=False), nn.BatchNorm3d(after)
        )
    first = block(before, width, convolution, stride, shortcut)
    return nn.Sequential(first, *(block(after, width, convolution) for _ in range(blocks - 1)))


def grey_stem(weights: torch.Tensor) -> torch.Tensor:
    """First convolution for one channel that answers a grey picture as the colour one does.

    Args:
        weights: of a convolution of three channels, shape (width, 3, ...).

    Returns:
        Their sum over the channels, shape (width, 1, ...).
    """
    return weights.sum(1, keepdim=True)
