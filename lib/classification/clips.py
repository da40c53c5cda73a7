"""Scans as clips of 3-D CNN with BERT: slices in three channels, a fixed number of them.

Source: Tan and Liu 2021 (3-D CNN with BERT), sections 3.5 and 5.2; FACTS 4.6 and 4.7. Each of the
three channels is one of R (the slice itself), M (its lung mask) and L (the slice inside the lungs).
They are merged at full resolution, then resized to 5/4 of what the network takes; training crops
and transforms a clip at random, judging takes its middle.

Of a scan only the kept slices (`lib.data.selection`) are read, and of those only the ones asked
for, each decoded once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from lib.classification.clip_augmentation import (
    WHITE,
    Affine,
    brightness_and_contrast,
    draw_affine,
    draw_crop,
    middle_crop,
    sampled,
    sampling_matrix,
)
from lib.classification.inputs import ScanItem
from lib.classification.resampling import random_positions
from lib.data.scan import to_grey
from lib.data.store import StoredVolume, open_volume

RAW, MASK, LUNGS = "R", "M", "L"


class ChannelStatistics(NamedTuple):
    """What the three channels are normalised by, as shares of white.

    Attributes:
        mean: of each channel.
        deviation: likewise, above 0.
    """

    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


# Of the videos that the network learned from first (FACTS 4.6).
VIDEO_STATISTICS = ChannelStatistics((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))


def channel_statistics(
    channels: str, by_letter: Mapping[str, Sequence[float]] | None
) -> ChannelStatistics:
    """What clips are normalised by.

    Args:
        channels: three letters, as for ``compose``.
        by_letter: mean and deviation of R, M and L, for a network that starts at random, where a
            larger deviation makes a channel count less; None for one that starts from videos.
    """
    if by_letter is None:
        return VIDEO_STATISTICS
    means, deviations = zip(*(by_letter[letter] for letter in channels), strict=True)
    return ChannelStatistics(means, deviations)


def compose(grey: np.ndarray, lungs: np.ndarray | None, channels: str) -> np.ndarray:
    """A slice as a picture of three channels (section 3.5).

    Args:
        grey: uint8, shape (height, width).
        lungs: above 0 where there is lung, same shape; None only if ``channels`` is ``"RRR"``.
        channels: three letters: R is the slice, M its mask in black and white, L the slice with
            everything but lung in black.

    Returns:
        uint8, shape (height, width, 3).

    Raises:
        ValueError: other letters, a mask that is needed but missing, or one of another shape.
    """
    check_channels(channels)
    planes = {RAW: grey}
    if set(channels) != {RAW}:
        if lungs is None:
            raise ValueError(f"channels {channels} need a lung mask")
        if lungs.shape != grey.shape:
            raise ValueError(f"slice and lung mask differ in shape: {grey.shape} and {lungs.shape}")
        planes[MASK] = (lungs > 0) * np.uint8(WHITE)
        planes[LUNGS] = grey & planes[MASK]
    return cv2.merge([planes[letter] for letter in channels])


def check_channels(channels: str) -> None:
    """Complain about anything but three letters of R, M and L."""
    if len(channels) != 3 or not set(channels) <= {RAW, MASK, LUNGS}:
        raise ValueError(f"channels are three letters of R, M and L, got {channels!r}")


def resize_picture(picture: np.ndarray, size: int) -> np.ndarray:
    """Resize a picture to a square, bilinearly (OpenCV), as in the paper from 512 to 280 pixels.

    Bilinear sampling would skip pixels where it reduces by more than 2. So a picture that large is
    halved first, each time to the means of 2 x 2 pixels: small opacities stay.

    Args:
        picture: uint8, shape (height, width, channels).
        size: new height and width in pixels.

    Returns:
        uint8, shape (size, size, channels).
    """
    while max(picture.shape[:2]) > 2 * size:
        height, width = (max((length + 1) // 2, size) for length in picture.shape[:2])
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    return cv2.resize(picture, (size, size), interpolation=cv2.INTER_LINEAR)


@dataclass(frozen=True)
class ComposedScan:
    """The kept slices of a stored scan, composed and resized when they are asked for.

    Index it with ascending positions within the kept range: ``scan[positions]`` is uint8, shape
    (positions, 3, size, size); a slice that is asked for several times is decoded once.

    Attributes:
        scan: the scan; without a selection all slices are kept.
        channels: three letters, as for ``compose``.
        size: height and width of the pictures in pixels.
        cropped: cut out the volume's body box first.

    Raises:
        ValueError: names the scan: other channels, a mask that is needed but missing or of another
            shape, a selection that does not fit the scan, or none though it is to be cropped.
    """

    scan: ScanItem
    channels: str
    size: int
    cropped: bool

    def __post_init__(self) -> None:
        try:
            check_channels(self.channels)
        except ValueError as error:
            self._complain(str(error))
        slices, height, width = self._volume.shape
        if self._mask is not None and self._mask.shape != self._volume.shape:
            self._complain(
                f"scan and lung mask differ in shape: {self._volume.shape} and {self._mask.shape}"
            )
        if self._mask is None and set(self.channels) != {RAW}:
            self._complain(f"channels {self.channels} need a lung mask")
        if self.cropped and self.scan.selection is None:
            self._complain("without a selection there is no body box to crop to")
        _, last, (_, _, xmax, ymax) = self._kept
        if last >= slices or xmax > width or ymax > height:
            self._complain(
                f"the selection reaches to slice {last}, row {ymax - 1} and column {xmax - 1}, "
                f"but the scan has the shape {self._volume.shape}"
            )

    def _complain(self, fault: str) -> None:
        raise ValueError(f"{self.scan.scan_id}: {fault}")

    def __len__(self) -> int:
        """Number of kept slices."""
        first, last, _ = self._kept
        return last - first + 1

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        pictures = np.empty((len(positions), 3, self.size, self.size), np.uint8)
        for row, position in enumerate(positions):
            if row and position == positions[row - 1]:
                pictures[row] = pictures[row - 1]
            else:
                pictures[row] = self._picture(int(position)).transpose(2, 0, 1)
        return pictures

    def _picture(self, position: int) -> np.ndarray:
        """One kept slice, uint8, shape (size, size, 3)."""
        first, last, (xmin, ymin, xmax, ymax) = self._kept
        index = range(first, last + 1)[position]
        window = (slice(ymin, ymax), slice(xmin, xmax)) if self.cropped else ...
        grey = to_grey(self._volume[index][window])
        needs_mask = set(self.channels) != {RAW}
        lungs = self._mask[index][window] if needs_mask else None
        return resize_picture(compose(grey, lungs, self.channels), self.size)

    @property
    def _kept(self) -> tuple[int, int, tuple[int, int, int, int]]:
        """First and last kept slice, and the box."""
        slices, height, width = self._volume.shape
        chosen = self.scan.selection
        if chosen is None:
            return 0, slices - 1, (0, 0, width, height)
        return chosen.first, chosen.last, chosen.box

    @cached_property
    def _volume(self) -> StoredVolume:
        return open_volume(self.scan.volume)

    @cached_property
    def _mask(self) -> StoredVolume | None:
        return None if self.scan.mask is None else open_volume(self.scan.mask)


def load_composed(scan: ScanItem, *, channels: str, size: int, cropped: bool) -> np.ndarray:
    """All kept slices of a scan, composed and resized; arguments and faults of `ComposedScan`.

    Returns:
        uint8, shape (kept slices, 3, size, size).
    """
    composed = ComposedScan(scan, channels=channels, size=size, cropped=cropped)
    return composed[np.arange(len(composed))]


def composition(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `ComposedScan`, from a classifier's settings."""
    return {
        "channels": settings["channels"],
        "size": settings["resized_size"],
        "cropped": settings["cropped"],
    }


