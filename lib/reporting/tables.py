"""The study's tables: built from manifests, scores and predictions, written in three formats.

Builders are pure: tables in, one table out, a row per system. A column ``x`` with an interval has
the neighbours ``x_low`` and ``x_high``, one with a published counterpart ``x_published``. The CSV
file keeps that form at full precision; Markdown and LaTeX show ``0.93 [0.88, 0.97]``. A system
that was not run keeps its row, with n = 0, so that it still shows what was published; the column
``not_measured``, where there is one, says why, and stands in the place of the values.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.data.files import whole_file
from lib.data.splits import SPLITS, TEST
from lib.evaluation.classification import (
    DEFAULT_THRESHOLD,
    attach_patients,
    read_predictions,
    validate_predictions,
)
from lib.evaluation.statistics import (
    REPETITIONS,
    Statistic,
    bootstrap_difference,
    bootstrap_interval,
    classification_statistic,
    holm_adjusted,
    mean_statistic,
    signed_rank_test,
)

NOT_RUN = "not run"
FULL_ONLY = "only in the full study"
NO_LABELS = "no labelled scan in this part"
NOT_MEASURED = "not_measured"
UNDEFINED = "–"
WITHOUT_INTERVAL = (
    "Values without an interval: nearly all resamples agree, as with a perfect score of few "
    "patients, which is not certainty; or there is one patient; or none was computed."
)
LATEX_WIDEST_CELL = 40  # characters; longer text is broken into lines
LATEX_WIDEST_TABLE = 100  # characters; wider tables are shrunk to the width of the text
SMALLEST_P_VALUE = 0.001  # smaller ones are printed as below it
P_VALUES = (
    "p_value", "p_holm", "p_mcnemar", "p_mcnemar_holm", "p_delong", "p_delong_holm",
)  # fmt: skip
LOW, HIGH, PUBLISHED = "_low", "_high", "_published"
DECIMALS = 2
PUBLISHED_DECIMALS = 4  # as printed: percent with two decimals
ALL_SPLITS = "all"
UNLABELLED = "unlabelled"

LUNG_PARTS = ("right", "left", "both")
# Column of the segmentation table: its column in the scores of a part.
PART_METRICS = {
    "dice": "dice_{part}",
    "iou": "iou_{part}",
    "hd95": "hd95_{part}",
    "assd": "assd_{part}",
}
DISTANCES = ("hd95", "assd")
FAILURES = ("empty", "lung_missing", "leak")
SCORE_KEYS = ("data_set", "method", "scan_id", "patient_id", "split", "label")
REFERENCE_METHOD = "sam2clip2sam"  # the others are compared with it
# What SAM2CLIP2SAM claims (sections 1 and 4.3), see lib.evaluation.lung_errors.
CLAIM_METRICS = (
    "dice_both",
    "mediastinum_leakage",
    "rim_error",
    "lesions_kept",
    "ground_glass_kept",
    "consolidation_kept",
    "slices_missed_share",
    "slices_invented_share",
    "neighbour_dice_gap",
)
ABLATION_METRICS = ("dice", "dice_change", "iou", "empty")
CLASS_METRICS = ("dice_both", "mediastinum_leakage", "rim_error", "lesions_kept")
# The rim error by its size, since two methods that err to different sides are not compared by sign.
PAIRED_METRICS = (
    "dice_both",
    "mediastinum_leakage",
    "rim_distance",
    "lesions_kept",
    "slices_missed_share",
)

HEADINGS = {
    "n": "n",
    "n_positive": "n positive",
    "macro_f1": "Macro F1",
    "roc_auc": "ROC AUC",
    "auc": "AUC",
    "brier": "Brier score",
    "iou": "IoU",
    "hd95": "HD95",
    "assd": "ASSD",
    "dice_both": "Dice",
    "dice_change": "Dice, change",
    "empty": "Slices left empty",
    "rim_distance": "Rim error, size",
    "lesions_kept": "Infected lung kept",
    "ground_glass_kept": "Ground glass kept",
    "slices_missed_share": "Slices missed",
    "slices_invented_share": "Slices invented",
    "neighbour_dice_gap": "Neighbour Dice, gap",
    "distance_unit": "Distances in",
    "several_sets": "Scans of several sets",
    "p_value": "p",
    "p_holm": "p, Holm",
    "p_mcnemar": "p, McNemar",
    "p_mcnemar_holm": "p, McNemar, Holm",
    "p_delong": "p, DeLong",
    "p_delong_holm": "p, DeLong, Holm",
    "accuracy_difference": "Accuracy, difference",
    "macro_f1_difference": "Macro F1, difference",
    "f1_covid_difference": "F1 (covid), difference",
    "roc_auc_difference": "ROC AUC, difference",
    "giga_flops": "GFLOPs",
    "seconds_per_scan": "Seconds per scan",
    "peak_megabytes": "Peak memory, MB",
    "measured_published": "Published",
    "own_published": "Published of itself",
    "paper_rule": "Paper's rule",
    "coco_rule": "COCO's rule",
    "paper_published": "Published, paper's rule",
    "readme_published": "README, paper's rule",
    "sensitivity_covid_difference": "Sensitivity (covid), difference",
    "parameters_published": "Parameters, published or computed",
}

_LATEX_ESCAPES = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{character: f"\\{character}" for character in "&%$#_{}"},
    }
)


class SystemRun(NamedTuple):
    """What one row of a classification table is about."""

    system: str
    segmentation: str
    data_set: str


def expected_runs(
    data_sets: Iterable[str], systems: Iterable[str], segmentations: Iterable[str]
) -> list[SystemRun]:
    """Every system on every segmentation of every data set, sorted as they are given."""
    rows = product(data_sets, systems, segmentations)
    return [SystemRun(system, segmentation, data_set) for data_set, system, segmentation in rows]


def read_runs(
    paths: Iterable[Path],
    manifests: Mapping[str, pd.DataFrame],
    *,
    systems: Mapping[str, str],
    expected: Iterable[SystemRun] = (),
) -> dict[SystemRun, pd.DataFrame | None]:
    """Predictions of all systems, for :func:`classification_table`.

    Args:
        paths: files ``<data set>/<classifier>-<segmentation>.csv``.
        manifests: of each data set; say which patient a scan is of.
        systems: printed name of each classifier; others keep the name of their file.
        expected: runs that get a row even where there is no file; they come first.

    Returns:
        Predictions with ``patient_id``, None where there are none.
    """
    runs: dict[SystemRun, pd.DataFrame | None] = dict.fromkeys(expected)
    for path in paths:
        classifier, segmentation = path.stem.split("-", 1)
        data_set = path.parent.name
        run = SystemRun(systems.get(classifier, classifier), segmentation, data_set)
        runs[run] = attach_patients(read_predictions(path), manifests[data_set])
    return runs


def metrics_by_run(table: pd.DataFrame, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Some scores of each row of a classification table, as DVC metrics want them.

    Args:
        table: of :func:`classification_table`.
        names: of the scores.
    """
    keys = table["data_set"] + "/" + table["system"] + "/" + table["segmentation"]
    return dict(zip(keys, table[list(names)].to_dict("records"), strict=True))


