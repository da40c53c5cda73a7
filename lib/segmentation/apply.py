"""Any segmenter on stored scans."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from lib.data.scan import LEFT_LUNG, RIGHT_LUNG, Scan
from lib.data.store import StoredVolume, open_volume, save_volume


def one_file(volume: Path) -> tuple[Path]:
    """The only file that the mask of a scan depends on, for ``map_scans``."""
    return (volume,)


def segment_scan(
    build: Callable[..., Callable[[Scan], np.ndarray]],
    volume: Path,
    path: Path,
    **settings: object,
) -> dict[str, int]:
    """Segment one stored scan and store the mask; the work of ``map_scans``.

    Args:
        build: makes the segmenter from the settings.
        volume: the stored scan.
        path: the store file to write.
        settings: of the segmenter.

    Returns:
        Slices of the scan, slices with lung, and voxels of the right and of the left lung.

    Raises:
        ValueError: if the segmenter returns no mask of the scan's shape.
    """
    stored = open_volume(volume)
    return store_mask(build(**settings)(stored.scan()), path, stored)


def store_mask(mask: np.ndarray, path: Path, stored: StoredVolume) -> dict[str, int]:
    """Write a scan's lung mask to the store.

    Args:
        mask: uint8, shape of the scan.
        path: the store file to write.
        stored: the scan.

    Returns:
        As `segment_scan`.

    Raises:
        ValueError: if the mask is of another type or shape.
    """
    if tuple(mask.shape) != tuple(stored.shape) or mask.dtype != np.uint8:
        raise ValueError(f"mask {mask.dtype} {mask.shape} for a scan of shape {stored.shape}")
    save_volume(path, mask, spacing_mm=stored.spacing_mm)
    return {
        "slices": len(mask),
        "slices_with_lung": int(mask.any(axis=(1, 2)).sum()),
        "right_voxels": int(np.count_nonzero(mask == RIGHT_LUNG)),
        "left_voxels": int(np.count_nonzero(mask == LEFT_LUNG)),
    }
