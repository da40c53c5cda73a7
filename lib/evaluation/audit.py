"""Could printed scores have been measured? Exact arithmetic on percentages and counts of scans.

A score of a finite test set is a ratio of counts, so only some percentages can occur. Everything
here works on percentages as printed, and lets every printed number stand for all values that round
to it or become it by cutting digits off: from half a unit of its last digit below to a whole one
above, ends included. So "not reachable" means: by no outcome, whatever way the digits were lost.

Counts of a binary test: true positives, false positives, false negatives, true negatives; *errors*
are false positives and false negatives together.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

PERCENT = 100.0
DECIMALS = 2  # of a printed percentage
BELOW, ABOVE = 0.5 * 10.0**-DECIMALS, 10.0**-DECIMALS  # of a printed value: rounded, or cut off
SLACK = 1e-9  # binary floating point


def prints_as(value: np.ndarray | float, printed: float) -> np.ndarray:
    """Whether values in percent give a printed one, rounded or cut off.

    Args:
        value: percent, any shape; nan gives none.
        printed: percent.
    """
    gap = np.asarray(value) - printed
    return (gap >= -BELOW - SLACK) & (gap <= ABOVE + SLACK)


def counts_for_rate(printed: float, total: int) -> np.ndarray:
    """Counts out of a total that give a printed rate (a sensitivity out of all positives).

    Args:
        printed: percent.
        total: at least 1.

    Returns:
        Ascending counts; empty where the rate is not reachable.

    Raises:
        ValueError: when there is nothing to count.
    """
    if total < 1:
        raise ValueError(f"a rate needs at least one scan, got {total}")
    counts = np.arange(total + 1)
    return counts[prints_as(PERCENT * counts / total, printed)]


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
