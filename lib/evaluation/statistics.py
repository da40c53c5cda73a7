"""Uncertainty of scores: intervals and comparisons by resampling patients.

Scans of one patient are not independent, so whole patients are drawn with replacement. A resample
is never copied out: it is a row of weights (how often each scan was drawn), and a statistic is a
function of the table and of many such rows at once.

Four choices, made once for the whole study:

* **Percentile intervals**, not BCa. They stay inside the range of the score, and they exist at the
  edges: the acceleration of BCa is undefined when leaving out any one patient changes nothing, as
  with a perfect score.
* **Not stratified by class.** How many patients of each class a test set holds is a matter of
  chance as well, and a patient may have scans of both classes, so strata would cut patients apart.
* **Resamples without a value are left out** (ROC AUC when a class was not drawn). Above 5 % of
  them the rest is no longer a fair sample, and the interval is nan.
* **No interval of width zero.** Where (nearly) all resamples agree (a perfect score; no failure
  among a few patients) they know of no spread, which is not certainty, so the interval is nan.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from lib.evaluation.classification import (
    DEFAULT_THRESHOLD,
    class_names,
    identifier_column,
    predicted_classes,
    probability_matrix,
)

REPETITIONS = 2000
CONFIDENCE = 0.95
MAX_UNDEFINED = 0.05
ROUNDING = 1e-12  # resamples that differ by less agree
BLOCK_WEIGHTS = 4_000_000  # weights held at once, 32 MB, so that large test sets fit

# A statistic takes a table of rows and weights of shape (resamples, rows) and returns, for each
# name, its values of shape (resamples,).
Statistic = Callable[[pd.DataFrame, np.ndarray], Mapping[str, np.ndarray]]


class AreaComparison(NamedTuple):
    """Two ROC AUCs on the same scans, compared.

    Attributes:
        difference: first area minus second; nan where a class has no scan.
        standard_error: of the difference; nan where a class has fewer than two scans.
        p_value: two-sided, that the areas are equal; nan where it cannot be told.
    """

    difference: float
    standard_error: float
    p_value: float


def bootstrap_interval(
    frame: pd.DataFrame,
    statistic: Statistic,
    *,
    group: str = "patient_id",
    repetitions: int = REPETITIONS,
    seed: int,
    confidence: float = CONFIDENCE,
) -> pd.DataFrame:
    """Values of a statistic with percentile bootstrap intervals over groups of rows.

    Args:
        frame: one row per scan.
        statistic: for example :func:`mean_statistic` or :func:`classification_statistic`, with its
            keywords bound by ``functools.partial``.
        group: column of the units that are drawn.
        repetitions: number of resamples.
        seed: of the resampling; same seed, same intervals, in whatever order the rows are.
        confidence: of the interval.

    Returns:
        One row per name of the statistic with ``value``, ``low``, ``high`` and ``undefined``, the
        fraction of resamples without a value. ``low`` and ``high`` are nan when there is a single
        group, when ``undefined`` exceeds 5 %, and when they are equal.

    Raises:
        ValueError: when the table is empty, the column is missing or has gaps, or the confidence
            is not between 0 and 1.
    """
    codes = _group_codes(frame, group)
    value = statistic(frame, np.ones((1, len(frame))))
    blocks = [statistic(frame, weights) for weights in resampled_weights(codes, repetitions, seed)]
    return _intervals(value, blocks, confidence, single_group=not codes.any())


def bootstrap_difference(
    first: pd.DataFrame,
    second: pd.DataFrame,
    statistic: Statistic,
    *,
    group: str = "patient_id",
    repetitions: int = REPETITIONS,
    seed: int,
    confidence: float = CONFIDENCE,
) -> pd.DataFrame:
    """Difference of two systems on the same scans, with paired bootstrap intervals.

    Both systems are scored on the same resamples, so what makes a scan hard for both cancels.

    Args:
        first: predictions or scores of one system, one row per scan.
        second: those of the other system, on the same scans in any order.
        statistic: as in :func:`bootstrap_interval`.
        group: column of the units that are drawn.
        repetitions: number of resamples.
        seed: of the resampling.
        confidence: of the interval.

    Returns:
        As :func:`bootstrap_interval`, of ``first`` minus ``second``.

    Raises:
        ValueError: as there, and when scans, labels or groups of the two differ.
    """
    identifier = identifier_column(first)
    first, second = (
        frame.sort_values(identifier, kind="stable", ignore_index=True) for frame in (first, second)
    )
    for column in (identifier, group, "label"):
        if column in first and not first[column].equals(second.get(column)):
            raise ValueError(f"the two systems differ in {column}, so they cannot be paired")
    codes = _group_codes(first, group)

    def difference(weights: np.ndarray) -> dict[str, np.ndarray]:
        ours, theirs = statistic(first, weights), statistic(second, weights)
        return {name: ours[name] - theirs[name] for name in ours}

    value = difference(np.ones((1, len(first))))
    blocks = [difference(weights) for weights in resampled_weights(codes, repetitions, seed)]
    return _intervals(value, blocks, confidence, single_group=not codes.any())


def mcnemar_exact(first_correct: Sequence[bool], second_correct: Sequence[bool]) -> float:
    """Two-sided p-value of McNemar's exact test that two systems err equally often.

    It counts the scans that one system alone gets right; under the hypothesis each is a fair coin.
    Scans must be independent: give one per patient.

    Args:
        first_correct: whether one system is right, per scan.
        second_correct: whether the other is right, on the same scans in the same order.

    Returns:
        The p-value; 1 where the systems never differ.

    Raises:
        ValueError: when the lengths differ.
    """
    first, second = np.asarray(first_correct, bool), np.asarray(second_correct, bool)
    if first.shape != second.shape:
        raise ValueError(f"the systems cover {len(first)} and {len(second)} scans")
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)


def delong_test(
    is_positive: Sequence[bool], first: Sequence[float], second: Sequence[float]
) -> AreaComparison:
    """DeLong's test of two correlated ROC AUCs.

    Source: DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988), equations 2 to 5: an area is
    the mean of a comparison of every positive scan with every negative one, and its variance that
    of the means per scan (the structural components). These come from mid-ranks here, in
    O(n log n) instead of all pairs (Sun and Xu, IEEE Signal Processing Letters 21, 2014).

    Scans must be independent: give one per patient. The normal approximation is poor where an area
    is close to 1 or a class has few scans; see the bootstrap interval then.

    Args:
        is_positive: whether each scan is of the class to detect, shape (scans,).
        first: score of one system for being positive, same shape.
        second: score of the other system.

    Returns:
        The comparison. The p-value is 1 where both order every pair alike, and nan where a
        difference has no variance (for example a perfect ranking against none at all).

    Raises:
        ValueError: when the lengths differ or a score is not finite.
    """
    truth = np.asarray(is_positive, bool)
    scores = [np.asarray(values, np.float64) for values in (first, second)]
    if any(values.shape != truth.shape for values in scores):
        lengths = ", ".join(str(len(values)) for values in (truth, *scores))
        raise ValueError(f"labels and the two scores must have one length, got {lengths}")
    if not all(np.isfinite(values).all() for values in scores):
        raise ValueError("a score is not finite, so scans cannot be ranked")
    if truth.all() or not truth.any():
        return AreaComparison(np.nan, np.nan, np.nan)
    parts = [_structural_components(truth, values) for values in scores]
    of_positives, of_negatives = (ours - theirs for ours, theirs in zip(*parts, strict=True))
    difference = float(of_positives.mean())
    if min(len(of_positives), len(of_negatives)) < 2:
        return AreaComparison(difference, np.nan, np.nan)
    variance = sum(part.var(ddof=1) / len(part) for part in (of_positives, of_negatives))
    return AreaComparison(difference, float(np.sqrt(variance)), _normal_p(difference, variance))


def _structural_components(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each positive the share of negatives below it, for each negative of positives above.

    Ties count half. The mid-rank of a scan among all less that among its own class counts the
    scans of the other class below it.
    """
    ranks = stats.rankdata(scores)
    positives, negatives = scores[truth], scores[~truth]
    below = (ranks[truth] - stats.rankdata(positives)) / len(negatives)
    above = 1 - (ranks[~truth] - stats.rankdata(negatives)) / len(positives)
    return below, above


