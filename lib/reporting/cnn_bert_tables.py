"""Tables 1 to 3 of 3-D CNN with BERT: its ablations, its MLP, its benchmark (FACTS 4.10).

The paper prints the validation part only, on which it also chose its networks; here the test part
stands beside it. What a row measures is a *run*: a configuration of the network, perhaps with a
perceptron over its embeddings, trained with one or several seeds.
"""

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.data.splits import TEST, VALIDATION
from lib.evaluation.classification import attach_patients, read_predictions
from lib.evaluation.repeated import repeated_scores
from lib.evaluation.statistics import REPETITIONS
from lib.reporting.effects import Comparison, effect_table
from lib.reporting.published import BEST, BEST_WITH_MLP
from lib.reporting.tables import (
    HIGH,
    LOW,
    NO_LABELS,
    NOT_MEASURED,
    NOT_RUN,
    SystemRun,
    with_published,
)

PARTS = (VALIDATION, TEST)
RUN = ("configuration", "perceptron")  # columns that name a run; "" is the network by itself
COUNTS = ("run", "n", "seeds", "interval_over", "several_sets")
DIFFERENCES = ("accuracy", "macro_f1", "roc_auc")
CHOSEN_BY = "macro_f1"  # of the run that is compared with the paper's best
NETWORK_FILE = re.compile(r"cnn_bert_(\w+)_seed(\d+)-unet_refined")  # the masks of the paper
PERCEPTRON_FOLDER = re.compile(r"cnn_bert_(\w+)_seed(\d+)_mlp")


class TableRow(NamedTuple):
    """A row of a table.

    Attributes:
        system: as the published table calls it.
        configuration: of the network.
        perceptron: pooling and activation, for example ``both_sigmoid``; empty without one.
        parts: of the data set that have this row.
    """

    system: str
    configuration: str
    perceptron: str = ""
    parts: tuple[str, ...] = PARTS

    @property
    def run(self) -> str:
        """What is measured, for people."""
        return run_name(self.configuration, self.perceptron)


def run_name(configuration: str, perceptron: str = "") -> str:
    """Name of a run, for example ``rml_msc + both_sigmoid``."""
    return f"{configuration} + {perceptron}" if perceptron else configuration


def read_cnn_bert_runs(
    folder: Path,
    manifests: Mapping[str, pd.DataFrame],
    *,
    configurations: Container[str],
    seeds: Container[int],
) -> pd.DataFrame:
    """Predictions of the networks and perceptrons of this study; files of others are left alone.

    Args:
        folder: holds ``<data set>/cnn_bert_<configuration>_seed<k>-unet_refined.csv`` and
            ``<data set>/cnn_bert_<configuration>_seed<k>_mlp/<pooling>_<activation>.csv``.
        manifests: of each data set; say which patient a scan is of.
        configurations: of the networks to read.
        seeds: likewise.

    Returns:
        The rows of these files with ``data_set``, ``configuration``, ``perceptron``, ``seed`` and
        ``patient_id``; no row where there is no file.

    Raises:
        ValueError: if a file is no predictions table.
    """
    tables = [pd.DataFrame(columns=["data_set", *RUN, "seed", "patient_id", "split"])]
    for data_set, manifest in manifests.items():
        for path, about in _files(folder / data_set):
            if about["configuration"] not in configurations or about["seed"] not in seeds:
                continue
            predictions = attach_patients(read_predictions(path), manifest)
            tables.append(predictions.assign(data_set=data_set, **about))
    return pd.concat(tables[1:] or tables, ignore_index=True)


def read_evidence_tables(scores: Path, data_sets: Iterable[str]) -> pd.DataFrame:
    """Where networks found their evidence, of all explained runs.

    Args:
        scores: holds ``<data set>/evidence_<run>/summary.csv`` and ``by_label.csv`` of
            ``lib.evaluation.evidence.evidence_tables``.
        data_sets: to read.

    Returns:
        One row per data set, run, label (``all`` first), measure and attribution: its ``value``
        with the interval, and on how many scans it was ``measured``.
    """
    found = [pd.DataFrame(columns=["data_set", "run", "label", "measure", "attribution"])]
    for data_set in data_sets:
        for folder in sorted((scores / data_set).glob("evidence_*")):
            together = pd.read_csv(folder / "summary.csv").assign(label="all")
            rows = pd.concat([together, pd.read_csv(folder / "by_label.csv", dtype={"label": str})])
            run = folder.name.removeprefix("evidence_")
            found.append(rows.assign(data_set=data_set, run=run))
    table = pd.concat(found[1:] or found, ignore_index=True)
    keys = ["data_set", "run", "label", "measure", "attribution"]
    columns = [*keys, "measured", "value", "value_low", "value_high"]
    return table.rename(columns={"low": "value_low", "high": "value_high"}).reindex(columns=columns)


