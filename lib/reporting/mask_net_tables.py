"""Score tables of COVID-CT-Mask-Net: its tables 4 to 7 and 9, and the diagnosis of scans.

Where scores are published, a row is one score of one system, as nine scores side by side, each with
its interval and published value, could not be read. With one seed an interval draws patients; with
several it is Student's of the mean over the seeds, see `lib.evaluation.repeated`.

The paper prints the mean of the sensitivities as its F1 (FACTS 5.3); it stands here by its own
name, balanced accuracy, beside the macro F1.
"""

import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.data.pictures import CLASSES, REMAINING
from lib.data.splits import TEST, TRAIN, VALIDATION
from lib.evaluation.calibration import expected_calibration_error
from lib.evaluation.classification import (
    attach_patients,
    class_names,
    classification_scores,
    identifier_column,
    probability_matrix,
    read_predictions,
)
from lib.evaluation.repeated import repeated_scores
from lib.evaluation.statistics import REPETITIONS
from lib.reporting.effects import Comparison, effect_table
from lib.reporting.published import NO_SEGMENTATION
from lib.reporting.tables import (
    HIGH,
    LOW,
    NOT_MEASURED,
    NOT_RUN,
    PUBLISHED,
    SystemRun,
    heading,
    published_of,
)

POSITIVE = "covid"
PICTURE, SCAN = "picture", "scan"  # what a system judges
MEASURED, OWN = "measured", "own"  # names of columns, with the suffix of what is published
NO_PICTURES = "no labelled picture in this part"
NOTHING_LEFT = "this data set leaves no picture over"
DIFFERENCES = ("accuracy", "balanced_accuracy", "sensitivity_covid")
RUN_FILE = re.compile(r"(\w+)_seed(\d+)")
MEAN_SENSITIVITY = "Balanced accuracy (printed as F1)"
# Of the positive class in classification_scores, by class in what competitors say of themselves.
OF_POSITIVE = {"specificity": "specificity_covid", "roc_auc": "roc_auc_covid"}
PRECISIONS = ("AP@0.5", "AP@0.75", "mAP")
PAPER_RULE, COCO_RULE = "paper", "coco"
CALIBRATION = {"before": "before calibration", "after": "after calibration"}  # of diagnoses
SCAN_SCORES = (
    "accuracy", "macro_f1", "sensitivity_control", "sensitivity_pneumonia", "sensitivity_covid",
)  # fmt: skip

Runs = Mapping[str, Mapping[str, pd.DataFrame]]  # by data set and system, all seeds together


class SystemRow(NamedTuple):
    """A system of a table.

    Attributes:
        system: as printed.
        run: name of its predictions without the seed.
        published: as the published table calls it; empty where it has no row there.
        own: as `published.MASK_NET_OWN` calls it; empty where it has no publication of its own.
        level: ``picture`` or ``scan``, whichever it judges.
    """

    system: str
    run: str
    published: str = ""
    own: str = ""
    level: str = PICTURE


def read_picture_runs(
    folder: Path,
    pictures: Mapping[str, pd.DataFrame],
    *,
    systems: Container[str],
    seeds: Container[int],
    of_scans: Container[str] = (),
    kind: str = "pictures",
) -> dict[str, dict[str, pd.DataFrame]]:
    """Predictions of this study's systems; files of others are left alone.

    Args:
        folder: holds ``<data set>/<kind>/<system>_seed<k>.csv``.
        pictures: list of pictures of each data set (`lib.data.pictures`).
        systems: to read.
        seeds: likewise.
        of_scans: those of the systems that judge scans, see `judged_scans`.
        kind: ``pictures``, or ``diagnoses`` of scans.

    Returns:
        By data set and system the rows of all seeds, with ``patient_id`` and ``seed``.

    Raises:
        ValueError: if a file is no predictions table, or names what the list does not have.
    """
    found: dict[str, dict[str, pd.DataFrame]] = {}
    for data_set, listed in pictures.items():
        patients = {"image_id": listed, "scan_id": listed.drop_duplicates("scan_id")}
        parts: dict[str, list[pd.DataFrame]] = {}
        for path in sorted((folder / data_set / kind).glob("*.csv")):
            name = RUN_FILE.fullmatch(path.stem)
            if not name or name[1] not in systems or int(name[2]) not in seeds:
                continue
            table = read_predictions(path)
            table = attach_patients(table, patients[identifier_column(table)])
            parts.setdefault(name[1], []).append(table.assign(seed=int(name[2])))
        found[data_set] = {
            system: pd.concat(tables, ignore_index=True) for system, tables in parts.items()
        }
        for system in filter(of_scans.__contains__, found[data_set]):
            found[data_set][system] = judged_scans(found[data_set][system], listed)
    return found


