"""FDVTS of ICCV 2021 (CMC v1): an inflated ResNeSt-50 with contrastive mixup classification.

A 2-D ResNeSt-50 becomes 3-D by inflation (Carreira and Zisserman 2017, section 2.1): every
convolution and pooling is extended in depth, and the weights of a convolution are repeated and
divided, so that a volume of equal slices gives what the slice gave. Source: Hou et al. 2021
(CMC-COV19D); FACTS 6.2. Losses, views and mixing are in `contrastive_mixup`.
"""

from collections.abc import Callable
from pathlib import Path

import timm
import torch
from lightning_fabric import seed_everything
from safetensors.torch import load_file
from timm.layers import SelectAdaptivePool2d
from timm.layers.split_attn import SplitAttn
from timm.models import adapt_input_conv
from torch import Tensor, nn

from lib.classification.contrastive_mixup import (
    ContrastiveNetwork,
    fit_contrastive,
    predict,
    shown,
)
from lib.classification.task import Card, Task, Trained

__all__ = ["CARD", "VARIANTS", "build", "inflate", "predict", "shown", "train"]

RESNEST_50 = "resnest50d"  # timm's name of ResNeSt-50: deep stem of 32, average down-sampling

VARIANTS = {
    "paper": {"backbone": RESNEST_50},
    # One block per stage instead of 3, 4, 6, 3, and a quarter of the channels.
    "small": {
        "backbone": RESNEST_50,
        "layers": [1, 1, 1, 1],
        "stem_width": 8,
        "channels": [16, 32, 64, 128],
        "projection_width": 32,
    },
}

CARD = Card(
    name="FDVTS",
    source="Hou et al. 2021 (CMC-COV19D), code of the ICCV 2021 entry; FACTS 6.2",
    published="ImageNet ResNeSt-50 inflated to 3-D, projection head 2048-2048-128; supervised "
    "contrastive loss on two views and cross entropy under mixup, with learned weights; Adam, "
    "batches of 4 scans, three test views",
    ours="depth of the volumes and their preparation are not released: depth strides as in plane, "
    "slices repeated at the ends in depth; contrastive loss linear in the targets of a mixture, "
    "its line being lost in the released file; the released double softmax is not repeated; "
    "parameters are our count, none is published",
    parameters=None,
)


class ReplicateDepth(nn.Module):
    """Repeat the first and the last slice, so that equal slices stay equal up to the ends.

    The concatenation is reproducible on a GPU, which PyTorch's padding layer is not.

    Args:
        slices: how often each is repeated.
    """

    def __init__(self, slices: int) -> None:
        super().__init__()
        self.slices = slices

    def forward(self, volumes: Tensor) -> Tensor:
        """Pad volumes of shape (volumes, channels, depth, height, width)."""
        first, last = (
            part.expand(-1, -1, self.slices, -1, -1)
            for part in (volumes[:, :, :1], volumes[:, :, -1:])
        )
        return torch.cat([first, volumes, last], dim=2)


class SplitAttention3d(nn.Module):
    """Split attention over volumes, made of the inflated layers of timm's ``SplitAttn``.

    The channels come in ``radix`` splits; their sum, averaged over all positions, decides by a
    softmax over the splits how much each counts (Zhang et al. 2020, ResNeSt, section 3.1).

    Args:
        layer: timm's layer, its parts already inflated.
    """

    def __init__(self, layer: SplitAttn) -> None:
        super().__init__()
        self.radix = layer.radix
        self.splits = nn.Sequential(layer.conv, layer.bn0, layer.drop, layer.act0)
        self.attention = nn.Sequential(layer.fc1, layer.bn1, layer.act1, layer.fc2, layer.rsoftmax)

    def forward(self, volumes: Tensor) -> Tensor:
        """From (volumes, channels, depth, height, width) to the same axes."""
        splits = self.splits(volumes).unflatten(1, (self.radix, -1))  # (volumes, radix, channels..)
        attention = self.attention(splits.sum(1).mean((2, 3, 4), keepdim=True))
        return (splits * attention.view(*splits.shape[:3], 1, 1, 1)).sum(1)


def inflate(module: nn.Module) -> nn.Module:
    """Turn a 2-D network of timm into a 3-D one, its weights inflated.

    Walks the modules and replaces those of `INFLATED` and the global pooling; the network given is
    changed. In depth a kernel is as long as in plane, the stride the same, and volumes are padded
    by repeating the slices at their ends: so a volume of equal slices gives exactly the features of
    that slice.

    Args:
        module: the network; square kernels.

    Returns:
        The network for volumes of shape (volumes, channels, depth, height, width).

    Raises:
        ValueError: if it has a 2-D layer without a 3-D form here.
    """
    if type(module) is SelectAdaptivePool2d:
        return _global_pool(module)
    for name, child in module.named_children():
        setattr(module, name, inflate(child))
    form = INFLATED.get(type(module))
    if form is not None:
        return form(module).train(module.training)
    if type(module).__name__.endswith("2d"):
        raise ValueError(f"no 3-D form of the layer {type(module).__name__}")
    return module


