"""Phantom data sets of an experiment: drawn and prepared in one call, any number of them.

They go the way of every data set: `lib.data.phantom` writes the raw layout, the adapter
lists it, `lib.data.prepare` reads, checks and stores it. Nothing is done twice; see `map_scans`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

from lib.data import integrity, masks, phantom, prepare, readers, scan, store
from lib.data.datasets import list_scans
from lib.data.datasets import phantom as layout
from lib.data.files import save_csv
from lib.data.phantom import PhantomRecord, plan_phantoms
from lib.data.scan_map import ScanResult, map_scans
from lib.data.splits import TEST

WITH_TUBE, WITHOUT_TUBE = "with_tube", "without_tube"
_PREPARATION = (prepare, readers, integrity, masks, scan, store, layout)


def confounded_plans(
    strengths: Iterable[float], *, seed: int, scans_per_class: Mapping[str, int], **settings: float
) -> dict[float, list[PhantomRecord]]:
    """Plans of data sets in which a tube outside the lungs goes with COVID-19, for each strength.

    The strength is the correlation in the training and the validation part; in the test part it is
    0: half of each class wears the tube. Everything else is the same at every strength, so that
    two results differ by the tube alone.

    Args:
        strengths: correlations in [-1, 1].
        seed: of plan and scans.
        scans_per_class: by split.
        **settings: further ones of ``plan_phantoms``.

    Raises:
        ValueError: as ``plan_phantoms``.
    """
    learned = [split for split in scans_per_class if split != TEST]
    return {
        strength: plan_phantoms(
            scans_per_class=scans_per_class,
            confounder_correlation=dict.fromkeys(learned, strength),
            seed=seed,
            **settings,
        )
        for strength in strengths
    }


def tube_folder(confounder: bool) -> str:
    """In which of the two data sets of a seed a scan of ``confounded_plans`` is drawn."""
    return WITH_TUBE if confounder else WITHOUT_TUBE


def by_tube(plans: Iterable[Sequence[PhantomRecord]]) -> dict[str, list[PhantomRecord]]:
    """The scans that several plans need, once each, by ``tube_folder``.

    Args:
        plans: of ``confounded_plans``, all of one seed.
    """
    wanted: dict[str, dict[str, PhantomRecord]] = {WITH_TUBE: {}, WITHOUT_TUBE: {}}
    for record in (record for plan in plans for record in plan):
        wanted[tube_folder(record.confounder)][record.scan_id] = record
    return {name: [records[key] for key in sorted(records)] for name, records in wanted.items()}


def scanner_plans(scanners: Iterable[str], **settings: float) -> dict[str, list[PhantomRecord]]:
    """The same patients on each scanner: plans of data sets that differ by the scanner alone.

    Args:
        scanners: keys of ``lib.data.phantom.SCANNERS``.
        **settings: of ``plan_phantoms``.
    """
    plan = plan_phantoms(**settings)
    return {name: [replace(record, scanner=name) for record in plan] for name in scanners}


def draw_data_set(
    records: Sequence[PhantomRecord],
    folder: Path,
    *,
    size: int,
    hounsfield: bool,
    executor: Executor | None = None,
) -> pd.DataFrame:
    """Draw phantoms and prepare them; what is there already and unchanged is not made again.

    Args:
        records: of ``plan_phantoms``, at least one.
        folder: gets ``raw/``, ``scans/``, ``lungs/`` (true ones) and ``manifest.csv``.
        size: pixels per side.
        hounsfield: see ``make_phantom``.
        executor: of ``map_scans``.

    Returns:
        The manifest.

    Raises:
        ScanMapError: if a scan cannot be drawn or prepared.
    """
    run = partial(map_scans, executor=executor, keep_going=False)
    root = (folder / "raw").resolve()
    run(
        phantom.draw_phantom,
        records,
        root / "scans",
        suffix="",
        parameters={"size": size, "hounsfield": hounsfield},
        inputs=phantom.record_text,
        code=phantom.CODE,
        description=f"{folder.name}: phantoms",
    )
    phantom.write_plan(records, root)
    manifest = _prepare(root, folder, run)
    save_csv(manifest, folder / "manifest.csv")
    return manifest


def _prepare(root: Path, folder: Path, run: Callable[..., list[ScanResult]]) -> pd.DataFrame:
    """Store scans and true lungs of a raw phantom data set; returns the manifest."""
    sources = {source.scan_id: source for source in list_scans("phantom", root).scans}
    store_all = partial(run, suffix=".b2nd", code=_PREPARATION)
    scans = folder / "scans"
    stored = store_all(
        partial(prepare.prepare_scan, root=root),
        sources,
        scans,
        parameters={},
        inputs=partial(prepare.scan_inputs, root=root),
        description=f"{folder.name}: scans",
    )
    store_all(
        partial(prepare.prepare_mask, data_set=layout.PHANTOM, scans=scans, root=root),
        sources,
        folder / "lungs",
        parameters={"kind": "lungs"},
        inputs=partial(prepare.mask_inputs, kind="lungs", scans=scans, root=root),
        description=f"{folder.name}: lungs",
    )
    return prepare.manifest_table(stored, sources, quarantined=[], shares={}, seed=0)
