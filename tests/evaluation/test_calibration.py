import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import softmax
from sklearn import metrics
from sklearn.calibration import calibration_curve

from lib.evaluation.calibration import (
    EQUAL_MASS,
    EQUAL_WIDTH,
    calibration_scores,
    expected_calibration_error,
    log_loss,
    predicted_confidence,
    reliability_by_part,
    reliability_table,
    scores_by_part,
)
from lib.evaluation.classification import brier_score

CLASSES = ("control", "pneumonia", "covid")  # not in alphabetical order
GENERATOR = np.random.default_rng(0)


def predictions(number=60, seed=0, splits=("validation", "test")):
    generator = np.random.default_rng(seed)
    probabilities = softmax(2 * generator.normal(size=(number, 3)), axis=1)
    frame = pd.DataFrame(probabilities, columns=[f"probability_{name}" for name in CLASSES])
    frame.insert(0, "label", generator.choice(CLASSES, number))
    frame.insert(0, "split", np.resize(splits, number))
    frame.insert(0, "scan_id", [f"s{k:03d}" for k in range(number)])
    return frame


@pytest.mark.parametrize(
    ("strategy", "theirs"), [(EQUAL_WIDTH, "uniform"), (EQUAL_MASS, "quantile")]
)
def test_bins_are_those_of_scikit_learn(strategy, theirs):
    confidence = GENERATOR.uniform(0.3, 1, 100)
    correct = GENERATOR.uniform(size=100) < confidence
    accuracy, mean = calibration_curve(correct, confidence, n_bins=5, strategy=theirs)
    table = reliability_table(confidence, correct, bins=5, strategy=strategy)
    np.testing.assert_allclose(table["accuracy"], accuracy)
    np.testing.assert_allclose(table["confidence"], mean)


@given(
    st.integers(1, 8),
    arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1)),
    st.sampled_from([EQUAL_MASS, EQUAL_WIDTH]),
    st.randoms(),
)
def test_every_prediction_is_in_one_bin_whatever_the_order(bins, confidence, strategy, random):
    correct = confidence > 0.5
    table = reliability_table(confidence, correct, bins=bins, strategy=strategy)
    assert table["n"].sum() == len(confidence) and len(table) <= bins
    assert (table["highest"].to_numpy()[:-1] < table["lowest"].to_numpy()[1:]).all()
    assert table["confidence"].between(table["lowest"] - 1e-9, table["highest"] + 1e-9).all()
    order = list(range(len(confidence)))
    random.shuffle(order)
    again = reliability_table(confidence[order], correct[order], bins=bins, strategy=strategy)
    pd.testing.assert_frame_equal(again, table)


def test_bins_of_equal_mass_hold_as_many_as_can_be():
    table = reliability_table(GENERATOR.permutation(20) / 20, np.ones(20, bool), bins=5)
    assert table["n"].tolist() == [4] * 5
    tied = reliability_table([0.5] * 7 + [0.9], [True] * 8, bins=4)
    assert tied["n"].tolist() == [7, 1]


def test_intervals_are_wilsons():
    table = reliability_table([0.9] * 10, [True] * 8 + [False] * 2, bins=1)
    z, n, p = 1.959964, 10, 0.8  # Wilson, JASA 22 (1927)
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert table["accuracy_low"].item() == pytest.approx(middle - half, abs=1e-6)
    assert table["accuracy_high"].item() == pytest.approx(middle + half, abs=1e-6)
    sure = reliability_table([1.0], [True]).iloc[0]
    assert sure["accuracy_high"] == pytest.approx(1) and 0 < sure["accuracy_low"] < 0.5


def test_calibration_error_by_hand():
    # two bins: 0.6 sure and half right, 0.9 sure and all right
    table = reliability_table([0.6, 0.6, 0.9, 0.9], [True, False, True, True], bins=2)
    assert expected_calibration_error(table) == pytest.approx((0.1 * 2 + 0.1 * 2) / 4)
    honest = reliability_table([0.5, 0.5], [True, False])
    assert expected_calibration_error(honest) == 0


