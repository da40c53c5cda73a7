"""What a network for clips looked at: integrated gradients, pixel by pixel and slice by slice.

Source: Sundararajan, Taly and Yan, "Axiomatic Attribution for Deep Networks" (2017), equation 1.
The paper on 3-D CNN with BERT shows no such evidence; where in a scan its verdict comes from is
measured here. Integrated gradients rather than gradient times input: they are complete (what all
pixels contribute adds up to what the network's output moved by, so the error can be told), they do
not vanish where the output is saturated, and they count from a black picture, whereas the zero of a
normalised clip is a grey of no meaning.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lib.classification.inputs import BINARY_CLASSES

COVID, NON_COVID = BINARY_CLASSES.index("covid"), BINARY_CLASSES.index("non_covid")
STEPS = 8


class SliceContributions(NamedTuple):
    """Contributions of the slices of one scan.

    Attributes:
        slices: ascending int64 numbers of the slices in the scan, shape (slices seen,); one that
            the clip left out was not looked at and has no entry.
        maps: contribution of each pixel, float32, shape (slices seen, height, width).
    """

    slices: np.ndarray
    maps: np.ndarray


def class_difference(logits: Tensor) -> Tensor:
    """By how much COVID-19 outscores the rest.

    Args:
        logits: shape (scans, 2), in the order of ``BINARY_CLASSES``.

    Returns:
        Shape (scans,).
    """
    return logits[:, COVID] - logits[:, NON_COVID]


def integrated_gradients(
    network: nn.Module, clip: Tensor, black: Tensor, *, steps: int = STEPS, batch_clips: int = 1
) -> Tensor:
    """Contribution of every value of a clip to the score of COVID-19 less that of the rest.

    The gradient is averaged over the straight way from a black clip to this one, at the middles of
    equal steps, and multiplied by the way. The network judges, as in evaluation: nothing of it
    changes, neither weights nor gradients nor running means, and each part is left in the mode in
    which it was.

    Args:
        network: from clips, shape (clips, channels, slices, height, width), to logits (clips, 2).
        clip: shape (channels, slices, height, width), normalised as the network takes it.
        black: what the network takes for a clip of black slices; broadcasts to the clip's shape.
        steps: of the way; more of them leave a smaller remainder.
        batch_clips: steps that are computed at once.

    Returns:
        float32 on the CPU, shape of the clip. For a network that is linear on the way the sum is
        exactly the difference of its outputs.

    Raises:
        ValueError: if there is no step, or black does not fit the clip.
    """
    if steps < 1 or batch_clips < 1:
        raise ValueError(f"steps and batch_clips are at least 1, got {steps} and {batch_clips}")
    _check_fit(clip, black)
    device = _device(network, clip)
    clip, black = clip.to(device), black.to(device)
    way, total = clip - black, torch.zeros(clip.shape, dtype=torch.float64, device=device)
    middles = (torch.arange(steps, device=device, dtype=clip.dtype) + 0.5) / steps
    with evaluating(network):
        for part in middles.split(batch_clips):
            points = black + part.view(-1, 1, 1, 1, 1) * way  # (clips, 3, slices, height, width)
            total += input_gradients(network, points).double().sum(0)
    return (way * total / steps).float().cpu()


def input_gradients(network: nn.Module, clips: Tensor) -> Tensor:
    """Gradient of `class_difference` of each clip with respect to that clip.

    Args:
        network: judges each clip by itself, as any network does in evaluation mode.
        clips: shape (clips, channels, slices, height, width).

    Returns:
        Same shape; parameters of the network receive no gradient.
    """
    with torch.enable_grad():
        clips = clips.detach().requires_grad_()
        (gradients,) = torch.autograd.grad(class_difference(network(clips)).sum(), clips)
    return gradients


def output_change(network: nn.Module, clip: Tensor, black: Tensor) -> float:
    """What all contributions together should add up to: the output for a clip less that for black.

    Args:
        network: as for `integrated_gradients`.
        clip: shape (channels, slices, height, width).
        black: broadcasts to the clip's shape.
    """
    _check_fit(clip, black)
    device = _device(network, clip)
    with evaluating(network), torch.no_grad():
        clips = torch.stack([clip, black.expand_as(clip)]).to(device)
        of_clip, of_black = class_difference(network(clips)).tolist()
    return of_clip - of_black


def by_slice(contributions: Tensor, positions: np.ndarray) -> SliceContributions:
    """Contributions of a clip, put back to the slices that it was made of.

    The channels of a pixel show the same tissue, and a slice that was repeated is one slice: both
    are sums, so that all pixels still add up to the change of the output.

    Args:
        contributions: of `integrated_gradients`, shape (channels, positions, height, width).
        positions: number of the slice that stands at each position, shape (positions,).

    Returns:
        Signed contributions of the slices seen.

    Raises:
        ValueError: if the positions are not as many as the clip has.
    """
    pixels = contributions.sum(0).numpy()  # (positions, height, width)
    if positions.shape != pixels.shape[:1]:
        raise ValueError(f"{len(positions)} positions for a clip of {len(pixels)} slices")
    slices, places = np.unique(positions, return_inverse=True)
    maps = np.zeros((len(slices), *pixels.shape[1:]), np.float32)
    np.add.at(maps, places, pixels)
    return SliceContributions(slices.astype(np.int64), maps)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then every part has the mode back that it had."""
    before = {part: part.training for part in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training


def _check_fit(clip: Tensor, black: Tensor) -> None:
    """Complain about a black clip that is not one of this shape."""
    sides = list(zip(black.shape, clip.shape, strict=False))
    if (clip.ndim, black.ndim) != (4, 4) or any(b not in (1, c) for b, c in sides):
        raise ValueError(
            "a clip has shape (channels, slices, height, width) and a black one fits it, "
            f"got {tuple(clip.shape)} and {tuple(black.shape)}"
        )


def _device(network: nn.Module, clip: Tensor) -> torch.device:
    """Where a network computes."""
    return next((parameter.device for parameter in network.parameters()), clip.device)
