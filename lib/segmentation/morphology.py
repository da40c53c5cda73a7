"""Lungs by thresholds and mathematical morphology: the published routine and our own.

Two readings of one idea, air inside the body:

- ``published``: the slice-wise routine of paper 001 (figure 1; FACTS 4.1 and 4.2), which paper 000
  falls back on for slices its network fails on (FACTS 3.2). It keeps whatever two air regions are
  largest, so it reports lungs in slices of the neck and the abdomen too.
- ``default``: ours. It uses the whole scan to leave out the airways, bowel gas, the table and
  slices without lungs, and it keeps vessels and most consolidations at the pleura.
"""

import numpy as np
from scipy import ndimage
from skimage.filters import roberts, threshold_otsu
from skimage.morphology import isotropic_closing, isotropic_erosion
from skimage.segmentation import clear_border

from lib.data.masks import (
    IN_SLICE,
    body_mask,
    largest_regions,
    separate_lungs,
    tissue_threshold,
)
from lib.data.scan import LEFT_LUNG, RIGHT_LUNG, Scan, to_grey

# ---- published: FACTS 4.1 and 4.2, lengths in pixels of a 512 x 512 picture -------------------
PUBLISHED_SIZE = 512
BLUR_SIGMA = 1.1  # a 5 x 5 kernel with automatic sigma: 0.3 ((5 - 1) / 2 - 1) + 0.8
BLUR_RADIUS = 2
BODY_EROSION = 7
LUNG_EROSION = 2
LUNG_CLOSING = 10
LUNG_REGIONS = 2
DARKEST_TISSUE = 10  # grey value; darker pixels of the body box count as lung

# ---- default ----------------------------------------------------------------------------------
WORKING_SIZE = 256  # regions are chosen on a grid of about this size, borders at full size
GAS_PERCENTILE = 15  # air regions darker on average than this part of all air are gas, not lung
SMALLEST_LUNG_SHARE = 0.02  # of the largest lung; smaller pieces are not lung
AIRWAY_DILATION = 2  # working pixels; from the dark core of an airway to its wall
LARGEST_AIRWAY_SHARE = 0.006  # of the slice; larger dark regions are emphysema
CLOSING_RADIUS = 5  # working pixels; keeps vessels and nodules at the pleura
COSTAL_RADIUS = 25  # working pixels; keeps consolidations at the ribs
COSTAL_OPENING = 2  # working pixels; bays between ribs are thinner
LARGEST_HOLE_SHARE = 0.004  # of the slice; larger holes need lung below them


def scaled(length: float, picture: np.ndarray) -> int:
    """A length in pixels of a 512 x 512 picture, for a picture of another size."""
    return max(1, round(length * max(picture.shape[-2:]) / PUBLISHED_SIZE))


def body_foreground(grey: np.ndarray) -> np.ndarray:
    """Tissue of one slice: blur, Otsu's threshold over pixels above 0, erosion (FACTS 4.1, 1-3).

    Deviation: pictures of another size are not resized to 512 x 512; the lengths are scaled, so
    that the mask needs no resizing back.

    Args:
        grey: uint8, shape (height, width), lung window.

    Returns:
        bool, same shape; all False for a picture of one value.
    """
    sigma = BLUR_SIGMA * max(grey.shape) / PUBLISHED_SIZE
    radius = scaled(BLUR_RADIUS, grey)
    blurred = np.rint(ndimage.gaussian_filter(grey.astype(np.float32), sigma, radius=radius))
    positive = blurred[blurred > 0]
    if positive.size == 0:
        return np.zeros(grey.shape, bool)
    tissue = blurred > threshold_otsu(positive.astype(np.uint8))
    return ndimage.minimum_filter(tissue, size=scaled(BODY_EROSION, grey), mode="nearest")


