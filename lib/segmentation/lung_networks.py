"""Lungs by a trained U-Net or BCDU-Net: from a scan to a mask.

Both networks see slices resized to one square size, stretched where they are not square, and their
probabilities are resized back to the slice before the threshold, so that borders are finer than the
network's pixels.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lib.data.masks import separate_lungs
from lib.data.scan import Scan
from lib.inference import best_device, in_batches, load_weights, one_thread
from lib.segmentation import bcdunet, unet

NETWORKS = {"unet": unet, "bcdunet": bcdunet}
THRESHOLD = 0.5  # of the probability
SIZES = ("widths", "dropout")  # the settings that a network is built from


def build_network(network: str, settings: Mapping[str, Any]) -> nn.Module:
    """A network of one kind with random weights, laid out for fast convolutions.

    Args:
        network: ``"unet"`` or ``"bcdunet"``.
        settings: with ``widths`` and ``dropout``.

    Raises:
        ValueError: if there is no such network.
    """
    if network not in NETWORKS:
        raise ValueError(f"network is one of {sorted(NETWORKS)}, got {network!r}")
    model = NETWORKS[network].build(**{name: settings[name] for name in SIZES})
    return model.to(memory_format=torch.channels_last)  # twice as fast on a CPU


def resized(pictures: Tensor, shape: Sequence[int]) -> Tensor:
    """Pictures of another size: bilinear, and averaged where they become smaller.

    Args:
        pictures: float, (batch, 1, height, width).
        shape: new height and width.

    Returns:
        float, (batch, 1, *shape).
    """
    return functional.interpolate(pictures, tuple(shape), mode="bilinear", antialias=True)


def as_tensor(slices: np.ndarray) -> Tensor:
    """Slices, uint8 of shape (slices, height, width), as float (slices, 1, height, width), 0..1."""
    return torch.from_numpy(slices)[:, None].float() / 255


class NetworkSegmenter:
    """Lungs of a scan by a trained network.

    Args:
        weights: ``best.safetensors`` of `lib.training.fit`; ``training.json`` beside it says which
            network it is for and at which size it works. They are read once per process.
        batch_size: slices at a time; bounds the memory, does not change the result.

    Raises:
        FileNotFoundError: if nothing was trained there.
        ValueError: if the weights are damaged or are not those of a lung network.
    """

    def __init__(self, *, weights: Path, batch_size: int) -> None:
        changed = weights.stat().st_mtime_ns if weights.is_file() else None
        self.network, self.size, self.model = _load(weights, changed)
        self.batch_size = batch_size

    def __call__(self, scan: Scan) -> np.ndarray:
        """Segment the lungs.

        Args:
            scan: whole scan or single slice of any size, Hounsfield units or 8-bit.

        Returns:
            uint8, shape of the scan: 0 background, 1 right lung, 2 left lung; slices without lung
            are empty.
        """
        shown = NETWORKS[self.network].pictures(scan)
        with one_thread():
            predicted = np.stack(in_batches(self._run, shown, batch_size=self.batch_size))
        return separate_lungs(NETWORKS[self.network].lungs(scan, predicted))

    @torch.inference_mode()
    def probability(self, slices: np.ndarray) -> Tensor:
        """The network's output on a batch of its pictures.

        Args:
            slices: uint8, (slices, height, width).

        Returns:
            float32, same shape, 0 to 1, on the network's device.
        """
        small = resized(as_tensor(slices).to(best_device()), (self.size, self.size))
        logits = self.model(small.contiguous(memory_format=torch.channels_last))
        return resized(logits.sigmoid(), slices.shape[1:])[:, 0]

    def _run(self, slices: np.ndarray) -> np.ndarray:
        """Where a batch of slices shows the network's target, bool, same shape."""
        return (self.probability(slices) >= THRESHOLD).cpu().numpy()


@lru_cache(maxsize=4)
def _load(weights: Path, changed: int | None) -> tuple[str, int, nn.Module]:
    """Name, size and network of a weights file; ``changed`` is its time, to notice new weights."""
    settings = training_settings(weights)
    model = load_weights(build_network(settings["network"], settings), weights)
    return settings["network"], settings["size"], model.to(best_device())


def training_settings(weights: Path) -> dict[str, Any]:
    """With which settings a lung network was trained.

    Args:
        weights: of a finished training.

    Returns:
        Among others ``network``, ``size``, ``widths`` and ``dropout``.

    Raises:
        FileNotFoundError: if nothing was trained there, or not to the end.
        ValueError: if something else was trained there.
    """
    summary = weights.with_name("training.json")
    if not summary.is_file():
        raise FileNotFoundError(f"{summary} is not there: run the stage train_lung_network first")
    settings = json.loads(summary.read_text())["identity"]["given"]
    if settings.get("network") not in NETWORKS:
        raise ValueError(f"{summary} does not describe one of the networks {sorted(NETWORKS)}")
    return settings
