"""Whole data sets, made on the spot and prepared as notebooks/prepare.ipynb does."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from lib.data import files, integrity, prepare
from lib.data.datasets import DATA_SETS, list_scans
from lib.data.datasets.folders import pseudonym
from lib.data.scan_map import ScanResult, map_scans


def chest(slices: int = 5, side: int = 40, seed: int = 0) -> np.ndarray:
    """HU: air around a body of noisy soft tissue with two lungs, the left one smaller."""
    random = np.random.default_rng(seed)
    volume = np.full((slices, side, side), -1000, np.int16)
    volume[:, 4:-4, 4:-4] = random.normal(40, 10, (slices, side - 8, side - 8))
    volume[lungs(slices, side) > 0] = -850
    return volume


def lungs(slices: int = 5, side: int = 40) -> np.ndarray:
    """The true lung mask of `chest`."""
    mask = np.zeros((slices, side, side), np.uint8)
    mask[:, 8:-8, 7 : side // 2 - 3] = 1
    mask[:, 8:-12, side // 2 + 3 : -7] = 2
    return mask


def own_id(scan: str, label: str = "covid") -> str:
    """The scan_id of ``<label>/<scan>`` in a user's own data set."""
    return f"scan-{pseudonym(f'{label}/{scan}')}"


def prepare_data_set(
    name: str,
    raw: Path,
    folder: Path,
    *,
    shares: Mapping[str, float] | None = None,
    largest_share: float = 1.0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells of notebooks/prepare.ipynb, in one process: quarantine and manifest, also saved."""
    layout, raw = DATA_SETS[name], raw.resolve()
    listing = list_scans(name, raw)
    sources = {source.scan_id: source for source in listing.scans}
    results = _stored(layout, sources, raw, folder)
    duplicates = integrity.duplicate_findings(prepare.slice_hashes(results["scan"], name))
    quarantine = prepare.quarantine_table(results, duplicates, sources, raw)
    left_out = set(quarantine.loc[quarantine["left_out"] == "scan", "scan_id"])
    manifest = prepare.manifest_table(
        results["scan"], sources, quarantined=left_out, shares=shares or {}, seed=0
    )
    findings = prepare.preparation_findings(name, listing, manifest, raw)
    tables = {"quarantine": quarantine, "manifest": manifest, "findings": findings}
    for table, content in tables.items():
        files.save_csv(content, folder / f"{table}.csv")
    integrity.stop_if_too_many(
        len(left_out), len(sources), largest_share=largest_share, data_set=name
    )
    return quarantine, manifest


def _stored(layout, sources, raw: Path, folder: Path) -> dict[str, list[ScanResult]]:
    """Scans first, then the masks of those that could be stored."""
    code = [prepare, integrity, sys.modules[layout.find.__module__]]
    store_all: Callable = partial(map_scans, suffix=".b2nd", code=code)
    results = {
        "scan": store_all(
            partial(prepare.prepare_scan, root=raw),
            sources,
            folder / "scans",
            parameters={"transposed": layout.transposed},
            inputs=partial(prepare.scan_inputs, root=raw),
            description="scans",
        )
    }
    stored = {result.scan_id for result in results["scan"] if not result.error}
    for kind in prepare.MASKS:
        results[kind] = store_all(
            partial(prepare.prepare_mask, data_set=layout, scans=folder / "scans", root=raw),
            prepare.with_mask(sources, stored, kind),
            folder / kind,
            parameters={"kind": kind},
            inputs=partial(prepare.mask_inputs, kind=kind, scans=folder / "scans", root=raw),
            description=kind,
        )
    return results


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path within."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
