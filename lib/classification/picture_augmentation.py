"""Random views of single slices, or of all slices of a scan alike: one draw.

The changes of COVIDNet-CT (FACTS 6.7) and COVNet (FACTS 6.8), each with the ranges that a
classifier's settings name; torchvision does the sampling. All numbers come from the generator that
is given, so that a view depends on its seed alone.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

WHITE = 255.0
BILINEAR = InterpolationMode.BILINEAR


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How far random views may go; the default changes nothing.

    Attributes:
        probability: of each of the changes below, noise excepted, which is always there.
        rotation: largest angle either way, degrees.
        shear: largest shift of a column against its neighbour either way, pixels.
        shift: largest shift either way along both axes, share of the picture's length.
        scale: largest enlargement or reduction, share.
        box_jitter: largest shift of each edge of the picture either way, share of its length.
        mirrored: left for right.
        upside_down: front for back.
        elastic: largest strength of an elastic distortion, pixels.
        elastic_smoothness: of it, deviations of a Gaussian in pixels, smallest and largest.
        noise_variance: largest variance of Gaussian noise on the scale 0 to 1.
    """

    probability: float = 0.5
    rotation: float = 0.0
    shear: float = 0.0
    shift: float = 0.0
    scale: float = 0.0
    box_jitter: float = 0.0
    mirrored: bool = False
    upside_down: bool = False
    elastic: float = 0.0
    elastic_smoothness: tuple[float, float] = (8.0, 13.0)
    noise_variance: float = 0.0


def augmented(
    slices: np.ndarray, generator: np.random.Generator, ranges: Augmentation
) -> np.ndarray:
    """A random view of slices, all changed alike save for noise; what comes in is black.

    Args:
        slices: uint8, shape (slices, size, size).
        generator: source of the draw.
        ranges: how far it may go.

    Returns:
        uint8, same shape.
    """
    picture = torch.tensor(slices)  # a copy: loaded pictures may be read-only
    picture = jittered(picture, generator, ranges)
    picture = transformed(picture, generator, ranges)
    if ranges.elastic and happens(generator, ranges):
        field = displacement(generator, slices.shape[-1], ranges)
        picture = functional.elastic(picture, field, interpolation=BILINEAR)
    for axis, asked in ((-1, ranges.mirrored), (-2, ranges.upside_down)):
        if asked and happens(generator, ranges):
            picture = picture.flip(axis)
    return noisy(picture.numpy(), generator, ranges)


def happens(generator: np.random.Generator, ranges: Augmentation) -> bool:
    """Whether the next change is made."""
    return bool(generator.random() < ranges.probability)


def jittered(picture: Tensor, generator: np.random.Generator, ranges: Augmentation) -> Tensor:
    """Move each edge of a picture by itself, inwards or outwards, and resize what is inside.

    Args:
        picture: uint8, shape (..., size, size).
        generator: source of the draw.
        ranges: of which box_jitter and probability count.
    """
    if not ranges.box_jitter or not happens(generator, ranges):
        return picture
    size = picture.shape[-1]
    moves = generator.uniform(-ranges.box_jitter, ranges.box_jitter, 4) * size
    top, left, bottom, right = (round(move) for move in moves)
    height, width = size + bottom - top, size + right - left
    return functional.resized_crop(
        picture, top, left, height, width, [size, size], interpolation=BILINEAR, antialias=True
    )


def transformed(picture: Tensor, generator: np.random.Generator, ranges: Augmentation) -> Tensor:
    """Turn, shear, shift and scale a picture around its middle, in one sampling.

    Args:
        picture: uint8, shape (..., size, size).
        generator: source of the draw.
        ranges: of which rotation, shear, shift, scale and probability count.
    """

    def drawn(largest: float) -> float:
        made = largest > 0 and happens(generator, ranges)
        return float(generator.uniform(-largest, largest)) if made else 0.0

    size = picture.shape[-1]
    angle, lean = drawn(ranges.rotation), math.degrees(math.atan(drawn(ranges.shear)))
    shift = [drawn(ranges.shift) * size, drawn(ranges.shift) * size]
    scale = 1 + drawn(ranges.scale)
    if (angle, lean, *shift, scale) == (0.0, 0.0, 0.0, 0.0, 1.0):
        return picture
    return functional.affine(picture, angle, shift, scale, [lean, 0.0], interpolation=BILINEAR)


def displacement(generator: np.random.Generator, size: int, ranges: Augmentation) -> Tensor:
    """Where an elastic distortion takes each pixel from: noise, smoothed, of random strength.

    Args:
        generator: source of the draw.
        size: of the picture in pixels.
        ranges: of which elastic and elastic_smoothness count.

    Returns:
        float32, shape (1, size, size, 2), columns then rows, in halves of the picture's length.
    """
    sigma = generator.uniform(*ranges.elastic_smoothness)
    strength = generator.uniform(0, ranges.elastic)
    noise = generator.uniform(-1, 1, (size, size, 2))
    pixels = strength * ndimage.gaussian_filter(noise, (sigma, sigma, 0), mode="constant")
    return torch.from_numpy((2 / size * pixels).astype(np.float32))[None]


def noisy(slices: np.ndarray, generator: np.random.Generator, ranges: Augmentation) -> np.ndarray:
    """Slices with Gaussian noise of random strength, each pixel by itself.

    Args:
        slices: uint8, any shape.
        generator: source of the draw.
        ranges: of which noise_variance counts.
    """
    if not ranges.noise_variance:
        return slices
    deviation = WHITE * math.sqrt(generator.uniform(0, ranges.noise_variance))
    noise = np.float32(deviation) * generator.standard_normal(slices.shape, np.float32)
    return np.rint(np.clip(slices + noise, 0, WHITE)).astype(np.uint8)
