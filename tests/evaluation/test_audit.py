"""Tests of lib/evaluation/audit.py: scores that were measured must always be found possible."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    precision_score,
    recall_score,
)

from lib.evaluation.audit import (
    chance_of_round_gains,
    class_ratio_bounds,
    confusion_scores,
    counts_for_class_f1,
    counts_for_detection,
    counts_for_precision,
    counts_for_rate,
    counts_for_rates,
    dense_parameters,
    f1_bounds,
    is_mean_of,
    is_round,
    outcomes_with_accuracy,
    possible_positives,
    prints_as,
)

OUTCOMES = st.tuples(
    *[st.integers(0, 40)] * 4
)  # true and false positives, false and true negatives
WAYS = st.sampled_from([lambda v: round(v, 2), lambda v: np.floor(100 * v) / 100])  # of printing


def percentages(found, false, missed, right):
    """F1 of both classes, precision and sensitivity of an outcome, by scikit-learn where it can."""
    truth = [1] * (found + missed) + [0] * (false + right)
    called = [1] * found + [0] * missed + [1] * false + [0] * right
    f1 = [100 * f1_score(truth, called, pos_label=label, zero_division=0) for label in (1, 0)]
    return *f1, 100 * found / (found + false), 100 * found / (found + missed)


@settings(max_examples=40, deadline=None)
@given(OUTCOMES, WAYS)
def test_what_was_measured_is_found_among_the_possible_outcomes(outcome, printed):
    found, false, missed, right = outcome
    assume(found and false + missed and right)
    positive, negative, precision, sensitivity = map(printed, percentages(*outcome))
    positives, negatives = found + missed, false + right
    counts = counts_for_class_f1(positive, negative, sum(outcome))
    assert [found, false + missed, right] in counts.tolist()
    assert (counts.sum(axis=1) == sum(outcome)).all()
    assert positives in possible_positives(counts)
    low, high = class_ratio_bounds(positive, negative)
    assert low <= positives / negatives <= high
    assert found in counts_for_rate(sensitivity, positives)
    assert [found, false] in counts_for_precision(precision, positives, negatives).tolist()
    row = counts_for_detection(precision, sensitivity, positive, positives, negatives)
    assert [found, false] in row.tolist()
    low, high = f1_bounds(precision, sensitivity)
    assert low - 0.01 <= positive <= high + 0.01
    assert is_mean_of(printed((percentages(*outcome)[0] + percentages(*outcome)[1]) / 2),
                      (positive, negative))  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(OUTCOMES, WAYS)
def test_outcomes_with_an_accuracy_hold_the_one_that_was_measured(outcome, printed):
    found, false, missed, right = outcome
    positives, negatives = found + missed, false + right
    assume(positives and negatives)
    share = (found + right) / (positives + negatives)
    outcomes = outcomes_with_accuracy(printed(100 * share), positives, negatives)
    (row,) = outcomes[(outcomes[:, 0] == found) & (outcomes[:, 1] == right)]
    truth = [1] * positives + [0] * negatives
    called = [1] * found + [0] * missed + [1] * false + [0] * right
    assert row[2] == pytest.approx(100 * f1_score(truth, called, average="macro", zero_division=0))
    assert outcomes[:, 2].max() <= 100 * outcomes[:, :2].sum(axis=1).max() / len(truth) + 1e-9


def test_possible_class_f1_outcomes_are_those_of_trying_all():
    total, positive, negative = 60, 80.0, 85.71  # for example 20 found, 10 errors, 30 right
    expected = []
    for found, errors in product(range(1, total + 1), repeat=2):
        right = total - found - errors
        if right >= 0:
            scores = [200 * right_ones / (2 * right_ones + errors) for right_ones in (found, right)]
            if all(map(prints_as, scores, (positive, negative))):
                expected.append([found, errors, right])
    assert [20, 10, 30] in expected
    assert counts_for_class_f1(positive, negative, total).tolist() == expected


def test_outcomes_that_do_not_exist_give_empty_answers():
    nothing = counts_for_class_f1(99.99, 12.34, 10)
    assert nothing.shape == (0, 3)
    assert len(possible_positives(nothing)) == 0
    assert len(counts_for_rate(98.73, 255)) == 0
    assert counts_for_rate(98.43, 255).tolist() == [251]


def test_values_print_rounded_or_cut_off_but_not_rounded_up_twice():
    assert prints_as([92.1549, 92.155, 92.16, 92.1699, 92.171], 92.16).tolist() == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_a_ratio_of_classes_is_as_sharp_as_the_scores_are_high():
    wide, narrow = class_ratio_bounds(80.0, 80.0), class_ratio_bounds(99.0, 99.0)
    assert wide[0] < narrow[0] < 1 < narrow[1] < wide[1]


def test_round_gains_and_their_chance():
    assert [is_round(gain, 0.25) for gain in (2.0, 1.5, 1.75, 1.03, 89.87 - 87.87)] == [
        True,
        True,
        True,
        False,
        True,
    ]
    assert chance_of_round_gains(0, 33, 0.25) == pytest.approx(1)
    assert chance_of_round_gains(1, 1, 0.25) == pytest.approx(1 / 25)
    draws = np.random.default_rng(0).integers(0, 25, (20_000, 33)) == 0
    expected = (draws.sum(axis=1) >= 3).mean()
    assert chance_of_round_gains(3, 33, 0.25) == pytest.approx(expected, abs=0.01)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="at least one scan, got 0"):
        counts_for_rate(50.0, 0)
    with pytest.raises(ValueError, match=r"between 0 and 100, got 100\.0 and 90\.0"):
        class_ratio_bounds(100.0, 90.0)
    with pytest.raises(ValueError, match=r"square, got the shape \(2, 3\)"):
        confusion_scores([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ValueError, match="every class must occur and be predicted"):
        confusion_scores([[3, 0], [2, 0]])


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4).flatmap(
    lambda size: st.lists(st.lists(st.integers(0, 9), min_size=size, max_size=size),
                          min_size=size, max_size=size)))  # fmt: skip
def test_scores_of_a_matrix_are_those_of_the_images_in_it(matrix):
    counts = np.array(matrix)
    assume(counts.sum(axis=0).all() and counts.sum(axis=1).all())
    truth, called = (np.repeat(axis.ravel(), counts.ravel()) for axis in np.indices(counts.shape))
    scores = confusion_scores(matrix)
    expected = {
        "accuracy": accuracy_score(truth, called),
        "macro_f1": f1_score(truth, called, average="macro"),
        "weighted_f1": f1_score(truth, called, average="weighted"),
        "balanced_accuracy": balanced_accuracy_score(truth, called),
    }
    assert {name: scores[name] for name in expected} == pytest.approx(
        {name: 100 * value for name, value in expected.items()}
    )
    means = [score(truth, called, average="macro") for score in (precision_score, recall_score)]
    harmonic = 2 * means[0] * means[1] / sum(means) if sum(means) else 0
    assert scores["f1_of_means"] == pytest.approx(100 * harmonic)
    assert scores["f1_of_means"] >= scores["macro_f1"] - 1e-9  # the harmonic mean is concave


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 2),
)
def test_what_all_classes_got_right_is_among_the_possible_sums(classes, decimals):
    counts, totals = zip(*classes, strict=True)
    printed = [round(100 * count / total, decimals) for count, total in classes]
    sums = counts_for_rates(printed, totals, decimals=decimals)
    assert sum(counts) in sums
    per_class = [
        counts_for_rate(rate, total, decimals=decimals)
        for rate, total in zip(printed, totals, strict=True)
    ]
    assert sums.tolist() == sorted({sum(chosen) for chosen in product(*per_class)})


def test_one_rate_that_no_count_gives_leaves_no_sum():
    assert len(counts_for_rates([81.2, 50.0], [30, 10], decimals=1)) == 0


def test_dense_parameters_are_those_of_torch():
    layers = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    assert dense_parameters([7, 5, 3]) == sum(p.numel() for p in layers.parameters())
