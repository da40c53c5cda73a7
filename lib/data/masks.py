"""Masks of the lungs and the body: which lung is which, and where the patient is."""

import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.segmentation import watershed

from lib.data.scan import LEFT_LUNG, RIGHT_LUNG

IN_SLICE = np.zeros((3, 3, 3), bool)  # neighbours within a slice, none across slices
IN_SLICE[1] = ndimage.generate_binary_structure(2, 1)

SMALLEST_LUNG_SHARE = 0.15  # the smaller of two lungs has at least this share of both
WIDEST_NECK_SHARE = 0.5  # two lungs touch over at most this share of the smaller one's thickness
EROSION_STEPS = 12  # depths at which a region is tried for falling in two
LEAST_SIDEWAYS = 0.6  # cosine: two lungs lie side by side, lobes of one lung rather front to back
STRADDLING_SHARE = 0.25  # a piece with this share beyond the plane holds both lungs

TISSUE_THRESHOLD = -320  # HU, half way between lung and soft tissue; ground glass counts as lung
BODY_OPENING = 1 / 128  # of the picture's longer side; parts the table and clothes from the body

ENCLOSING_SIDES = 3  # of four; a lung may be cut off on one


def both_lungs(mask: np.ndarray) -> np.ndarray:
    """Both lungs as one region, the inverse of `separate_lungs`.

    Args:
        mask: lung mask of any shape, 0 background, 1 right lung, 2 left lung.

    Returns:
        Same shape, bool.
    """
    return mask > 0


def separate_lungs(lungs: np.ndarray) -> np.ndarray:
    """Tell the patient's right lung from the left one in a mask with one value for both.

    Each slice is taken apart into pieces, cutting a piece in two where it is two lungs that touch
    (the anterior junction). Slices with a clear pair of lungs say where the plane between the lungs
    is and how far the patient is turned; every piece goes to the side of that plane it lies on.
    Where no slice has a pair, the plane is the middle of the picture.

    Args:
        lungs: bool, shape (slices, height, width) or (height, width), in the convention of
            `lib.data.scan` (column 0 is the patient's right).

    Returns:
        Same shape, uint8: 0 background, 1 right lung, 2 left lung.

    Raises:
        ValueError: if the mask has neither two nor three axes.
    """
    lungs = np.asarray(lungs, bool)
    if lungs.ndim not in (2, 3):
        raise ValueError(f"a lung mask has two or three axes, got {lungs.ndim}")
    volume = lungs[None] if lungs.ndim == 2 else lungs
    pieces, count = _pieces(volume)
    if count == 0:
        return np.zeros(lungs.shape, np.uint8)
    areas = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
    centres = _centres(pieces, areas)
    pairs = _pairs(areas, centres)
    plane = _plane_between(pairs, areas, centres[:, 1:], width=volume.shape[2])
    sides = np.where(_beyond(centres[:, 1:], plane), LEFT_LUNG, RIGHT_LUNG)
    separated = np.concatenate([[0], sides]).astype(np.uint8)[pieces]
    _cut_straddling(separated, pieces, areas, plane)
    return separated.reshape(lungs.shape)