def _files(folder: Path) -> Iterator[tuple[Path, dict[str, str | int]]]:
    """Files of one data set, each with what it is of."""
    for path in sorted(folder.glob("cnn_bert_*.csv")):
        if found := NETWORK_FILE.fullmatch(path.stem):
            yield path, {"configuration": found[1], "perceptron": "", "seed": int(found[2])}
    for path in sorted(folder.glob("cnn_bert_*/*.csv")):
        if found := PERCEPTRON_FOLDER.fullmatch(path.parent.name):
            yield path, {"configuration": found[1], "perceptron": path.stem, "seed": int(found[2])}


def cnn_bert_table(
    predictions: pd.DataFrame,
    rows: Sequence[TableRow],
    published: pd.DataFrame,
    *,
    data_sets: Sequence[str],
    metrics: Sequence[str],
    positive: str,
    seed: int,
    not_measured: str = NOT_RUN,
    repetitions: int = REPETITIONS,
) -> pd.DataFrame:
    """Scores of runs on the validation and the test part, the published ones beside them.

    One seed: the interval draws patients. Several: the mean over the seeds with Student's interval,
    see ``lib.evaluation.repeated``; as the patients are the same for all seeds, it tells what
    training varies by, not what other patients would give.

    Args:
        predictions: of :func:`read_cnn_bert_runs`.
        rows: of the table, in their order.
        published: published values of one table; a value belongs to the part its data set names.
        data_sets: to have rows for.
        metrics: scores as in ``classification_scores``.
        positive: the class to detect.
        seed: of the bootstrap.
        not_measured: what a row says whose run is not there.
        repetitions: of the bootstrap.

    Returns:
        One row per data set, part and row with ``system``, ``run``, ``n`` (scans), ``seeds``,
        ``interval_over``, ``several_sets`` (on how many scans a perceptron had more than one set
        to pool), the metrics with intervals and published values, ``published_on``, ``remarks``,
        ``not_measured``.

    Raises:
        ValueError: if a published value occurs twice.
    """
    scores = _scores(predictions, rows, metrics, positive, seed, repetitions)
    there = set(predictions[["data_set", *RUN]].itertuples(index=False, name=None))
    made = []
    for data_set in data_sets:
        for part in PARTS:
            for row in rows:
                if part in row.parts:
                    found = scores.get((data_set, part, *row[1:3]))
                    about = {"data_set": data_set, "part": part, "system": row.system}
                    cells = _measured_cells(row, found, metrics)
                    values = _published_on(published, row.system, part)
                    absent = NO_LABELS if (data_set, *row[1:3]) in there else not_measured
                    why = {NOT_MEASURED: absent if found is None else ""}
                    counts = {name: cells[name] for name in COUNTS}
                    made.append(about | counts | with_published(cells, metrics, values) | why)
    return _without_empty(pd.DataFrame(made), "several_sets")


def _scores(
    predictions: pd.DataFrame,
    rows: Sequence[TableRow],
    metrics: Sequence[str],
    positive: str,
    seed: int,
    repetitions: int,
) -> dict[tuple[str, ...], dict]:
    """Scores of the wanted runs by data set, part, configuration and perceptron."""
    wanted = pd.MultiIndex.from_tuples([row[1:3] for row in rows])
    used = predictions[
        pd.MultiIndex.from_frame(predictions[list(RUN)]).isin(wanted)
        & predictions["split"].isin(PARTS).to_numpy()
    ]
    if used.empty:
        return {}
    keys = ["data_set", "split", *RUN]
    scores = repeated_scores(
        used, keys=keys, metrics=metrics, positive=positive, seed=seed, repetitions=repetitions
    )
    several = used.assign(several=used["sets"] > 1) if "sets" in used else used.assign(several=0)
    counts = several.drop_duplicates([*keys, "scan_id"]).groupby(keys, sort=False)
    scores["several_sets"] = counts["several"].sum().to_numpy()
    scores["n"] = counts.size().to_numpy()  # scans, not scans times seeds
    return {tuple(found[key] for key in keys): found for found in scores.to_dict("records")}


def _measured_cells(row: TableRow, found: Mapping | None, metrics: Sequence[str]) -> dict:
    """The measured cells of a row; nothing where the run is not there."""
    names = [metric + suffix for metric in metrics for suffix in ("", LOW, HIGH)]
    cells = {"run": row.run, "n": 0, "seeds": 0, "interval_over": "", "several_sets": pd.NA}
    cells |= dict.fromkeys(names, np.nan)
    if found is not None:
        cells |= {name: found[name] for name in ("n", "seeds", "interval_over", *names)}
        cells["several_sets"] = int(found["several_sets"]) if row.perceptron else pd.NA
    return cells


