"""Tests of lib/evaluation/statistics.py.

References: scikit-learn with sample weights, and resampling spelled out row by row.
"""

import itertools
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from lib.evaluation import statistics
from lib.evaluation.classification import class_names, classification_scores, probability_matrix
from lib.evaluation.statistics import (
    bootstrap_difference,
    bootstrap_interval,
    classification_statistic,
    delong_test,
    holm_adjusted,
    mcnemar_exact,
    mean_statistic,
    resampled_weights,
    signed_rank_test,
    weighted_roc_auc,
)

SCORES = partial(classification_statistic, positive="covid")
MEAN = partial(mean_statistic, columns=["dice"])


def make_predictions(rows, *, classes=("covid", "non_covid"), seed=0, scans_per_patient=2):
    """Random predictions with ties, somewhat right, two scans per patient."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, len(classes), rows)
    truth[: len(classes)] = np.arange(len(classes))
    raw = generator.dirichlet(np.ones(len(classes)), rows) + 0.4 * np.eye(len(classes))[truth]
    probabilities = (raw / raw.sum(axis=1, keepdims=True)).round(1)  # ties
    probabilities[:, -1] = 1 - probabilities[:, :-1].sum(axis=1)
    return pd.DataFrame(
        {
            "scan_id": [f"scan-{number:04d}" for number in range(rows)],
            "patient_id": [f"patient-{number // scans_per_patient:04d}" for number in range(rows)],
            "split": "test",
            "label": np.array(classes)[truth],
            **{f"probability_{name}": probabilities[:, k] for k, name in enumerate(classes)},
        }
    )


def explicit_scores(frame):
    """Scores by scikit-learn, without the counts."""
    scores = classification_scores(
        frame["label"], probability_matrix(frame), positive="covid", classes=class_names(frame)
    )
    return {name: value for name, value in scores.items() if name not in ("n", "n_positive")}


@pytest.mark.parametrize("classes", [("covid", "non_covid"), ("control", "covid", "pneumonia")])
def test_weighted_scores_equal_scores_of_repeated_rows(classes):
    frame = make_predictions(30, classes=classes)
    weights = np.random.default_rng(1).integers(0, 4, (20, 30))
    weighted = classification_statistic(frame, weights.astype(float), positive="covid")
    for number, row in enumerate(weights):
        repeated = frame.loc[frame.index.repeat(row)]
        got = {name: values[number] for name, values in weighted.items()}
        assert got == pytest.approx(explicit_scores(repeated), nan_ok=True)


def test_weighted_scores_agree_where_undefined():
    frame = make_predictions(12)
    weights = (frame["label"] == "covid").to_numpy(float)[None]  # no other class drawn
    weighted = classification_statistic(frame, weights, positive="covid")
    expected = explicit_scores(frame[frame["label"] == "covid"])
    assert {name: values[0] for name, values in weighted.items()} == pytest.approx(
        expected, nan_ok=True
    )
    assert np.isnan(weighted["roc_auc"][0])
    assert np.isnan(weighted["specificity"][0])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 3)), min_size=2, max_size=25
    )
)
def test_weighted_roc_auc_equals_scikit_learn(rows):
    is_positive, score, weight = (np.array(column) for column in zip(*rows, strict=True))
    got = weighted_roc_auc(is_positive, score / 5, weight[None].astype(float))[0]
    used = weight > 0
    if len(set(is_positive[used])) < 2:
        assert np.isnan(got)
    else:
        expected = metrics.roc_auc_score(
            is_positive[used], score[used], sample_weight=weight[used].astype(float)
        )
        assert got == pytest.approx(expected)


def test_interval_equals_explicit_resampling_of_patients():
    frame = make_predictions(24)
    intervals = bootstrap_interval(frame, SCORES, repetitions=100, seed=5)
    patients = sorted(set(frame["patient_id"]))
    draws = np.random.default_rng(5).multinomial(12, np.full(12, 1 / 12), size=100)
    resampled = []
    for draw in draws:
        rows = [
            frame[frame["patient_id"] == name]
            for name, times in zip(patients, draw, strict=True)
            for _ in range(times)
        ]
        resampled.append(explicit_scores(pd.concat(rows)))
    resampled = pd.DataFrame(resampled)[intervals.index]
    assert intervals["value"].to_dict() == pytest.approx(explicit_scores(frame))
    np.testing.assert_allclose(intervals["low"], resampled.quantile(0.025))
    np.testing.assert_allclose(intervals["high"], resampled.quantile(0.975))


def test_intervals_depend_on_the_seed_only(monkeypatch):
    frame = make_predictions(40)
    first = bootstrap_interval(frame, SCORES, repetitions=50, seed=1)
    shuffled = frame.sample(frac=1, random_state=2)
    pd.testing.assert_frame_equal(
        first, bootstrap_interval(shuffled, SCORES, repetitions=50, seed=1)
    )
    monkeypatch.setattr(statistics, "BLOCK_WEIGHTS", 7 * 40)  # other blocks, same draws
    pd.testing.assert_frame_equal(first, bootstrap_interval(frame, SCORES, repetitions=50, seed=1))
    assert not first.equals(bootstrap_interval(frame, SCORES, repetitions=50, seed=2))


def test_whole_patients_are_drawn():
    codes = np.array([0, 0, 1, 2, 2, 2])
    (weights,) = resampled_weights(codes, 200, seed=0)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3:] == weights[:, [3]]).all()
    assert (weights[:, [0, 2, 3]].sum(axis=1) == 3).all()


def test_mean_leaves_out_what_was_not_measured():
    frame = pd.DataFrame({"dice": [0.5, np.nan, 1.0, np.inf], "patient_id": list("abcd")})
    weights = np.array([[1.0, 1, 1, 1], [3, 0, 1, 0], [0, 1, 0, 1]])
    means = mean_statistic(frame, weights, columns=["dice"])["dice"]
    assert means == pytest.approx([0.75, 0.625, np.nan], nan_ok=True)


def test_an_interval_is_withheld_when_too_many_resamples_have_no_value():
    frame = make_predictions(20, scans_per_patient=1)
    frame["label"] = ["covid"] + ["non_covid"] * 19  # about 36 % of resamples miss the one case
    intervals = bootstrap_interval(frame, SCORES, repetitions=500, seed=0)
    auc = intervals.loc["roc_auc"]
    assert 0.3 < auc["undefined"] < 0.42
    assert np.isfinite(auc["value"])
    assert np.isnan(auc["low"])
    assert np.isnan(auc["high"])
    assert intervals.loc["specificity", ["low", "high"]].notna().all()


def test_one_patient_has_no_interval():
    frame = pd.DataFrame({"dice": [0.5, 0.7], "patient_id": ["a", "a"]})
    row = bootstrap_interval(frame, MEAN, repetitions=20, seed=0).loc["dice"]
    assert row["value"] == pytest.approx(0.6)
    assert row[["low", "high"]].isna().all()


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        (pd.DataFrame({"dice": [1.0]}), {}, "no column patient_id"),
        (pd.DataFrame({"dice": [1.0], "patient_id": [None]}), {}, "rows without patient_id"),
        (pd.DataFrame({"dice": [], "patient_id": []}), {}, "table is empty"),
        (pd.DataFrame({"dice": [1.0], "patient_id": ["a"]}), {"confidence": 95}, "between 0 and 1"),
    ],
)
def test_intervals_refuse(frame, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(frame, MEAN, repetitions=5, seed=0, **options)


def test_two_thousand_repetitions_of_all_scores_take_less_than_three_seconds():
    frame = make_predictions(500)
    start = time.perf_counter()
    bootstrap_interval(frame, SCORES, seed=0)
    assert time.perf_counter() - start < 3


def test_intervals_by_patient_cover_and_by_scan_do_not():
    """Four scans per patient that share a patient effect; the true mean is 0."""
    generator = np.random.default_rng(11)
    covered = {"patient_id": 0, "scan_id": 0}
    for seed in range(150):
        effect = generator.normal(size=(40, 1)) + 0.3 * generator.normal(size=(40, 4))
        frame = pd.DataFrame(
            {"dice": effect.ravel(), "patient_id": np.repeat(np.arange(40), 4)}
        ).assign(scan_id=np.arange(160))
        for group in covered:
            row = bootstrap_interval(frame, MEAN, group=group, repetitions=300, seed=seed)
            covered[group] += row.at["dice", "low"] <= 0 <= row.at["dice", "high"]
    assert 0.88 <= covered["patient_id"] / 150 <= 0.99
    assert covered["scan_id"] / 150 < 0.8


def test_a_paired_difference_cancels_what_both_share():
    generator = np.random.default_rng(0)
    hard = generator.uniform(0.3, 0.9, 60)  # differs much between scans
    first = pd.DataFrame(
        {
            "scan_id": [f"scan-{number}" for number in range(60)],
            "patient_id": np.arange(60) // 2,
            "dice": hard + 0.02 + generator.normal(0, 0.01, 60),
        }
    )
    second = first.assign(dice=hard).sample(frac=1, random_state=1)  # order does not matter
    row = bootstrap_difference(first, second, MEAN, repetitions=500, seed=0).loc["dice"]
    assert row["value"] == pytest.approx(first["dice"].mean() - second["dice"].mean())
    assert 0.01 < row["low"] < row["value"] < row["high"] < 0.03
    single = bootstrap_interval(first, MEAN, repetitions=500, seed=0).loc["dice"]
    assert row["high"] - row["low"] < (single["high"] - single["low"]) / 5


def test_a_system_does_not_differ_from_itself():
    frame = make_predictions(30)
    table = bootstrap_difference(frame, frame, SCORES, repetitions=50, seed=0)
    assert (table["value"] == 0).all() and table[["low", "high"]].isna().all(axis=None)


def test_a_perfect_score_of_few_patients_has_no_interval_and_an_imperfect_one_has():
    frame = make_predictions(30)
    names = ["probability_covid", "probability_non_covid"]
    is_covid = (frame["label"] == "covid").to_numpy(float)
    frame[names] = np.stack([is_covid, 1 - is_covid], axis=1)
    perfect = bootstrap_interval(frame, SCORES, repetitions=50, seed=0).loc["accuracy"]
    assert perfect["value"] == 1 and np.isnan([perfect["low"], perfect["high"]]).all()
    frame.loc[0, names] = frame.loc[0, names].to_numpy()[::-1]
    good = bootstrap_interval(frame, SCORES, repetitions=50, seed=0).loc["accuracy"]
    assert good["low"] < good["value"] < 1


@pytest.mark.parametrize("column", ["scan_id", "label", "patient_id"])
def test_systems_on_other_scans_are_not_paired(column):
    frame = make_predictions(10)
    other = frame.assign(**{column: frame[column].to_numpy()[::-1] + "x"})
    with pytest.raises(ValueError, match=f"differ in {column}"):
        bootstrap_difference(frame, other, SCORES, repetitions=5, seed=0)


@pytest.mark.parametrize(
    ("only_first", "only_second", "expected"),
    [(0, 0, 1.0), (3, 3, 1.0), (6, 0, 2 / 2**6), (9, 1, 2 * (1 + 10) / 2**10)],
)
def test_mcnemar_counts_coins(only_first, only_second, expected):
    first = [True] * only_first + [False] * only_second + [True, False]
    second = [False] * only_first + [True] * only_second + [True, False]
    assert mcnemar_exact(first, second) == pytest.approx(expected)


def test_mcnemar_needs_the_same_scans():
    with pytest.raises(ValueError, match="cover 2 and 3 scans"):
        mcnemar_exact([True] * 2, [True] * 3)


def test_signed_ranks_by_flipping_every_sign():
    differences = np.array([0.5, -0.1, 0.9, 0.3, 0.7, -0.2])
    ranks = np.abs(differences).argsort().argsort() + 1
    flips = np.array(list(itertools.product((0, 1), repeat=6)))
    sums = flips @ ranks
    seen = ranks[differences > 0].sum()
    middle = ranks.sum() / 2
    expected = np.mean(np.abs(sums - middle) >= abs(seen - middle))
    assert signed_rank_test(differences, list("abcdef")) == pytest.approx(expected)
    halves = np.concatenate([differences - 0.05, differences + 0.05, [np.nan, np.inf]])
    assert signed_rank_test(halves, list("abcdefabcdefag")) == pytest.approx(expected)


def test_signed_ranks_of_systems_that_never_differ_or_were_not_measured():
    assert signed_rank_test([0.0, 0.0], ["a", "b"]) == 1
    assert signed_rank_test([0.3], ["a"]) == 1
    assert np.isnan(signed_rank_test([np.nan], ["a"]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_holm_is_the_smallest_level_at_which_stepping_down_rejects(twentieths):
    p_values = np.array(twentieths) / 100
    order, count = np.argsort(p_values, kind="stable"), len(p_values)
    expected = np.full(count, 1.0)
    for level in np.arange(0, 121)[::-1] / 100:  # all products of p-values and counts, and more
        for step, number in enumerate(order):
            if p_values[number] * (count - step) > level + 1e-9:
                break
            expected[number] = min(level, 1.0)
    np.testing.assert_allclose(holm_adjusted(p_values), expected, atol=1e-9)


def test_holm_counts_the_comparisons_that_were_made():
    adjusted = holm_adjusted([0.04, np.nan, 0.01])
    np.testing.assert_allclose(adjusted, [0.04, np.nan, 0.02])
    assert holm_adjusted([]).shape == (0,)


def structural_components(positives, negatives):
    """DeLong's V10 and V01 by comparing every pair."""
    won = np.array([[(x > y) + (x == y) / 2 for y in negatives] for x in positives])
    return won.mean(axis=1), won.mean(axis=0)


