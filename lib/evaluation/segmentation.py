"""Agreement of a lung mask with the true one: overlap, surface distances, errors, failures.

Where a mask errs (mediastinum, pleura, lesions, slices) is in `lib.evaluation.lung_errors`.
Conventions of overlap and distances, for each lung and for both together:

- Surface: voxels of the mask with at least one face neighbour outside it; the border of the
  picture counts as outside.
- HD95: the larger of the two directed 95th percentiles (NumPy's linear interpolation) of the
  distances from the voxels of one surface to the nearest voxel of the other.
- ASSD: mean over the voxels of both surfaces of the distance to the nearest voxel of the other.
- Both masks empty: Dice 1, IoU 1, distances 0. One of them empty: Dice 0, IoU 0, distances nan.
- A single slice is compared in its plane, so that its surface is its outline.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.spatial import cKDTree

from lib.data.files import save_csv
from lib.data.masks import body_mask, both_lungs, tissue_threshold
from lib.data.scan import LEFT_LUNG, RIGHT_LUNG, Scan
from lib.data.store import open_volume
from lib.evaluation.lung_errors import (
    lesions_kept,
    mediastinum_leakage,
    neighbour_dice,
    rim_error,
    slice_failures,
)

HAUSDORFF_PERCENTILE = 95
MISSING_SHARE = 0.05  # a lung with less than this share of its true volume is missing
LEAK_SHARE = 0.02  # a mask with more than this share outside the body leaks


def score_masks(
    predicted: np.ndarray,
    true: np.ndarray,
    *,
    spacing_mm: tuple[float, ...] | None = None,
    scan: Scan | None = None,
    lesions: np.ndarray | None = None,
) -> dict[str, float | bool | str]:
    """Score a predicted lung mask against the true one.

    Args:
        predicted: shape (slices, height, width) or (height, width): 0 background, 1 right lung,
            2 left lung.
        true: same shape and values.
        spacing_mm: distance of neighbours along each axis of the masks. Without it distances are
            counted in pixels.
        scan: the scan that was segmented; with it leaks are found.
        lesions: lesion mask of the masks' shape, 1 ground-glass opacity, 2 consolidation; with it
            the infected lung that was kept is measured.

    Returns:
        For ``right``, ``left`` and ``both``: ``dice_<lung>``, ``iou_<lung>``, ``hd95_<lung>`` and
        ``assd_<lung>``; ``distance_unit``, ``"mm"`` or ``"pixels"``; the flags of `failure_flags`;
        what `slice_failures`, `neighbour_dice` and `rim_error` return; with a scan the flags of
        `leak_flags` and ``mediastinum_leakage``; with lesions what `lesions_kept` returns.

    Raises:
        ValueError: if the shapes differ or the spacing does not fit them.
    """
    predicted, true = np.asarray(predicted), np.asarray(true)
    if predicted.shape != true.shape:
        raise ValueError(f"masks have different shapes: {predicted.shape} and {true.shape}")
    spacing = np.ones(true.ndim) if spacing_mm is None else np.asarray(spacing_mm, float)
    if spacing.shape != (true.ndim,) or not (spacing > 0).all():
        raise ValueError(f"{true.ndim} positive spacings are needed, got {spacing_mm}")

    scores: dict[str, float | bool | str] = {}
    for lung, of in LUNGS.items():
        ours, theirs = of(predicted), of(true)
        scores[f"dice_{lung}"], scores[f"iou_{lung}"] = overlap(ours, theirs)
        distances = surface_agreement(ours, theirs, spacing)
        scores[f"hd95_{lung}"], scores[f"assd_{lung}"] = distances
    scores["distance_unit"] = "pixels" if spacing_mm is None else "mm"
    scores |= failure_flags(predicted, true)
    return scores | _error_scores(predicted, true, spacing, scan, lesions)


def _error_scores(
    predicted: np.ndarray,
    true: np.ndarray,
    spacing: np.ndarray,
    scan: Scan | None,
    lesions: np.ndarray | None,
) -> dict[str, float | bool]:
    """The leaks and the scores of `lib.evaluation.lung_errors`; masks may lack the slice axis."""
    predicted, true = (mask if mask.ndim == 3 else mask[None] for mask in (predicted, true))
    box = _box_in_plane((predicted > 0) | (true > 0))  # nothing outside it counts, and it is faster
    ours, theirs = predicted[box], true[box]
    scores = slice_failures(ours, theirs) | neighbour_dice(ours, theirs)
    pixel = float(np.sqrt(spacing[-2] * spacing[-1]))  # pixels of CT are square
    scores |= rim_error(ours, theirs, pixel=pixel)
    if scan is not None:
        if predicted.shape != scan.voxels.shape:
            raise ValueError(f"mask {predicted.shape} does not fit the scan {scan.voxels.shape}")
        tissue = scan.voxels > tissue_threshold(scan.voxels)
        scores |= leak_flags(predicted, tissue)
        scores["mediastinum_leakage"] = mediastinum_leakage(ours, theirs, tissue[box])
    if lesions is not None:
        lesions = lesions if lesions.ndim == 3 else lesions[None]
        if predicted.shape != lesions.shape:
            raise ValueError(f"mask {predicted.shape} does not fit the lesions {lesions.shape}")
        scores |= lesions_kept(predicted, lesions)
    return scores


def _box_in_plane(mask: np.ndarray) -> tuple[slice, slice, slice]:
    """All slices, and the rows and columns that hold anything of a mask."""
    found = ndimage.find_objects(mask.any(axis=0).view(np.uint8))
    return (slice(None), *(found[0] if found else (slice(0, 1), slice(0, 1))))


LUNGS = {
    "right": lambda mask: mask == RIGHT_LUNG,
    "left": lambda mask: mask == LEFT_LUNG,
    "both": both_lungs,
}


def overlap(predicted: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Dice coefficient and intersection over union of two masks.

    Args:
        predicted: bool, any shape.
        true: bool, same shape.

    Returns:
        Dice and IoU, both 1 where both masks are empty.
    """
    common = np.count_nonzero(predicted & true)
    total = np.count_nonzero(predicted) + np.count_nonzero(true)
    if total == 0:
        return 1.0, 1.0
    return float(2 * common / total), float(common / (total - common))


