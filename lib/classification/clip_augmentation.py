"""Random views of a clip of slices: one draw, shared by all its slices.

Source: Tan and Liu 2021 (3-D CNN with BERT), section 5.2; FACTS 4.7. In the order of use: an affine
transform, a crop of random size and place (multi-scale cropping, MSC), a flip left for right half
of the time, then brightness and contrast.

Deviations from the public code, on purpose:

- All geometry is one sampling: the matrices of transform, crop, resize and flip are multiplied, and
  a pixel is interpolated once, from the pixels that are there, instead of twice and rounded twice.
  It also costs half the time.
- Brightness and contrast follow the geometry, on the pixels that the network sees. Both commute
  with interpolation, save for clipping; contrast turns around the mean of what is seen.
- The public crops lie at multiples of 14 pixels whatever their size, and are cut off where they
  leave the picture, so that a "whole" picture could be one of 224 pixels. That is taken for an
  oversight: here the 13 places are quarters of the room that a crop leaves.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

CROP_RATIOS = (1.0, 0.875, 0.75, 0.66)  # of the picture's length
# Places of a crop, down and across, in quarters of the room that it leaves: four corners, middle of
# the picture, middles of the four sides, and halfway from the middle to each corner.
CROP_PLACES = (
    *((0, 0), (0, 4), (4, 0), (4, 4)),
    (2, 2),
    *((2, 0), (2, 4), (4, 2), (0, 2)),
    *((1, 1), (1, 3), (3, 1), (3, 3)),
)
GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # of three channels in a grey picture (ITU-R BT.601)
WHITE = 255


@dataclass(frozen=True)
class Affine:
    """One affine transform with a change of brightness and contrast; the default changes nothing.

    Attributes:
        angle: of rotation, degrees clockwise.
        across: shift to the right in pixels.
        down: shift downwards in pixels.
        scale: factor of enlargement.
        shear: degrees by which columns lean.
        brightness: factor of every grey value.
        contrast: factor of the distance of every grey value from the slice's mean.
    """

    angle: int = 0
    across: int = 0
    down: int = 0
    scale: float = 1.0
    shear: int = 0
    brightness: float = 1.0
    contrast: float = 1.0


class Crop(NamedTuple):
    """A part of a picture in pixels."""

    top: int
    left: int
    height: int
    width: int


def draw_affine(generator: np.random.Generator, length: int, ranges: Mapping[str, float]) -> Affine:
    """Draw a transform (section 5.2; whole degrees and pixels and tenths, FACTS 4.7).

    Args:
        generator: source of the draw.
        length: height and width of the picture in pixels.
        ranges: largest changes either way: ``degrees``, ``translation`` (share of ``length``),
            ``scale``, ``shear_degrees``, ``brightness`` and ``contrast`` (shares).

    Raises:
        ValueError: if the ranges are not exactly these.
    """
    wanted = {"degrees", "translation", "scale", "shear_degrees", "brightness", "contrast"}
    if set(ranges) != wanted:
        raise ValueError(f"ranges of the affine draw are {sorted(wanted)}, got {sorted(ranges)}")

    def whole(largest: float) -> int:
        return int(generator.integers(-int(largest), int(largest), endpoint=True))

    def factor(largest: float) -> float:
        return 1 + round(float(generator.uniform(-largest, largest)), 1)

    return Affine(
        angle=whole(ranges["degrees"]),
        across=whole(ranges["translation"] * length),
        down=whole(ranges["translation"] * length),
        scale=factor(ranges["scale"]),
        shear=whole(ranges["shear_degrees"]),
        brightness=factor(ranges["brightness"]),
        contrast=factor(ranges["contrast"]),
    )


def draw_crop(generator: np.random.Generator, length: int) -> Crop:
    """Draw a crop of multi-scale cropping: its sides differ by one ratio at most (FACTS 4.7).

    Args:
        generator: source of the draw.
        length: height and width of the picture in pixels.
    """
    pairs = [(i, j) for i in range(4) for j in range(4) if abs(i - j) <= 1]
    height, width = (
        int(length * CROP_RATIOS[ratio]) for ratio in pairs[generator.integers(len(pairs))]
    )
    down, across = CROP_PLACES[generator.integers(len(CROP_PLACES))]
    return Crop((length - height) * down // 4, (length - width) * across // 4, height, width)


def middle_crop(length: int, size: int) -> Crop:
    """The middle of a picture, height and width ``length``, as a crop of height and width ``size``.

    Raises:
        ValueError: if the picture is smaller.
    """
    if size > length:
        raise ValueError(f"pictures of {length} pixels hold no crop of {size}")
    return Crop((length - size) // 2, (length - size) // 2, size, size)


def sampling_matrix(
    affine: Affine, crop: Crop, *, length: int, size: int, flip: bool
) -> np.ndarray:
    """Where each pixel of the view comes from.

    Args:
        affine: transform of the picture around its middle.
        crop: part of the transformed picture that is resized to the view.
        length: height and width of the picture in pixels.
        size: height and width of the view in pixels.
        flip: left for right.

    Returns:
        float64, shape (2, 3): from column, row and 1 in the view to column and row in the picture,
        pixels counted at their centres.
    """
    angle, lean = np.deg2rad(affine.angle), np.tan(np.deg2rad(affine.shear))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turned = affine.scale * rotation @ [[1, -lean], [0, 1]]
    middle, shift = np.full(2, (length - 1) / 2), np.array([affine.across, affine.down])
    transform = _homogeneous(turned, middle + shift - turned @ middle)
    across, down = crop.width / size, crop.height / size
    cut = _homogeneous(  # the corner of the first pixel, half a pixel before its centre, stays one
        np.diag([across, down]), [crop.left + (across - 1) / 2, crop.top + (down - 1) / 2]
    )
    mirror = _homogeneous(np.diag([-1, 1]), [size - 1, 0]) if flip else np.eye(3)
    return (np.linalg.inv(transform) @ cut @ mirror)[:2]


def _homogeneous(linear: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """A linear map and a shift as one 3 x 3 matrix."""
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = linear, shift
    return matrix


def sampled(
    planes: np.ndarray, matrix: np.ndarray, *, size: int, outside: int | None
) -> np.ndarray:
    """All pictures of a clip sampled alike, bilinearly (OpenCV, rounded to whole grey values).

    Args:
        planes: uint8, shape (pictures, length, length).
        matrix: of ``sampling_matrix``.
        size: height and width of the views.
        outside: grey value around the picture; None continues the pixels at its edge.

    Returns:
        uint8, shape (pictures, size, size).
    """
    views = np.empty((len(planes), size, size), np.uint8)
    options = {
        "flags": cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        "borderMode": cv2.BORDER_REPLICATE if outside is None else cv2.BORDER_CONSTANT,
        "borderValue": outside or 0,
    }
    for plane, view in zip(planes, views, strict=True):
        cv2.warpAffine(plane, matrix, (size, size), dst=view, **options)
    return views


def brightness_and_contrast(clip: np.ndarray, *, brightness: float, contrast: float) -> np.ndarray:
    """Change grey values: first all in proportion, then their distance from the slice's mean.

    Args:
        clip: float32 grey values of 0 to 255, shape (3, slices, height, width); changed in place.
        brightness: factor; what exceeds white is white.
        contrast: factor; the mean is that of the slice's three channels by `GREY_WEIGHTS`.

    Returns:
        ``clip``.
    """
    if brightness != 1:
        clip *= brightness
        np.minimum(clip, WHITE, out=clip)
    if contrast != 1:
        means = np.tensordot(GREY_WEIGHTS, clip.mean(axis=(2, 3)), 1)  # (slices,)
        clip *= contrast
        clip += ((1 - contrast) * means[:, None, None]).astype(np.float32)
        np.clip(clip, 0, WHITE, out=clip)
    return clip
