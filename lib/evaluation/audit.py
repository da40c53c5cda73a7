"""Could printed scores have been measured? Exact arithmetic on percentages and counts of scans.

A score of a finite test set is a ratio of counts, so only some percentages can occur. Everything
here works on percentages as printed, and lets every printed number stand for all values that round
to it or become it by cutting digits off: from half a unit of its last digit below to a whole one
above, ends included. So "not reachable" means: by no outcome, whatever way the digits were lost.

Counts of a binary test: true positives, false positives, false negatives, true negatives; *errors*
are false positives and false negatives together.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy import stats

PERCENT = 100.0
DECIMALS = 2  # of a printed percentage
BELOW, ABOVE = 0.5 * 10.0**-DECIMALS, 10.0**-DECIMALS  # of a printed value: rounded, or cut off
SLACK = 1e-9  # binary floating point


def prints_as(value: np.ndarray | float, printed: float, *, decimals: int = DECIMALS) -> np.ndarray:
    """Whether values in percent give a printed one, rounded or cut off.

    Args:
        value: percent, any shape; nan gives none.
        printed: percent.
        decimals: of the printed value.
    """
    gap = (np.asarray(value) - printed) * 10.0 ** (decimals - DECIMALS)
    return (gap >= -BELOW - SLACK) & (gap <= ABOVE + SLACK)


def counts_for_rate(printed: float, total: int, *, decimals: int = DECIMALS) -> np.ndarray:
    """Counts out of a total that give a printed rate (a sensitivity out of all positives).

    Args:
        printed: percent.
        total: at least 1.
        decimals: of the printed value.

    Returns:
        Ascending counts; empty where the rate is not reachable.

    Raises:
        ValueError: when there is nothing to count.
    """
    if total < 1:
        raise ValueError(f"a rate needs at least one scan, got {total}")
    counts = np.arange(total + 1)
    return counts[prints_as(PERCENT * counts / total, printed, decimals=decimals)]


def counts_for_rates(
    printed: Sequence[float], totals: Sequence[int], *, decimals: int = DECIMALS
) -> np.ndarray:
    """Sums of counts that give a printed rate in every class (all that a classifier got right).

    Args:
        printed: percent, one per class (its sensitivity).
        totals: of each class, same order.
        decimals: of the printed values.

    Returns:
        Ascending sums without gaps; empty where one of the rates is not reachable.
    """
    counts = [
        counts_for_rate(rate, total, decimals=decimals)
        for rate, total in zip(printed, totals, strict=True)
    ]
    if not all(map(len, counts)):
        return np.empty(0, np.int64)
    return np.arange(sum(found[0] for found in counts), sum(found[-1] for found in counts) + 1)


def confusion_scores(confusion: Sequence[Sequence[int]]) -> dict[str, float]:
    """What may be called the F1 of several classes, and the accuracy, from counts.

    Args:
        confusion: rows true, columns predicted, any number of classes; each class occurs and is
            predicted.

    Returns:
        In percent ``accuracy``, ``macro_f1`` (mean of the classes), ``weighted_f1`` (by the size of
        each class), ``f1_of_means`` (of mean precision and mean sensitivity) and
        ``balanced_accuracy`` (mean sensitivity).

    Raises:
        ValueError: when the matrix is not square, or a class does not occur or is not predicted.
    """
    counts = np.asarray(confusion)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"a confusion matrix is square, got the shape {counts.shape}")
    right, true, called = np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0)
    if not (true.all() and called.all()):
        raise ValueError("every class must occur and be predicted once or more")
    f1, sensitivity, precision = 2 * right / (true + called), right / true, right / called
    mean_sensitivity, mean_precision = sensitivity.mean(), precision.mean()
    harmonic = stats.hmean([mean_sensitivity, mean_precision]) if right.any() else 0.0
    scores = {
        "accuracy": right.sum() / true.sum(),
        "macro_f1": f1.mean(),
        "weighted_f1": np.average(f1, weights=true),
        "f1_of_means": harmonic,
        "balanced_accuracy": mean_sensitivity,
    }
    return {name: float(PERCENT * value) for name, value in scores.items()}


def dense_parameters(widths: Sequence[int]) -> int:
    """Weights and biases of fully connected layers.

    Args:
        widths: of the input and of the output of each layer in turn.
    """
    return sum((inputs + 1) * outputs for inputs, outputs in pairwise(widths))


def counts_for_precision(printed: float, positives: int, negatives: int) -> np.ndarray:
    """True and false positives that give a printed precision.

    Args:
        printed: percent.
        positives: scans of the class to detect.
        negatives: other scans.

    Returns:
        Shape (outcomes, 2); empty where the precision is not reachable.
    """
    found, false = _outcomes(positives, negatives)
    with np.errstate(invalid="ignore"):
        precision = PERCENT * found / (found + false)
    return np.argwhere(prints_as(precision, printed))


def counts_for_detection(
    precision: float, sensitivity: float, f1: float, positives: int, negatives: int
) -> np.ndarray:
    """True and false positives that give precision, sensitivity and F1 of one printed row at once.

    Args:
        precision: percent, likewise the next two.
        sensitivity: of the positive class.
        f1: of the positive class.
        positives: scans of the class to detect.
        negatives: other scans.

    Returns:
        Shape (outcomes, 2); empty where the row is not reachable.
    """
    found, false = _outcomes(positives, negatives)
    with np.errstate(invalid="ignore"):
        fits = prints_as(PERCENT * found / (found + false), precision)
    fits = fits & prints_as(PERCENT * found / positives, sensitivity)
    return np.argwhere(fits & prints_as(PERCENT * 2 * found / (positives + found + false), f1))


def _outcomes(positives: int, negatives: int) -> tuple[np.ndarray, np.ndarray]:
    """All true positives down, all false positives across."""
    return np.arange(positives + 1)[:, None], np.arange(negatives + 1)[None, :]


def counts_for_class_f1(positive: float, negative: float, total: int) -> np.ndarray:
    """True positives, errors and true negatives that give the F1 of both classes.

    Neither F1 depends on how the errors divide into false positives and false negatives, so the
    number of scans of each class need not be known.

    Args:
        positive: F1 of the positive class, percent, above 0.
        negative: F1 of the other class, percent.
        total: scans.

    Returns:
        Shape (outcomes, 3), each row summing to ``total``; empty where the pair is not reachable.
    """
    found = np.arange(1, total + 1)
    # F1 = 2 found / (2 found + errors), solved for the fewest and most errors that print it.
    fewest, most = (2 * found * (PERCENT / (positive + side) - 1) for side in (ABOVE, -BELOW))
    first, last = np.ceil(fewest - SLACK).clip(0), np.floor(most + SLACK)
    steps = np.arange(int((last - first).max()) + 1)
    errors = (first[:, None] + steps[None, :]).astype(np.int64)
    right = total - found[:, None] - errors
    with np.errstate(invalid="ignore", divide="ignore"):
        fits = (right >= 0) & (errors <= last[:, None])
        fits &= prints_as(PERCENT * 2 * right / (2 * right + errors), negative)
    rows, columns = np.nonzero(fits)
    return np.stack([found[rows], errors[rows, columns], right[rows, columns]], axis=1)


def possible_positives(counts: np.ndarray) -> np.ndarray:
    """How many scans of the positive class there can have been.

    Args:
        counts: of :func:`counts_for_class_f1`.

    Returns:
        Ascending numbers: between none and all of the errors are false negatives.
    """
    ranges = [np.arange(found, found + errors + 1) for found, errors, _ in counts]
    return np.unique(np.concatenate(ranges)) if ranges else np.empty(0, np.int64)


def class_ratio_bounds(positive: float, negative: float) -> tuple[float, float]:
    """Smallest and largest ratio of positive to negative scans that two class F1 scores allow.

    With e errors there are ``a = TP / e = F1 / (2 (1 - F1))`` true positives per error and likewise
    ``b`` true negatives. The ratio is smallest where every error is a false positive, a / (b + 1),
    and largest where every one is a false negative, (a + 1) / b; rounding widens this a little.

    Args:
        positive: F1 of the positive class, percent, below 100.
        negative: F1 of the other class, percent, below 100.

    Returns:
        Both ends.

    Raises:
        ValueError: when an F1 is not between 0 and 100, where errors say nothing about classes.
    """
    if not (0 < positive < PERCENT and 0 < negative < PERCENT):
        raise ValueError(f"F1 scores must lie between 0 and 100, got {positive} and {negative}")
    low, high = (_right_per_error(positive + side) for side in (-BELOW, ABOVE))
    few, many = (_right_per_error(negative + side) for side in (-BELOW, ABOVE))
    return low / (many + 1), (high + 1) / few


def _right_per_error(f1: float) -> float:
    """Scans of a class that were found, per error; from its F1 in percent."""
    return f1 / (2 * max(PERCENT - f1, SLACK))


def outcomes_with_accuracy(printed: float, positives: int, negatives: int) -> np.ndarray:
    """Outcomes of a binary test that give a printed accuracy, and the macro F1 of each.

    For two classes the macro F1 never exceeds the accuracy. With e errors the F1 of a class of
    which t scans are right is f(t) = 2 t / (2 t + e), and f is concave, so the mean of f(TP) and
    f(TN) is at most f((TP + TN) / 2), which is the accuracy.

    Args:
        printed: accuracy, percent.
        positives: scans of the one class.
        negatives: scans of the other.

    Returns:
        Columns true positives, true negatives, macro F1 in percent; no row where no outcome does.
    """
    found, right = np.indices((positives + 1, negatives + 1))
    total = positives + negatives
    fits = prints_as(PERCENT * (found + right) / total, printed)
    found, right = found[fits], right[fits]
    errors = total - found - right
    with np.errstate(invalid="ignore"):  # a class that is neither there nor predicted
        macro = PERCENT * (found / (2 * found + errors) + right / (2 * right + errors))
    return np.stack([found, right, macro], axis=1)


def is_mean_of(printed: float, parts: Sequence[float]) -> bool:
    """Whether a printed mean can be that of parts that lost digits themselves.

    Args:
        printed: percent.
        parts: percent.
    """
    return bool(abs(printed - np.mean(parts)) <= BELOW + ABOVE + SLACK)


def f1_bounds(precision: float, sensitivity: float) -> tuple[float, float]:
    """Smallest and largest F1 of a printed precision and sensitivity, percent.

    Args:
        precision: percent, above 0.
        sensitivity: percent, above 0.
    """
    ends = [(precision + side, sensitivity + side) for side in (-BELOW, ABOVE)]
    low, high = (2 * p * s / (p + s) for p, s in ends)
    return low, high


def is_round(gain: float, step: float) -> bool:
    """Whether a difference of printed values is a whole multiple of a step.

    Args:
        gain: percentage points.
        step: percentage points, a whole number of hundredths.
    """
    hundredths = round(gain * 10**DECIMALS)
    return hundredths % round(step * 10**DECIMALS) == 0


def chance_of_round_gains(found: int, total: int, step: float) -> float:
    """Probability of so many round gains or more, if the last digits were evenly spread.

    Gains of one row are not independent of one another, so read its order of magnitude only.

    Args:
        found: round gains.
        total: all gains.
        step: percentage points.
    """
    chance = 1 / round(step * 10**DECIMALS)
    return float(stats.binom.sf(found - 1, total, chance))