def test_scores_are_those_of_scikit_learn():
    table = predictions()
    probabilities = table[[f"probability_{name}" for name in sorted(CLASSES)]].to_numpy()
    scores = calibration_scores(table)
    assert scores["n"] == 60
    assert scores["log_loss"] == pytest.approx(metrics.log_loss(table["label"], probabilities))
    one_hot = np.array(sorted(CLASSES))[None] == table["label"].to_numpy()[:, None]
    assert scores["brier"] == pytest.approx(((probabilities - one_hot) ** 2).sum(1).mean())
    called = np.array(sorted(CLASSES))[probabilities.argmax(1)]
    assert scores["accuracy"] == metrics.accuracy_score(table["label"], called)
    assert scores["confidence"] == pytest.approx(probabilities.max(1).mean())


def test_brier_score_of_two_classes_is_the_usual_one():
    probability = GENERATOR.uniform(size=30)
    labels = np.where(GENERATOR.uniform(size=30) < probability, "covid", "control")
    ours = brier_score(labels, np.c_[1 - probability, probability], classes=("control", "covid"))
    theirs = metrics.brier_score_loss(labels, probability, pos_label="covid")
    assert ours == pytest.approx(theirs)


def test_a_class_without_a_case_does_not_matter_and_certainty_of_an_error_is_not_infinite():
    labels = ["covid", "covid"]
    rows = np.array([[0.2, 0.0, 0.8], [0.5, 0.0, 0.5]])
    expected = -np.log([0.8, 0.5]).mean()
    assert log_loss(labels, rows, classes=CLASSES) == pytest.approx(expected, abs=1e-5)
    wrong = log_loss(["covid"], np.array([[1.0, 0, 0]]), classes=CLASSES)
    assert wrong == pytest.approx(-np.log(1e-6), abs=1e-4)


def test_of_equally_probable_classes_the_first_is_the_prediction():
    table = predictions(1).assign(label="control")
    table[[f"probability_{name}" for name in CLASSES]] = [[0.4, 0.2, 0.4]]
    confidence, correct = predicted_confidence(table)
    assert confidence.tolist() == [0.4] and correct.tolist() == [True]


def test_tables_by_part_hold_each_part_of_each_system():
    systems = {"before": predictions(), "after": predictions(seed=1)}
    scores, bins = scores_by_part(systems), reliability_by_part(systems, bins=3)
    assert scores[["split", "system"]].to_numpy().tolist() == [
        ["validation", "before"], ["validation", "after"], ["test", "before"], ["test", "after"],
    ]  # fmt: skip
    assert scores["n"].tolist() == [30] * 4
    assert bins.columns.tolist()[:3] == ["split", "system", "lowest"]
    assert bins.groupby(["split", "system"])["n"].sum().tolist() == [30] * 4
    first = predictions()[lambda rows: rows["split"] == "validation"]
    alone = reliability_table(*predicted_confidence(first), bins=3)
    pd.testing.assert_frame_equal(bins.iloc[:3, 2:].reset_index(drop=True), alone)
    only_test = {"after": predictions(splits=("test",))}
    assert scores_by_part(only_test)["split"].tolist() == ["test"]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([0.5], [True, False]), {}, "1 confidences, but 2 answers"),
        (([], []), {}, "calibration needs predictions"),
        (([1.2], [True]), {}, r"a confidence is outside \[0, 1\]"),
        (([np.nan], [True]), {}, r"a confidence is outside \[0, 1\]"),
        (([0.5], [True]), {"bins": 0}, "at least one bin is needed, got 0"),
        (([0.5], [True]), {"strategy": "quantile"}, "bins are of equal mass or equal width"),
    ],
)
def test_bad_input_gives_one_sentence(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        reliability_table(*arguments, **options)