def delong_by_all_pairs(truth, first, second):
    """The test as printed: areas and the 2 x 2 covariance matrix S = S10 / m + S01 / n."""
    parts = [structural_components(scores[truth], scores[~truth]) for scores in (first, second)]
    areas = [of_positives.mean() for of_positives, _ in parts]
    s10 = np.cov([of_positives for of_positives, _ in parts])
    s01 = np.cov([of_negatives for _, of_negatives in parts])
    covariance = s10 / truth.sum() + s01 / (~truth).sum()
    contrast = np.array([1, -1])
    return areas[0] - areas[1], np.sqrt(contrast @ covariance @ contrast)


def make_two_scores(scans, seed, decimals=8):
    """Two systems that see the same scans, one better than the other; ties where rounded."""
    generator = np.random.default_rng(seed)
    truth = generator.random(scans) < 0.4
    truth[:4] = [True, True, False, False]
    shared = generator.normal(size=scans)
    first = truth + 0.7 * shared + generator.normal(scale=0.6, size=scans)
    second = 0.5 * truth + 0.7 * shared + generator.normal(scale=0.6, size=scans)
    return truth, first.round(decimals), second.round(decimals)


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 40), st.integers(0, 10_000), st.sampled_from([0, 1, 8]))
def test_delong_equals_the_comparison_of_all_pairs(scans, seed, decimals):
    truth, first, second = make_two_scores(scans, seed, decimals)
    found = delong_test(truth, first, second)
    difference, error = delong_by_all_pairs(truth, first, second)
    assert found.difference == pytest.approx(difference, abs=1e-12)
    assert found.standard_error == pytest.approx(error, abs=1e-9)
    areas = [metrics.roc_auc_score(truth, scores) for scores in (first, second)]
    assert found.difference == pytest.approx(areas[0] - areas[1], abs=1e-12)
    if error > 1e-6:
        chi_squared = (difference / error) ** 2
        assert found.p_value == pytest.approx(stats.chi2.sf(chi_squared, 1), abs=1e-9)


