"""What one change does to a system: the same scans twice, and the difference.

For SAM2CLIP2SAM the change is the segmentation of the input; `effect_table` takes any.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib.data.splits import TEST
from lib.evaluation.classification import (
    PROBABILITY_PREFIX,
    class_names,
    identifier_column,
    predicted_classes,
    probability_matrix,
)
from lib.evaluation.statistics import (
    REPETITIONS,
    bootstrap_difference,
    classification_statistic,
    delong_test,
    holm_adjusted,
    mcnemar_exact,
)
from lib.reporting.pictures import STYLE, legend_beside, legend_name, line_style, panels
from lib.reporting.published import CONVENTIONAL, NO_SEGMENTATION, SAM2CLIP2SAM
from lib.reporting.tables import (
    HIGH,
    LOW,
    NOT_MEASURED,
    NOT_RUN,
    PUBLISHED,
    SystemRun,
    heading,
    published_of,
    reason,
    tested_rows,
)

DIFFERENCES = ("macro_f1", "f1_covid", "roc_auc")
TESTS = ("p_mcnemar", "p_delong")


class Comparison(NamedTuple):
    """One system on one data set in two ways, the second of which is the reference.

    For most tables ``segmentation`` is that of the input; the name of any change may stand there.
    """

    data_set: str
    system: str
    segmentation: str
    reference: str

    def runs(self) -> tuple[SystemRun, SystemRun]:
        """The two runs that are compared, the reference last."""
        pair = (self.segmentation, self.reference)
        first, second = (SystemRun(self.system, name, self.data_set) for name in pair)
        return first, second


def segmentation_effect_table(
    predictions: Mapping[SystemRun, pd.DataFrame | None],
    published: pd.DataFrame,
    *,
    positive: str,
    seed: int,
    split: str = TEST,
    published_as: Mapping[str, str] | None = None,
    not_measured: str = NOT_RUN,
    repetitions: int = REPETITIONS,
) -> pd.DataFrame:
    """The effect of segmentation on each system, with intervals and tests.

    Every segmentation is compared with none, and SAM2CLIP2SAM with the conventional one.

    Args:
        predictions: for each system its predictions with the column ``patient_id``; None for a
            system that was not run.
        published: published values of one table.
        positive: the class to detect.
        seed: of the bootstrap.
        split: rows to use.
        published_as: name in the published table of systems that are called otherwise here.
        not_measured: what the row of a comparison says of which a side was not run.
        repetitions: of the bootstrap.

    Returns:
        A table of :func:`effect_table`.

    Raises:
        ValueError: when predictions are invalid, or two runs of a system cover other scans.
    """
    return effect_table(
        _comparisons(predictions),
        predictions,
        published,
        positive=positive,
        seed=seed,
        split=split,
        published_as=published_as,
        not_measured=not_measured,
        repetitions=repetitions,
    )


def effect_table(
    comparisons: Iterable[Comparison],
    predictions: Mapping[SystemRun, pd.DataFrame | None],
    published: pd.DataFrame,
    *,
    positive: str,
    seed: int,
    split: str = TEST,
    metrics: Sequence[str] = DIFFERENCES,
    published_as: Mapping[str, str] | None = None,
    not_measured: str = NOT_RUN,
    repetitions: int = REPETITIONS,
) -> pd.DataFrame:
    """Differences between two ways of a system on the same scans, with intervals and tests.

    The intervals draw patients, so all scans count. McNemar's and DeLong's tests want independent
    scans: they see the first scan of each patient. Holm's correction takes all comparisons of a
    data set together, for each of the tests.

    Args:
        comparisons: what to compare, in the order of the rows.
        predictions: as in :func:`segmentation_effect_table`.
        published: likewise.
        positive: likewise.
        seed: likewise.
        split: likewise.
        metrics: scores whose difference is wanted.
        published_as: likewise.
        not_measured: likewise.
        repetitions: likewise.

    Returns:
        One row per comparison: on how many scans (``n``) and ``patients``; the differences of the
        metrics with 95 % intervals, and what the published values differ by; the p-values, also
        after correction, and over how many ``comparisons``.

    Raises:
        ValueError: when predictions are invalid, or two runs of a system cover other scans.
    """
    rows = []
    for comparison in comparisons:
        first, second = (tested_rows(run, predictions.get(run), split) for run in comparison.runs())
        cells = dict.fromkeys(_cell_names(metrics), np.nan) | {"n": 0, "patients": 0}
        if len(first) and len(second):
            cells |= _compared(comparison, first, second, metrics, positive, seed, repetitions)
        missing = any(predictions.get(run) is None for run in comparison.runs())
        why = {NOT_MEASURED: reason(cells["n"], None if missing else first, not_measured)}
        gaps = _published_gaps(comparison, published, metrics, published_as or {})
        rows.append(comparison._asdict() | cells | gaps | why)
    names = [*Comparison._fields, *_cell_names(metrics)]
    return _corrected(pd.DataFrame(rows, columns=None if rows else [*names, NOT_MEASURED]))


def _comparisons(runs: Mapping[SystemRun, object]) -> Iterator[Comparison]:
    """All pairs of inputs that are compared, systems in their order."""
    systems = dict.fromkeys((run.data_set, run.system) for run in runs)
    for data_set, system in systems:
        names = [
            run.segmentation for run in runs if (run.data_set, run.system) == (data_set, system)
        ]
        pairs = [(name, NO_SEGMENTATION) for name in names if name != NO_SEGMENTATION]
        pairs += [(SAM2CLIP2SAM, CONVENTIONAL)]
        for segmentation, reference in pairs:
            if {segmentation, reference} <= set(names):
                yield Comparison(data_set, system, segmentation, reference)


def _cell_names(metrics: Iterable[str]) -> list[str]:
    """Columns of a comparison, in their order."""
    names = ["n", "patients"]
    for metric in metrics:
        column = f"{metric}_difference"
        names += [column, column + LOW, column + HIGH, column + PUBLISHED]
    return [*names, *(name + suffix for name in TESTS for suffix in ("", "_holm"))]


def _compared(
    comparison: Comparison,
    first: pd.DataFrame,
    second: pd.DataFrame,
    metrics: Iterable[str],
    positive: str,
    seed: int,
    repetitions: int,
) -> dict[str, float]:
    """Differences with intervals, and the p-values."""
    statistic = partial(classification_statistic, positive=positive)
    try:
        gaps = bootstrap_difference(first, second, statistic, seed=seed, repetitions=repetitions)
    except ValueError as error:
        raise ValueError(f"{' / '.join(comparison)}: {error}") from error
    cells = {"n": len(first), "patients": first["patient_id"].nunique()}
    for metric in metrics:
        if metric in gaps.index:
            column = f"{metric}_difference"
            values = gaps.loc[metric, ["value", "low", "high"]]
            cells |= dict(zip((column, column + LOW, column + HIGH), values, strict=True))
    return cells | _tests(_one_per_patient(first), _one_per_patient(second), positive)


def _one_per_patient(predictions: pd.DataFrame) -> pd.DataFrame:
    """The first scan of each patient, by its name, so that scans are independent."""
    ordered = predictions.sort_values(identifier_column(predictions), kind="stable")
    return ordered.drop_duplicates("patient_id", ignore_index=True)


def _tests(first: pd.DataFrame, second: pd.DataFrame, positive: str) -> dict[str, float]:
    """P-values of McNemar's test on the classes and DeLong's on the ranking."""
    right = [_is_right(part, positive) for part in (first, second)]
    scores = [part[PROBABILITY_PREFIX + positive] for part in (first, second)]
    delong = delong_test(first["label"] == positive, *scores)
    return dict(zip(TESTS, (mcnemar_exact(*right), delong.p_value), strict=True))


def _is_right(predictions: pd.DataFrame, positive: str) -> np.ndarray:
    """Whether each scan is classified rightly at the threshold 0.5."""
    called = predicted_classes(
        probability_matrix(predictions), positive=positive, classes=class_names(predictions)
    )
    return called == predictions["label"].to_numpy(object)


def _published_gaps(
    comparison: Comparison,
    published: pd.DataFrame,
    metrics: Sequence[str],
    published_as: Mapping[str, str],
) -> dict[str, float]:
    """What the published values of the two runs differ by; nan where one is missing."""
    name = published_as.get(comparison.system, comparison.system)
    ours, theirs = (
        published_of(published, run._replace(system=name))["fraction"] for run in comparison.runs()
    )
    gaps = (ours - theirs).reindex(list(metrics))
    return {f"{metric}_difference{PUBLISHED}": gap for metric, gap in gaps.items()}


def _corrected(table: pd.DataFrame) -> pd.DataFrame:
    """The table with Holm's correction, data set by data set."""
    parts = []
    for _, part in table.groupby("data_set", sort=False):
        adjusted = {f"{name}_holm": holm_adjusted(part[name]) for name in TESTS}
        made = int(part["n"].gt(0).sum())
        parts.append(part.assign(**adjusted, comparisons=made))
    return pd.concat(parts, ignore_index=True) if parts else table.assign(comparisons=0)


