"""Where a lung mask errs: what SAM2CLIP2SAM claims to do better, as numbers.

The paper (sections 1 and 4.3, figure 3) says of conventional masks that they keep the mediastinal
mass between the lungs and a bit of the pleural space around them, and fail on whole slices; it
shows three pictures. Here each of these is measured, with what a mask must not lose: the infected
lung. Everything is in-plane, slice by slice, since slices may lie centimetres apart. Masks have
the shape (slices, height, width); a value that is not defined is nan.
"""

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull

from lib.data.scan import CONSOLIDATION, GROUND_GLASS_OPACITY, LEFT_LUNG, RIGHT_LUNG

RIM_LIMIT = 10.0  # mm (pixels where the spacing is unknown); larger offsets count as this
WALL_DEPTH = 0.03  # of the width of both lungs; the ribs dent the wall less than that
FOUND_SHARE = 0.5  # a lung of a slice that is covered less has no border to measure
FOUND_DICE = 0.5  # a slice below it has failed
PIXEL_CORNERS = np.array([(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)])
LESIONS = {
    "lesions": (GROUND_GLASS_OPACITY, CONSOLIDATION),
    "ground_glass": (GROUND_GLASS_OPACITY,),
    "consolidation": (CONSOLIDATION,),
}


def between_lungs(lungs: np.ndarray) -> np.ndarray:
    """The region between the two lungs: mediastinum, and the spine where it parts them.

    A pixel lies between the lungs if, along its row, the first lung met towards the patient's right
    is the right one and the first towards the left is the left one. That is the part of the convex
    hull of both lungs that separates them: unlike the whole hull it leaves out vessels that the
    true mask spares, dents of the ribs, and the diaphragm's dome inside a ring of lung, none of
    which is mediastinum (a dome that stands open to the middle does count: nothing in a lung mask
    parts it from the heart). A slice with one lung has no such region.

    Args:
        lungs: true lung mask, any number of axes, the last one from the patient's right to left.

    Returns:
        bool, same shape.
    """
    towards_right = _nearest_lung(lungs)
    towards_left = np.flip(_nearest_lung(np.flip(lungs, -1)), -1)
    return (lungs == 0) & (towards_right == RIGHT_LUNG) & (towards_left == LEFT_LUNG)


def _nearest_lung(lungs: np.ndarray) -> np.ndarray:
    """Which lung is met first from each pixel towards column 0; 0 where there is none."""
    columns = np.arange(lungs.shape[-1])
    last = np.maximum.accumulate(np.where(lungs > 0, columns, 0), axis=-1)
    return np.take_along_axis(lungs, last, axis=-1)


def mediastinum_leakage(predicted: np.ndarray, true: np.ndarray, tissue: np.ndarray) -> float:
    """Share of a mask that is soft tissue between the lungs.

    Air between the lungs (trachea, bronchi) is no mediastinal mass and does not count.

    Args:
        predicted: lung mask, above 0 inside.
        true: true lung mask, 0 background, 1 right lung, 2 left lung.
        tissue: bool, voxels that are neither air nor lung (`lib.data.masks.tissue_threshold`).

    Returns:
        Between 0 and 1; nan where the mask is empty.
    """
    inside = predicted > 0
    leaked = np.count_nonzero(inside & tissue & between_lungs(true))
    return _share(leaked, np.count_nonzero(inside))


def outer_wall(lungs: np.ndarray) -> np.ndarray:
    """Surface of the lungs of one slice along the ribs, where the pleural space lies.

    These are the surface pixels (a neighbour in the row or column is outside, the picture's border
    counts as outside) whose centres lie within 3 % of the lungs' width from the border of the
    convex hull of both lungs, and that do not face the other lung. The heart, the hilum and the
    diaphragm's dome dent a lung far deeper than that. With one lung alone its medial side would lie
    on the hull as well, so a slice without both lungs has no wall.

    Args:
        lungs: true lung mask of one slice, shape (height, width), 0, 1 right lung, 2 left lung.

    Returns:
        bool, same shape.
    """
    wall = np.zeros(lungs.shape, bool)
    if not ((lungs == RIGHT_LUNG).any() and (lungs == LEFT_LUNG).any()):
        return wall
    between = np.pad(between_lungs(lungs), ((0, 0), (1, 1)))
    facing = between[:, :-2] | between[:, 2:]
    pixels = np.argwhere((lungs > 0) & ~ndimage.binary_erosion(lungs > 0))
    near = _depth_in_hull(pixels) <= WALL_DEPTH * np.ptp(pixels[:, 1])
    wall[tuple(pixels[near].T)] = True
    return wall & ~facing


def _depth_in_hull(pixels: np.ndarray) -> np.ndarray:
    """Distance of pixel centres, shape (n, 2), to the border of the convex hull of the pixels."""
    corners = (pixels[:, None] + PIXEL_CORNERS).reshape(-1, 2)
    sides = ConvexHull(corners).equations  # outward normal and offset of each side
    return -(pixels @ sides[:, :2].T + sides[:, 2]).max(axis=1)


