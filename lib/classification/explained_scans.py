"""Stored scans explained: contributions of 3-D CNN with BERT beside the true place of the disease.

Everything is brought to the grid of the network's clip (slices left out, resized, cut to the
middle), by the same functions, so that a pixel of a lesion mask is a pixel of the attribution.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lib.classification.attribution import by_slice, integrated_gradients, output_change
from lib.classification.clip_augmentation import WHITE
from lib.classification.clips import (
    ComposedScan,
    channel_statistics,
    composition,
    judged_clip,
    middle,
)
from lib.classification.inputs import ScanItem
from lib.classification.resampling import symmetrical_positions
from lib.data.store import open_volume
from lib.evaluation.evidence import Evidence


def explain_scan(
    scan: ScanItem,
    *,
    truth: Path,
    trained: nn.Module,
    untrained: nn.Module,
    settings: Mapping[str, Any],
    steps: int,
    batch_clips: int,
) -> Evidence | None:
    """What a network looked at in the set of slices that decides on a scan.

    Args:
        scan: as it is classified, with its selection and its lung mask.
        truth: folder of its data set with ``lesions`` and, if known, ``lungs``, true masks by the
            name of the scan; without true lungs those that it is classified with count.
        trained: takes clips, shape (clips, 3, slices, height, width).
        untrained: the same network with random weights.
        settings: slices, image_size, resized_size, channels and cropped, as it was trained with.
        steps: of `integrated_gradients`.
        batch_clips: likewise.

    Returns:
        The evidence; None where no slice that was looked at shows a lesion, which is not computed.

    Raises:
        FileNotFoundError: if there is no lesion mask.
        ValueError: if a mask has another shape than the scan.
    """
    lesions, lungs = (truth / part / f"{scan.scan_id}.b2nd" for part in ("lesions", "lungs"))
    composed = ComposedScan(scan, **composition(settings))
    positions = symmetrical_positions(len(composed), settings["slices"])
    seen = np.unique(positions)
    grey, lesion_pixels = masked_pixels(scan, lesions, seen, settings=settings)
    if not lesion_pixels.any():
        return None
    known = lungs if lungs.is_file() else scan.mask
    _, lung_pixels = masked_pixels(scan, known, seen, settings=settings)

    statistics = channel_statistics(settings["channels"], settings["channel_statistics"])
    view = partial(judged_clip, size=settings["image_size"], statistics=statistics)
    pictures = composed[seen]
    clip = view(pictures, np.searchsorted(seen, positions))
    black = view(np.zeros_like(pictures[:1]), np.zeros_like(positions))
    contributions = [
        by_slice(
            integrated_gradients(network, clip, black, steps=steps, batch_clips=batch_clips),
            positions,
        )
        for network in (trained, untrained)
    ]
    return Evidence(
        scan_id=scan.scan_id,
        slices=seen + (scan.selection.first if scan.selection else 0),
        grey=grey,
        lungs=lung_pixels,
        lesions=lesion_pixels,
        network=contributions[0].maps,
        random_weights=contributions[1].maps,
        output_change=output_change(trained, clip, black),
    )


def masked_pixels(
    scan: ScanItem, mask: Path, positions: np.ndarray, *, settings: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Some slices of a scan, and a mask of it, on the network's grid.

    Args:
        scan: with its selection.
        mask: file of a mask of the whole scan.
        positions: ascending, within the kept slices.
        settings: image_size, resized_size and cropped.

    Returns:
        Grey values, uint8, and the share of each pixel inside the mask, float32, 0 to 1; both of
        shape (positions, image_size, image_size).

    Raises:
        ValueError: if the mask has another shape than the scan.
    """
    shapes = [open_volume(path).shape for path in (scan.volume, mask)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{mask}: the mask has shape {shapes[1]}, its scan has {shapes[0]}")
    shown = composition(settings) | {"channels": "RRM"}
    composed = ComposedScan(replace(scan, mask=mask), **shown)
    middles = middle(composed[positions], settings["image_size"])
    return middles[:, 0], middles[:, 2].astype(np.float32) / np.float32(WHITE)


def random_network(build: Callable[..., nn.Module], seed: int, **variant: Any) -> nn.Module:
    """A network with random weights, the control of Adebayo et al. 2018.

    Args:
        build: makes the network.
        seed: of its weights; the state of PyTorch's generator is left as it was.
        variant: arguments of ``build``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(**variant).eval().requires_grad_(False)
