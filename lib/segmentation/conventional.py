"""What the conventional way does to a network's lung masks: refinement, and the 40 % rule.

Refinement is paper 001's (FACTS 4.3); the rule, with the morphological routine it falls back on, is
paper 000's (FACTS 3 and 3.2). Both work on whole scans and say on how many slices they acted.
"""

from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage.filters import roberts
from skimage.morphology import isotropic_closing

from lib.data.masks import both_lungs, largest_regions, separate_lungs
from lib.data.scan import Scan, to_grey
from lib.data.store import open_volume, save_volume
from lib.segmentation.morphology import LUNG_CLOSING, LUNG_REGIONS, published_lungs, scaled


def refine_slice(lungs: np.ndarray) -> np.ndarray:
    """Close gaps, keep the two largest regions, fill holes (FACTS 4.3).

    The published way to fill is to fill the outlines that Roberts' operator finds, which also
    widens the lungs by up to a pixel. Deviations: the outline of a lung that the picture cuts off
    is closed along the picture's border, else nothing but the open outline would remain of it; and
    the errors of the JPEG files in which the published masks are stored are not imitated.

    Args:
        lungs: bool, shape (height, width), both lungs; the radius of the closing scales with it.

    Returns:
        bool, same shape.
    """
    radius = scaled(LUNG_CLOSING, lungs)
    regions = largest_regions(isotropic_closing(lungs, radius), LUNG_REGIONS)
    return ndimage.binary_fill_holes(roberts(np.pad(regions, 1)) > 0)[1:-1, 1:-1]


def refine(mask: np.ndarray) -> np.ndarray:
    """Refine every slice of a scan.

    Args:
        mask: uint8, shape (slices, height, width): 0 background, 1 right lung, 2 left lung.

    Returns:
        Same shape and values; right and left are told apart anew, since closing may join them.
    """
    return separate_lungs(np.stack([refine_slice(one) for one in both_lungs(mask)]))


def small_slices(mask: np.ndarray, share: float) -> np.ndarray:
    """Slices whose lungs are small beside the largest of the scan (paper 000, section 4.3).

    Args:
        mask: shape (slices, height, width), above 0 inside the lungs.
        share: of the largest area; below it a slice is small.

    Returns:
        bool, shape (slices,); all True where no slice has any lung.

    Raises:
        ValueError: if the share is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of the largest area lies between 0 and 1, got {share}")
    areas = np.count_nonzero(mask, axis=(1, 2))
    return (areas < share * areas.max()) | (areas.max() == 0)


def replace_small_slices(mask: np.ndarray, scan: Scan, *, share: float) -> np.ndarray:
    """Segment slices with small lungs again, by morphology: the 40 % rule (paper 000; FACTS 3.2).

    Areas are compared once, before anything is replaced, and the morphological mask replaces the
    network's even where it is smaller: that is what the paper states. Mind what this does at both
    ends of a scan. Near the apices and the diaphragm even a perfect mask is below 40 % of the
    largest, so the rule always acts there, on slices that the network may have got right, and the
    routine takes whatever two air regions are largest: trachea, stomach and bowel become lung in
    slices that hold none. The rule mends slices in the middle that a network failed on.

    Args:
        mask: uint8, shape (slices, height, width): 0 background, 1 right lung, 2 left lung.
        scan: the scan that was segmented.
        share: 0.4 in the paper.

    Returns:
        Same shape and values; slices that are not small are as they were.

    Raises:
        ValueError: if mask and scan differ in shape or the share is not between 0 and 1.
    """
    if mask.shape != scan.voxels.shape:
        raise ValueError(f"mask {mask.shape} does not fit the scan {scan.voxels.shape}")
    small = small_slices(mask, share)
    lungs = both_lungs(mask)
    for place in np.flatnonzero(small):
        lungs[place] = published_lungs(to_grey(scan.voxels[place]))
    return np.where(small[:, None, None], separate_lungs(lungs), mask)


def refine_stored(mask_file: Path, path: Path) -> dict[str, int]:
    """Refine a stored mask and store the result; the work of ``map_scans``.

    Args:
        mask_file: the stored mask.
        path: the store file to write.

    Returns:
        The counts of `changes`.
    """
    stored = open_volume(mask_file)
    before = stored.load()
    after = refine(before)
    save_volume(path, after, spacing_mm=stored.spacing_mm)
    return changes(before, after)


def conventional_stored(files: tuple[Path, Path], path: Path, *, share: float) -> dict[str, int]:
    """Apply the 40 % rule to a stored mask and store the result; the work of ``map_scans``.

    Args:
        files: scan and network's mask, both stored.
        path: the store file to write.
        share: see `small_slices`.

    Returns:
        ``slices_small`` (segmented again), ``slices_were_empty`` (of those, where the network saw
        no lung), ``slices_got_lung`` (of those, where the routine sees some), and `changes`.
    """
    volume, stored = map(open_volume, files)
    before = stored.load()
    after = replace_small_slices(before, volume.scan(), share=share)
    save_volume(path, after, spacing_mm=volume.spacing_mm)
    small = small_slices(before, share)
    empty = small & ~before.any((1, 2))
    return {
        "slices_small": int(small.sum()),
        "slices_were_empty": int(empty.sum()),
        "slices_got_lung": int((empty & after.any((1, 2))).sum()),
    } | changes(before, after)


def changes(before: np.ndarray, after: np.ndarray) -> dict[str, int]:
    """How much two lung masks of a scan differ, right and left not told apart.

    Args:
        before: shape (slices, height, width), above 0 inside the lungs.
        after: same shape.

    Returns:
        ``slices``, ``slices_changed``, ``voxels_added`` and ``voxels_removed``.
    """
    before, after = both_lungs(before), both_lungs(after)
    return {
        "slices": len(before),
        "slices_changed": int((before != after).any((1, 2)).sum()),
        "voxels_added": int(np.count_nonzero(after & ~before)),
        "voxels_removed": int(np.count_nonzero(before & ~after)),
    }