def judged_scans(predictions: pd.DataFrame, pictures: pd.DataFrame) -> pd.DataFrame:
    """One row per scan of a system that gives all pictures of a scan the judgement of the scan.

    Args:
        predictions: one row per picture and seed, of `read_picture_runs`.
        pictures: list of pictures of the data set.

    Returns:
        The same columns with ``scan_id`` instead of ``image_id``.

    Raises:
        ValueError: if pictures of a scan differ in label or judgement.
    """
    scans = predictions["image_id"].map(pictures.set_index("image_id")["scan_id"])
    rows = predictions.drop(columns="image_id").assign(scan_id=scans).drop_duplicates()
    twice = rows.duplicated(["scan_id", "split", "seed"])
    if twice.any():
        raise ValueError(
            f"pictures of scan {rows.loc[twice, 'scan_id'].iloc[0]} differ in label or "
            "probability, so it has no single row"
        )
    return rows.reset_index(drop=True)


def picture_score_table(
    runs: Runs,
    rows: Sequence[SystemRow],
    published: pd.DataFrame,
    *,
    data_sets: Sequence[str],
    metrics: Sequence[str],
    seed: int,
    own: pd.DataFrame | None = None,
    not_measured: str = NOT_RUN,
    repetitions: int = REPETITIONS,
) -> pd.DataFrame:
    """Scores of systems on the test part, the published ones beside them, one score per row.

    Args:
        runs: of `read_picture_runs`.
        rows: the systems, in their order.
        published: published values of one table.
        data_sets: to have rows for.
        metrics: scores as in ``classification_scores``.
        seed: of the bootstrap.
        own: what systems say of themselves in their own publications.
        not_measured: what a row says whose run is not there.
        repetitions: of the bootstrap.

    Returns:
        One row per data set, score and system: ``n`` (pictures or scans, whatever the number of
        ``seeds``), ``measured`` with its interval and published value, ``published_on``,
        ``remarks`` and ``not_measured``. Where ``own`` is given, ``run``, ``level`` and
        ``own_published`` too.

    Raises:
        ValueError: if a published value occurs twice.
    """
    table = []
    for data_set in data_sets:
        found = _scores_of(runs.get(data_set, {}), rows, [TEST], metrics, seed, repetitions)
        for metric in metrics:
            for row in rows:
                about = {"data_set": data_set, "score": score_name(metric), "system": row.system}
                if own is not None:
                    about |= {"run": row.run, "level": row.level}
                cells = _cells(found, row, TEST, [metric], not_measured)
                for suffix in ("", LOW, HIGH):
                    cells[MEASURED + suffix] = cells.pop(metric + suffix)
                table.append(about | cells | _stated(row, metric, published, own))
    return _reasons_last(pd.DataFrame(table))


