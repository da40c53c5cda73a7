"""Lesions of a slice one by one, as Mask R-CNN learns them (Ter-Sarkisov 2022, 2; FACTS 5.1)."""

from typing import NamedTuple

import numpy as np
import torch
from skimage.measure import label, regionprops
from torch import Tensor

from lib.data.scan import CONSOLIDATION, GROUND_GLASS_OPACITY

# Names of the classes 1, 2, ... under each mask type; 0 is what is no lesion, healthy lung included
CLASSES = {
    "both": ("ground-glass opacity", "consolidation"),
    "merged": ("lesion",),
    "ggo": ("ground-glass opacity",),
}
# Class that each value of a lesion mask becomes. Upstream numbers the values that a slice happens
# to hold instead, so that consolidation without ground glass is learnt as ground glass.
_CLASS_OF_VALUE = {
    "both": {GROUND_GLASS_OPACITY: 1, CONSOLIDATION: 2},
    "merged": {GROUND_GLASS_OPACITY: 1, CONSOLIDATION: 1},
    "ggo": {GROUND_GLASS_OPACITY: 1, CONSOLIDATION: 0},
}
REFERENCE_SIDE = 512  # pixels of the slices whose specks are counted
IGNORED_AREAS = {"paper2020": 1, "head2023": 100}  # pixels of a slice of that side


class LesionInstances(NamedTuple):
    """Lesions of one slice; ``_asdict()`` is a target of torchvision's detectors.

    Attributes:
        boxes: (x1, y1, x2, y2) in pixels, x2 and y2 exclusive, float32, shape (lesions, 4).
        labels: class, from 1 on (`CLASSES`), int64, shape (lesions,).
        masks: 0 or 1, uint8, shape (lesions, height, width).
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor


def lesion_instances(
    mask: np.ndarray, *, mask_type: str = "both", ignored_area: float = 0
) -> LesionInstances:
    """Connected components of each class, neighbours by a corner included.

    Args:
        mask: lesion mask of a slice, 0 none, 1 ground-glass opacity, 2 consolidation, shape
            (height, width).
        mask_type: ``both`` keeps the classes apart, ``merged`` makes one class of them, ``ggo``
            leaves consolidation out.
        ignored_area: components of at most so many pixels of a 512 x 512 slice are left out;
            published are `IGNORED_AREAS`. Scaled to the area of the slice, so that the same lesions
            stay in a slice of another size (upstream counts pixels of the file).

    Returns:
        The lesions by class, within a class from top to bottom; none where the mask is empty.

    Raises:
        ValueError: for a mask of another shape, with another value, or an unknown mask type.
    """
    classes = _classes(mask, mask_type)
    least = ignored_area * classes.size / REFERENCE_SIDE**2
    components = [
        (number, regions == region.label, region.bbox)
        for number in range(1, len(CLASSES[mask_type]) + 1)
        for regions in [label(classes == number, connectivity=2)]
        for region in regionprops(regions)
        if region.area > least
    ]
    boxes = [(left, top, right, bottom) for *_, (top, left, bottom, right) in components]
    masks = np.zeros((len(components), *classes.shape), np.uint8)
    for filled, (_, inside, _) in zip(masks, components, strict=True):
        filled[inside] = 1
    return LesionInstances(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor([number for number, *_ in components], dtype=torch.int64),
        torch.from_numpy(masks),
    )


def _classes(mask: np.ndarray, mask_type: str) -> np.ndarray:
    """Class of every pixel under a mask type, same shape."""
    if mask_type not in CLASSES:
        raise ValueError(f"a mask type is one of {', '.join(CLASSES)}, got {mask_type!r}")
    if mask.ndim != 2 or not mask.size:
        raise ValueError(f"a slice's mask has the shape (height, width), got {mask.shape}")
    known = _CLASS_OF_VALUE[mask_type]
    unknown = sorted(set(np.unique(mask).tolist()) - {0, *known})
    if unknown:
        raise ValueError(
            "a lesion mask holds 0 (none), 1 (ground-glass opacity) and 2 (consolidation), got "
            + ", ".join(map(str, unknown))
        )
    return sum(number * (mask == value) for value, number in known.items())