def _published_on(published: pd.DataFrame, system: str, part: str) -> pd.DataFrame:
    """The published values of a system on one part, by metric."""
    same = (published["system"] == system) & published["data_set"].str.endswith(f", {part}")
    values = published[same].set_index("metric")
    if not values.index.is_unique:
        raise ValueError(f"published values of {system} on {part} occur twice; give one table")
    return values


def _without_empty(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The table without a column that holds nothing, else as whole numbers."""
    if table[column].isna().all():
        return table.drop(columns=column)
    return table.astype({column: "Int64"})


def cnn_bert_benchmark_table(
    predictions: pd.DataFrame,
    networks: Mapping[str, str],
    perceptron: str,
    published: pd.DataFrame,
    *,
    data_sets: Sequence[str],
    **options: object,
) -> pd.DataFrame:
    """Table 3: networks with and without a perceptron, and on the test part the best of each.

    The paper prints the best on the test part, and does not say of what. Choosing by the test part
    would flatter, so *best* here is the run of highest macro F1 on the validation part, the first
    of equals.

    Args:
        predictions: as for :func:`cnn_bert_table`.
        networks: printed name of each configuration.
        perceptron: the one that is benchmarked.
        published: values of table 3.
        data_sets: to have rows for.
        options: of :func:`cnn_bert_table`; the metrics hold ``macro_f1``.

    Returns:
        As :func:`cnn_bert_table`.
    """
    alone = [TableRow(name, key) for key, name in networks.items()]
    pooled = [TableRow(f"{name} + MLP", key, perceptron) for key, name in networks.items()]
    rows = [row for pair in zip(alone, pooled, strict=True) for row in pair]
    tables = []
    for data_set in data_sets:
        part = {"data_sets": [data_set], **options}
        table = cnn_bert_table(predictions, rows, published, **part)
        scores = table[table["part"] == VALIDATION].set_index("run")[CHOSEN_BY]
        best = [
            _best(alone, scores)._replace(system=BEST, parts=(TEST,)),
            _best(pooled, scores)._replace(system=BEST_WITH_MLP, parts=(TEST,)),
        ]
        tables.append(cnn_bert_table(predictions, [*rows, *best], published, **part))
    return pd.concat(tables, ignore_index=True)


def _best(rows: Sequence[TableRow], scores: pd.Series) -> TableRow:
    """The row of the highest score, the first of equals; one that was not run is never it."""
    return max(rows, key=lambda row: np.nan_to_num(scores[row.run], nan=-1.0))


def cnn_bert_effect_table(
    predictions: pd.DataFrame,
    pairs: Sequence[tuple[TableRow, TableRow]],
    *,
    data_sets: Sequence[str],
    seeds: Sequence[int],
    positive: str,
    seed: int,
    not_measured: str = NOT_RUN,
    repetitions: int = REPETITIONS,
) -> pd.DataFrame:
    """What BERT and the perceptron change: pairs of runs on the same scans, seed by seed.

    Args:
        predictions: of :func:`read_cnn_bert_runs`.
        pairs: of runs, the reference last.
        data_sets: to have rows for.
        seeds: of the runs.
        positive: the class to detect.
        seed: of the bootstrap.
        not_measured: what a row says of which a side is not there.
        repetitions: of the bootstrap.

    Returns:
        A table of ``lib.reporting.effects.effect_table`` for each part, with ``part``, ``run`` and
        ``seed``. Holm's correction counts the comparisons of a data set and part, seeds included.
    """
    runs = {
        SystemRun(str(number), run_name(*run), data_set): frame
        for (data_set, *run, number), frame in predictions.groupby(["data_set", *RUN, "seed"])
    }
    comparisons = [
        Comparison(data_set, str(number), first.run, second.run)
        for data_set in data_sets
        for first, second in pairs
        for number in seeds
    ]
    tables = []
    for part in PARTS:
        table = effect_table(
            comparisons,
            runs,
            _NOTHING_PUBLISHED,
            positive=positive,
            seed=seed,
            split=part,
            metrics=DIFFERENCES,
            not_measured=not_measured,
            repetitions=repetitions,
        )
        table.insert(1, "part", part)
        tables.append(table.rename(columns={"system": "seed", "segmentation": "run"}))
    return pd.concat(tables, ignore_index=True)


# The paper prints no differences with which these could be compared.
_NOTHING_PUBLISHED = pd.DataFrame(columns=["system", "segmentation", "metric", "fraction"])
