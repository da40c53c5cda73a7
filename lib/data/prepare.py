"""Preparation: from a raw data set to the store, the manifest and the quarantine list."""

from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lib.data.datasets import DataSet, Listing, ScanSource
from lib.data.integrity import Finding, findings_table, inspect_scan, manifest_findings
from lib.data.masks import separate_lungs
from lib.data.readers import (
    describe_source,
    read_label_volume,
    read_scan,
    source_files,
    source_sha256,
)
from lib.data.scan import Scan, ScanError
from lib.data.scan_map import ScanResult
from lib.data.splits import assign_splits
from lib.data.store import open_volume, save_volume

MANIFEST_COLUMNS = [
    "scan_id",
    "patient_id",
    "split",
    "label",
    "slices",
    "height",
    "width",
    "spacing_mm",
    "source_sha256",
    "flags",
]
QUARANTINE_COLUMNS = ["scan_id", "left_out", "reason", "file", "detail"]
MASKS = ("lungs", "lesions")


def scan_inputs(source: ScanSource, *, root: Path) -> Sequence[Path]:
    """Files that a prepared scan depends on, for ``map_scans``; none outside the root is opened.

    Raises:
        ScanError: if one is missing (a link that leads nowhere) or lies outside the root.
    """
    files = source_files(_source(source.files), root=root)
    for file in files:
        if not file.exists():
            raise ScanError("no such file", file)
    return files


def prepare_scan(
    source: ScanSource,
    path: Path,
    *,
    root: Path,
    transposed: bool = False,
    skip_unreadable: bool = False,
) -> dict:
    """Read, check and store one scan; the work of ``map_scans``.

    Args:
        source: where the scan lies.
        path: the store file to write.
        root: folder that no file may lie outside of.
        transposed: whether rows and columns of the source are swapped.
        skip_unreadable: leave out damaged slices, with a flag, instead of refusing the scan.

    Returns:
        The record of ``inspect_scan`` with source_sha256.

    Raises:
        ScanError: for a scan that cannot be used.
    """
    files = _source(source.files)
    scan = read_scan(files, root=root, skip_unreadable=skip_unreadable)
    if transposed:
        scan = _transposed(scan)
    record = inspect_scan(scan, source.files[0])
    save_volume(path, scan.voxels, spacing_mm=scan.spacing_mm)
    return record | {"source_sha256": source_sha256(files, root=root)}


def _transposed(scan: Scan) -> Scan:
    """The scan with rows and columns of every slice swapped, and their spacing with them."""
    spacing = scan.spacing_mm and tuple(scan.spacing_mm[axis] for axis in (0, 2, 1))
    return Scan(np.swapaxes(scan.voxels, 1, 2), spacing, scan.flags)


def with_mask(
    sources: Mapping[str, ScanSource], stored: Container[str], kind: str
) -> dict[str, ScanSource]:
    """The stored scans that come with a true mask of a kind (``"lungs"`` or ``"lesions"``)."""
    return {
        name: source
        for name, source in sources.items()
        if name in stored and _mask_files(source, kind)
    }


def mask_inputs(source: ScanSource, *, kind: str, scans: Path, root: Path) -> Sequence[Path]:
    """Files that a prepared mask depends on: its own (none outside the root), the stored scan."""
    own = source_files(_source(_mask_files(source, kind)), root=root)
    return (*own, scans / f"{source.scan_id}.b2nd")


def prepare_mask(
    source: ScanSource, path: Path, *, kind: str, data_set: DataSet, scans: Path, root: Path
) -> dict:
    """Read and store the true mask of a prepared scan; the work of ``map_scans``.

    Args:
        source: where the mask lies.
        path: the store file to write.
        kind: ``"lungs"`` or ``"lesions"``.
        data_set: says what the values of the source mask mean.
        scans: folder of the prepared scans.
        root: folder that no file may lie outside of.

    Returns:
        Number of voxels of each value of the study's mask.

    Raises:
        ScanError: if the mask cannot be read or does not fit its scan.
    """
    files = _mask_files(source, kind)
    labels = read_label_volume(_source(files), root=root)
    if data_set.transposed:
        labels = np.swapaxes(labels, 1, 2)
    scan = open_volume(scans / f"{source.scan_id}.b2nd")
    if labels.shape != scan.shape:
        raise ScanError("mask does not fit the scan", files[0], f"{labels.shape}, {scan.shape}")
    mask = lung_mask(labels, data_set) if kind == "lungs" else lesion_mask(labels, data_set)
    save_volume(path, mask, spacing_mm=scan.spacing_mm)
    values, counts = np.unique(mask, return_counts=True)
    return {"voxels": dict(zip(map(str, values.tolist()), counts.tolist(), strict=True))}


def lung_mask(labels: np.ndarray, data_set: DataSet) -> np.ndarray:
    """The study's lung mask (0, 1 right, 2 left) of a data set's own labels, shape kept."""
    if data_set.lung_sides_known:
        return np.where(np.isin(labels, data_set.lung_values), labels, 0).astype(np.uint8)
    return separate_lungs(np.isin(labels, data_set.lung_values))


