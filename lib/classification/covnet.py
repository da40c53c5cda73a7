"""COVNet: ResNet-50 on every slice, the largest feature of the scan, one layer (FACTS 6.8).

Li et al. 2020 judge scans, not slices. The slices of a batch lie one after another, as in
`lib.classification.racnet`, and nothing is padded.

Not reproduced: the public code leaves batch normalisation at the statistics of the current batch
when it judges, so that what a scan gets depends on its own slices' statistics; here, as usual, the
running statistics judge.
"""

from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lib.classification.task import Card

LARGEST_GREY = 255.0

VARIANTS = {
    "paper": {"widths": [64, 128, 256, 512], "blocks": [3, 4, 6, 3], "frozen_affine": True},
    # The same layers, fewer and narrower, for the phantom on two CPU cores. Deviation: scale and
    # shift of the norms learn, as there is no ImageNet start that they could keep.
    "small": {"widths": [8, 16, 32, 64], "blocks": [1, 1, 1, 1], "frozen_affine": False},
}

CARD = Card(
    name="COVNet",
    source="Li et al. 2020; FACTS 6.8",
    published="ResNet-50 from ImageNet on every slice, mean over its pixels, largest value over "
    "the slices, linear layer; scale and shift of batch normalisation frozen; Adam 1e-5 with "
    "weight decay 0.1, one scan at a time",
    ours="running statistics judge, where the public code takes those of the scan; ImageNet "
    "weights from a file of one's own, and random ones without it",
    parameters=23_514_179,
)


class COVNet(nn.Module):
    """Slices of several scans in, class scores per scan out.

    Args:
        trunk: slices (slices, 3, height, width) to pooled features (slices, width).
        width: size of the features.
        classes: number of outputs.
    """

    def __init__(self, trunk: nn.Module, *, width: int, classes: int = 3) -> None:
        super().__init__()
        self.trunk, self.output = trunk, nn.Linear(width, classes)

    def forward(self, slices: Tensor, lengths: Sequence[int]) -> Tensor:
        """Class scores of each scan.

        Args:
            slices: uint8, scans one after another, shape (total slices, 1 or 3, height, width).
            lengths: number of slices of each scan; sums to total slices.

        Returns:
            Logits, shape (scans, classes).

        Raises:
            ValueError: if slices and lengths disagree, or a scan has no slice.
        """
        lengths = [int(length) for length in lengths]
        if sum(lengths) != len(slices):
            raise ValueError(f"{len(slices)} slices, but the lengths sum to {sum(lengths)}")
        if min(lengths) < 1:
            raise ValueError(f"a scan needs at least one slice, got lengths {lengths}")
        colour = slices.expand(-1, 3, -1, -1).float() / LARGEST_GREY
        features = self.trunk(colour)  # (total slices, width)
        largest = [scan.amax(dim=0) for scan in features.split(lengths)]
        return self.output(torch.stack(largest))  # (scans, classes)


def build(
    *,
    widths: Sequence[int] = (64, 128, 256, 512),
    blocks: Sequence[int] = (3, 4, 6, 3),
    frozen_affine: bool = True,
    weights: str | Path | None = None,
    classes: int = 3,
) -> COVNet:
    """COVNet: ``build(**VARIANTS["paper"])``.

    Args:
        widths: channels of the four stages before their expansion by 4.
        blocks: of the four stages.
        frozen_affine: keep scale and shift of batch normalisation as they start.
        weights: safetensors file of ResNet-50 with timm's or torchvision's names, which are the
            same; its class layer is left out. None draws at random.
        classes: number of outputs.

    Raises:
        ValueError: if the file holds other layers.
    """
    trunk = timm.create_model(
        "resnet50",
        channels=tuple(widths),
        layers=tuple(blocks),
        num_classes=0,
        pretrained=False,
        zero_init_last=False,  # a frozen scale of 0 would shut every block for good
    )
    if weights is not None:
        states = {n: v for n, v in load_file(weights).items() if not n.startswith("fc.")}
        if states.keys() != trunk.state_dict().keys():
            raise ValueError(f"{weights} does not hold the layers of this ResNet")
        trunk.load_state_dict(states)
    if frozen_affine:
        for layer in trunk.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.requires_grad_(False)
    model = COVNet(trunk, width=trunk.num_features, classes=classes)
    return model.to(memory_format=torch.channels_last)