def body_box(foreground: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the body, the largest region of tissue (FACTS 4.1, 4).

    Args:
        foreground: bool, shape (height, width), from `body_foreground`.

    Returns:
        Row and column slices that crop the picture; the whole picture where there is no tissue.
    """
    boxes = ndimage.find_objects(ndimage.label(foreground, np.ones((3, 3)))[0])
    whole = tuple(slice(0, side) for side in foreground.shape)
    # The published code takes the largest contour; the area inside it is that of the filled region.
    areas = [ndimage.binary_fill_holes(foreground[box]).sum() for box in boxes]
    return boxes[int(np.argmax(areas))] if boxes else whole


def lung_ratio(grey: np.ndarray, foreground: np.ndarray) -> float:
    """Share of a picture, cropped to the body box, that is air inside the body (FACTS 4.1, 5).

    Args:
        grey: uint8, shape (height, width), lung window, cropped to the body box.
        foreground: bool, same shape, from `body_foreground`, cropped alike.

    Returns:
        Between 0 and 1.
    """
    dark = np.where(foreground, grey, 0) < DARKEST_TISSUE
    regions = ndimage.label(dark)[0]
    corners = np.unique(regions[[0, 0, -1, -1], [0, -1, 0, -1]])
    return float(np.mean(dark & ~np.isin(regions, corners)))


def body_box_and_lung_ratio(grey: np.ndarray) -> tuple[tuple[slice, slice], float]:
    """Body box and coarse lung ratio of one slice, used to select slices (FACTS 4.1).

    Args:
        grey: uint8, shape (height, width), lung window.

    Returns:
        The box as row and column slices, and the share of it that is lung, 0 to 1.
    """
    foreground = body_foreground(grey)
    box = body_box(foreground)
    return box, lung_ratio(grey[box], foreground[box])


def published_lungs(grey: np.ndarray) -> np.ndarray:
    """Both lungs of one slice by the published routine (FACTS 4.2).

    Args:
        grey: uint8, shape (height, width), lung window.

    Returns:
        bool, same shape.
    """
    # The published flood fill from the corners is contained in clearing the border.
    air = clear_border(~body_foreground(grey))
    lungs = largest_regions(air, LUNG_REGIONS)
    lungs = isotropic_erosion(lungs, scaled(LUNG_EROSION, grey))
    lungs = isotropic_closing(lungs, scaled(LUNG_CLOSING, grey))
    return ndimage.binary_fill_holes(roberts(lungs) > 0)


def default_lungs(voxels: np.ndarray) -> np.ndarray:
    """Lungs of a whole scan by our routine: both are told apart, other air is left out.

    Args:
        voxels: shape (slices, height, width), int16 HU or uint8 grey.

    Returns:
        uint8, same shape: 0 background, 1 right lung, 2 left lung.
    """
    # Choose the regions on a coarse grid, where thin walls of tables and noise do not count.
    factor = max(1, round(max(voxels.shape[1:]) / WORKING_SIZE))
    threshold = tissue_threshold(voxels)
    coarse = _shrink(voxels, factor)
    air = coarse <= threshold

    # Air inside the body, less what is gas rather than lung, less small pieces.
    inner = air_inside_body(air)
    gas = gas_regions(coarse, inner)
    lungs = _large_in_volume(inner & ~gas)

    # Tell the lungs apart, so that closing does not bridge the mediastinum; then mend each.
    separated = separate_lungs(lungs)
    mended = np.zeros_like(separated)
    for side, lateral in ((RIGHT_LUNG, -1), (LEFT_LUNG, 1)):
        mended[mend_lung(separated == side, gas, lateral=lateral)] = side
    return _refine(mended, voxels <= threshold, factor)


def _shrink(voxels: np.ndarray, factor: int) -> np.ndarray:
    """Mean of square blocks in each slice, float32; the last blocks repeat the picture's edge."""
    _, height, width = voxels.shape
    margin = [(0, 0), (0, -height % factor), (0, -width % factor)]
    padded = np.pad(voxels, margin, mode="edge") if height % factor or width % factor else voxels
    total = sum(
        padded[:, row::factor, column::factor].astype(np.float32)
        for row in range(factor)
        for column in range(factor)
    )
    return total / factor**2


def air_inside_body(air: np.ndarray) -> np.ndarray:
    """Air regions of each slice of which most lies inside the body.

    Args:
        air: bool, shape (slices, height, width).

    Returns:
        bool, same shape.
    """
    regions, count = ndimage.label(air, IN_SLICE)
    enclosed = body_mask(~air)
    areas = np.bincount(regions.ravel(), minlength=count + 1)
    inside = np.bincount(regions[enclosed], minlength=count + 1) > areas / 2
    inside[0] = False
    return inside[regions] & enclosed  # a wall too thin to see lets a lung leak out, not far


def gas_regions(intensity: np.ndarray, air: np.ndarray) -> np.ndarray:
    """Air that is too dark for lung: airways, bowel gas.

    Compared with all air inside the body of this scan, not with a fixed HU, because scanners
    differ (in the Kaggle lung data air is at -820 HU) and 8-bit pictures have no HU at all.

    Args:
        intensity: shape (slices, height, width), HU or grey.
        air: bool, same shape, air inside the body.

    Returns:
        bool, same shape.
    """
    core = ndimage.binary_erosion(air, IN_SLICE, border_value=1)
    if not core.any():
        return np.zeros(air.shape, bool)
    darkest_lung = np.percentile(intensity[core], GAS_PERCENTILE)
    regions, count = ndimage.label(air, IN_SLICE)
    regions_of_core = regions[core]
    areas = np.bincount(regions_of_core, minlength=count + 1)
    sums = np.bincount(regions_of_core, weights=intensity[core], minlength=count + 1)
    gas = (sums < darkest_lung * areas)[regions]
    smooth = ndimage.uniform_filter(intensity, (1, 3, 3))
    return _follow_airways(gas, core & (smooth < darkest_lung), air)


def _follow_airways(gas: np.ndarray, dark: np.ndarray, air: np.ndarray) -> np.ndarray:
    """Follow airways towards the feet into slices where they are fused with a lung.

    A dark core below gas of the slice above is the same airway, unless it is too large for one.
    """
    followed = gas.copy()
    cores, count = ndimage.label(ndimage.binary_opening(dark, IN_SLICE), IN_SLICE)
    areas = np.bincount(cores.ravel(), minlength=count + 1)
    narrow = areas < LARGEST_AIRWAY_SHARE * gas[0].size
    narrow[0] = False
    for place in range(1, len(gas)):
        below = np.unique(cores[place][followed[place - 1]])
        airway = np.isin(cores[place], below[narrow[below]])
        if airway.any():
            airway = ndimage.binary_dilation(airway, iterations=AIRWAY_DILATION)
            followed[place] |= airway & air[place]
    return followed


def _large_in_volume(lungs: np.ndarray) -> np.ndarray:
    """Regions connected through the slices that are large enough for a lung or a part of it."""
    regions = ndimage.label(lungs)[0]
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0
    return (sizes > SMALLEST_LUNG_SHARE * sizes.max())[regions] & lungs


def mend_lung(lung: np.ndarray, gas: np.ndarray, *, lateral: int) -> np.ndarray:
    """Give one lung back its vessels, nodules, bullae and consolidations at the ribs.

    Args:
        lung: bool, shape (slices, height, width).
        gas: bool, same shape; gas that the closed lung does not cover is kept out.
        lateral: -1 where the ribs are towards column 0 (right lung), 1 for the left lung.

    Returns:
        bool, same shape.
    """
    mended = lung.copy()
    for place in np.flatnonzero(lung.any((1, 2))):
        one, box = mended[place], ndimage.find_objects(lung[place].view(np.uint8))[0]
        one[box] = _without_gas(_closed(lung[place][box], CLOSING_RADIUS), gas[place][box])
        one[box] |= costal_bays(one[box], lateral=lateral)
    return fill_holes(mended)


def _closed(region: np.ndarray, radius: int) -> np.ndarray:
    """Closing of a 2-D mask with a disk, as in a picture without borders."""
    inside = (slice(radius + 1, -radius - 1),) * 2
    return isotropic_closing(np.pad(region, radius + 1), radius)[inside]


def _without_gas(closed: np.ndarray, gas: np.ndarray) -> np.ndarray:
    """Take gas out of a closed lung, except bullae and small bronchi that it mostly covers."""
    regions, count = ndimage.label(gas)
    areas = np.bincount(regions.ravel(), minlength=count + 1)
    outside = np.bincount(regions[closed], minlength=count + 1) < areas / 2
    outside[0] = False
    return closed & ~outside[regions]


def costal_bays(lung: np.ndarray, *, lateral: int) -> np.ndarray:
    """Bays in the lung's surface towards the ribs, where a consolidation hides the lung.

    Only the side of the ribs: bays towards the mediastinum and the diaphragm are heart and liver.

    Args:
        lung: bool, shape (height, width), one lung in one slice.
        lateral: -1 where the ribs are towards column 0 (right lung), 1 for the left lung.

    Returns:
        bool, same shape.
    """
    bays = ndimage.binary_opening(_closed(lung, COSTAL_RADIUS) & ~lung, iterations=COSTAL_OPENING)
    if not bays.any():
        return bays
    lung = lung[:, ::-lateral]  # ribs towards column 0
    ribwards, anterior = (np.logical_or.accumulate(lung, axis) for axis in (1, 0))
    inwards, posterior = (
        np.flip(np.logical_or.accumulate(np.flip(lung, axis), axis), axis) for axis in (1, 0)
    )
    costal = (inwards & anterior & (~posterior | ~ribwards))[:, ::-lateral]
    regions, count = ndimage.label(bays)
    areas = np.bincount(regions.ravel(), minlength=count + 1)
    accepted = np.bincount(regions[costal], minlength=count + 1) > areas / 2
    accepted[0] = False
    return accepted[regions]


def fill_holes(lung: np.ndarray) -> np.ndarray:
    """Fill holes in slices of one lung, but not the dome of the diaphragm.

    From the feet upwards, a hole is filled where it is small or where most of it has lung below:
    a consolidation ends inside the lung, the dome goes on into the abdomen.

    Args:
        lung: bool, shape (slices, height, width), slice 0 nearest to the head.

    Returns:
        bool, same shape.
    """
    filled = lung.copy()
    below = np.zeros(lung.shape[1:], bool)
    for one in filled[::-1]:
        holes, count = ndimage.label(ndimage.binary_fill_holes(one) & ~one)
        areas = np.bincount(holes.ravel(), minlength=count + 1)
        covered = np.bincount(holes[below], minlength=count + 1) > areas / 2
        accepted = covered | (areas < LARGEST_HOLE_SHARE * one.size)
        accepted[0] = False
        one |= accepted[holes]
        below = one
    return filled


def _refine(coarse: np.ndarray, air: np.ndarray, factor: int) -> np.ndarray:
    """Bring a coarse mask to full size: its border follows the air of the full-size scan."""
    if factor == 1:
        return coarse
    certain = ndimage.grey_erosion(coarse, footprint=IN_SLICE, mode="nearest")
    possible = ndimage.grey_dilation(coarse, footprint=IN_SLICE, mode="nearest")
    _, height, width = air.shape
    certain, possible = (
        mask.repeat(factor, 1).repeat(factor, 2)[:, :height, :width] for mask in (certain, possible)
    )
    return np.where(air, possible, certain)


READINGS = {
    "default": lambda scan: default_lungs(scan.voxels),
    "published": lambda scan: separate_lungs(
        np.stack([published_lungs(one) for one in to_grey(scan.voxels)])
    ),
}


class MorphologySegmenter:
    """Lungs of a scan by thresholds and morphology; needs no training.

    Args:
        reading: ``"default"`` for our volume-wise routine, ``"published"`` for the slice-wise one
            of paper 001 (FACTS 4.2).

    Raises:
        ValueError: if there is no such reading.
    """

    def __init__(self, *, reading: str = "default") -> None:
        if reading not in READINGS:
            raise ValueError(f"reading is one of {sorted(READINGS)}, got {reading!r}")
        self.reading = reading

    def __call__(self, scan: Scan) -> np.ndarray:
        """Segment the lungs.

        Args:
            scan: whole scan or single slice, Hounsfield units or 8-bit.

        Returns:
            uint8, shape of the scan: 0 background, 1 right lung, 2 left lung.
        """
        return READINGS[self.reading](scan)
