"""Slices with open lungs, and the box around the body in them, by the coarse lung ratio.

Source: 3-D CNN with BERT, section 3.3 (FACTS 4.1 and 4.4). The ratio of a slice is the share of its
body box that is air inside the body. Slices of at least 0.7 of the scan's largest ratio are hits;
where they span too few slices the threshold falls by 0.1, down to 0.1. Kept is the whole range from
the first hit to the last, closed-looking slices between them included: where erosion opens a thin
chest wall, the coarse routine takes a lung for air outside the body, also in the middle of a scan.

Paper and code differ, and this is the code's reading: the paper lowers the threshold until 8 slices
remain, the code until first and last hit lie 8 slices apart (in the test part 0), with 2 hits at
least; the paper lets the threshold reach 0, the code ends at 0.1. The code made the published
lists, so it is followed; the paper's numbers are named beside ours in `params.yaml`. What happens
to a scan that no threshold suits is said by neither. It is kept here, as the published lists keep
theirs (their shortest range is one slice): with the range of the lowest threshold, or with all its
slices where no slice has any lung, and the table says so.

Deviation: slices of another size than 512 x 512 are not resized first; the routine's lengths scale
with the slice, so that boxes are in pixels of the stored slices. On 40 phantoms of 256 x 256 pixels
39 ranges were the same either way, and one differed by one slice.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.data.files import save_csv
from lib.data.scan import to_grey
from lib.data.selection import COVID, NON_COVID, UNKNOWN, Selection
from lib.data.store import StoredVolume, open_volume
from lib.segmentation.morphology import body_box_and_lung_ratio

BOX = ["xmin", "ymin", "xmax", "ymax"]


class KeptRange(NamedTuple):
    """Which slices of a scan are kept, and why.

    Attributes:
        first: first kept slice.
        last: last kept slice, itself kept.
        threshold: share of the largest ratio that gave the range; nan where no slice has any lung.
        accepted: whether that range has enough hits, far enough apart.
    """

    first: int
    last: int
    threshold: float
    accepted: bool


def measure_slices(volume: StoredVolume | np.ndarray) -> pd.DataFrame:
    """Coarse lung ratio and body box of every slice of a scan (FACTS 4.1).

    Args:
        volume: int16 HU or uint8, shape (slices, height, width); each slice is read once.

    Returns:
        One row per slice: ``slice``, ``ratio`` (0 to 1), ``xmin``, ``ymin``, ``xmax``, ``ymax`` in
        pixels, the maxima just outside the box.
    """
    rows = []
    for index in range(len(volume)):
        (y, x), ratio = body_box_and_lung_ratio(to_grey(volume[index]))
        rows.append((index, ratio, x.start, y.start, x.stop, y.stop))
    return pd.DataFrame(rows, columns=["slice", "ratio", *BOX])


def measure_stored(volume: Path, path: Path) -> dict[str, float]:
    """Measure the slices of a stored scan and write them as CSV; the work of ``map_scans``.

    Args:
        volume: the stored scan.
        path: the CSV file to write, see `measure_slices`.

    Returns:
        Number of slices and the largest ratio.
    """
    measured = measure_slices(open_volume(volume))
    save_csv(measured, path)
    return {"slices": len(measured), "largest_ratio": float(measured["ratio"].max())}


def kept_range(
    ratios: np.ndarray,
    *,
    thresholds: Sequence[float],
    fewest_hits: int,
    least_distance: int,
) -> KeptRange:
    """The range of slices with open lungs, by the adaptive threshold (section 3.3; FACTS 4.4).

    Args:
        ratios: lung ratio of each slice, shape (slices,), at least one.
        thresholds: falling shares of the largest ratio, tried in this order.
        fewest_hits: slices that must reach the threshold.
        least_distance: smallest accepted ``last - first``.

    Returns:
        The range of the first accepted threshold. Where none is, as in scans with few slices, that
        of the last one, ``accepted`` False; where every ratio is 0 all slices, ``accepted`` False
        and the threshold nan.

    Raises:
        ValueError: if there is no slice, or the thresholds are not falling from 1 at most to above
            0.
    """
    if len(ratios) == 0:
        raise ValueError("a scan without slices has no range to keep")
    if not _falling(thresholds):
        raise ValueError(f"thresholds fall from at most 1 to above 0, got {list(thresholds)}")
    largest = np.max(ratios)
    if largest == 0:
        return KeptRange(0, len(ratios) - 1, np.nan, False)
    for threshold in thresholds:
        hits = np.flatnonzero(ratios >= threshold * largest)
        first, last = int(hits[0]), int(hits[-1])
        if len(hits) >= fewest_hits and last - first >= least_distance:
            return KeptRange(first, last, threshold, True)
    return KeptRange(first, last, threshold, False)


def volume_box(boxes: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest box around the body boxes of several slices.

    Args:
        boxes: shape (slices, 4), each (xmin, ymin, xmax, ymax).

    Returns:
        (xmin, ymin, xmax, ymax).
    """
    return (*map(int, boxes[:, :2].min(0)), *map(int, boxes[:, 2:].max(0)))


def select_scans(
    manifest: pd.DataFrame,
    measured: Mapping[str, pd.DataFrame],
    *,
    positive: Collection[str],
    thresholds: Sequence[float],
    fewest_hits: int,
    least_distance: Mapping[str, int],
) -> pd.DataFrame:
    """What is kept of every scan of a data set.

    Args:
        manifest: columns scan_id, split, label (None where unknown).
        measured: of each scan, by scan_id, see `measure_slices`.
        positive: labels that count as COVID-19.
        thresholds: see `kept_range`.
        fewest_hits: see `kept_range`.
        least_distance: of each split, see `kept_range`.

    Returns:
        One row per scan in the manifest's order: ``scan_id``, ``split``, ``label`` in the words of
        `lib.data.selection`, ``slices`` of the scan, ``first``, ``last``, the four columns of the
        box, ``threshold`` and ``accepted`` of `KeptRange`.
    """
    rows = []
    for scan in manifest.itertuples():
        slices = measured[scan.scan_id]
        kept = kept_range(
            slices["ratio"].to_numpy(),
            thresholds=thresholds,
            fewest_hits=fewest_hits,
            least_distance=least_distance[scan.split],
        )
        box = volume_box(slices[BOX].to_numpy()[kept.first : kept.last + 1])
        about = {"scan_id": scan.scan_id, "split": scan.split, "slices": len(slices)}
        label = {"label": label_word(scan.label, positive)}
        rows.append(about | label | kept._asdict() | dict(zip(BOX, box, strict=True)))
    order = ["scan_id", "split", "label", "slices", "first", "last", *BOX, "threshold", "accepted"]
    return pd.DataFrame(rows, columns=order)


def label_word(label: object, positive: Collection[str]) -> str:
    """A label in the words of the published lists; ``UNKNOWN`` for a scan without one."""
    if pd.isna(label):  # an empty cell may be None or NaN
        return UNKNOWN
    return COVID if label in positive else NON_COVID


def selections(selected: pd.DataFrame) -> list[Selection]:
    """Rows of `select_scans` as they are listed."""
    return [
        Selection(
            row.scan_id, row.label, row.first, row.last, (row.xmin, row.ymin, row.xmax, row.ymax)
        )
        for row in selected.itertuples()
    ]


def _falling(thresholds: Sequence[float]) -> bool:
    steps = [1.0, *thresholds]
    return len(steps) > 1 and steps[-1] > 0 and all(np.diff(thresholds) < 0) and steps[1] <= 1