def plain_score_table(
    runs: Runs,
    rows: Sequence[SystemRow],
    *,
    data_sets: Sequence[str],
    metrics: Sequence[str],
    seed: int,
    parts: Sequence[str] = (TEST,),
    not_measured: str = NOT_RUN,
    repetitions: int = REPETITIONS,
) -> pd.DataFrame:
    """Scores of which nothing is published, side by side: table 9 and more.

    Args:
        runs: as for `picture_score_table`.
        rows: likewise.
        data_sets: likewise.
        metrics: likewise.
        seed: likewise.
        parts: of the data sets; of more than one, each row names its part.
        not_measured: likewise.
        repetitions: likewise.

    Returns:
        One row per data set, part and system: ``n``, ``seeds``, the scores with intervals and
        ``not_measured``.
    """
    table = []
    for data_set in data_sets:
        found = _scores_of(runs.get(data_set, {}), rows, parts, metrics, seed, repetitions)
        for part in parts:
            for row in rows:
                about = {"data_set": data_set, "part": part, "system": row.system, "run": row.run}
                table.append(about | _cells(found, row, part, metrics, not_measured))
    hidden = ["run", "part"] if len(parts) == 1 else ["run"]
    return _reasons_last(pd.DataFrame(table).drop(columns=hidden))


def score_name(metric: str) -> str:
    """A score for people."""
    return MEAN_SENSITIVITY if metric == "balanced_accuracy" else heading(metric)


def _scores_of(
    frames: Mapping[str, pd.DataFrame],
    rows: Sequence[SystemRow],
    parts: Sequence[str],
    metrics: Sequence[str],
    seed: int,
    repetitions: int,
) -> dict[str, dict[str, dict]]:
    """Scores by run and part; no part for a run without labelled rows there.

    Scores of a class that the data set does not have are left out.
    """
    scores: dict[str, dict[str, dict]] = {}
    for run in (row.run for row in rows if row.run in frames):
        used = frames[run][frames[run]["split"].isin(parts)]
        scores[run] = {}
        if len(used):
            absent = tuple(f"_{name}" for name in CLASSES if name not in class_names(used))
            there = [name for name in metrics if not name.endswith(absent)]
            options = {"metrics": there, "positive": POSITIVE, "seed": seed}
            table = repeated_scores(used, keys=["split"], repetitions=repetitions, **options)
            counts = used.groupby("split")[identifier_column(used)].nunique()
            table["n"] = table["split"].map(counts)  # not times seeds
            scores[run] = {found["split"]: found for found in table.to_dict("records")}
    return scores


def _cells(
    scores: Mapping[str, Mapping[str, Mapping]],
    row: SystemRow,
    part: str,
    metrics: Sequence[str],
    not_measured: str,
) -> dict:
    """Counts, scores with intervals, and the reason where there are none."""
    names = [metric + suffix for metric in metrics for suffix in ("", LOW, HIGH)]
    found = scores.get(row.run, {}).get(part)
    if found is None:
        why = NO_PICTURES if row.run in scores else not_measured
        return {"n": 0, "seeds": 0, **dict.fromkeys(names, np.nan), NOT_MEASURED: why}
    return {name: found.get(name, np.nan) for name in ("n", "seeds", *names)} | {NOT_MEASURED: ""}


def _stated(row: SystemRow, metric: str, published: pd.DataFrame, own: pd.DataFrame | None) -> dict:
    """What is published of a score, and on what."""
    places = {MEASURED + PUBLISHED: (published, row.published, metric)}
    if own is not None:
        places[OWN + PUBLISHED] = (own, row.own, OF_POSITIVE.get(metric, metric))
    found = {column: _published_cell(*place) for column, place in places.items()}
    return _published_cells(found)


def _published_cells(found: Mapping[str, pd.Series | None]) -> dict:
    """Published values by column, what they were measured on, and what is remarked on them."""
    known = [cell for cell in found.values() if cell is not None]
    fractions = {
        column: np.nan if cell is None else cell["fraction"] for column, cell in found.items()
    }
    return fractions | {
        "published_on": "; ".join(dict.fromkeys(cell["data_set"] for cell in known)),
        "remarks": "; ".join(dict.fromkeys(cell["remark"] for cell in known if cell["remark"])),
    }


