"""Lung masks that came with a data set: the truth where it is known, or a user's own."""

from pathlib import Path

from lib.data.scan import ScanError
from lib.data.store import open_volume
from lib.segmentation.apply import store_mask


def existing_files(pair: tuple[Path, Path]) -> tuple[Path, Path]:
    """Scan and mask, for ``map_scans``.

    Args:
        pair: the stored scan and its stored mask.

    Raises:
        ScanError: if the scan came without a mask.
    """
    if not pair[1].is_file():
        raise ScanError("no lung mask came with this scan", pair[1])
    return pair


def keep_given(pair: tuple[Path, Path], path: Path) -> dict[str, int]:
    """Take the mask that came with a scan; the work of ``map_scans``.

    Args:
        pair: the stored scan and its stored mask (0, 1 right, 2 left lung).
        path: the store file to write.

    Returns:
        As `lib.segmentation.apply.segment_scan`.
    """
    volume, mask = map(open_volume, pair)
    return store_mask(mask.load(), path, volume)