def middle(pictures: np.ndarray, size: int) -> np.ndarray:
    """The middle of pictures, shape (..., size, size)."""
    top, left, height, width = middle_crop(pictures.shape[-1], size)
    return pictures[..., top : top + height, left : left + width]


def judged_clip(
    composed: np.ndarray | ComposedScan,
    positions: np.ndarray,
    *,
    size: int,
    statistics: ChannelStatistics = VIDEO_STATISTICS,
) -> Tensor:
    """Some slices of a scan for judging: the middle of each (section 5.2).

    Args:
        composed: of ``load_composed``, or the scan to read the slices from.
        positions: of the slices, ascending.
        size: height and width of the clip in pixels.
        statistics: that the channels are normalised by.

    Returns:
        float32, normalised, shape (3, slices, size, size).
    """
    middles = middle(composed[positions], size)
    return normalised(middles.transpose(1, 0, 2, 3).astype(np.float32, order="C"), statistics)


def training_clip(
    composed: np.ndarray | ComposedScan,
    generator: np.random.Generator,
    *,
    slices: int,
    size: int,
    affine: Mapping[str, float] | None,
    multi_scale_crop: bool,
    statistics: ChannelStatistics = VIDEO_STATISTICS,
) -> Tensor:
    """A random view of a scan: random slices, one random transform of them all (section 5.2).

    The slices are flipped left for right half of the time, whatever the switches say.

    Args:
        composed: of ``load_composed``, or the scan to read the slices from.
        generator: source of everything random.
        slices: number of slices of the clip.
        size: height and width of the clip in pixels.
        affine: ranges for ``draw_affine``; None leaves out transform, brightness and contrast.
        multi_scale_crop: crop at random; otherwise the middle is taken, as in judging (the paper
            does not say what it crops then).
        statistics: that the channels are normalised by.

    Returns:
        float32, normalised, shape (3, slices, size, size).
    """
    pictures = composed[random_positions(len(composed), slices, generator)]
    length = pictures.shape[-1]
    change = Affine() if affine is None else draw_affine(generator, length, affine)
    crop = draw_crop(generator, length) if multi_scale_crop else middle_crop(length, size)
    flip = bool(generator.random() < 0.5)
    matrix = sampling_matrix(change, crop, length=length, size=size, flip=flip)
    planes = pictures.transpose(1, 0, 2, 3).reshape(-1, length, length)
    views = sampled(planes, matrix, size=size, outside=None if affine is None else 0)
    clip = views.reshape(3, slices, size, size).astype(np.float32)
    brightness_and_contrast(clip, brightness=change.brightness, contrast=change.contrast)
    return normalised(clip, statistics)


def normalised(clip: np.ndarray, statistics: ChannelStatistics) -> Tensor:
    """Grey values as the network takes them, each channel by its mean and deviation (FACTS 4.6).

    Args:
        clip: float32 of 0 to 255, shape (3, slices, height, width); changed in place.
        statistics: of the channels.

    Returns:
        float32, same shape and memory.
    """
    values = torch.from_numpy(clip)
    mean, deviation = (torch.tensor(numbers)[:, None, None, None] for numbers in statistics)
    return values.div_(WHITE).sub_(mean).div_(deviation)