def data_table(
    manifests: Mapping[str, pd.DataFrame], quarantined: Mapping[str, int]
) -> pd.DataFrame:
    """What each data set holds, per split and in all.

    Args:
        manifests: for each data set its manifest; scans without a label count as unlabelled.
        quarantined: for each data set how many scans were left out. They belong to no split, so
            the number stands in the row of all splits.

    Returns:
        One row per data set and split with ``patients``, ``scans``, ``slices`` (in all, and the
        fewest, median and most of a scan), one column per label and ``quarantined``.
    """
    rows = [
        _data_row(name, split, scans, quarantined.get(name, 0))
        for name, manifest in manifests.items()
        for split, scans in _by_split(manifest)
    ]
    table = pd.DataFrame(rows)
    labels = sorted(column for column in table.columns if column.startswith("label: "))
    table[labels] = table[labels].fillna(0).astype(np.int64)
    table["quarantined"] = table["quarantined"].astype("Int64")
    return table[[column for column in table.columns if column not in labels] + labels]


def _by_split(manifest: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame]]:
    """The parts of a manifest that hold scans, then the whole of it."""
    for split in SPLITS:
        scans = manifest[manifest["split"] == split]
        if len(scans):
            yield split, scans
    yield ALL_SPLITS, manifest


def _data_row(data_set: str, split: str, scans: pd.DataFrame, quarantined: int) -> dict:
    labels = scans["label"].fillna(UNLABELLED).value_counts()
    slices = scans["slices"]
    return {
        "data_set": data_set,
        "split": split,
        "patients": scans["patient_id"].nunique(),
        "scans": len(scans),
        "slices": int(slices.sum()),
        "slices_fewest": slices.min(),
        "slices_median": slices.median(),
        "slices_most": slices.max(),
        "quarantined": quarantined if split == ALL_SPLITS else pd.NA,
        **{f"label: {name}": count for name, count in labels.items()},
    }