def lesion_mask(labels: np.ndarray, data_set: DataSet) -> np.ndarray:
    """The study's lesion mask (1 ground-glass opacity, 2 consolidation), shape kept."""
    meaning = np.zeros(256, np.uint8)
    for value, lesion in data_set.lesion_values.items():
        meaning[value] = lesion
    return meaning[labels]


def _mask_files(source: ScanSource, kind: str) -> tuple[Path, ...]:
    """Files of the lung or of the lesion mask; empty where there is none."""
    return (source.lung_mask if kind == "lungs" else source.lesion_mask) or ()


def _source(files: tuple[Path, ...]) -> Path | tuple[Path, ...]:
    """One file or folder by itself, several files as they are."""
    return files[0] if len(files) == 1 else files


def slice_hashes(results: Iterable[ScanResult], data_set: str) -> dict[tuple[str, str], list[str]]:
    """Hashes of all slices of the scans that could be read, by data set and scan_id."""
    return {(data_set, r.scan_id): r.record["slice_hashes"] for r in results if r.record}


def quarantine_table(
    failed: Mapping[str, Iterable[ScanResult]],
    duplicates: Iterable[Finding],
    sources: Mapping[str, ScanSource],
    root: Path,
) -> pd.DataFrame:
    """What was left out and why.

    Args:
        failed: results of ``map_scans`` by what they are (``"scan"``, ``"lungs"``, ``"lesions"``);
            those with an error are listed. A scan whose mask fails stays, without that mask.
        duplicates: of ``duplicate_findings``; the quarantined ones are listed.
        sources: by scan_id.
        root: folder of the raw data set; files are named relative to it, and never by a name that
            may identify a patient.

    Returns:
        ``QUARANTINE_COLUMNS``, in a fixed order.
    """
    rows = [
        {
            "scan_id": result.scan_id,
            "left_out": part,
            "reason": result.error.reason,
            "file": describe_source(result.error.file or _first_file(result, sources), root),
            "detail": result.error.detail,
        }
        for part, results in failed.items()
        for result in results
        if result.error
    ]
    rows += [
        {
            "scan_id": finding.scan_id,
            "left_out": "scan",
            "reason": finding.reason,
            "file": describe_source(sources[finding.scan_id].files[0], root),
            "detail": finding.detail,
        }
        for finding in duplicates
        if finding.quarantined
    ]
    table = pd.DataFrame(rows, columns=QUARANTINE_COLUMNS)
    return table.sort_values(QUARANTINE_COLUMNS, ignore_index=True)


def _first_file(result: ScanResult, sources: Mapping[str, ScanSource]) -> Path:
    """Where the scan of a result lies."""
    return sources[result.scan_id].files[0]


def manifest_table(
    results: Iterable[ScanResult],
    sources: Mapping[str, ScanSource],
    *,
    quarantined: Iterable[str],
    shares: Mapping[str, float],
    seed: int,
) -> pd.DataFrame:
    """The manifest: one row per usable scan, with its split.

    Args:
        results: of ``prepare_scan``.
        sources: by scan_id.
        quarantined: scan_ids to leave out.
        shares: of patients per split, where none is published (see ``assign_splits``).
        seed: of that draw.

    Returns:
        ``MANIFEST_COLUMNS`` and one column per attribute of the data set, rows by scan_id.
    """
    left_out = set(quarantined)
    rows = [
        _manifest_row(result, sources[result.scan_id])
        for result in results
        if result.record and result.scan_id not in left_out
    ]
    manifest = pd.DataFrame(rows, columns=None if rows else MANIFEST_COLUMNS)
    if rows:
        manifest["split"] = assign_splits(manifest, fractions=shares, seed=seed)
    return manifest.sort_values("scan_id", ignore_index=True)


def _manifest_row(result: ScanResult, source: ScanSource) -> dict:
    """One scan; lists become text, and what was measured hides an attribute of that name."""
    record = result.record
    spacing = record["spacing_mm"]
    row = {
        "scan_id": source.scan_id,
        "patient_id": source.patient_id,
        "split": source.split,
        "label": source.label,
        "slices": record["slices"],
        "height": record["height"],
        "width": record["width"],
        "spacing_mm": " ".join(f"{value:.4g}" for value in spacing) if spacing else "",
        "source_sha256": record["source_sha256"],
        "flags": "; ".join(record["flags"]),
    }
    return row | {name: text for name, text in source.attributes.items() if name not in row}


def preparation_findings(
    data_set: str, listing: Listing, manifest: pd.DataFrame, root: Path
) -> pd.DataFrame:
    """Everything noticed that leaves no scan out: listing problems and remarks on the manifest.

    Args:
        data_set: its name.
        listing: of the raw folder.
        manifest: of ``manifest_table``.
        root: folder of the raw data set.

    Returns:
        The columns of ``Finding``.
    """
    problems = [
        Finding(data_set, "", str(p.reason), f"{describe_source(p.file, root)} {p.detail}".strip())
        for p in listing.problems
    ]
    return findings_table([*problems, *manifest_findings(data_set, manifest)])