def surface_agreement(
    predicted: np.ndarray, true: np.ndarray, spacing: np.ndarray
) -> tuple[float, float]:
    """95 % Hausdorff distance and average symmetric surface distance of two masks.

    Args:
        predicted: bool, two or three axes; a first axis of length 1 is left out.
        true: bool, same shape.
        spacing: distance of neighbours along each axis.

    Returns:
        HD95 and ASSD in the unit of the spacing; 0 where both are empty, nan where one is.
    """
    if not predicted.any() or not true.any():
        value = np.nan if predicted.any() or true.any() else 0.0
        return value, value
    if predicted.ndim == 3 and len(predicted) == 1:
        predicted, true, spacing = predicted[0], true[0], spacing[1:]
    box = ndimage.find_objects((predicted | true).view(np.uint8))[0]
    ours, theirs = _surface(predicted[box]), _surface(true[box])
    ways = _distances(ours, theirs, spacing), _distances(theirs, ours, spacing)
    hd95 = max(np.percentile(way, HAUSDORFF_PERCENTILE) for way in ways)
    return float(hd95), float(np.concatenate(ways).mean())


def _surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of a mask with a face neighbour outside it, bool, same shape."""
    return mask & ~ndimage.binary_erosion(mask)


def _distances(of: np.ndarray, to: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distance from each voxel of one surface to the nearest voxel of another, shape (n,)."""
    # Asked of a tree of the surface, not of a distance transform of the volume: 3 to 5 times faster
    # for lungs, with the same result. Most voxels lie on both surfaces and need not ask.
    distances, apart = np.zeros(np.count_nonzero(of)), ~to[of]
    tree = cKDTree(np.argwhere(to) * spacing, balanced_tree=False, compact_nodes=False)
    distances[apart] = tree.query(np.argwhere(of & ~to) * spacing)[0]
    return distances


def failure_flags(predicted: np.ndarray, true: np.ndarray) -> dict[str, bool]:
    """Gross failures that a mean Dice hides.

    Args:
        predicted: lung mask, 0 background, 1 right lung, 2 left lung.
        true: same shape and values.

    Returns:
        ``empty``: nothing predicted where the truth has lung. ``lung_missing``: not empty, but of
        a lung in the truth less than 5 % of its volume is predicted.
    """
    empty = bool(true.any() and not predicted.any())
    shares = [
        np.count_nonzero(predicted == lung) / np.count_nonzero(true == lung)
        for lung in (RIGHT_LUNG, LEFT_LUNG)
        if (true == lung).any()
    ]
    missing = bool(not empty and any(share < MISSING_SHARE for share in shares))
    return {"empty": empty, "lung_missing": missing}


def leak_flags(predicted: np.ndarray, tissue: np.ndarray) -> dict[str, float | bool]:
    """Whether a mask leaks out of the patient.

    Args:
        predicted: lung mask, shape (slices, height, width).
        tissue: bool, same shape, voxels of the scan that are not air or lung.

    Returns:
        ``outside_body_share``: share of the mask outside `lib.data.masks.body_mask`, 0 where the
        mask is empty. ``leak``: whether that is more than 2 %.
    """
    lungs = both_lungs(predicted)
    outside = np.count_nonzero(lungs & ~body_mask(tissue))
    share = float(outside / max(1, np.count_nonzero(lungs)))
    return {"outside_body_share": share, "leak": share > LEAK_SHARE}


def score_stored(files: tuple[Path, ...], path: Path) -> dict:
    """Score a stored mask and write its scores as a table of one row; the work of ``map_scans``.

    Args:
        files: predicted mask, true mask and scan, and the lesion mask where there is one; all
            stored.
        path: the CSV file to write.

    Returns:
        An empty record: scores may be nan, which a record cannot hold.
    """
    predicted, true, volume, *lesions = (open_volume(file) for file in files)
    scores = score_masks(
        predicted.load(),
        true.load(),
        spacing_mm=volume.spacing_mm,
        scan=volume.scan(),
        lesions=lesions[0].load() if lesions else None,
    )
    save_csv(pd.DataFrame([scores]), path)
    return {}


def read_scores(paths: Iterable[Path], manifest: pd.DataFrame) -> pd.DataFrame:
    """Scores of many scans beside what the tables group them by.

    Args:
        paths: files of `score_stored`, each named after its scan.
        manifest: columns scan_id, patient_id, split, label.

    Returns:
        One row per file; no score columns where there is no file.
    """
    rows = [pd.read_csv(path).assign(scan_id=path.stem) for path in paths]
    scores = pd.concat(rows) if rows else pd.DataFrame({"scan_id": pd.Series(dtype=str)})
    known = manifest[["scan_id", "patient_id", "split", "label"]]
    return known.merge(scores, on="scan_id", validate="one_to_one")
