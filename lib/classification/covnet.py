"""COVNet: ResNet-50 on every slice, the largest feature of the scan, one layer (FACTS 6.8).

Li et al. 2020 judge scans, not slices. The slices of a batch lie one after another, as in
`lib.classification.racnet`, and nothing is padded.

Not reproduced: the public code leaves batch normalisation at the statistics of the current batch
when it judges, so that what a scan gets depends on its own slices' statistics; here, as usual, the
running statistics judge.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from lightning_fabric import Fabric, seed_everything
from torch import Tensor, nn

from lib.classification.inputs import pack, scan_logits
from lib.classification.picture_augmentation import Augmentation, augmented
from lib.classification.pictures import UNKNOWN, PictureItem, load_picture, prepared
from lib.classification.task import Card, Task, Trained
from lib.classification.volumes import ScanVolumes, fit_volumes, predict_volumes
from lib.data.scan import Window
from lib.inference import load_tensors

LARGEST_GREY = 255.0
WINDOW = Window(centre=-500, width=1500)  # -1250 to 250 HU (FACTS 6.8)

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
    ours="no lung masks, with which the published input is cut out; running statistics judge, "
    "where the public code takes those of the scan; ImageNet weights from a file of one's own, and "
    "random ones without it; a picture gets the judgement of its scan, made from the pictures of "
    "it that are asked for",
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
        states = {n: v for n, v in load_tensors(Path(weights)).items() if not n.startswith("fc.")}
        if states.keys() != trunk.state_dict().keys():
            raise ValueError(f"{weights} does not hold the layers of this ResNet")
        trunk.load_state_dict(states)
    if frozen_affine:
        for layer in trunk.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.requires_grad_(False)
    model = COVNet(trunk, width=trunk.num_features, classes=classes)
    return model.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class ListedScan:
    """The listed pictures of one scan.

    Attributes:
        scan_id: pseudonymous name of the scan.
        pictures: in their order.
    """

    scan_id: str
    pictures: tuple[PictureItem, ...]

    @property
    def target(self) -> int:
        """The class that its pictures have; `UNKNOWN` if none has any."""
        return max(picture.target for picture in self.pictures)


def listed_scans(pictures: Sequence[PictureItem]) -> list[ListedScan]:
    """Pictures by their scans, which come in the order of their first pictures.

    Raises:
        ValueError: if pictures of one scan belong to several classes, naming it.
    """
    by_scan: dict[str, list[PictureItem]] = {}
    for picture in pictures:
        by_scan.setdefault(picture.scan_id, []).append(picture)
    for scan_id, found in by_scan.items():
        if len({picture.target for picture in found} - {UNKNOWN}) > 1:
            raise ValueError(f"{scan_id} has pictures of several classes, COVNet gives it one")
    return [ListedScan(scan_id, tuple(found)) for scan_id, found in by_scan.items()]


def load_slices(scan: ListedScan, *, size: int) -> np.ndarray:
    """The listed slices of a scan in grey, uint8, shape (slices, size, size)."""
    return np.stack([load_picture(item, size=size, window=WINDOW) for item in scan.pictures])


def varied(
    slices: np.ndarray, generator: np.random.Generator | None, *, ranges: Augmentation
) -> np.ndarray:
    """Slices as they are, or with a generator changed at random, all alike."""
    return slices if generator is None else augmented(slices, generator, ranges)


def train(task: Task) -> Trained:
    """Train COVNet on the listed slices of scans (FACTS 6.8): cross entropy, Adam.

    Args:
        task: of pictures; its ``start`` is None or a training of COVNet. Settings are image_size,
            batch_scans, rounds, learning_rate, weight_decay, augmentation (of `Augmentation`),
            class_balanced (scans), cache_pictures, loader_processes, and those of ``fit_network``.

    Raises:
        ValueError: if a picture to learn from has no class, or those of a scan have several.
    """
    settings = task.settings
    seed_everything(task.seed, verbose=False)
    model = prepared(task, build)
    optimizer = torch.optim.Adam(
        [weights for weights in model.parameters() if weights.requires_grad],
        lr=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
    )
    history = fit_volumes(
        task,
        model,
        partial(_scans, settings=settings, cache=settings["cache_pictures"]),
        optimizer=optimizer,
        logits=scan_logits,
        collate=pack,
    )
    return Trained(model, {CARD.name: history})


def predict(
    model: nn.Module, scans: Sequence[PictureItem], *, settings: Mapping[str, Any], fabric: Fabric
) -> np.ndarray:
    """Probabilities of each picture (see `task`): those of its scan, from the pictures given.

    Args:
        model: of `train`.
        scans: the pictures.
        settings: image_size, batch_scans, loader_processes, augmentation.
        fabric: device and precision.
    """
    views = _scans(scans, settings)
    found = predict_volumes(
        model, views, settings=settings, fabric=fabric, logits=scan_logits, collate=pack
    )
    rows = {scan.scan_id: row for row, scan in enumerate(views.scans)}
    return found[[rows[picture.scan_id] for picture in scans]]


def shown(scan: PictureItem, settings: Mapping[str, Any]) -> np.ndarray:
    """What the network sees of a picture, through a window of its own.

    Args:
        scan: the picture.
        settings: with image_size.

    Returns:
        uint8, shape (1, image_size, image_size).
    """
    return load_picture(scan, size=settings["image_size"], window=WINDOW)[None]


def _scans(
    pictures: Sequence[PictureItem], settings: Mapping[str, Any], *, cache: bool = False
) -> ScanVolumes:
    """Listed scans as this module prepares them."""
    return ScanVolumes(
        listed_scans(pictures),
        load=partial(load_slices, size=settings["image_size"]),
        view=partial(varied, ranges=Augmentation(**settings["augmentation"])),
        cache=cache,
    )
