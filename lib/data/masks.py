"""Lung masks: telling the patient's right lung from the left one."""

import numpy as np
from scipy import ndimage

from lib.data.scan import LEFT_LUNG, RIGHT_LUNG

IN_SLICE = np.zeros((3, 3, 3), bool)  # neighbours within a slice, none across slices
IN_SLICE[1] = ndimage.generate_binary_structure(2, 1)

SMALLEST_LUNG_SHARE = 0.15  # a piece is a lung of its own from this share of the slice's mask on
WIDEST_NECK_SHARE = 0.5  # lungs touch over at most this share of the smaller lung's own thickness
LEAST_SIDEWAYS = 0.6  # cosine: two lungs lie side by side, lobes of one lung lie front to back
EROSION_STEPS = 24  # finer steps find no other cut


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
    is and how far the patient is turned; every other piece goes to the side it lies on. Where no
    slice of the scan has a pair, the middle of the picture is that plane.

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
    areas, places, centres = _measure(pieces, count)
    point, direction = _plane_between_lungs(areas, places, centres, volume.shape[2])
    sides = np.where((centres - point) @ direction < 0, RIGHT_LUNG, LEFT_LUNG)
    for right, left in _pairs(areas, places, centres):
        sides[right], sides[left] = RIGHT_LUNG, LEFT_LUNG
    lookup = np.concatenate([[0], sides]).astype(np.uint8)
    return lookup[pieces].reshape(lungs.shape)


def _pieces(volume: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the regions of each slice 1..count, lungs that touch as two."""
    pieces, count = ndimage.label(volume, IN_SLICE)
    width = volume.shape[2]
    for number, (place, *region) in enumerate(ndimage.find_objects(pieces), start=1):
        columns = region[1]
        if not columns.start < width / 2 < columns.stop:  # far from the middle: one lung
            continue
        view = pieces[(place, *region)]
        second = _second_lung(view[0] == number)
        if second is not None:
            count += 1
            view[0][second] = count
    return pieces, count
