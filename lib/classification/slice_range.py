"""Which part of a slice and which slices of a scan ACVLab looks at (step 0; FACTS 6.3).

Both follow from one picture: where even the darkest pixel nearby is bright there is solid tissue,
so vessels, couch and noise are gone, and what the tissue encloses is air, above all lung.

The published sizes are pixels of slices of 512 x 512; here they scale with the slice, so that a
smaller picture of the same patient gives the same answer.
"""

from collections.abc import Iterable
from itertools import groupby

import numpy as np
from scipy.ndimage import binary_fill_holes, minimum_filter

TISSUE_GREY = 100  # of 255; brighter than aerated lung in the lung window
CROP_FILTER = 10  # pixels at a width of 512
AREA_FILTER = 5  # pixels at a width of 512
FULL_WIDTH = 512


def solid_tissue(grey: np.ndarray, filter_size: int) -> np.ndarray:
    """Pixels without anything dark around them.

    Args:
        grey: uint8, shape (height, width).
        filter_size: of the minimum filter, in pixels at a width of 512.

    Returns:
        bool, shape (height, width).
    """
    size = max(1, round(filter_size * grey.shape[1] / FULL_WIDTH))
    return minimum_filter(grey, size) >= TISSUE_GREY


def longest_run(flags: Iterable[bool]) -> tuple[int, int]:
    """Start and stop of the longest run of true values, the first of equals.

    Args:
        flags: one per position.

    Returns:
        Half-open range; (0, 0) where nothing is true.
    """
    runs, place = [(0, 0)], 0
    for flag, members in groupby(bool(flag) for flag in flags):
        length = len(list(members))
        if flag:
            runs.append((place, place + length))
        place += length
    return max(runs, key=lambda run: run[1] - run[0])


def body_box(grey: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the body: the longest runs that hold solid tissue.

    Args:
        grey: uint8, shape (height, width).

    Returns:
        Index of the box; the whole slice where there is no tissue (the original would fail).
    """
    tissue = solid_tissue(grey, CROP_FILTER)
    if not tissue.any():
        return slice(0, grey.shape[0]), slice(0, grey.shape[1])
    return slice(*longest_run(tissue.any(1))), slice(*longest_run(tissue.any(0)))


def enclosed_area(grey: np.ndarray) -> float:
    """Share of a slice that solid tissue encloses: its lung area.

    Args:
        grey: uint8, shape (height, width).

    Returns:
        Pixels that hole filling adds to the tissue, divided by all pixels.
    """
    tissue = solid_tissue(grey, AREA_FILTER)
    return float((binary_fill_holes(tissue) & ~tissue).mean())


def largest_window(areas: np.ndarray, share: float) -> tuple[int, int]:
    """Contiguous slices with the largest summed lung area.

    Args:
        areas: lung area of each slice, shape (slices,), at least one.
        share: of the slices that the window takes, rounded up; 0.5 is published.

    Returns:
        Half-open range; of equal windows the most central one, so that a scan without any lung
        keeps its middle (the original keeps its beginning).

    Raises:
        ValueError: if the share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of slices is above 0 and at most 1, got {share}")
    length = int(np.ceil(len(areas) * share))
    sums = np.convolve(areas, np.ones(length), mode="valid")
    best = np.flatnonzero(np.isclose(sums, sums.max()))
    middle = (len(areas) - length) / 2
    start = int(best[np.abs(best - middle).argmin()])
    return start, start + length


def draw(length: int, number: int, generator: np.random.Generator) -> np.ndarray:
    """Random slices in their order: each at most once where there are enough.

    Args:
        length: slices to draw from.
        number: slices to draw.
        generator: of random numbers.

    Returns:
        Ascending int64 indices, shape (number,).
    """
    return np.sort(generator.choice(length, number, replace=length < number))