@matplotlib.rc_context(STYLE)
def systems_figure(table: pd.DataFrame, metric: str) -> Figure:
    """One score of every system, by segmentation, beside the published one.

    Args:
        table: of ``lib.reporting.tables.classification_table``.
        metric: a score that it holds.

    Returns:
        One panel per data set: a dot with its 95 % interval per system and segmentation, the
        published value as a ring.
    """
    data_sets = list(dict.fromkeys(table["data_set"]))
    systems = list(dict.fromkeys(table["system"]))
    inputs = list(dict.fromkeys(table["segmentation"]))
    figure, axes = panels(len(data_sets), size=(4.5, 1.0 + 0.42 * len(systems)))
    for axis, data_set in zip(axes, data_sets, strict=True):
        for row in table[table["data_set"] == data_set].to_dict("records"):
            order = inputs.index(row["segmentation"])
            place = systems.index(row["system"]) + 0.22 * (order - (len(inputs) - 1) / 2)
            colour = line_style(order)["color"]
            axis.plot([row[metric + LOW], row[metric + HIGH]], [place, place], color=colour)
            axis.plot(row[metric], place, "o", color=colour, markersize=4)
            ring = {"fillstyle": "none", "markersize": 6, "color": colour}
            axis.plot(row[metric + PUBLISHED], place, "o", **ring)
        axis.set_yticks(range(len(systems)), systems)
        axis.set_ylim(len(systems) - 0.4, -0.6)
        axis.set(title=data_set, xlabel=f"{heading(metric)}, 95 % interval", xlim=(None, 1.01))
    handles = [
        Line2D([], [], label=legend_name(name), color=line_style(order)["color"], marker="o")
        for order, name in enumerate(inputs)
    ]
    ring = Line2D(
        [], [], linestyle="", marker="o", fillstyle="none", color="0.3", label="published"
    )
    legend_beside(figure, [*handles, ring])
    return figure