def _published_cell(values: pd.DataFrame, system: str, metric: str) -> pd.Series | None:
    """A published value, None where there is none."""
    found = published_of(values, SystemRun(system, NO_SEGMENTATION, ""))
    return found.loc[metric] if metric in found.index else None


def _reasons_last(table: pd.DataFrame) -> pd.DataFrame:
    """The table with what was not measured at its end."""
    return table[[name for name in table if name != NOT_MEASURED] + [NOT_MEASURED]]


def best_variant(frames: Mapping[str, pd.DataFrame], variants: Sequence[str]) -> str:
    """The variant that the paper calls its best: of highest sensitivity to COVID-19.

    It is chosen on the validation part here, so that the test part says something new of it; where
    the paper chose it is not said. Of equals the one of higher mean sensitivity, then the first.
    One that was not run is never it, unless none was.

    Args:
        frames: predictions of a data set by system, all seeds together.
        variants: systems to choose from.
    """

    def rank(variant: str) -> tuple[float, float]:
        if variant not in frames:
            return (-1.0, -1.0)
        frame = frames[variant]
        found = [
            classification_scores(
                part["label"],
                probability_matrix(part),
                positive=POSITIVE,
                classes=class_names(part),
            )
            for _, part in frame[frame["split"] == VALIDATION].groupby("seed")
        ]
        means = pd.DataFrame(found).reindex(columns=["sensitivity", "balanced_accuracy"]).mean()
        return tuple(np.nan_to_num(means.to_numpy(), nan=-0.5))

    return max(variants, key=rank)


def benchmark_table(
    runs: Runs,
    variants: Sequence[str],
    comparators: Sequence[SystemRow],
    published: pd.DataFrame,
    *,
    data_sets: Sequence[str],
    best: str,
    **options: object,
) -> pd.DataFrame:
    """Table 5: the best variant beside other systems.

    Args:
        runs: as for `picture_score_table`.
        variants: systems of which `best_variant` is taken, of each data set its own.
        comparators: the other systems.
        published: values of table 5.
        data_sets: to have rows for.
        best: name of the best variant in the published table.
        options: of `picture_score_table`; ``own`` among them.

    Returns:
        As `picture_score_table`; ``run`` says which variant is the best.
    """
    tables = []
    for data_set in data_sets:
        chosen = SystemRow(best, best_variant(runs.get(data_set, {}), variants), best)
        rows = [chosen, *comparators]
        part = {"data_sets": [data_set], **options}
        tables.append(picture_score_table(runs, rows, published, **part))
    return pd.concat(tables, ignore_index=True)


def remaining_table(
    runs: Runs,
    rows: Sequence[SystemRow],
    pictures: Mapping[str, pd.DataFrame],
    **options: object,
) -> pd.DataFrame:
    """Table 7: scores on the pictures that were left over when the training part was drawn.

    Their patients are those of training, so the scores say how well a system knows other slices of
    patients that it has seen, and nothing about new ones. The column ``patients_also_trained``
    counts them.

    Args:
        runs: as for `picture_score_table`.
        rows: likewise.
        pictures: list of pictures of each data set.
        options: of `plain_score_table`; ``data_sets`` among them.

    Returns:
        As `plain_score_table`.
    """
    table = plain_score_table(runs, rows, parts=[REMAINING], **options)
    seen = {name: _also_trained(listed) for name, listed in pictures.items()}
    place = table.columns.get_loc("n") + 1
    table.insert(place, "patients_also_trained", table["data_set"].map(seen))
    empty = table["patients_also_trained"].eq("")
    table.loc[empty, NOT_MEASURED] = NOTHING_LEFT
    return table


def _also_trained(pictures: pd.DataFrame) -> str:
    """How many patients of remaining pictures have pictures in training too; empty without any."""
    left, trained = (
        set(pictures.loc[pictures["split"] == split, "patient_id"]) for split in (REMAINING, TRAIN)
    )
    return f"{len(left & trained)} of {len(left)}" if left else ""