def read_score_tables(paths: Iterable[Path]) -> pd.DataFrame:
    """Scores of several data sets and methods in one table.

    Args:
        paths: files ``scores.csv`` of the stage that scores segmentations, in the order that the
            tables shall have; missing ones are skipped. A data set without true masks has no rows.

    Returns:
        Rows of :func:`segmentation_table`; no row where nothing was scored.
    """
    text = dict.fromkeys(SCORE_KEYS, str)
    tables = [pd.read_csv(path, dtype=text) for path in paths if path.exists()]
    filled = [table for table in tables if len(table)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=SCORE_KEYS)


def segmentation_table(
    scores: pd.DataFrame,
    *,
    seed: int,
    split: str | None = TEST,
    expected: Sequence[tuple[str, str]] = (),
    repetitions: int = REPETITIONS,
) -> pd.DataFrame:
    """Agreement of each method's lung masks with the reference masks.

    Args:
        scores: one row per data set, method and scan: ``data_set``, ``method``, ``scan_id``,
            ``patient_id``, ``split``, for right, left and both lungs ``dice_<part>``,
            ``iou_<part>``, ``hd95_<part>``, ``assd_<part>``, their ``distance_unit``, and truth
            columns for the failures ``empty``, ``lung_missing``, ``leak``. Columns that are absent
            give empty cells. Distances to an empty mask are nan or infinite.
        seed: of the bootstrap.
        split: rows to use; all without it.
        expected: pairs of data set and method that get rows even if they were not run.
        repetitions: of the bootstrap.

    Returns:
        One row per data set, method and part with ``n`` and ``patients``, the means with their
        95 % intervals over patients, ``distances_n`` (on how many scans the surface distances
        exist: a method that often fails is judged on its successes there), and for both lungs the
        rates of failure.
    """
    used = _of_split(scores, split)
    runs = dict(list(used.groupby(["data_set", "method"], sort=False)))
    order = dict.fromkeys([*expected, *runs])
    rows = [
        {"data_set": run[0], "method": run[1], "part": part}
        | _part_row(runs.get(run, used.iloc[:0]), part, seed=seed, repetitions=repetitions)
        for run in order
        for part in LUNG_PARTS
    ]
    return pd.DataFrame(rows, columns=None if rows else ["data_set", "method", "part", "n"])


def _part_row(scores: pd.DataFrame, part: str, *, seed: int, repetitions: int) -> dict:
    """Means of one method on one part of the lungs."""
    names = {source.format(part=part): metric for metric, source in PART_METRICS.items()}
    if part == "both":
        names |= {failure: f"{failure}_rate" for failure in FAILURES}
    columns = [*PART_METRICS, *(f"{failure}_rate" for failure in FAILURES)]
    available = scores[[name for name in names if name in scores.columns]].rename(columns=names)
    measured = list(available.columns)
    distances = [name for name in measured if name in DISTANCES]
    counts = _counts(scores) | {
        "distances_n": int(np.isfinite(available[distances].astype(float)).all(axis=1).sum())
        if distances
        else 0,
    }
    statistic = partial(mean_statistic, columns=measured)
    frame = available.assign(patient_id=scores["patient_id"])
    return counts | _interval_cells(frame, statistic, columns, seed=seed, repetitions=repetitions)


