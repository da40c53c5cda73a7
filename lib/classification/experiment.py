"""Experiments: many trainings of classifiers, each judged on one or several test sets.

The claim of SAM2CLIP2SAM (sections 1 and 5: segmentation keeps a classifier from what lies outside
the lungs) and the step from one scanner or hospital to another are tested by training the same
systems on many data sets. A `Run` is one such training. Its result, the predictions on the test
sets, is one file with a fingerprint of all that it depends on (`lib.data.scan_map`), so an
experiment that was killed or extended trains only what is missing.

On a CPU each run has one thread, so that several run at once, one per core, and a result does not
depend on how many do.
"""

import json
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
from lightning_fabric import Fabric

from lib import training
from lib.classification.inputs import BINARY_CLASSES, ScanItem, content_digest, scan_items
from lib.classification.task import Task
from lib.data.files import save_csv
from lib.data.manifest import read_manifest
from lib.data.phantom import PhantomRecord
from lib.data.phantom_sets import by_tube
from lib.data.scan_map import map_scans
from lib.data.splits import TEST
from lib.evaluation.classification import predictions_table
from lib.inference import one_thread

PACKAGE = "lib.classification"


@dataclass(frozen=True)
class Case:
    """A scan of an experiment.

    Attributes:
        scan: to be classified.
        split: its part.
        patient_id: pseudonymous; intervals draw patients.
    """

    scan: ScanItem
    split: str
    patient_id: str