def read_lesion_scores(
    scores: Path, data_sets: Sequence[str], configurations: Sequence[str]
) -> pd.DataFrame:
    """Average precisions of the lesion models.

    Args:
        scores: holds ``<data set>/lesions/<configuration>/summary.csv`` with rule, metric, value,
            low, high and n.
        data_sets: to read.
        configurations: likewise.

    Returns:
        Their rows with ``data_set`` and ``configuration``; no row where there is no file.
    """
    columns = ["data_set", "configuration", "rule", "metric", "value", "low", "high", "n"]
    tables = [pd.DataFrame(columns=columns)]
    for data_set in data_sets:
        for configuration in configurations:
            path = scores / data_set / "lesions" / configuration / "summary.csv"
            if path.exists():
                about = {"data_set": data_set, "configuration": configuration}
                tables.append(pd.read_csv(path).assign(**about)[columns])
    return pd.concat(tables[1:] or tables, ignore_index=True)


def lesion_table(
    scores: pd.DataFrame,
    systems: Mapping[str, str],
    published: Mapping[str, pd.DataFrame],
    *,
    data_sets: Sequence[str],
    not_measured: str = NOT_RUN,
) -> pd.DataFrame:
    """Table 6: average precision of lesions, by the paper's rule and by COCO's.

    Args:
        scores: of `read_lesion_scores`.
        systems: printed name of each configuration, as the published values call it where they do.
        published: values of the paper and of the README, by the name of the column that they give.
        data_sets: to have rows for.
        not_measured: what a row says whose model was not scored.

    Returns:
        One row per data set, metric and configuration: ``n`` (images), ``paper_rule`` and
        ``coco_rule`` with intervals, what is published (by the paper's rule), ``published_on`` and
        ``remarks``.
    """
    keys = ["data_set", "configuration", "metric", "rule"]
    found = scores.set_index(keys)[["value", "low", "high", "n"]]
    table = []
    for data_set in data_sets:
        for metric in PRECISIONS:
            for configuration, system in systems.items():
                key = (data_set, configuration, metric)
                cells = _precision_cells(found, key)
                cells[NOT_MEASURED] = "" if cells["n"] else not_measured
                about = {"data_set": data_set, "score": metric, "system": system}
                stated = _lesions_stated(published, system, metric)
                table.append(about | {"configuration": configuration} | cells | stated)
    return _reasons_last(pd.DataFrame(table))


def _precision_cells(found: pd.DataFrame, key: tuple[str, str, str]) -> dict:
    """Number of images, and value and interval by each rule."""
    cells = {"n": 0}
    for rule in (PAPER_RULE, COCO_RULE):
        names = [f"{rule}_rule{suffix}" for suffix in ("", LOW, HIGH)]
        cells |= dict.fromkeys(names, np.nan)
        if (*key, rule) in found.index:
            row = found.loc[(*key, rule)]
            cells |= dict(zip(names, row[["value", "low", "high"]], strict=True))
            cells["n"] = int(row["n"])
    return cells


def _lesions_stated(published: Mapping[str, pd.DataFrame], system: str, metric: str) -> dict:
    """Published precisions of a system, by column, and what is remarked on them."""
    return _published_cells(
        {
            column + PUBLISHED: _published_cell(values, system, metric)
            for column, values in published.items()
        }
    )