def _of_split(scores: pd.DataFrame, split: str | None) -> pd.DataFrame:
    """The rows of one part, or all."""
    return scores if split is None else scores[scores["split"] == split]


def _counts(scores: pd.DataFrame) -> dict[str, int | str]:
    """How many scans and patients were measured, and what their distances are counted in."""
    units = scores.get("distance_unit", pd.Series(dtype=str)).dropna().unique()
    return {
        "n": len(scores),
        "patients": scores["patient_id"].nunique(),
        "distance_unit": "; ".join(sorted(units)),
    }


def segmentation_claim_table(
    scores: pd.DataFrame, *, seed: int, split: str | None = TEST, repetitions: int = REPETITIONS
) -> pd.DataFrame:
    """What SAM2CLIP2SAM claims in words and pictures, measured for each method.

    Args:
        scores: one row per data set, method and scan, as in :func:`segmentation_table`, with the
            columns ``CLAIM_METRICS``; absent ones give empty cells.
        seed: of the bootstrap.
        split: rows to use; all without it.
        repetitions: of the bootstrap.

    Returns:
        One row per data set and method, in the order of the scores, with ``n``, ``patients``, the
        unit of the rim error, and the means with their 95 % intervals over patients. A scan where
        a metric is not defined (lesions kept without lesions) does not count for it.
    """
    return _grouped_means(
        _of_split(scores, split),
        ["data_set", "method"],
        CLAIM_METRICS,
        seed=seed,
        repetitions=repetitions,
    )


def segmentation_by_class_table(
    scores: pd.DataFrame, *, seed: int, split: str | None = TEST, repetitions: int = REPETITIONS
) -> pd.DataFrame:
    """The same for the scans of each label: does a method fail where the lung is ill?

    Args:
        scores: as in :func:`segmentation_claim_table`, with ``label``; scans without a label count
            as unlabelled.
        seed: of the bootstrap.
        split: rows to use; all without it.
        repetitions: of the bootstrap.

    Returns:
        One row per data set, label and method with the columns ``CLASS_METRICS``.
    """
    used = _of_split(scores, split)
    used = used.assign(label=used["label"].fillna(UNLABELLED))
    used = used.sort_values("label", kind="stable")
    keys = ["data_set", "label", "method"]
    return _grouped_means(used, keys, CLASS_METRICS, seed=seed, repetitions=repetitions)


def segmentation_tables(scores: pd.DataFrame, *, seed: int) -> dict[str, tuple[pd.DataFrame, str]]:
    """All tables of lung masks against true ones, by name, each with its caption.

    Args:
        scores: of :func:`read_score_tables`.
        seed: of the intervals.
    """
    about = "Test part, means with 95 % intervals over patients."
    return {
        name: (build(scores, seed=seed), caption)
        for name, build, caption in (
            (
                "segmentation",
                segmentation_table,
                "Lung segmentation on the test part: means with 95 % intervals over patients.",
            ),
            (
                "segmentation_claim",
                segmentation_claim_table,
                f"What SAM2CLIP2SAM claims, measured. {about}",
            ),
            (
                "segmentation_by_class",
                segmentation_by_class_table,
                f"The same for each label. {about}",
            ),
            (
                "segmentation_paired",
                segmentation_paired_table,
                "Method less reference on the same scans. p: Wilcoxon's signed-rank test on the "
                "means per patient, after Holm's correction over all comparisons of the data set. "
                f"{about}",
            ),
        )
    }


def ablation_table(
    scores: pd.DataFrame, *, seed: int, repetitions: int = REPETITIONS
) -> pd.DataFrame:
    """What changing one setting of a segmenter does on the same slices.

    Args:
        scores: one row per data set, variant and scan with ``data_set``, ``variant``, ``scan_id``,
            ``patient_id``, ``dice``, ``iou`` and ``empty``; each data set's first variant is the
            one that the others change.
        seed: of the bootstrap.
        repetitions: of the bootstrap.

    Returns:
        One row per data set and variant, in order: means with their 95 % intervals over patients,
        among them ``dice_change``, the paired difference from the first variant.
    """
    first = scores.groupby(["data_set", "scan_id"], sort=False)["dice"].transform("first")
    changed = scores.assign(dice_change=scores["dice"] - first)
    keys = ["data_set", "variant"]
    table = _grouped_means(changed, keys, ABLATION_METRICS, seed=seed, repetitions=repetitions)
    return table.drop(columns="distance_unit")