def _centres(pieces: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Centres (slice, row, column) of the pieces 1..count, shape (count, 3)."""
    places = np.nonzero(pieces)
    numbers = pieces[places]
    sums = [np.bincount(numbers, weights=axis, minlength=len(areas) + 1)[1:] for axis in places]
    return np.transpose(sums) / areas[:, None]


def _pieces(volume: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the regions of each slice 1..count, two lungs that touch as two regions."""
    pieces, count = ndimage.label(volume, IN_SLICE)
    for number, region in enumerate(ndimage.find_objects(pieces), start=1):
        if not _wide(region):
            continue
        view = pieces[region][0]
        second = _second_lung(view == number)
        if second is not None:
            count += 1
            view[second] = count
    return pieces, count


def _wide(region: tuple[slice, slice, slice]) -> bool:
    """Whether a region is at least as wide as high; a lung alone mostly is higher."""
    _, rows, columns = region
    return columns.stop - columns.start >= rows.stop - rows.start


def _second_lung(region: np.ndarray) -> np.ndarray | None:
    """The part of a 2-D region beyond its neck, or None where it is not two lungs that touch."""
    depth = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    for level in np.linspace(0, WIDEST_NECK_SHARE * depth.max(), EROSION_STEPS):
        cores, count = ndimage.label(depth > level)
        areas = np.bincount(cores.ravel(), minlength=3)
        areas[0] = 0
        first, second = np.argsort(areas)[-2:]
        if count < 2 or areas[first] < SMALLEST_LUNG_SHARE * areas.sum():
            continue
        if level > WIDEST_NECK_SHARE * depth[cores == first].max():
            return None
        if not _side_by_side(*ndimage.center_of_mass(region, cores, (first, second))):
            continue
        markers = (cores == first) + 2 * (cores == second)
        return watershed(-depth, markers, mask=region) == 1
    return None


def _side_by_side(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two (row, column) centres lie beside each other rather than front to back."""
    step = np.subtract(other, one)
    return abs(step[1]) > LEAST_SIDEWAYS * np.hypot(*step)


def _pairs(areas: np.ndarray, centres: np.ndarray) -> list[tuple[int, int]]:
    """Index pairs (right, left) of pieces that are clearly the two lungs of one slice."""
    pairs = []
    for place in np.unique(centres[:, 0]):
        here = np.flatnonzero(centres[:, 0] == place)
        here = here[np.argsort(areas[here], kind="stable")][-2:]
        if len(here) < 2 or areas[here[0]] < SMALLEST_LUNG_SHARE * areas[here].sum():
            continue
        if _side_by_side(*centres[here, 1:]):
            pairs.append(tuple(here[np.argsort(centres[here, 2])]))
    return pairs


def _plane_between(
    pairs: list[tuple[int, int]], areas: np.ndarray, centres: np.ndarray, *, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """A (row, column) point between the lungs and the direction from the right to the left one."""
    if not pairs:
        return np.array([0.0, (width - 1) / 2]), np.array([0.0, 1.0])
    right, left = np.transpose(pairs)
    weights = np.minimum(areas[right], areas[left])
    point = np.average((centres[right] + centres[left]) / 2, axis=0, weights=weights)
    direction = np.average(centres[left] - centres[right], axis=0, weights=weights)
    return point, direction


def _beyond(points: np.ndarray, plane: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Whether (row, column) points, shape (n, 2), lie on the left lung's side of the plane."""
    point, direction = plane
    return (points - point) @ direction > 0


def _cut_straddling(
    separated: np.ndarray,
    pieces: np.ndarray,
    areas: np.ndarray,
    plane: tuple[np.ndarray, np.ndarray],
) -> None:
    """Cut along the plane, in place, the pieces that lie on both sides of it without a neck."""
    grid = np.moveaxis(np.indices(pieces.shape[1:]), 0, -1)
    beyond = np.broadcast_to(_beyond(grid, plane), pieces.shape)
    shares = np.bincount(pieces[beyond], minlength=len(areas) + 1)[1:] / areas
    wide = np.array([_wide(region) for region in ndimage.find_objects(pieces)])
    straddling = wide & (shares > STRADDLING_SHARE) & (shares < 1 - STRADDLING_SHARE)
    where = np.concatenate([[False], straddling])[pieces]
    separated[where] = np.where(beyond[where], LEFT_LUNG, RIGHT_LUNG)


def tissue_threshold(voxels: np.ndarray) -> float:
    """Value that parts air and lung from tissue.

    Args:
        voxels: int16 HU, for which it is a constant, or uint8 grey, for which it is Otsu's
            threshold over the whole scan (black too: in a soft-tissue window the lungs are black).

    Returns:
        Threshold in the units of the voxels; tissue is above it.
    """
    if voxels.dtype == np.int16:
        return TISSUE_THRESHOLD
    return float(threshold_otsu(voxels))


def body_mask(tissue: np.ndarray) -> np.ndarray:
    """The patient's body with everything in it, lungs cut off by the picture's border included.

    The body's tissue is the largest region of each slice once thin things (table, clothes) are
    opened away. A pixel is in the body where that tissue lies on at least three of its four sides.

    Args:
        tissue: bool, shape (slices, height, width), voxels that are not air or lung.

    Returns:
        bool, same shape.
    """
    steps = max(1, round(BODY_OPENING * max(tissue.shape[1:])))
    opened = ndimage.binary_opening(tissue, IN_SLICE, iterations=steps)
    body = np.stack([largest_regions(one, 1) for one in opened])
    sides = np.zeros(body.shape, np.uint8)
    for axis in (1, 2):
        sides += np.logical_or.accumulate(body, axis)
        sides += np.flip(np.logical_or.accumulate(np.flip(body, axis), axis), axis)
    return sides >= ENCLOSING_SIDES


def largest_regions(foreground: np.ndarray, count: int) -> np.ndarray:
    """The largest regions of a 2-D mask, diagonal neighbours joined.

    Args:
        foreground: bool, shape (height, width).
        count: how many to keep; fewer where there are fewer.

    Returns:
        bool, same shape.
    """
    regions = ndimage.label(foreground, np.ones((3, 3)))[0]
    areas = np.bincount(regions.ravel())
    areas[0] = 0
    chosen = np.argsort(areas, kind="stable")[-count:]
    return np.isin(regions, chosen[areas[chosen] > 0])
