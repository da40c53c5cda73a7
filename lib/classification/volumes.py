"""Scans as input of 3-D networks: one tensor of fixed size per scan.

Each published system prepares its volumes in its own way; what they share is here: reading once,
random views that depend on the seed alone, batches, learning from them and judging.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lib.classification.inputs import Item, ScanItem
from lib.classification.task import Logits, Task, fit_network
from lib.data.store import open_volume
from lib.training import Loss, Row, SeededOrder
from lib.training import predict as class_probabilities

View = Callable[[np.ndarray, np.random.Generator | None], Tensor | np.ndarray]
Collate = Callable[[Sequence[tuple[Any, int, str]]], Any]


class VolumeBatch(NamedTuple):
    """Several scans as a 3-D network takes them.

    Attributes:
        volumes: shape (scans, ...), of the same shape for every scan.
        targets: int64, shape (scans,).
        scan_ids: pseudonymous name of each scan.
    """

    volumes: Tensor
    targets: Tensor
    scan_ids: list[str]


class ScanVolumes(Dataset):
    """Scans as (view, target, scan_id).

    An index asks for the plain view of a scan; a pair (index, seed), as `SeededOrder` draws it, for
    a random view. So augmentation depends on the seed alone, not on the number of worker processes.

    Args:
        scans: what to read, in this order.
        load: reads a scan once, without anything random.
        view: from what was loaded, and a generator or None, to what the network sees.
        cache: keep what was loaded in memory; use it with ``num_workers=0``.
    """

    def __init__(
        self,
        scans: Sequence[ScanItem],
        *,
        load: Callable[[ScanItem], np.ndarray],
        view: View,
        cache: bool = False,
    ) -> None:
        self.scans, self.load, self.view = list(scans), load, view
        self._cache: dict[int, np.ndarray] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, asked: int | tuple[int, int]) -> tuple[Tensor, int, str]:
        index, seed = asked if isinstance(asked, tuple) else (asked, None)
        generator = None if seed is None else np.random.default_rng(seed)
        scan = self.scans[index]
        return self.view(self._loaded(index), generator), scan.target, scan.scan_id

    def _loaded(self, index: int) -> np.ndarray:
        """One scan, from memory where it is kept."""
        if self._cache is None:
            return self.load(self.scans[index])
        if index not in self._cache:
            self._cache[index] = self.load(self.scans[index])
        return self._cache[index]


def slices_and_lungs(scan: ScanItem) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Slices of a stored scan as they are stored, each with the pixels that count.

    Args:
        scan: the scan.

    Yields:
        int16 HU or uint8, and bool, both shape (height, width); all True without a lung mask.

    Raises:
        ValueError: if scan and mask differ in shape.
    """
    volume = open_volume(scan.volume)
    mask = None if scan.mask is None else open_volume(scan.mask)
    if mask is not None and mask.shape != volume.shape:
        raise ValueError(
            f"{scan.scan_id}: scan and lung mask differ in shape: {volume.shape} and {mask.shape}"
        )
    for index in range(len(volume)):
        voxels = volume[index]
        yield voxels, np.ones(voxels.shape, bool) if mask is None else mask[index] > 0


def stack(items: Sequence[tuple[Tensor, int, str]]) -> VolumeBatch:
    """Batch of volumes of one shape (the ``collate_fn`` of `ScanVolumes`)."""
    volumes, targets, scan_ids = zip(*items, strict=True)
    return VolumeBatch(torch.stack(volumes), torch.tensor(targets), list(scan_ids))


def class_balance(scans: Sequence[Item]) -> list[float]:
    """Weights of scans with which every class is drawn equally often."""
    counts = Counter(scan.target for scan in scans)
    return [1 / counts[scan.target] for scan in scans]


def random_batches(
    scans: ScanVolumes,
    *,
    batch_size: int,
    rounds: int = 1,
    processes: int = 0,
    balanced: bool = False,
    collate: Collate = stack,
) -> DataLoader:
    """Random views in random order, for training.

    Args:
        scans: the training part.
        batch_size: scans per batch; the last one of an epoch may hold fewer, but never only one,
            which batch normalisation could not take: that one is left out.
        rounds: times that every scan is seen in one epoch.
        processes: that load beside the training.
        balanced: draw every class equally often, whatever its share of the scans; some scans are
            then seen more often than others.
        collate: makes a batch of several scans.
    """
    weights = class_balance(scans.scans) if balanced else None
    return DataLoader(
        scans,
        batch_size=batch_size,
        sampler=SeededOrder(len(scans), count=len(scans) * rounds, weights=weights),
        collate_fn=collate,
        num_workers=processes,
        drop_last=(len(scans) * rounds) % batch_size == 1 and len(scans) > 1,
    )


def plain_batches(
    scans: ScanVolumes, *, batch_size: int, processes: int = 0, collate: Collate = stack
) -> DataLoader:
    """Plain views in the given order, for validation and prediction."""
    return DataLoader(scans, batch_size=batch_size, collate_fn=collate, num_workers=processes)


def volume_logits(model: nn.Module, batch: VolumeBatch) -> Tensor:
    """Class scores of a batch from a network that takes volumes, shape (scans, classes)."""
    return model(batch.volumes)


def fit_volumes(
    task: Task,
    model: nn.Module,
    volumes: Callable[[Sequence[ScanItem]], ScanVolumes],
    *,
    optimizer: Optimizer,
    logits: Logits = volume_logits,
    loss: Loss | None = None,
    collate: Collate = stack,
) -> list[Row]:
    """Train a network on random views, choosing its best epoch on plain ones.

    Args:
        task: settings are batch_scans, rounds, loader_processes, those of `fit_network`, and where
            it is not False class_balanced (see `random_batches`).
        model: the network.
        volumes: the scans of a part as the network takes them.
        optimizer: of the network.
        logits: see `fit_network`.
        loss: see there.
        collate: makes a batch of several scans, with ``targets``.

    Returns:
        One row per epoch.
    """
    settings = task.settings
    options = {
        "batch_size": settings["batch_scans"],
        "processes": settings["loader_processes"],
        "collate": collate,
    }
    return fit_network(
        task,
        model,
        train_batches=random_batches(
            volumes(task.train),
            rounds=settings["rounds"],
            balanced=settings.get("class_balanced", False),
            **options,
        ),
        validation_batches=plain_batches(volumes(task.validation), **options),
        logits=logits,
        optimizers=[optimizer],
        loss=loss,
    )


def predict_volumes(
    model: nn.Module,
    volumes: ScanVolumes,
    *,
    settings: Mapping[str, Any],
    fabric: Fabric,
    logits: Logits = volume_logits,
    collate: Collate = stack,
) -> np.ndarray:
    """Probabilities of the classes of each scan, from its plain view.

    Args:
        model: the network.
        volumes: the scans as the network takes them.
        settings: batch_scans, loader_processes.
        fabric: device and precision.
        logits: from network and batch (on the device) to scores, shape (scans, classes).
        collate: makes a batch of several scans.

    Returns:
        float32, shape (scans, classes).
    """
    batches = plain_batches(
        volumes,
        batch_size=settings["batch_scans"],
        processes=settings["loader_processes"],
        collate=collate,
    )
    return class_probabilities(model, batches, fabric=fabric, logits=logits)
