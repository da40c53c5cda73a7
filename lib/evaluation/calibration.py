"""Whether probabilities mean what they say: of diagnoses held with 80 %, are 80 % right?

The confidence of a prediction is the probability of its most probable class. Predictions are put
into bins by confidence; in each the mean confidence is compared with the share that is right (Guo
et al., ICML 2017, section 2). Bins of a dozen scans hold little, so each share comes with its
interval; Wilson's, which takes scans as independent: where patients have several, read it as the
least uncertainty.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats
from sklearn import metrics

from lib.data.splits import SPLITS
from lib.evaluation.classification import brier_score, class_names, probability_matrix

BINS = 5
CONFIDENCE = 0.95
PROBABILITY_FLOOR = 1e-6  # a probability of 0 for what then happens would cost infinitely much
EQUAL_MASS, EQUAL_WIDTH = "equal mass", "equal width"


def reliability_table(
    confidence: Sequence[float],
    correct: Sequence[bool],
    *,
    bins: int = BINS,
    strategy: str = EQUAL_MASS,
) -> pd.DataFrame:
    """Mean confidence and share of right predictions in bins of confidence.

    Args:
        confidence: of each prediction, in [0, 1], shape (predictions,).
        correct: whether each is right, same shape.
        bins: how many; fewer come out where bins would be empty.
        strategy: ``"equal mass"``: as many predictions in each bin as can be, in the order of
            confidence, equal confidences never apart; ``"equal width"``: edges evenly from 0 to 1,
            a confidence on an edge counts below it.

    Returns:
        One row per bin: ``lowest`` and ``highest`` confidence in it, ``n``, mean ``confidence``,
        ``accuracy`` and the 95 % interval of the latter, ``accuracy_low`` and ``accuracy_high``.

    Raises:
        ValueError: when the lengths differ, there is nothing, a confidence is outside [0, 1], there
            is no bin or the strategy is unknown.
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, bool)
    _check(confidence, correct, bins)
    numbers = _bin_numbers(confidence, bins, strategy)
    rows = [_bin_row(confidence[numbers == k], correct[numbers == k]) for k in np.unique(numbers)]
    return pd.DataFrame(rows)


def _check(confidence: np.ndarray, correct: np.ndarray, bins: int) -> None:
    if confidence.shape != correct.shape:
        raise ValueError(f"{len(confidence)} confidences, but {len(correct)} answers")
    if not len(confidence):
        raise ValueError("calibration needs predictions")
    if not ((confidence >= 0) & (confidence <= 1)).all():  # nan fails as well
        raise ValueError("a confidence is outside [0, 1]")
    if bins < 1:
        raise ValueError(f"at least one bin is needed, got {bins}")


def _bin_numbers(confidence: np.ndarray, bins: int, strategy: str) -> np.ndarray:
    """Which bin each prediction falls into."""
    if strategy == EQUAL_WIDTH:
        return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
    if strategy != EQUAL_MASS:
        raise ValueError(f"bins are of {EQUAL_MASS} or {EQUAL_WIDTH}, got {strategy}")
    first_rank = stats.rankdata(confidence, method="min") - 1  # equals share theirs
    return (first_rank * min(bins, len(confidence))).astype(int) // len(confidence)


