"""Training data, loss and validation score of the lung networks.

Slices with and without lung are used alike. They are kept in memory, resized: the published size
takes 0.5 MB per slice.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from tqdm import tqdm

from lib.data.store import open_volume
from lib.segmentation.lung_networks import NETWORKS, as_tensor, resized

Batch = Sequence[Tensor]  # pictures and targets, uint8, each (batch, 1, size, size)


class LungSlices(Dataset):
    """All slices of some scans with what a network shall predict.

    Args:
        pictures: uint8, (slices, 1, size, size).
        targets: uint8, same shape, 255 where the network shall predict 1, between where a small
            pixel covers a border.
        flip: mirror every other slice at random, right for left.
    """

    def __init__(self, pictures: Tensor, targets: Tensor, *, flip: bool = False) -> None:
        self.pictures, self.targets, self.flip = pictures, targets, flip

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Picture and target of one slice, uint8, each (1, size, size)."""
        pair = self.pictures[index], self.targets[index]
        return tuple(one.flip(-1) for one in pair) if self.flip and torch.rand(()) < 0.5 else pair

    def digest(self) -> str:
        """SHA-256 of all pictures and targets, to tell trainings on different data apart."""
        digest = hashlib.sha256()
        for values in (self.pictures, self.targets):
            digest.update(values.contiguous().numpy())
        return digest.hexdigest()


def load_slices(
    scan_ids: Iterable[str], prepared: Path, *, network: str, size: int, flip: bool = False
) -> LungSlices:
    """Read the slices of scans with true lung masks.

    Args:
        scan_ids: which scans; those without a mask are left out.
        prepared: folder of the prepared data set.
        network: ``"unet"`` or ``"bcdunet"``; they see and predict different things.
        size: height and width of the network's pictures.
        flip: see `LungSlices`.

    Raises:
        ValueError: if none of the scans has a mask.
    """
    with_mask = [name for name in scan_ids if (prepared / "lungs" / f"{name}.b2nd").is_file()]
    if not with_mask:
        raise ValueError(f"none of these scans of {prepared.name} has a true lung mask")
    pairs = [
        _load_scan(prepared, name, network, size)
        for name in tqdm(with_mask, desc=f"{prepared.name}: slices", unit="scan", mininterval=1)
    ]
    return LungSlices(*map(torch.cat, zip(*pairs, strict=True)), flip=flip)


def _load_scan(prepared: Path, name: str, network: str, size: int) -> tuple[Tensor, Tensor]:
    """Pictures and targets of one scan at the network's size, uint8."""
    scan, lungs = (open_volume(prepared / kind / f"{name}.b2nd") for kind in ("scans", "lungs"))
    if scan.shape != lungs.shape:
        raise ValueError(f"scan {scan.shape} and lung mask {lungs.shape} of {name} do not match")
    scan = scan.scan()
    targets = NETWORKS[network].target(scan, lungs.load()).astype(np.uint8) * 255
    return tuple(
        resized(as_tensor(one), (size, size)).mul(255).round().to(torch.uint8)
        for one in (NETWORKS[network].pictures(scan), targets)
    )


def scores(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of a batch and the targets as 0 to 1, float, (batch, 1, size, size)."""
    pictures, targets = (values.float() / 255 for values in batch)
    return model(pictures.contiguous(memory_format=torch.channels_last)), targets


def pixel_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean binary cross-entropy of all pixels, a scalar (FACTS 3.1 and 4.3)."""
    return functional.binary_cross_entropy_with_logits(*scores(model, batch))


def mean_dice(
    model: nn.Module, batches: Iterable[Batch], *, to_device: Callable[[Batch], Batch]
) -> float:
    """Dice of the predicted target, all pixels of all batches together.

    Deviation: published is the choice of the epoch by the loss; Dice is what the study reports.

    Args:
        model: in evaluation mode.
        batches: of `LungSlices`.
        to_device: brings a batch to the network's device.

    Returns:
        0 to 1; 1 where nothing is there and nothing predicted.
    """
    common = total = 0
    for batch in batches:
        logits, targets = scores(model, to_device(batch))
        predicted, true = logits >= 0, targets >= 0.5
        common += (predicted & true).sum().item()
        total += predicted.sum().item() + true.sum().item()
    return 2 * common / total if total else 1.0
