from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score

from lib.evaluation.repeated import mean_interval, repeated_scores
from lib.evaluation.statistics import bootstrap_interval, classification_statistic


def make_predictions(seeds, *, system="one", strength=1.0):
    tables = []
    for seed in seeds:
        generator = np.random.default_rng(seed)
        covid = np.arange(20) % 2 == 0
        probability = 1 / (1 + np.exp(-(strength * (2 * covid - 1) + generator.normal(size=20))))
        tables.append(
            pd.DataFrame(
                {
                    "system": system,
                    "seed": seed,
                    "patient_id": [f"p{k}" for k in range(20)],
                    "scan_id": [f"s{k}" for k in range(20)],
                    "label": np.where(covid, "covid", "non_covid"),
                    "probability_non_covid": 1 - probability,
                    "probability_covid": probability,
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


score = partial(
    repeated_scores, keys=["system"], metrics=["accuracy"], positive="covid", repetitions=100
)


def test_one_seed_has_the_interval_over_patients():
    predictions = make_predictions([3])
    row = score(predictions, seed=5).iloc[0]
    statistic = partial(classification_statistic, positive="covid")
    expected = bootstrap_interval(predictions, statistic, seed=5, repetitions=100).loc["accuracy"]
    assert row[["accuracy", "accuracy_low", "accuracy_high"]].tolist() == pytest.approx(
        expected[["value", "low", "high"]].tolist()
    )
    assert (row["n"], row["seeds"], row["interval_over"]) == (20, 1, "patients")


def test_several_seeds_have_students_interval_of_their_mean():
    predictions = make_predictions([1, 2, 3])
    row = score(predictions, seed=0).iloc[0]
    values = [
        accuracy_score(part["label"] == "covid", part["probability_covid"] >= 0.5)
        for _, part in predictions.groupby("seed")
    ]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert row["accuracy"] == pytest.approx(np.mean(values))
    assert row["accuracy_low"] == pytest.approx(max(expected.low, 0))
    assert row["accuracy_high"] == pytest.approx(min(expected.high, 1))
    assert (row["n"], row["seeds"], row["interval_over"]) == (60, 3, "seeds")


def test_groups_keep_their_order_and_do_not_mix():
    pair = [make_predictions([0], system="z"), make_predictions([0], system="a", strength=20.0)]
    table = score(pd.concat(pair), seed=0)
    assert table["system"].tolist() == ["z", "a"]
    assert table["accuracy"].iloc[1] == 1 > table["accuracy"].iloc[0]


def test_too_little_is_refused():
    with pytest.raises(ValueError, match="no predictions to score"):
        score(make_predictions([0]).iloc[:0], seed=0)
    with pytest.raises(ValueError, match="needs two or more, got 1"):
        mean_interval([0.5])


def test_seeds_that_agree_have_no_interval():
    found = mean_interval([1.0, 1.0])
    assert found["value"] == 1 and np.isnan(found[["low", "high"]].to_numpy()).all()
