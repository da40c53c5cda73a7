"""Integrity: what is checked about every scan before anything is trained on it.

``inspect_scan`` looks at one scan and runs inside the preparation of that scan; the functions below
it look across scans and data sets. A finding either puts a scan into quarantine or is a remark.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lib.data.scan import Scan, ScanError
from lib.data.splits import patients_in_several_splits

AIR_BELOW = -700  # HU; a chest scan holds air (around the patient or in the lungs) ...
SOFT_TISSUE = (-200, 300)  # HU; ... and fat, muscle or blood
SMALLEST_SHARE = 0.01  # of the voxels that must be air, and that must be soft tissue
HIGHEST_PLAUSIBLE = 16_000  # HU; metal saturates below this even on extended scales
SMALLEST_SIDE = 32  # pixels; a smaller slice shows no anatomy
SAME_SCAN_SHARE = 0.5  # of the slices of the shorter scan found in the other one


@dataclass(frozen=True)
class Finding:
    """One thing noticed about one scan.

    Attributes:
        data_set: name of the data set.
        scan_id: the scan, or an empty string where the finding is about the data set.
        reason: a few words from a fixed list, for counting.
        detail: one sentence.
        quarantined: whether the scan is left out.
    """

    data_set: str
    scan_id: str
    reason: str
    detail: str = ""
    quarantined: bool = False


def inspect_scan(scan: Scan, file: Path) -> dict:
    """Check one scan that could be read.

    Args:
        scan: the scan.
        file: where it came from, for the message.

    Returns:
        What the manifest and the search for duplicates need: slices, height, width, spacing_mm,
        flags, the darkest and brightest intensity, and one short hash per slice (empty for slices
        of a single intensity, which are alike in all scans).

    Raises:
        ScanError: ``"slice too small"``, ``"constant intensity"`` or
            ``"implausible Hounsfield units"``.
    """
    slices, height, width = scan.voxels.shape
    if min(height, width) < SMALLEST_SIDE:
        raise ScanError("slice too small", file, f"{height}x{width} pixels")
    lowest, highest = int(scan.voxels.min()), int(scan.voxels.max())
    if lowest == highest:
        raise ScanError("constant intensity", file, f"every voxel is {lowest}")
    if scan.is_hounsfield:
        _require_plausible_hounsfield(scan.voxels, highest, file)
    hashes = [slice_hash(image) for image in scan.voxels]
    return {
        "slices": slices,
        "height": height,
        "width": width,
        "spacing_mm": list(scan.spacing_mm) if scan.spacing_mm else None,
        "intensity": "Hounsfield units" if scan.is_hounsfield else "8-bit picture",
        "lowest": lowest,
        "highest": highest,
        "flags": [*scan.flags, *_slice_flags(hashes)],
        "slice_hashes": hashes,
    }


def _require_plausible_hounsfield(voxels: np.ndarray, highest: int, file: Path) -> None:
    """Air and soft tissue must both be there; every fourth slice is enough to tell."""
    sample = voxels[::4]
    air = np.count_nonzero(sample < AIR_BELOW) / sample.size
    tissue = np.count_nonzero((sample >= SOFT_TISSUE[0]) & (sample <= SOFT_TISSUE[1])) / sample.size
    if air < SMALLEST_SHARE or tissue < SMALLEST_SHARE or highest > HIGHEST_PLAUSIBLE:
        detail = f"{air:.1%} air, {tissue:.1%} soft tissue, brightest {highest} HU"
        raise ScanError("implausible Hounsfield units", file, detail)


def slice_hash(image: np.ndarray) -> str:
    """16 hexadecimal digits that identify a slice by size and pixels; empty for a blank slice."""
    if image.min() == image.max():
        return ""
    digest = hashlib.sha256(f"{image.shape}{image.dtype}".encode())
    digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()[:16]


def _slice_flags(hashes: list[str]) -> list[str]:
    """Remarks on blank and repeated slices of one scan."""
    blank = hashes.count("")
    repeated = len(hashes) - blank - len(set(hashes) - {""})
    flags = [f"{blank} blank slices"] if blank else []
    return flags + ([f"{repeated} repeated slices"] if repeated else [])


def find_same_scans(
    slice_hashes: Mapping[tuple[str, str], Iterable[str]],
) -> list[tuple[tuple[str, str], tuple[str, str], float]]:
    """Pairs of scans that share pixels, within a data set or across data sets.

    Args:
        slice_hashes: per (data set, scan_id), the hashes of ``inspect_scan``.

    Returns:
        (first, second, share), sorted, where ``share`` is the part of the shorter scan's slices
        that the other one holds too, at least ``SAME_SCAN_SHARE``.
    """
    sets = {scan: set(hashes) - {""} for scan, hashes in sorted(slice_hashes.items())}
    holders: dict[str, list] = defaultdict(list)
    for scan, hashes in sets.items():
        for value in hashes:
            holders[value].append(scan)
    shared: dict[tuple, int] = defaultdict(int)
    for scans in holders.values():
        for i, first in enumerate(scans):
            for second in scans[i + 1 :]:
                shared[first, second] += 1
    shares = (
        (first, second, count / min(len(sets[first]), len(sets[second])))
        for (first, second), count in sorted(shared.items())
    )
    return [pair for pair in shares if pair[2] >= SAME_SCAN_SHARE]


def stored_slice_hashes(scans: Path, data_set: str) -> dict[tuple[str, str], list[str]]:
    """Slice hashes of the scans of a prepared data set, by data set and scan_id.

    Args:
        scans: folder of its stored scans, with the records that ``map_scans`` left beside them.
        data_set: its name.
    """
    records = {path.stem: json.loads(path.read_text()) for path in sorted(scans.glob("*.json"))}
    return {(data_set, name): r["record"]["slice_hashes"] for name, r in records.items()}


def duplicate_findings(
    slice_hashes: Mapping[tuple[str, str], Iterable[str]],
) -> list[Finding]:
    """``find_same_scans`` as findings.

    Within one data set the scan that comes second in name order goes into quarantine: the same
    pixels under two names would count twice, or sit in two splits. A scan that is left out already
    puts out no other, so that of several alike the first stays and each of the rest is named once.
    Across data sets both stay, with a remark each, since each data set is evaluated by itself.
    """
    findings, left_out = [], set()
    for first, second, share in find_same_scans(slice_hashes):
        same_set = first[0] == second[0]
        if same_set and not left_out.isdisjoint((first, second)):
            continue
        if same_set:
            left_out.add(second)
        reason = "same pixels under two names" if same_set else "same scan in two data sets"
        text = f"{share:.0%} of its slices are those of"
        findings.append(Finding(*second, reason, f"{text} {'/'.join(first)}", same_set))
        if not same_set:
            findings.append(Finding(*first, reason, f"{text} {'/'.join(second)}"))
    return findings


def manifest_findings(data_set: str, manifest: pd.DataFrame) -> list[Finding]:
    """Remarks on a manifest: patients in several splits, scans without a label, flags.

    Args:
        data_set: its name.
        manifest: the columns of ``manifest.csv``.
    """
    torn = set(patients_in_several_splits(manifest))
    findings = []
    for row in manifest.itertuples():
        if row.patient_id in torn:
            detail = f"patient {row.patient_id} has scans in several parts of the published split"
            findings.append(Finding(data_set, row.scan_id, "patient in two splits", detail))
        if not isinstance(row.label, str) or not row.label:
            findings.append(Finding(data_set, row.scan_id, "no label"))
        if isinstance(row.flags, str) and row.flags:
            findings.append(Finding(data_set, row.scan_id, "mended while reading", row.flags))
    return findings


def findings_table(findings: Iterable[Finding]) -> pd.DataFrame:
    """Findings as a table, one row each, in a fixed order."""
    columns = list(Finding.__dataclass_fields__)
    table = pd.DataFrame([asdict(finding) for finding in findings], columns=columns)
    return table.sort_values(["data_set", "scan_id", "reason", "detail"], ignore_index=True)


def stop_if_too_many(quarantined: int, total: int, *, largest_share: float, data_set: str) -> None:
    """Stop the run where more scans are bad than the study can do without.

    Raises:
        RuntimeError: one sentence, if the share of quarantined scans is above ``largest_share``.
    """
    if total and quarantined / total > largest_share:
        raise RuntimeError(
            f"{quarantined} of {total} scans of {data_set} are unusable, more than the "
            f"{largest_share:.0%} that params.yaml allows (prepare.largest_quarantined_share); "
            f"quarantine.csv names each with its reason."
        )