def test_delongs_standard_error_is_that_of_the_bootstrap():
    truth, first, second = make_two_scores(300, 3)
    weights = np.concatenate(list(resampled_weights(np.arange(300), 2000, 0)))
    areas = [weighted_roc_auc(truth, scores, weights) for scores in (first, second)]
    found = delong_test(truth, first, second)
    assert found.standard_error == pytest.approx((areas[0] - areas[1]).std(), rel=0.08)


def test_delong_rejects_at_its_level_where_systems_are_equal():
    p_values = []
    for seed in range(300):
        truth, first, _ = make_two_scores(60, seed)
        generator = np.random.default_rng(10_000 + seed)
        second = truth + generator.normal(scale=(0.7**2 + 0.6**2) ** 0.5, size=60)  # as good
        p_values.append(delong_test(truth, first, second).p_value)
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.09


def test_delong_is_antisymmetric_and_sees_ranks_only():
    truth, first, second = make_two_scores(40, 5)
    found, swapped = delong_test(truth, first, second), delong_test(truth, second, first)
    assert swapped.difference == pytest.approx(-found.difference)
    assert swapped.p_value == pytest.approx(found.p_value)
    stretched = delong_test(truth, np.exp(first), second**3)
    assert stretched == pytest.approx(found)


@pytest.mark.parametrize(
    ("truth", "first", "second", "difference", "p_value"),
    [
        ([1, 1, 0, 0], [4, 3, 2, 1], [9, 8, 1, 0], 0.0, 1.0),  # the same order
        ([1, 1, 0, 0], [4, 3, 2, 1], [1, 1, 1, 1], 0.5, np.nan),  # no variance at all
        ([1, 0, 0], [3, 2, 1], [1, 2, 3], 1.0, np.nan),  # a class of one scan
        ([1, 1], [3, 2], [1, 2], np.nan, np.nan),  # one class only
    ],
)
def test_delong_says_what_it_cannot_tell(truth, first, second, difference, p_value):
    found = delong_test(truth, first, second)
    assert found.difference == pytest.approx(difference, nan_ok=True)
    assert found.p_value == pytest.approx(p_value, nan_ok=True)


@pytest.mark.parametrize(
    ("first", "message"),
    [([0.1, 0.2], "must have one length, got 3, 2, 3"), ([0.1, np.nan, 1], "not finite")],
)
def test_delong_refuses_scores_that_cannot_be_ranked(first, message):
    with pytest.raises(ValueError, match=message):
        delong_test([True, False, True], first, [0.1, 0.2, 0.3])
