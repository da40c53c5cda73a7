"""Everything that a slice shows, as named regions: what SAM is prompted for and CLIP is told about.

The regions follow from the slice and its lung mask by thresholds alone, so any data set with lung
masks can train both small models (DESIGN, "The embedded default must be real").
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage.morphology import convex_hull_image

from lib.data.masks import body_mask, tissue_threshold
from lib.data.scan import LEFT_LUNG, RIGHT_LUNG

RIGHT_LUNG_REGION, LEFT_LUNG_REGION = "right lung", "left lung"
BOTH_LUNGS, LUNG_PIECE = "both lungs", "lung piece"
BODY, BACKGROUND, OUTSIDE = "body", "background", "table and clothes"
GAS, BONE, FAT, SOFT_TISSUE = "gas", "bone", "fat", "soft tissue"
MEDIASTINUM, CHEST_WALL = "mediastinum", "chest wall"

LUNG_REGIONS = (RIGHT_LUNG_REGION, LEFT_LUNG_REGION, BOTH_LUNGS, LUNG_PIECE)
OTHER_REGIONS = (
    *(BODY, BACKGROUND, OUTSIDE, GAS, BONE, FAT, SOFT_TISSUE),
    *(MEDIASTINUM, CHEST_WALL),
)

SMALLEST_SHARE = 0.0005  # of the slice; smaller regions are specks
HOUNSFIELD_RANGES = {BONE: (180, 3000), FAT: (-200, -20), SOFT_TISSUE: (-20, 180)}  # HU
SMOOTHING = 5  # pixels; side of the square over which Hounsfield units are averaged against noise
OPENING = 1 / 128  # of the picture's longer side; parts the mediastinum from strips along the lungs


@dataclass(frozen=True, eq=False)
class Region:
    """A part of a slice.

    Attributes:
        name: one of `LUNG_REGIONS` and `OTHER_REGIONS`.
        mask: bool, shape (height, width), with at least one pixel.
    """

    name: str
    mask: np.ndarray

    @property
    def is_lung(self) -> bool:
        """Whether it is a lung, both lungs or a piece of one."""
        return self.name in LUNG_REGIONS


def slice_regions(
    voxels: np.ndarray,
    lungs: np.ndarray,
    *,
    body: np.ndarray | None = None,
    smallest_share: float = SMALLEST_SHARE,
) -> list[Region]:
    """Regions of one slice.

    Right and left lung, gas, bones, fat and soft tissue are parts of the body and never overlap;
    background and things outside lie outside it. Both lungs, body, mediastinum and chest wall are
    unions or parts of others; they are absent where the slice has no lungs to tell them by. Vessels
    and a heart full of contrast medium are as dense as bone and count as bone.

    Args:
        voxels: shape (height, width), int16 HU or uint8.
        lungs: uint8, same shape: 0 background, 1 right lung, 2 left lung.
        body: bool, same shape, from `lib.data.masks.body_mask`; found here where None.
        smallest_share: smallest region, as a share of the slice.

    Returns:
        At least one region, lungs first, larger pieces of a kind before smaller ones. Kinds of
        tissue are told apart in Hounsfield units only.

    Raises:
        TypeError: for a slice of another dtype.
        ValueError: if the shapes differ or the lung mask has other values.
    """
    _check(voxels, lungs, body)
    tissue = voxels > tissue_threshold(voxels)
    if body is None:
        body = body_mask(tissue[None])[0]
    body = body | (lungs > 0)
    least = max(1, round(smallest_share * voxels.size))
    air = ~tissue & (lungs == 0)
    regions = [
        *_lung_regions(lungs, least),
        *_whole(BODY, body, least),
        *_pieces(BACKGROUND, air & ~body, least),
        *_pieces(OUTSIDE, tissue & ~body, least),
        *_pieces(GAS, air & body, least),
        *_between_and_around(lungs > 0, tissue & body & (lungs == 0), least),
    ]
    if voxels.dtype == np.int16:
        regions += _tissues(voxels, tissue & body & (lungs == 0), least)
    return regions or [Region(BACKGROUND, np.ones(voxels.shape, bool))]


def _check(voxels: np.ndarray, lungs: np.ndarray, body: np.ndarray | None) -> None:
    """Complain about what would give wrong regions silently."""
    if voxels.ndim != 2 or voxels.dtype not in (np.int16, np.uint8):
        raise TypeError(
            f"a slice is (height, width) in int16 or uint8, got {voxels.shape} in {voxels.dtype}"
        )
    shapes = {part.shape for part in (voxels, lungs, body) if part is not None}
    if len(shapes) > 1:
        raise ValueError(f"slice and masks differ in shape: {sorted(shapes)}")
    if not np.isin(lungs, (0, RIGHT_LUNG, LEFT_LUNG)).all():
        raise ValueError("a lung mask holds 0, 1 (right lung) and 2 (left lung) only")


def _whole(name: str, mask: np.ndarray, least: int) -> list[Region]:
    """A mask as one region, or nothing where it is a speck."""
    return [Region(name, mask)] if np.count_nonzero(mask) >= least else []


def _pieces(name: str, mask: np.ndarray, least: int) -> list[Region]:
    """The connected pieces of a mask, large ones first."""
    numbers, _ = ndimage.label(mask)
    areas = np.bincount(numbers.ravel())
    areas[0] = 0
    order = np.argsort(-areas, kind="stable")
    return [Region(name, numbers == number) for number in order if areas[number] >= least]


def _lung_regions(lungs: np.ndarray, least: int) -> Iterator[Region]:
    """Each lung, both of them, and the pieces of a lung that a slice cuts more than once."""
    sides = {RIGHT_LUNG_REGION: lungs == RIGHT_LUNG, LEFT_LUNG_REGION: lungs == LEFT_LUNG}
    whole = [region for name, mask in sides.items() for region in _whole(name, mask, least)]
    yield from whole
    if len(whole) == 2:
        yield Region(BOTH_LUNGS, lungs > 0)
    for region in whole:
        pieces = _pieces(LUNG_PIECE, region.mask, least)
        yield from pieces if len(pieces) > 1 else ()


def _between_and_around(lungs: np.ndarray, tissue: np.ndarray, least: int) -> list[Region]:
    """Mediastinum and chest wall: tissue within and outside the lungs' convex hull."""
    if np.count_nonzero(lungs) < least:
        return []
    box = ndimage.find_objects(lungs.astype(np.uint8))[0]
    hull = np.zeros(lungs.shape, bool)
    hull[box] = convex_hull_image(lungs[box], offset_coordinates=False)
    steps = max(1, round(OPENING * max(lungs.shape)))
    between = ndimage.binary_opening(hull & tissue, iterations=steps)
    around = ndimage.binary_opening(tissue & ~hull, iterations=steps)
    return _pieces(MEDIASTINUM, between, least)[:1] + _whole(CHEST_WALL, around, least)


def _tissues(hounsfield: np.ndarray, tissue: np.ndarray, least: int) -> list[Region]:
    """Pieces of bone, fat and soft tissue."""
    smooth = ndimage.uniform_filter(hounsfield.astype(np.float32), SMOOTHING)
    return [
        region
        for name, (low, high) in HOUNSFIELD_RANGES.items()
        for region in _pieces(name, tissue & (smooth >= low) & (smooth < high), least)
    ]