def scan_table(
    runs: Runs,
    rows: Sequence[SystemRow],
    calibration: pd.DataFrame,
    *,
    data_sets: Sequence[str],
    seed: int,
    not_measured: str = NOT_RUN,
    repetitions: int = REPETITIONS,
) -> pd.DataFrame:
    """Diagnoses of scans from their slices, where the paper stops: scores on the test part.

    Args:
        runs: diagnoses, of `read_picture_runs`.
        rows: the systems.
        calibration: of `read_calibration`.
        data_sets: to have rows for.
        seed: of the bootstrap.
        not_measured: what a row says whose run is not there.
        repetitions: of the bootstrap.

    Returns:
        One row per data set and system: ``n`` scans, ``seeds``, the scores with intervals, and the
        expected calibration error before and after calibration, the mean over seeds.
    """
    options = {"seed": seed, "not_measured": not_measured, "repetitions": repetitions}
    table = plain_score_table(runs, rows, data_sets=data_sets, metrics=SCAN_SCORES, **options)
    runs_of = pd.MultiIndex.from_product([data_sets, [row.run for row in rows]])
    errors = calibration.groupby(["data_set", "run"])[["before", "after"]].mean().reindex(runs_of)
    for name in errors:
        table[f"calibration_error_{name}"] = errors[name].to_numpy()
    return _reasons_last(table)


def read_calibration(
    scores: Path, data_sets: Sequence[str], systems: Container[str], seeds: Container[int]
) -> pd.DataFrame:
    """How far confidence and accuracy of diagnoses are apart, before and after calibration.

    Args:
        scores: holds ``<data set>/diagnoses/<system>_seed<k>/calibration.csv``, of
            `lib.evaluation.calibration.reliability_by_part`.
        data_sets: to read.
        systems: likewise.
        seeds: likewise.

    Returns:
        One row per data set, ``run`` and ``seed``: ``before`` and ``after``, on the test part.
    """
    rows = []
    for data_set in data_sets:
        for path in sorted((scores / data_set / "diagnoses").glob("*/calibration.csv")):
            name = RUN_FILE.fullmatch(path.parent.name)
            if name and name[1] in systems and int(name[2]) in seeds:
                table = pd.read_csv(path)
                tested = dict(list(table[table["split"] == TEST].groupby("system")))
                about = {"data_set": data_set, "run": name[1], "seed": int(name[2])}
                errors = {
                    column: expected_calibration_error(tested[system])
                    for column, system in CALIBRATION.items()
                    if system in tested
                }
                rows.append(about | errors)
    return pd.DataFrame(rows, columns=["data_set", "run", "seed", "before", "after"])


def variant_effect_table(
    runs: Runs,
    pairs: Sequence[tuple[str, str]],
    *,
    data_sets: Sequence[str],
    seeds: Sequence[int],
    seed: int,
    not_measured: str = NOT_RUN,
    repetitions: int = REPETITIONS,
) -> pd.DataFrame:
    """What training more of the network changes: pairs of variants on the same test pictures.

    McNemar's and DeLong's tests see one picture per patient, so that pictures are independent; on
    few patients they find nothing but large differences.

    Args:
        runs: of `read_picture_runs`.
        pairs: of systems, the reference last.
        data_sets: to have rows for.
        seeds: of the runs.
        seed: of the bootstrap.
        not_measured: what a row says of which a side is not there.
        repetitions: of the bootstrap.

    Returns:
        A table of ``lib.reporting.effects.effect_table`` with ``seed`` and ``run``.
    """
    frames = {
        SystemRun(str(number), system, data_set): part
        for data_set, systems in runs.items()
        for system, frame in systems.items()
        for number, part in frame.groupby("seed")
    }
    comparisons = [
        Comparison(data_set, str(number), *pair)
        for data_set in data_sets
        for pair in pairs
        for number in seeds
    ]
    table = effect_table(
        comparisons,
        frames,
        _NOTHING_PUBLISHED,
        positive=POSITIVE,
        seed=seed,
        metrics=DIFFERENCES,
        not_measured=not_measured,
        repetitions=repetitions,
    )
    return table.rename(columns={"system": "seed", "segmentation": "run"})


# The paper prints no differences with which these could be compared.
_NOTHING_PUBLISHED = pd.DataFrame(columns=["system", "segmentation", "metric", "fraction"])