@dataclass(frozen=True, kw_only=True)
class System:
    """A classifier of an experiment.

    Attributes:
        classifier: a module of `lib.classification`.
        preset: a key of its ``VARIANTS``.
        settings: that preset in params.yaml.
    """

    classifier: str
    preset: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training, and what it is judged on.

    Attributes:
        system: what is trained.
        about: what tells this run from the others, columns of its predictions; ``seed`` among them
            is that of the training.
        learned: scans of the training and the validation part; others are not looked at.
        tested: scans of the test part by the name of their data set.
    """

    system: System
    about: Mapping[str, str | float]
    learned: Sequence[Case]
    tested: Mapping[str, Sequence[Case]]

    @property
    def name(self) -> str:
        """Of its file: the values of ``about``."""
        return "-".join(str(value).replace(" ", "_") for value in self.about.values())


def cases(
    manifest: pd.DataFrame, *, scans: Path, masks: Path | None, positive: Container[str]
) -> list[Case]:
    """The scans of a manifest with their parts; see ``lib.classification.inputs.scan_items``.

    Args:
        manifest: columns scan_id, patient_id, split, label.
        scans: folder of the stored scans.
        masks: folder of their lung masks; None shows the scans unsegmented.
        positive: labels that count as COVID-19.
    """
    items = scan_items(manifest, scans=scans, masks=masks, positive=positive)
    columns = (manifest["split"], manifest["patient_id"])
    return [Case(*row) for row in zip(items, *columns, strict=True)]


def confounded_cases(
    plan: Iterable[PhantomRecord],
    manifests: Mapping[str, pd.DataFrame],
    folder: Path,
    *,
    lungs_only: bool,
    positive: Container[str],
) -> list[Case]:
    """The scans of a confounded data set, each from where it was drawn: with the tube or without.

    Args:
        plan: of ``confounded_plans``, for one strength.
        manifests: of all drawn scans, by ``tube_folder``.
        folder: of the seed; holds a folder for each manifest.
        lungs_only: whether the true lung masks are laid over the scans.
        positive: labels that count as COVID-19.

    Returns:
        In the order of the scans' names, whatever wears the tube.
    """
    found = []
    for tube, records in by_tube([list(plan)]).items():
        wanted = manifests[tube]["scan_id"].isin([record.scan_id for record in records])
        found += cases(
            manifests[tube][wanted],
            scans=folder / tube / "scans",
            masks=folder / tube / "lungs" if lungs_only else None,
            positive=positive,
        )
    return sorted(found, key=lambda case: case.scan.scan_id)


def prepared_cases(
    data: Path, data_set: str, segmentation: str, *, positive: Container[str]
) -> list[Case]:
    """The labelled scans of a prepared and segmented data set.

    Args:
        data: folder of all data.
        data_set: its name.
        segmentation: whose masks are laid over the scans.
        positive: labels that count as COVID-19.
    """
    prepared = data / "prepared" / data_set
    return cases(
        read_manifest(prepared).dropna(subset="label"),
        scans=prepared / "scans",
        masks=data / "segmented" / data_set / segmentation,
        positive=positive,
    )


def part(found: Iterable[Case], *splits: str) -> list[Case]:
    """The cases of some parts, in their order."""
    return [case for case in found if case.split in splits]


def cross_runs(
    data_sets: Mapping[str, Sequence[Case]],
    systems: Mapping[str, System],
    about: Mapping[str, str | float],
) -> Iterator[Run]:
    """Each system trained on each data set and tested on all of them.

    Args:
        data_sets: cases by name.
        systems: by the name of the data set that is trained on, since a data set has its preset.
        about: of all these runs, the seed included.

    Yields:
        One run per data set, ``trained_on`` in front of ``about``.
    """
    tested = {name: part(found, TEST) for name, found in data_sets.items()}
    for name, found in data_sets.items():
        yield Run(
            system=systems[name],
            about={"trained_on": name, **about},
            learned=found,
            tested=tested,
        )


def compared_runs(
    compared: Mapping[tuple[str, str, int], Mapping[str, Sequence[Case]]],
    classifiers: Iterable[str],
    *,
    presets: Mapping[str, str],
    settings: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> list[Run]:
    """`cross_runs` of several classifiers on several comparisons.

    Args:
        compared: by name of the comparison, input and seed the cases of its data sets.
        classifiers: modules of `lib.classification`.
        presets: of each data set.
        settings: of each classifier and preset.
    """
    runs: list[Run] = []
    for (comparison, shown, seed), sets in compared.items():
        for name in classifiers:
            systems = {
                data_set: System(classifier=name, preset=preset, settings=settings[name][preset])
                for data_set in sets
                for preset in [presets[data_set]]
            }
            about = {"comparison": comparison, "system": name, "input": shown, "seed": seed}
            runs += cross_runs(sets, systems, about)
    return runs


def run_all(
    runs: Iterable[Run],
    folder: Path,
    *,
    unfinished: Path,
    classifiers: Iterable[str],
    executor: Executor | None = None,
) -> pd.DataFrame:
    """Train and judge every run that has no result yet, and read all results.

    Args:
        runs: with names of their own.
        folder: gets ``<name>.csv`` and its fingerprint for each run, and loses all others.
        unfinished: gets the weights of a run in hand, from which a killed one goes on.
        classifiers: names of all classifiers; a run depends on the code of its own one and on all
            that is none.
        executor: processes that train; None trains in this one.

    Returns:
        Predictions of the test parts, one row per run and scan: the columns of ``about``,
        ``tested_on``, ``patient_id`` and those of ``predictions_table``.

    Raises:
        ValueError: if there is no run, or two have one name.
        ScanMapError: if a run fails; the results of the others are kept.
    """
    runs = list(runs)
    named = {run.name: run for run in runs}
    if not runs or len(named) != len(runs):
        raise ValueError(f"an experiment needs runs with different names, got {len(runs)} runs")
    results = map_scans(
        partial(train_and_judge, unfinished=unfinished),
        named,
        folder,
        suffix=".csv",
        parameters={},
        inputs=partial(run_inputs, classifiers=set(classifiers)),
        code=[training, "torch"],
        executor=executor,
        description=f"{folder.parent.name}: runs",
        keep_going=False,
    )
    return pd.concat([read_result(result.path) for result in results], ignore_index=True)


def run_inputs(run: Run, *, classifiers: Container[str]) -> list[Path | str]:
    """All that a result depends on, for ``map_scans``: the run, its scans, and the code.

    Args:
        run: the run.
        classifiers: names of all classifiers.
    """
    system = run.system
    everything = [("learned", run.learned), *run.tested.items()]
    described = {
        "system": [system.classifier, system.preset, dict(system.settings)],
        "about": dict(run.about),
        "cases": {
            name: [[c.scan.scan_id, c.split, c.patient_id] for c in found]
            for name, found in everything
        },
        "content": [content_digest([case.scan for case in found]) for _, found in everything],
    }
    return [json.dumps(described, sort_keys=True), *code_files(system.classifier, classifiers)]


def code_files(classifier: str, classifiers: Container[str]) -> list[Path]:
    """Modules that a classifier may use: its own, and all of the package that are no classifier."""
    modules = sorted(Path(__file__).parent.glob("*.py"))
    return [path for path in modules if path.stem == classifier or path.stem not in classifiers]


def train_and_judge(run: Run, path: Path, *, unfinished: Path) -> dict[str, int]:
    """Train a run and write its predictions; the work of ``map_scans``.

    Args:
        run: the run.
        path: CSV file to write.
        unfinished: see ``run_all``; the folder of this run is gone afterwards.

    Returns:
        How many scans were learned from and judged.
    """
    system = import_module(f"{PACKAGE}.{run.system.classifier}")
    settings = run.system.settings
    task = Task(
        scans=[case.scan for case in run.learned],
        splits=[case.split for case in run.learned],
        variant=system.VARIANTS[run.system.preset],
        settings=settings,
        fabric=Fabric(precision=settings["precision"]),
        folder=unfinished / run.name,
        seed=int(run.about["seed"]),
    )
    with one_thread() if task.fabric.device.type == "cpu" else nullcontext():
        model = system.train(task).model
        judge = partial(system.predict, model, settings=settings, fabric=task.fabric)
        tables = [_judged(found, judge, name) for name, found in run.tested.items()]
    save_csv(pd.concat(tables).assign(**run.about)[[*run.about, *tables[0].columns]], path)
    shutil.rmtree(unfinished / run.name, ignore_errors=True)
    return {"learned": len(task.train), "judged": sum(map(len, tables))}


def _judged(found: Sequence[Case], judge: Callable[..., Any], name: str) -> pd.DataFrame:
    """Predictions of the scans of one test set."""
    scans = [case.scan for case in found]
    table = predictions_table(
        [scan.scan_id for scan in scans],
        [case.split for case in found],
        [scan.target for scan in scans],
        judge(scans),
        classes=BINARY_CLASSES,
    )
    table.insert(0, "patient_id", [case.patient_id for case in found])
    table.insert(0, "tested_on", name)
    return table


def read_result(path: Path) -> pd.DataFrame:
    """The predictions of one run; names stay text.

    Args:
        path: a file of ``run_all``.
    """
    text = dict.fromkeys(("tested_on", "patient_id", "scan_id", "split", "label"), str)
    return pd.read_csv(path, dtype=text, keep_default_na=False)