def _normal_p(difference: float, variance: float) -> float:
    """Two-sided p-value of a difference under a normal law; see `delong_test` for the edges."""
    if np.isclose(variance, 0):
        return 1.0 if np.isclose(difference, 0) else float("nan")
    return float(2 * stats.norm.sf(abs(difference) / np.sqrt(variance)))


def signed_rank_test(differences: Sequence[float], groups: Sequence[object]) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test that paired differences centre on 0.

    Scans of one patient are not independent, so the test sees one mean difference per patient.

    Args:
        differences: of two systems on the same scans, shape (scans,); nan and infinity count as
            not measured.
        groups: patient of each scan.

    Returns:
        The p-value, exact for up to 50 patients whose differences are neither 0 nor tied; 1 where
        the systems never differ; nan where nothing was measured.
    """
    measured = pd.Series(np.asarray(differences, np.float64)).replace([np.inf, -np.inf], np.nan)
    means = measured.groupby(np.asarray(groups)).mean().dropna()
    if means.empty:
        return float("nan")
    return float(stats.wilcoxon(means).pvalue) if means.any() else 1.0


def holm_adjusted(p_values: Sequence[float]) -> np.ndarray:
    """P-values adjusted for multiple comparisons by Holm's step-down procedure.

    Rejecting where the adjusted value is at most alpha keeps the probability of any wrong rejection
    below alpha, whatever the tests have to do with each other.

    Args:
        p_values: of all comparisons of one family; nan for a comparison that could not be made,
            which does not count as one.

    Returns:
        Same order and shape (comparisons,); nan stays nan.
    """
    p_values = np.asarray(p_values, np.float64)
    made = np.flatnonzero(~np.isnan(p_values))
    order = made[np.argsort(p_values[made], kind="stable")]
    remaining = np.arange(len(order), 0, -1)  # comparisons not yet rejected, this one included
    adjusted = np.full(p_values.shape, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(remaining * p_values[order]), 1.0)
    return adjusted


def resampled_weights(codes: np.ndarray, repetitions: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row is drawn, block by block of resamples.

    Args:
        codes: number of each row's group, 0 to groups - 1, shape (rows,).
        repetitions: number of resamples in all.
        seed: of the draws, which do not depend on the size of the blocks.

    Yields:
        Weights of shape (resamples of the block, rows), whole numbers as float64.
    """
    generator = np.random.default_rng(seed)
    groups = int(codes.max()) + 1
    block = max(1, BLOCK_WEIGHTS // len(codes))
    for start in range(0, repetitions, block):
        size = min(block, repetitions - start)
        drawn = generator.multinomial(groups, np.full(groups, 1 / groups), size=size)
        yield drawn[:, codes].astype(np.float64)


def _group_codes(frame: pd.DataFrame, group: str) -> np.ndarray:
    """Number of each row's group; sorted, so that the order of the rows does not matter."""
    if group not in frame.columns:
        raise ValueError(f"the table has no column {group} to resample by")
    if frame.empty or frame[group].isna().any():
        raise ValueError(f"the table is empty or has rows without {group}")
    return pd.factorize(frame[group], sort=True)[0]


def _intervals(
    value: Mapping[str, np.ndarray],
    blocks: Sequence[Mapping[str, np.ndarray]],
    confidence: float,
    *,
    single_group: bool,
) -> pd.DataFrame:
    """Table of values and percentile intervals, one row per name."""
    if not 0 < confidence < 1:
        raise ValueError(f"the confidence is between 0 and 1, got {confidence}")
    tail = (1 - confidence) / 2
    rows = {}
    for name, point in value.items():
        resampled = np.concatenate([block[name] for block in blocks])
        undefined = float(np.isnan(resampled).mean())
        low = high = np.nan
        if undefined <= MAX_UNDEFINED and not single_group:
            low, high = np.nanquantile(resampled, [tail, 1 - tail])
        if high - low < ROUNDING:
            low = high = np.nan
        rows[name] = {"value": point[0], "low": low, "high": high, "undefined": undefined}
    return pd.DataFrame.from_dict(rows, orient="index").astype(np.float64)


def mean_statistic(
    frame: pd.DataFrame, weights: np.ndarray, *, columns: Sequence[str]
) -> dict[str, np.ndarray]:
    """Means of columns over the rows where they are finite.

    Args:
        frame: one row per scan.
        weights: shape (resamples, rows).
        columns: names of number or truth columns; nan and infinity count as not measured (a
            surface distance to an empty mask).

    Returns:
        For each column its means, shape (resamples,); nan where nothing was measured.
    """
    values = frame[list(columns)].to_numpy(np.float64)
    measured = np.isfinite(values)
    totals = weights @ np.where(measured, values, 0.0)
    means = _ratio(totals, weights @ measured.astype(np.float64))
    return {name: means[:, k] for k, name in enumerate(columns)}


def classification_statistic(
    predictions: pd.DataFrame,
    weights: np.ndarray,
    *,
    positive: str,
    threshold: float = DEFAULT_THRESHOLD,
) -> dict[str, np.ndarray]:
    """The scores of ``lib.evaluation.classification.classification_scores`` for many weightings.

    Same names, same definitions, same undefined cases; whole resamples at once, since calling
    scikit-learn for each would take minutes.

    Args:
        predictions: a predictions table.
        weights: shape (resamples, rows).
        positive: the class to detect.
        threshold: for two classes only.

    Returns:
        For each score its values, shape (resamples,).
    """
    classes = class_names(predictions)
    probabilities = probability_matrix(predictions)
    predicted = predicted_classes(
        probabilities, positive=positive, classes=classes, threshold=threshold
    )
    truth = pd.Categorical(predictions["label"], categories=classes).codes
    called = pd.Categorical(predicted, categories=classes).codes
    column = classes.index(positive)
    probabilities = probabilities / probabilities.sum(axis=1, keepdims=True)
    return {
        **_confusion_scores(_weighted_confusion(truth, called, weights, classes), classes, column),
        "roc_auc": weighted_roc_auc(truth == column, probabilities[:, column], weights),
        "brier": _weighted_brier(truth, probabilities, weights),
    }


def weighted_roc_auc(
    is_positive: np.ndarray, probability: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Area under the ROC curve for many weightings of the same rows.

    The area is the probability that a positive outranks a negative, ties counting half (Mann and
    Whitney): sort once, then sum weights below each tied group.

    Args:
        is_positive: shape (rows,), bool.
        probability: score of being positive, shape (rows,).
        weights: shape (resamples, rows).

    Returns:
        Shape (resamples,); nan where one of the classes has no weight.
    """
    order = np.argsort(probability, kind="stable")
    ranked = probability[order]
    tied_groups = np.flatnonzero(np.append(True, ranked[1:] > ranked[:-1]))
    weights, is_positive = weights[:, order], is_positive[order]
    positives = np.add.reduceat(weights * is_positive, tied_groups, axis=1)
    negatives = np.add.reduceat(weights * ~is_positive, tied_groups, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives
    won = (positives * (below + negatives / 2)).sum(axis=1)
    return _ratio(won, positives.sum(axis=1) * negatives.sum(axis=1))


def _weighted_confusion(
    truth: np.ndarray, called: np.ndarray, weights: np.ndarray, classes: Sequence[str]
) -> np.ndarray:
    """Confusion matrices of shape (resamples, true class, predicted class)."""
    size = len(classes)
    cells = np.eye(size * size)[truth.astype(np.intp) * size + called]
    return (weights @ cells).reshape(-1, size, size)


def _confusion_scores(
    confusion: np.ndarray, classes: Sequence[str], positive: int
) -> dict[str, np.ndarray]:
    """Scores that depend on the confusion matrix alone; each of shape (resamples,)."""
    right = np.diagonal(confusion, axis1=1, axis2=2)
    true, called = confusion.sum(axis=2), confusion.sum(axis=1)
    total = confusion.sum(axis=(1, 2))
    f1 = _ratio(2 * right, true + called)
    sensitivity = _ratio(right, true)
    precision = np.nan_to_num(_ratio(right, called), nan=0.0)
    false_positives = called[:, positive] - right[:, positive]
    negatives = total - true[:, positive]
    return {
        "macro_f1": f1.mean(axis=1),
        "accuracy": _ratio(right.sum(axis=1), total),
        "balanced_accuracy": sensitivity.mean(axis=1),
        "precision": precision[:, positive],
        "sensitivity": sensitivity[:, positive],
        "specificity": _ratio(negatives - false_positives, negatives),
        **{f"f1_{name}": f1[:, k] for k, name in enumerate(classes)},
        **{f"sensitivity_{name}": sensitivity[:, k] for k, name in enumerate(classes)},
        **{f"precision_{name}": precision[:, k] for k, name in enumerate(classes)},
    }


def _weighted_brier(
    truth: np.ndarray, probabilities: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Brier scores of shape (resamples,); halved for two classes, as is usual."""
    errors = ((probabilities - np.eye(probabilities.shape[1])[truth]) ** 2).sum(axis=1)
    if probabilities.shape[1] == 2:
        errors = errors / 2
    return _ratio(weights @ errors, weights.sum(axis=1))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Element-wise division, nan where the denominator is 0."""
    undefined = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator != 0)