def _grouped_means(
    scores: pd.DataFrame,
    keys: Sequence[str],
    metrics: Sequence[str],
    *,
    seed: int,
    repetitions: int,
) -> pd.DataFrame:
    """Means with intervals of each group of rows, groups in order of appearance."""
    rows = []
    for group, part in scores.groupby(list(keys), sort=False):
        statistic = partial(mean_statistic, columns=[name for name in metrics if name in part])
        cells = _interval_cells(part, statistic, metrics, seed=seed, repetitions=repetitions)
        rows.append(dict(zip(keys, group, strict=True)) | _counts(part) | cells)
    bounds = [name + suffix for name in metrics for suffix in ("", LOW, HIGH)]
    return pd.DataFrame(rows, columns=[*keys, "n", "patients", "distance_unit", *bounds])


def segmentation_paired_table(
    scores: pd.DataFrame, *, seed: int, split: str | None = TEST, repetitions: int = REPETITIONS
) -> pd.DataFrame:
    """Differences between methods on the same scans, and whether they could be chance.

    Every method is compared with ``REFERENCE_METHOD``, or where a data set lacks it with the first
    one. Holm's correction takes all comparisons of a data set, over methods and metrics, together.

    Args:
        scores: as in :func:`segmentation_claim_table`, with the columns ``PAIRED_METRICS``.
        seed: of the bootstrap.
        split: rows to use; all without it.
        repetitions: of the bootstrap.

    Returns:
        One row per data set, metric and method: on how many scans and patients both have the
        metric; ``difference`` of the means, method less reference, with its paired 95 % interval
        over patients; ``p_value`` of Wilcoxon's signed-rank test on the means per patient,
        ``p_holm`` after correction, and over how many ``comparisons``.
    """
    tables = [_paired_columns(pd.DataFrame())]
    for data_set, part in _of_split(scores, split).groupby("data_set", sort=False):
        methods = dict(list(part.groupby("method", sort=False)))
        reference = REFERENCE_METHOD if REFERENCE_METHOD in methods else next(iter(methods))
        rows = [
            {"data_set": data_set, "metric": heading(metric), "method": method}
            | {"reference": reference}
            | _paired_row(rows, methods[reference], metric, seed=seed, repetitions=repetitions)
            for metric in PAIRED_METRICS
            for method, rows in methods.items()
            if method != reference and metric in part
        ]
        table = _paired_columns(pd.DataFrame(rows))
        table["p_holm"] = holm_adjusted(table["p_value"])
        tables.append(table.assign(comparisons=int(table["p_value"].notna().sum())))
    filled = [table for table in tables if len(table)]
    return pd.concat(filled or tables, ignore_index=True)


def _paired_columns(table: pd.DataFrame) -> pd.DataFrame:
    """The columns of the paired table in their order; those that are missing are empty."""
    names = ["data_set", "metric", "method", "reference", "n", "patients", "difference"]
    names += ["difference" + LOW, "difference" + HIGH, *P_VALUES, "comparisons"]
    return table.reindex(columns=names)


def _paired_row(
    ours: pd.DataFrame, theirs: pd.DataFrame, metric: str, *, seed: int, repetitions: int
) -> dict[str, float]:
    """One method against the reference on one metric, on the scans where both have it."""
    keys = ["scan_id", "patient_id"]
    pairs = ours[[*keys, metric]].merge(theirs[[*keys, metric]], on=keys, suffixes=("", "_theirs"))
    finite = np.isfinite(pairs[[metric, metric + "_theirs"]].to_numpy(np.float64)).all(axis=1)
    pairs = pairs[finite]
    first = pairs[keys].assign(difference=pairs[metric].astype(np.float64))
    second = pairs[keys].assign(difference=pairs[metric + "_theirs"].astype(np.float64))
    cells = dict.fromkeys(("difference", "difference" + LOW, "difference" + HIGH), np.nan)
    if len(pairs):
        mean = partial(mean_statistic, columns=["difference"])
        interval = bootstrap_difference(first, second, mean, seed=seed, repetitions=repetitions)
        cells = dict(zip(cells, interval.loc["difference", ["value", "low", "high"]], strict=True))
    gaps = first["difference"] - second["difference"]
    test = {"p_value": signed_rank_test(gaps, pairs["patient_id"])}
    return {"n": len(pairs), "patients": pairs["patient_id"].nunique()} | cells | test


