"""The slices of a scan as ACVLab takes them: chosen, cropped, masked; then drawn and augmented.

Step 0 of the system (FACTS 6.3), and the random and plain views of slices and of embeddings on
which its networks learn and judge.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lib.classification.inputs import ScanItem, resize_slice
from lib.classification.slice_range import body_box, draw, enclosed_area, largest_window
from lib.data.scan import to_grey
from lib.data.store import open_volume

LARGEST_GREY = 255.0


def chosen_slices(scan: ScanItem, *, size: int, share: float) -> np.ndarray:
    """Step 0: the slice range of a scan, each slice cropped to the body and resized.

    Crop and range are found in the scan as it is, and the lung mask is applied afterwards: a
    segmented slice has no body left to find (the original, made for whole slices, would crop
    nothing and keep the first half). Scans whose slices differ in shape, of which the original
    judges only the last slice, do not exist in the store; scans that are not axial, two of which it
    leaves out by name, are left to whoever prepares the data set.

    Args:
        scan: the scan.
        size: height and width of the result in pixels.
        share: of the slices that are kept.

    Returns:
        uint8, shape (slices, size, size).

    Raises:
        ValueError: if scan and mask differ in shape.
    """
    volume = open_volume(scan.volume)
    mask = None if scan.mask is None else open_volume(scan.mask)
    if mask is not None and mask.shape != volume.shape:
        raise ValueError(f"scan and lung mask differ in shape: {volume.shape} and {mask.shape}")
    greys = [to_grey(volume[index]) for index in range(len(volume))]
    start, stop = largest_window(np.array([enclosed_area(grey) for grey in greys]), share)
    slices = np.empty((stop - start, size, size), np.uint8)
    for row, index in enumerate(range(start, stop)):
        seen = greys[index] if mask is None else greys[index] * (mask[index] > 0)
        slices[row] = resize_slice(seen[body_box(greys[index])], size)
    return slices


def augment(slices: np.ndarray, generator: np.random.Generator, *, strength: float = 1.0) -> Tensor:
    """Random changes, each slice by itself, each kind with a chance of one half.

    Mirror; shift by up to 0.2 of the side, scale by 0.8 to 1.2 and rotation by up to 30 degrees,
    together; contrast and brightness by up to 0.2. The published change of hue, saturation and
    value is left out: grey has no hue, and its steps are below one grey value.

    Args:
        slices: uint8, shape (slices, size, size).
        generator: of random numbers.
        strength: factor of all ranges; 1 is published.

    Returns:
        uint8, same shape.
    """
    number = len(slices)
    mirrored, moved, lit = generator.random((3, number)) < 0.5
    moved, lit = strength * moved, strength * lit
    angle = np.deg2rad(generator.uniform(-30, 30, number)) * moved
    scale = 1 + generator.uniform(-0.2, 0.2, number) * moved
    shift = 2 * generator.uniform(-0.2, 0.2, (2, number)) * moved  # sides are 2 long in a grid
    flip = np.where(mirrored, -1, 1)
    cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
    where = np.stack([[flip * cosine, -flip * sine, shift[0]], [sine, cosine, shift[1]]])
    where = torch.from_numpy(where).permute(2, 0, 1).float()  # (slices, 2, 3)
    pictures = torch.from_numpy(slices)[:, None].float()
    grid = functional.affine_grid(where, list(pictures.shape), align_corners=False)
    pictures = functional.grid_sample(
        pictures, grid, padding_mode="reflection", align_corners=False
    )
    contrast, brightness = generator.uniform(-0.2, 0.2, (2, number, 1, 1)) * lit[:, None, None]
    pictures = pictures[:, 0] * torch.from_numpy(1 + contrast).float()
    pictures = pictures + torch.from_numpy(LARGEST_GREY * brightness).float()
    return pictures.clamp(0, LARGEST_GREY).round().to(torch.uint8)


def whole_view(slices: np.ndarray, _: np.random.Generator | None) -> Tensor:
    """All slices of a scan as they are."""
    return torch.from_numpy(slices)


def slice_view(
    slices: np.ndarray,
    generator: np.random.Generator | None,
    *,
    number: int,
    seed: int,
    strength: float,
) -> Tensor:
    """Drawn slices of a scan, augmented where there is a generator, else always the same ones.

    Args:
        slices: uint8, shape (slices, size, size).
        generator: of random numbers, or None.
        number: slices to draw.
        seed: of the draw that is always the same.
        strength: of the augmentation.

    Returns:
        uint8, shape (number, size, size).
    """
    if generator is None:
        return torch.from_numpy(slices[draw(len(slices), number, np.random.default_rng(seed))])
    drawn = slices[draw(len(slices), number, generator)]
    return augment(drawn, generator, strength=strength)


def embedding_view(
    embeddings: np.ndarray,
    generator: np.random.Generator | None,
    *,
    number: int,
    seed: int,
    fresh: bool,
) -> Tensor:
    """Drawn embeddings of a scan, in order.

    Args:
        embeddings: shape (slices, embedding_width).
        generator: of random numbers, or None.
        number: slices to draw.
        seed: of the draw that is always the same.
        fresh: draw anew from the generator each time; else always the same, as published.

    Returns:
        Shape (number, embedding_width).
    """
    if generator is None or not fresh:
        generator = np.random.default_rng(seed)
    return torch.from_numpy(embeddings[draw(len(embeddings), number, generator)])