def _convolution(layer: nn.Conv2d) -> nn.Module:
    """Inflated convolution; its weights are a share of the 2-D ones in each depth."""
    kernel, pad = _square(layer.kernel_size), _square(layer.padding)
    inflated = nn.Conv3d(
        layer.in_channels,
        layer.out_channels,
        kernel,
        stride=_square(layer.stride),
        padding=(0, pad, pad),
        dilation=_square(layer.dilation),
        groups=layer.groups,
        bias=layer.bias is not None,
        device=layer.weight.device,
    )
    with torch.no_grad():
        inflated.weight.copy_(layer.weight[:, :, None] / kernel)
        if layer.bias is not None:
            inflated.bias.copy_(layer.bias)
    return _padded(inflated, pad)


def _batch_norm(layer: nn.BatchNorm2d) -> nn.BatchNorm3d:
    """Batch normalisation of volumes with the same weights and statistics."""
    inflated = nn.BatchNorm3d(
        layer.num_features,
        eps=layer.eps,
        momentum=layer.momentum,
        affine=layer.affine,
        track_running_stats=layer.track_running_stats,
        device=layer.weight.device if layer.affine else None,
    )
    inflated.load_state_dict(layer.state_dict(), assign=True)
    return inflated


def _max_pool(layer: nn.MaxPool2d) -> nn.Module:
    """Maximum over a cube."""
    pad = _square(layer.padding)
    return _padded(
        nn.MaxPool3d(
            _square(layer.kernel_size),
            stride=_square(layer.stride),
            padding=(0, pad, pad),
            ceil_mode=layer.ceil_mode,
        ),
        pad,
    )


def _average_pool(layer: nn.AvgPool2d) -> nn.Module:
    """Mean over a cube."""
    pad = _square(layer.padding)
    return _padded(
        nn.AvgPool3d(
            _square(layer.kernel_size),
            stride=_square(layer.stride),
            padding=(0, pad, pad),
            ceil_mode=layer.ceil_mode,
            count_include_pad=layer.count_include_pad,
        ),
        pad,
    )


def _global_pool(layer: SelectAdaptivePool2d) -> nn.Module:
    """Mean over the whole volume, flat."""
    if layer.pool_type != "avg":
        raise ValueError(f"no 3-D form of the global pooling {layer.pool_type!r}")
    return nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(1))


def _padded(layer: nn.Module, pad: int) -> nn.Module:
    """A layer behind the padding in depth, where there is any."""
    return nn.Sequential(ReplicateDepth(pad), layer) if pad else layer


def _square(size: int | tuple[int, int]) -> int:
    """One number for height and width, which inflation takes for the depth as well."""
    if isinstance(size, tuple):
        if size[0] != size[1]:
            raise ValueError(f"only square layers are inflated, got {size}")
        return size[0]
    return size


INFLATED: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv2d: _convolution,
    nn.BatchNorm2d: _batch_norm,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    SplitAttn: SplitAttention3d,
}


def build(
    *,
    backbone: str = RESNEST_50,
    backbone_weights: str | Path | None = None,
    projection_width: int = 128,
    **numbers: object,
) -> ContrastiveNetwork:
    """Build FDVTS on a 2-D network of timm: ``build(**VARIANTS["paper"])``.

    Args:
        backbone: timm's name of the network.
        backbone_weights: safetensors file with timm's own names, for example ImageNet's, as the
            published system starts; None starts at random. The three colour channels are summed.
        projection_width: size of the embeddings.
        numbers: of timm's network, where they differ.

    Returns:
        The network, in training mode.
    """
    network = timm.create_model(backbone, in_chans=1, num_classes=0, **numbers)
    if backbone_weights is not None:
        states = load_file(backbone_weights)
        first = f"{network.default_cfg['first_conv']}.weight"
        states[first] = adapt_input_conv(1, states[first])
        network.load_state_dict({name: states[name] for name in network.state_dict()})
    return ContrastiveNetwork(
        encoder=nn.Sequential(nn.Unflatten(1, (1, -1)), inflate(network)),
        feature_width=network.num_features,
        projection_width=projection_width,
    ).train()


def train(task: Task) -> Trained:
    """Train FDVTS on a task.

    Args:
        task: settings as `fit_contrastive` says.
    """
    seed_everything(task.seed, verbose=False)
    model = build(**task.variant)
    return Trained(model, {CARD.name: fit_contrastive(task, model)})