def classification_table(
    predictions: Mapping[SystemRun, pd.DataFrame | None],
    published: pd.DataFrame,
    *,
    positive: str,
    columns: Sequence[str],
    seed: int,
    split: str = TEST,
    thresholds: Mapping[SystemRun, float] | None = None,
    published_as: Mapping[str, str] | None = None,
    not_measured: str = NOT_RUN,
    repetitions: int = REPETITIONS,
) -> pd.DataFrame:
    """Each system's scores with the published ones beside them.

    Args:
        predictions: in the order of the rows, for each system its predictions with the column
            ``patient_id``; None for a system that was not run.
        published: published values as ``lib.reporting.published.published_values`` returns them,
            of one table, so that a system, segmentation and metric occur once.
        positive: the class to detect.
        columns: the scores to show, named as in
            ``lib.evaluation.classification.classification_scores``.
        seed: of the bootstrap.
        split: rows to use.
        thresholds: of the systems that do not use 0.5; see ``choose_threshold``.
        published_as: name in the published table of systems that are called otherwise here.
        not_measured: what the row of a system that was not run says.
        repetitions: of the bootstrap.

    Returns:
        One row per system with ``data_set`` (measured on), ``n``, ``n_positive``, the scores with
        95 % intervals over patients and published values (all fractions), ``published_on``, the
        remarks on the published values, and ``not_measured``, empty where it was.

    Raises:
        ValueError: when predictions are invalid, or when a published value occurs twice.
    """
    rows = []
    for run, table in predictions.items():
        threshold = (thresholds or {}).get(run, DEFAULT_THRESHOLD)
        statistic = partial(classification_statistic, positive=positive, threshold=threshold)
        tested = tested_rows(run, table, split)
        cells = _interval_cells(tested, statistic, columns, seed=seed, repetitions=repetitions)
        is_positive = tested["label"] == positive
        counts = {"n": len(tested), "n_positive": int(is_positive.sum())}
        named = run._replace(system=(published_as or {}).get(run.system, run.system))
        why = reason(len(tested), table, not_measured)
        rows.append(
            run._asdict()
            | counts
            | with_published(cells, columns, published_of(published, named))
            | {NOT_MEASURED: why}
        )
    return pd.DataFrame(rows)


def reason(measured: int, predictions: pd.DataFrame | None, not_measured: str) -> str:
    """Why nothing was measured; empty where something was.

    Args:
        measured: number of scans.
        predictions: of the system; None where it was not run.
        not_measured: what to say then.
    """
    if measured:
        return ""
    return not_measured if predictions is None else NO_LABELS


def tested_rows(run: SystemRun, predictions: pd.DataFrame | None, split: str) -> pd.DataFrame:
    """The checked rows of a split; no row for a system that was not run.

    A published test part may come without labels (COV19-CT-DB's does): it has no rows either.

    Args:
        run: named where the predictions are at fault.
        predictions: of that system; None where it was not run.
        split: rows to use.

    Raises:
        ValueError: when predictions are invalid.
    """
    if predictions is None:
        return pd.DataFrame(columns=["label", "patient_id"])
    try:
        validate_predictions(predictions)
    except ValueError as error:
        raise ValueError(f"{' / '.join(run)}: {error}") from error
    return predictions[predictions["split"] == split]


def published_of(published: pd.DataFrame, run: SystemRun) -> pd.DataFrame:
    """The published values of a system with its segmentation, on whatever data set.

    Args:
        published: published values of one table.
        run: the system, as that table calls it.

    Returns:
        Its rows, by metric.

    Raises:
        ValueError: when a metric occurs twice.
    """
    same = (published["system"] == run.system) & (published["segmentation"] == run.segmentation)
    values = published[same].set_index("metric")
    if not values.index.is_unique:
        raise ValueError(f"published values of {' / '.join(run)} occur twice; give one table")
    return values