def _bin_row(confidence: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    right = stats.binomtest(int(correct.sum()), len(correct))
    low, high = right.proportion_ci(CONFIDENCE, method="wilson")
    return {
        "lowest": confidence.min(),
        "highest": confidence.max(),
        "n": len(correct),
        "confidence": confidence.mean(),
        "accuracy": correct.mean(),
        "accuracy_low": low,
        "accuracy_high": high,
    }


def expected_calibration_error(reliability: pd.DataFrame) -> float:
    """Mean difference of confidence and accuracy over bins, weighted by their predictions.

    It depends on the bins, and chance alone makes it larger than 0: compare it between systems on
    the same scans only.

    Args:
        reliability: as `reliability_table` returns it.
    """
    gaps = (reliability["confidence"] - reliability["accuracy"]).abs()
    return float(np.average(gaps, weights=reliability["n"]))


def log_loss(labels: Sequence[str], probabilities: np.ndarray, *, classes: Sequence[str]) -> float:
    """Mean of minus the logarithm of the probability of the true class.

    Args:
        labels: true class names, shape (rows,).
        probabilities: shape (rows, classes); those below 1e-6 count as 1e-6, so that a vote without
            a voice for the truth costs 13.8 and not infinitely much.
        classes: names of the columns.
    """
    order = np.argsort(np.asarray(classes, dtype=str))  # scikit-learn wants alphabetical order
    rows = np.maximum(np.asarray(probabilities, np.float64)[:, order], PROBABILITY_FLOOR)
    rows = rows / rows.sum(axis=1, keepdims=True)
    return float(metrics.log_loss(labels, rows, labels=[classes[k] for k in order]))


def predicted_confidence(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Confidence of each prediction and whether it is right.

    Args:
        predictions: a predictions table.

    Returns:
        The largest probability of each row, and whether its class (of equals the first) is the
        label; both shape (rows,).
    """
    probabilities = probability_matrix(predictions)
    names = np.asarray(class_names(predictions), object)
    return probabilities.max(1), names[probabilities.argmax(1)] == predictions["label"].to_numpy()


def calibration_scores(predictions: pd.DataFrame, *, bins: int = BINS) -> dict[str, float]:
    """How good the probabilities of some predictions are.

    Args:
        predictions: a predictions table of one part, one row or more.
        bins: of the expected calibration error, of equal mass.

    Returns:
        ``n``, ``accuracy`` of the most probable class, ``log_loss``, ``brier``
        (`lib.evaluation.classification.brier_score`), ``expected_calibration_error`` and mean
        ``confidence``.
    """
    confidence, correct = predicted_confidence(predictions)
    labels, probabilities = predictions["label"].to_numpy(object), probability_matrix(predictions)
    named = {"classes": class_names(predictions)}
    return {
        "n": len(predictions),
        "accuracy": float(correct.mean()),
        "confidence": float(confidence.mean()),
        "log_loss": log_loss(labels, probabilities, **named),
        "brier": brier_score(labels, probabilities, **named),
        "expected_calibration_error": expected_calibration_error(
            reliability_table(confidence, correct, bins=bins)
        ),
    }


def scores_by_part(systems: Mapping[str, pd.DataFrame], *, bins: int = BINS) -> pd.DataFrame:
    """`calibration_scores` of several systems, part by part.

    Args:
        systems: for each its predictions table, of all parts.
        bins: of the expected calibration error.

    Returns:
        Columns ``split``, ``system`` and the scores, a row for each part and system.
    """
    rows = [
        {"split": split, "system": name, **calibration_scores(part, bins=bins)}
        for split, name, part in _parts(systems)
    ]
    return pd.DataFrame(rows)


def reliability_by_part(systems: Mapping[str, pd.DataFrame], *, bins: int = BINS) -> pd.DataFrame:
    """`reliability_table` of several systems, part by part, in bins of equal mass.

    Args:
        systems: for each its predictions table, of all parts.
        bins: how many at most.

    Returns:
        Columns ``split``, ``system`` and those of `reliability_table`.
    """
    tables = {
        (split, name): reliability_table(*predicted_confidence(part), bins=bins)
        for split, name, part in _parts(systems)
    }
    return pd.concat(tables, names=["split", "system"]).reset_index(["split", "system"])


def _parts(systems: Mapping[str, pd.DataFrame]) -> list[tuple[str, str, pd.DataFrame]]:
    """Rows of each part (in the study's order) and system."""
    return [
        (split, name, predictions[predictions["split"] == split])
        for split in SPLITS
        for name, predictions in systems.items()
        if (predictions["split"] == split).any()
    ]
