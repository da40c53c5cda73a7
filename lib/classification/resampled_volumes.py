"""Scans as a fixed number of slices, drawn again or left out: the input of the MosMed baselines.

MC3_18 and DenseNet3D121 of the COVID-19 benchmark of HKBU (FACTS 6.4) see every scan as 64 slices:
random ones in training, symmetrically chosen ones in judging (the rule of FACTS 4.5, which 3-D CNN
with BERT takes from there). A slice is resized by its nearest pixels to 5/4 of the wanted size and
cut to its middle; a volume is standardised by its own mean and deviation, Hounsfield units without
any window; in training each axis is flipped half of the time.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric, seed_everything
from skimage.exposure import rescale_intensity
from torch import Tensor, nn

from lib.classification.inputs import ScanItem
from lib.classification.resampling import random_positions, symmetrical_positions
from lib.classification.task import Task, Trained
from lib.classification.volumes import (
    ScanVolumes,
    fit_volumes,
    predict_volumes,
    slices_and_lungs,
)
from lib.data.scan import HOUNSFIELD_AIR

SHOWN_DEVIATIONS = (-2.0, 3.0)  # black and white of the pictures of `shown`


def nearest_middle(length: int, size: int) -> np.ndarray:
    """Pixels of one axis that remain when it is resized to 5/4 of a size and cut to its middle.

    Args:
        length: pixels of the axis.
        size: pixels that remain.

    Returns:
        Ascending int64 positions, shape (size,).
    """
    resized = size * 5 // 4
    kept = (resized - size) // 2 + np.arange(size)
    return (2 * kept + 1) * length // (2 * resized)


def load_middle(scan: ScanItem, *, size: int) -> np.ndarray:
    """All slices of a scan, resized and cut; outside the lung mask there is air.

    Args:
        scan: the scan.
        size: height and width of the result in pixels.

    Returns:
        int16 HU or uint8 as stored, shape (slices, size, size).
    """
    slices = []
    for voxels, lungs in slices_and_lungs(scan):
        air = HOUNSFIELD_AIR if voxels.dtype == np.int16 else 0
        chosen = np.ix_(*(nearest_middle(length, size) for length in voxels.shape))
        slices.append(np.where(lungs[chosen], voxels[chosen], np.asarray(air, voxels.dtype)))
    return np.stack(slices)


def standardised(volume: np.ndarray) -> np.ndarray:
    """Volume of mean 0 and standard deviation 1; one without any contrast becomes 0.

    Args:
        volume: any shape and type.

    Returns:
        float32, same shape.
    """
    centred = volume.astype(np.float32) - volume.mean(dtype=np.float64).astype(np.float32)
    deviation = centred.std(dtype=np.float64)
    return centred / np.float32(deviation) if deviation > 0 else np.zeros_like(centred)


def resampled(
    volume: np.ndarray, generator: np.random.Generator | None, *, slices: int
) -> np.ndarray:
    """A fixed number of slices of a scan, at random also mirrored.

    Args:
        volume: shape (slices there are, height, width).
        generator: for a random choice of slices and random flips of all axes; None for the
            symmetrical choice without flips.
        slices: number wanted.

    Returns:
        Same type, shape (slices, height, width).
    """
    if generator is None:
        return volume[symmetrical_positions(len(volume), slices)]
    chosen = volume[random_positions(len(volume), slices, generator)]
    return np.flip(chosen, np.flatnonzero(generator.random(3) < 0.5))


def resampled_view(
    volume: np.ndarray, generator: np.random.Generator | None, *, slices: int
) -> Tensor:
    """What the network sees of a loaded scan: a fixed number of slices, standardised.

    Args:
        volume: shape (slices there are, size, size).
        generator: for a random choice of slices and random flips; None for the plain view.
        slices: number wanted.

    Returns:
        float32, shape (1, slices, size, size).
    """
    return torch.from_numpy(standardised(resampled(volume, generator, slices=slices))[None])


def train_resampled(task: Task, build: Callable[..., nn.Module], *, name: str) -> Trained:
    """Train a network on resampled volumes (FACTS 6.4: cross entropy, Adam with weight decay).

    Args:
        task: settings are slices, image_size, batch_scans, rounds, learning_rate, weight_decay,
            loader_processes, cache_volumes, and those of ``fit_network``.
        build: makes the network from the task's variant.
        name: of the learning curve.
    """
    settings = task.settings
    seed_everything(task.seed, verbose=False)
    model = build(**task.variant)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
    )
    volumes = partial(_volumes, settings=settings, cache=settings["cache_volumes"])
    history = fit_volumes(task, model, volumes, optimizer=optimizer)
    return Trained(model, {name: history})


def predict(
    model: nn.Module, scans: Sequence[ScanItem], *, settings: Mapping[str, Any], fabric: Fabric
) -> np.ndarray:
    """Probabilities of each scan (see `task`), from symmetrically chosen slices."""
    return predict_volumes(model, _volumes(scans, settings), settings=settings, fabric=fabric)


def shown(scan: ScanItem, settings: Mapping[str, Any]) -> np.ndarray:
    """What the network sees of a scan, from 2 deviations below its mean to 3 above it.

    Args:
        scan: the scan.
        settings: with slices and image_size.

    Returns:
        uint8, shape (slices, image_size, image_size).
    """
    volume = load_middle(scan, size=settings["image_size"])
    view = resampled_view(volume, None, slices=settings["slices"])[0].numpy()
    return rescale_intensity(view, SHOWN_DEVIATIONS, (0, 255)).astype(np.uint8)


def _volumes(
    scans: Sequence[ScanItem], settings: Mapping[str, Any], *, cache: bool = False
) -> ScanVolumes:
    """Scans as this module prepares them."""
    return ScanVolumes(
        scans,
        load=partial(load_middle, size=settings["image_size"]),
        view=partial(resampled_view, slices=settings["slices"]),
        cache=cache,
    )