def with_published(
    cells: Mapping[str, float], columns: Sequence[str], published: pd.DataFrame
) -> dict:
    """Cells with the published value behind each score, and their data set and remarks.

    Args:
        cells: scores and their ``_low`` and ``_high``.
        columns: the scores.
        published: the published values of the row, by metric.
    """
    row = {}
    for column in columns:
        row |= {name: cells[name] for name in (column, column + LOW, column + HIGH)}
        row[column + PUBLISHED] = published["fraction"].get(column, np.nan)
    shown = published[published.index.isin(columns)]
    return row | {
        "published_on": "; ".join(dict.fromkeys(shown["data_set"])),
        "remarks": _joined_remarks(shown["remark"]),
    }


def _joined_remarks(remarks: pd.Series) -> str:
    """Each remark once, behind the published metrics that it is about."""
    parts = []
    for text in dict.fromkeys(remarks[remarks != ""]):
        about = remarks.index[remarks == text]
        who = "all" if len(about) == len(remarks) else ", ".join(map(heading, about))
        parts.append(f"{who}: {text}")
    return "; ".join(parts)


def _interval_cells(
    frame: pd.DataFrame,
    statistic: Statistic,
    columns: Sequence[str],
    *,
    seed: int,
    repetitions: int,
) -> dict[str, float]:
    """Value, low and high of each column; nan where nothing was measured."""
    names = ["value", "low", "high"]
    intervals = pd.DataFrame(columns=names, dtype=np.float64)
    if len(frame):
        intervals = bootstrap_interval(frame, statistic, seed=seed, repetitions=repetitions)
    cells = intervals.reindex(index=list(columns), columns=names)
    return {
        column + suffix: float(cells.at[column, name])
        for column in columns
        for name, suffix in zip(names, ("", LOW, HIGH), strict=True)
    }


def heading(column: str) -> str:
    """A column's name for people, for example ``"Macro F1, published"``."""
    if column.endswith(PUBLISHED) and column not in HEADINGS:
        return f"{heading(column.removesuffix(PUBLISHED))}, published"
    if column in HEADINGS:
        return HEADINGS[column]
    prefixes = (("f1_", "F1"), ("sensitivity_", "Sensitivity"), ("precision_", "Precision"))
    for prefix, label in prefixes:
        if column.startswith(prefix):
            return f"{label} ({column.removeprefix(prefix).replace('_', '-')})"
    text = column.replace("_", " ")
    return text[:1].upper() + text[1:]


def printable(table: pd.DataFrame, *, decimals: int = DECIMALS) -> pd.DataFrame:
    """A table of text for people, as the Markdown and LaTeX files show it.

    Args:
        table: as the builders return it.
        decimals: of fractional numbers; published ones keep the digits they were printed with.

    Returns:
        Text cells under readable headings: value and interval in one cell, ``not run`` (or what
        the column ``not_measured`` says) where n is 0, a dash where a value does not exist. Columns
        about published values are left out where there is none at all.
    """
    hidden = {name + suffix for name in table.columns for suffix in (LOW, HIGH)} | {NOT_MEASURED}
    hidden |= {name for name in table.columns if _about_published(name) and _empty(table[name])}
    shown = [name for name in table.columns if name not in hidden]
    not_run = table["n"].eq(0) if "n" in table else pd.Series(False, index=table.index)
    why = table.get(NOT_MEASURED, pd.Series(NOT_RUN, index=table.index))
    cells = {}
    for name in shown:
        digits = PUBLISHED_DECIMALS if name.endswith(PUBLISHED) else decimals
        values = table[name].astype(float) if name + LOW in table else table[name]
        text = [_p_value(v) if name in P_VALUES else _number(v, digits) for v in values]
        if name + LOW in table:
            bounds_of = zip(text, table[name + LOW], table[name + HIGH], strict=True)
            text = [_with_interval(*cell, decimals=decimals) for cell in bounds_of]
            text = np.where(not_run, why, text).tolist()
        cells[heading(name)] = text
    return pd.DataFrame(cells, dtype=object)


