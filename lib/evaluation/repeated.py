"""Scores of experiments that were repeated with several seeds, with intervals.

With one seed the interval is that of the other tables: patients are drawn with replacement. With
several it is Student's of the mean over the seeds: where each seed draws patients of its own, it
holds what patients and training vary by; on the same patients, training alone. A percentile of
three to five values would be too narrow.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
from scipy import stats

from lib.evaluation.statistics import (
    CONFIDENCE,
    REPETITIONS,
    ROUNDING,
    bootstrap_interval,
    classification_statistic,
)

OVER_PATIENTS, OVER_SEEDS = "patients", "seeds"


def repeated_scores(
    predictions: pd.DataFrame,
    *,
    keys: Sequence[str],
    metrics: Sequence[str],
    positive: str,
    seed: int,
    repetitions: int = REPETITIONS,
) -> pd.DataFrame:
    """Scores with 95 % intervals of every group of predictions.

    Args:
        predictions: rows of all groups and seeds: the columns ``keys``, ``seed`` (of the run),
            ``patient_id``, ``label`` and the probabilities.
        keys: columns that tell the groups apart.
        metrics: scores as in ``classification_scores``.
        positive: the class to detect.
        seed: of the bootstrap.
        repetitions: of the bootstrap.

    Returns:
        One row per group, in the order they come in: ``keys``, ``n`` (predictions, of all seeds),
        ``seeds``, ``interval_over`` (patients or seeds), and each score with ``_low``, ``_high``.

    Raises:
        ValueError: if there is no prediction.
    """
    if predictions.empty:
        raise ValueError("there are no predictions to score")
    statistic = partial(classification_statistic, positive=positive)
    rows = []
    for values, group in predictions.groupby(list(keys), sort=False):
        repeated = [part for _, part in group.groupby("seed")]
        row = dict(zip(keys, values, strict=True)) | {"n": len(group), "seeds": len(repeated)}
        if len(repeated) == 1:
            found = bootstrap_interval(group, statistic, seed=seed, repetitions=repetitions)
            row["interval_over"] = OVER_PATIENTS
        else:
            scores = [statistic(part, np.ones((1, len(part)))) for part in repeated]
            found = pd.DataFrame({m: mean_interval([s[m][0] for s in scores]) for m in metrics}).T
            row["interval_over"] = OVER_SEEDS
        for metric in metrics:
            names = (metric, f"{metric}_low", f"{metric}_high")
            row |= dict(zip(names, found.loc[metric, ["value", "low", "high"]], strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def mean_interval(scores: Sequence[float], *, confidence: float = CONFIDENCE) -> pd.Series:
    """Mean of a score over seeds with Student's interval, cut to [0, 1].

    Args:
        scores: one per seed, at least two; fractions.
        confidence: of the interval.

    Returns:
        ``value``, ``low``, ``high``; the bounds are nan where all seeds agree.

    Raises:
        ValueError: if there are fewer than two.
    """
    if len(scores) < 2:
        raise ValueError(f"an interval over seeds needs two or more, got {len(scores)}")
    mean, error = np.mean(scores), np.std(scores, ddof=1) / np.sqrt(len(scores))
    half = stats.t.ppf((1 + confidence) / 2, len(scores) - 1) * error
    low, high = np.clip([mean - half, mean + half], 0.0, 1.0)
    if high - low < ROUNDING:  # seeds that agree know of no spread
        low = high = np.nan
    return pd.Series({"value": mean, "low": low, "high": high})
