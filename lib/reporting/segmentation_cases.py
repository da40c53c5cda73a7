"""Which scans and slices the figures of lung segmentation show, by rules that are stated.

The figures themselves are drawn by `lib.reporting.segmentation_figures`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lib.data.splits import TEST
from lib.data.store import open_volume
from lib.evaluation.segmentation import overlap
from lib.reporting.segmentation_figures import SegmentedSlice, choose_cases, stored_slice


@dataclass(frozen=True)
class ScanFiles:
    """Where a scan and its lung masks lie.

    Attributes:
        scan: the stored scan.
        truth: its true lung mask; need not be there.
        masks: for each method the file of its mask.
    """

    scan: Path
    truth: Path
    masks: Mapping[str, Path]


def shown_part(manifest: pd.DataFrame) -> pd.DataFrame:
    """The scans that figures choose from: the test part, or all where there is none.

    Args:
        manifest: of a data set.
    """
    tested = manifest[manifest["split"] == TEST]
    return tested if len(tested) else manifest


def scan_files(
    data: Path, data_set: str, scan_ids: Sequence[str], methods: Sequence[str]
) -> dict[str, ScanFiles]:
    """Files of some scans of a data set.

    Args:
        data: folder of all data.
        data_set: its name.
        scan_ids: of the scans.
        methods: whose masks are wanted.
    """
    prepared, segmented = data / "prepared" / data_set, data / "segmented" / data_set
    return {
        scan_id: ScanFiles(
            prepared / f"scans/{scan_id}.b2nd",
            prepared / f"lungs/{scan_id}.b2nd",
            {method: segmented / method / f"{scan_id}.b2nd" for method in methods},
        )
        for scan_id in scan_ids
    }


def first_of_each_label(part: pd.DataFrame, files: Mapping[str, ScanFiles]) -> list[SegmentedSlice]:
    """The fullest slice of the first scan of each label.

    Args:
        part: columns scan_id and label.
        files: of these scans.
    """
    cases = []
    for label, group in part.groupby("label", dropna=False):
        scan_id = group["scan_id"].min()
        title = scan_id if pd.isna(label) else f"{scan_id} ({label})"
        cases.append(stored_slice(title, **vars(files[scan_id])))
    return cases


def best_median_worst(
    scores: pd.DataFrame, files: Mapping[str, ScanFiles], methods: Sequence[str]
) -> list[SegmentedSlice]:
    """The scans with the highest, the median and the lowest Dice of both lungs by the last method.

    Where true masks are unknown, the Dice between the first and the last method ranks them (one
    method alone agrees with itself, and the order of scan_id decides).

    Args:
        scores: of the last method, columns scan_id and dice_both.
        files: of the scans to choose from.
        methods: shown, in this order.

    Returns:
        Their fullest slices, titled with place, rule and value.
    """
    values, rule = scores.set_index("scan_id")["dice_both"].reindex(list(files)), "Dice"
    if values.isna().all():
        pairs = {name: [one.masks[methods[k]] for k in (0, -1)] for name, one in files.items()}
        loaded = {name: [open_volume(f).load() > 0 for f in pair] for name, pair in pairs.items()}
        values, rule = pd.Series({n: overlap(*pair)[0] for n, pair in loaded.items()}), "agreement"
    cases = []
    for place, scan_id in choose_cases(values).items():
        one = files[scan_id]
        masks = {method: one.masks[method] for method in methods}
        title = f"{place} {rule} {values[scan_id]:.3f}: {scan_id}"
        cases.append(stored_slice(title, one.scan, masks, one.truth))
    return cases