def rim_error(predicted: np.ndarray, true: np.ndarray, *, pixel: float = 1.0) -> dict[str, float]:
    """How far a mask ends beyond or inside the outer wall of the lungs.

    At each pixel of the true wall (`outer_wall`) the offset is the shortest way to the border of
    the mask: positive where the mask goes on beyond the wall into pleura and ribs, negative where
    it ends inside the lung. Offsets are cut to +-10 mm (pixels where the spacing is unknown), and a
    lung of a slice of which the mask covers less than half is left out: it is a failure, counted as
    one, and would only drown what is measured here.

    Args:
        predicted: lung mask, above 0 inside.
        true: true lung mask, 0 background, 1 right lung, 2 left lung.
        pixel: side of a pixel in mm; 1 counts in pixels.

    Returns:
        ``rim_error``, the mean offset, and ``rim_distance``, the mean of its size, which errors to
        both sides do not cancel; nan where no wall could be measured.
    """
    limit = RIM_LIMIT / pixel
    offsets = [np.empty(0)]
    for ours, theirs in zip(predicted > 0, true, strict=True):
        wall = _measurable_wall(ours, theirs)
        if wall.any():
            offsets.append(np.clip(_offsets(ours, wall, margin=int(limit) + 2), -limit, limit))
    found = pixel * np.concatenate(offsets)
    if not len(found):
        return {"rim_error": np.nan, "rim_distance": np.nan}
    return {"rim_error": float(found.mean()), "rim_distance": float(np.abs(found).mean())}


def _measurable_wall(region: np.ndarray, lungs: np.ndarray) -> np.ndarray:
    """The outer wall of those lungs of a slice of which a region covers at least half."""
    wall = outer_wall(lungs)
    if not wall.any():
        return wall
    found = [
        lung for lung in (RIGHT_LUNG, LEFT_LUNG) if region[lungs == lung].mean() >= FOUND_SHARE
    ]
    return wall & np.isin(lungs, found)


def _offsets(region: np.ndarray, wall: np.ndarray, *, margin: int) -> np.ndarray:
    """Signed distance in pixels from wall pixels to the border of a region, exact to the margin.

    A wall pixel is the outermost one of the true lung. Where it is the outermost one of the region
    as well, background is one pixel away and the offset is 0.
    """
    rows, columns = ndimage.find_objects(wall.view(np.uint8))[0]
    box = tuple(slice(max(0, side.start - margin), side.stop + margin) for side in (rows, columns))
    region, wall = (np.pad(mask[box], 1) for mask in (region, wall))
    inside = ndimage.distance_transform_edt(region)[wall]
    outside = ndimage.distance_transform_edt(~region)[wall]
    return np.where(inside > 0, inside - 1, -outside)


def lesions_kept(predicted: np.ndarray, lesions: np.ndarray) -> dict[str, float]:
    """Share of the infected lung that a mask keeps: its sensitivity inside the lesions.

    Args:
        predicted: lung mask, above 0 inside.
        lesions: lesion mask, 0 none, 1 ground-glass opacity, 2 consolidation.

    Returns:
        ``lesions_kept``, ``ground_glass_kept``, ``consolidation_kept``, between 0 and 1; nan where
        there is no such lesion.
    """
    inside = predicted > 0
    shares = {}
    for name, values in LESIONS.items():
        infected = np.isin(lesions, values)
        kept = np.count_nonzero(infected & inside)
        shares[f"{name}_kept"] = _share(kept, np.count_nonzero(infected))
    return shares


def slice_failures(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Slices on which a mask fails, which the mean over a scan hides.

    Args:
        predicted: lung mask, above 0 inside.
        true: true lung mask, above 0 inside.

    Returns:
        ``slices_missed``: slices with lung on which the Dice coefficient of both lungs together is
        below 0.5, an empty mask included; ``slices_invented``: slices without lung that have a
        mask; each with its ``_share`` of the slices with and without lung, nan where there are
        none.
    """
    dice = slice_dice(predicted > 0, true > 0)
    with_lung = true.any(axis=(1, 2))
    missed = np.count_nonzero(with_lung & (dice < FOUND_DICE))
    invented = np.count_nonzero(predicted.any(axis=(1, 2)) & ~with_lung)
    return {
        "slices_missed": missed,
        "slices_missed_share": _share(missed, np.count_nonzero(with_lung)),
        "slices_invented": invented,
        "slices_invented_share": _share(invented, np.count_nonzero(~with_lung)),
    }


def neighbour_dice(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """How much the masks of neighbouring slices resemble each other, beside the true ones.

    How much they should depends on the distance of the slices, so the true lungs are the measure:
    a mask that flickers from slice to slice stays below them, one that is smeared along the body
    gets above.

    Args:
        predicted: lung mask, above 0 inside.
        true: true lung mask, above 0 inside.

    Returns:
        ``neighbour_dice``: mean Dice coefficient of neighbouring slices of the mask, over the pairs
        of which at least one is not empty; ``neighbour_dice_true``: the same of the true lungs;
        ``neighbour_dice_gap``: the first less the second. nan without such a pair, and so for a
        single slice.
    """
    ours, theirs = (_mean_neighbour_dice(mask > 0) for mask in (predicted, true))
    return {
        "neighbour_dice": ours,
        "neighbour_dice_true": theirs,
        "neighbour_dice_gap": ours - theirs,
    }


def _mean_neighbour_dice(mask: np.ndarray) -> float:
    """Mean Dice coefficient of the pairs of neighbouring slices that are not both empty."""
    pairs = slice_dice(mask[:-1], mask[1:])
    return float(np.nanmean(pairs)) if np.isfinite(pairs).any() else np.nan


def slice_dice(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Dice coefficient of two masks slice by slice.

    Args:
        first: bool, shape (slices, height, width).
        second: bool, same shape.

    Returns:
        Shape (slices,); nan where both slices are empty.
    """
    sizes = [np.count_nonzero(mask, axis=(1, 2)) for mask in (first, second)]
    common, total = np.count_nonzero(first & second, axis=(1, 2)), sum(sizes)
    return np.divide(2 * common, total, out=np.full(len(total), np.nan), where=total > 0)


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else np.nan