def _about_published(name: str) -> bool:
    return name.endswith(PUBLISHED) or name in ("published_on", "remarks")


def _empty(column: pd.Series) -> bool:
    return bool((column.isna() | column.eq("")).all())


def _number(value: object, decimals: int) -> str:
    """A cell as text: counts whole, fractions rounded, a dash for nothing."""
    if pd.isna(value) or value == "":
        return UNDEFINED
    if isinstance(value, float | np.floating):
        return f"{value:.{decimals}f}"
    return str(value)


def _p_value(value: float) -> str:
    """A p-value as text; very small ones as a bound."""
    return f"< {SMALLEST_P_VALUE}" if value < SMALLEST_P_VALUE else _number(value, 3)


def _with_interval(text: str, low: float, high: float, *, decimals: int) -> str:
    """A value followed by its interval, where it has one."""
    if pd.isna(low) or pd.isna(high):
        return text
    return f"{text} [{low:.{decimals}f}, {high:.{decimals}f}]"


def write_table(
    table: pd.DataFrame, folder: Path, name: str, caption: str, *, decimals: int = DECIMALS
) -> list[Path]:
    """Write a table as CSV, Markdown and LaTeX.

    Each file appears whole or not at all, and the same table gives the same bytes.

    Args:
        table: as the builders return it.
        folder: made where it does not exist.
        name: of the files, without ending, for example ``"sam2clip2sam_table1"``.
        caption: one or two sentences of plain text; one more is added where an interval is missing.
        decimals: of the Markdown and LaTeX files; CSV keeps every digit.

    Returns:
        The three files.

    Raises:
        ValueError: when the name is a path.
    """
    if Path(name).name != name:
        raise ValueError(f"a table's name is no path, got {name}")
    if _without_interval(table):
        caption = f"{caption} {WITHOUT_INTERVAL}"
    text = printable(table, decimals=decimals)
    contents = {
        "csv": table.to_csv(index=False, lineterminator="\n"),
        "md": _markdown(text, caption),
        "tex": _latex(text, caption, name),
    }
    files = []
    for ending, content in contents.items():
        file = folder / f"{name}.{ending}"
        with whole_file(file) as partial_file:
            partial_file.write_text(content, encoding="utf-8", newline="\n")
        files.append(file)
    return files


def _without_interval(table: pd.DataFrame) -> bool:
    """Whether a measured value of a table with intervals has none."""
    bounded = [name for name in table.columns if name + LOW in table]
    return any((table[name].notna() & table[name + LOW].isna()).any() for name in bounded)


def publish_table(
    table: pd.DataFrame, folder: Path, name: str, caption: str, *, decimals: int = DECIMALS
) -> str:
    """Write a table as `write_table` does, and give the text of its Markdown file."""
    _, markdown, _ = write_table(table, folder, name, caption, decimals=decimals)
    return markdown.read_text(encoding="utf-8")


def _markdown(text: pd.DataFrame, caption: str) -> str:
    """A pipe table under its caption."""
    escaped = text.rename(columns=_escape_pipes).map(_escape_pipes)
    table = escaped.to_markdown(index=False, disable_numparse=True)
    return f"**{caption}**\n\n{table}\n"


def _escape_pipes(cell: str) -> str:
    return cell.replace("|", "\\|")


def _latex(text: pd.DataFrame, caption: str, name: str) -> str:
    """A booktabs table; it needs the LaTeX packages booktabs and, where wide, graphicx."""
    widest = [max([len(name), *map(len, text[name])]) for name in text]
    columns = ("p{4cm}" if width > LATEX_WIDEST_CELL else "l" for width in widest)
    source = text.to_latex(
        index=False,
        escape=True,
        caption=caption.translate(_LATEX_ESCAPES),
        label=f"tab:{name}",
        position="htbp",
        column_format="".join(columns),
    )
    if sum(widest) <= LATEX_WIDEST_TABLE:
        return source
    shrunk = source.replace(r"\begin{tabular}", "\\resizebox{\\textwidth}{!}{%\n\\begin{tabular}")
    return shrunk.replace(r"\end{tabular}", r"\end{tabular}}")
