"""Tests of lib/evaluation/classification.py; scikit-learn and hand counts are the references."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from lib.data.files import save_csv
from lib.evaluation.classification import (
    attach_patients,
    choose_threshold,
    class_names,
    classification_scores,
    confusion_matrix,
    predicted_classes,
    predictions_table,
    probability_matrix,
    read_predictions,
    validate_predictions,
)

BINARY = ("covid", "non_covid")


def make_predictions(labels, covid, *, split="test"):
    covid = np.asarray(covid, float)
    return pd.DataFrame(
        {
            "scan_id": [f"scan-{number:03d}" for number in range(len(labels))],
            "split": split,
            "label": labels,
            "probability_covid": covid,
            "probability_non_covid": 1 - covid,
        }
    )


def scores_of(labels, covid, **options):
    covid = np.asarray(covid, float)
    probabilities = np.stack([covid, 1 - covid], axis=1)
    options = {"positive": "covid", "classes": BINARY} | options
    return classification_scores(labels, probabilities, **options)


def test_scores_equal_hand_counts():
    # 3 covid of which 2 are found, 5 others of which 1 is called covid
    labels = ["covid"] * 3 + ["non_covid"] * 5
    scores = scores_of(labels, [0.9, 0.8, 0.2, 0.7, 0.1, 0.1, 0.3, 0.4])
    expected = {
        "accuracy": 6 / 8,
        "balanced_accuracy": (2 / 3 + 4 / 5) / 2,
        "precision": 2 / 3,
        "sensitivity": 2 / 3,
        "specificity": 4 / 5,
        "f1_covid": 2 / 3,
        "f1_non_covid": 4 / 5,
        "macro_f1": (2 / 3 + 4 / 5) / 2,
        "sensitivity_covid": 2 / 3,
        "sensitivity_non_covid": 4 / 5,
        "precision_covid": 2 / 3,
        "precision_non_covid": 4 / 5,
        "roc_auc": (5 + 5 + 2) / 15,  # pairs in which the covid scan ranks higher
        "brier": np.mean(np.square([0.1, 0.2, 0.8, 0.7, 0.1, 0.1, 0.3, 0.4])),
        "n": 8,
        "n_positive": 3,
    }
    assert scores == pytest.approx(expected)


@pytest.mark.parametrize(
    ("labels", "covid", "undefined", "values"),
    [
        (
            ["covid"] * 3,
            [0.9, 0.8, 0.1],
            {"roc_auc", "specificity", "balanced_accuracy"},
            {"sensitivity": 2 / 3},
        ),
        (["non_covid"] * 3, [0.9, 0.2, 0.1], {"roc_auc", "sensitivity"}, {"specificity": 2 / 3}),
        (
            ["covid", "non_covid"],
            [0.1, 0.2],
            set(),
            {"precision": 0.0, "precision_covid": 0.0, "precision_non_covid": 0.5, "f1_covid": 0.0},
        ),
        (["covid"] * 2, [0.9, 0.9], {"roc_auc", "f1_non_covid", "macro_f1"}, {"accuracy": 1.0}),
        (["covid", "non_covid"], [0.5, 0.4999], set(), {"accuracy": 1.0, "macro_f1": 1.0}),
    ],
    ids=["only covid", "no covid", "nothing called", "perfect on one class", "edge of threshold"],
)
def test_scores_at_the_edges(labels, covid, undefined, values):
    scores = scores_of(labels, covid)
    assert undefined <= {name for name, value in scores.items() if np.isnan(value)}
    assert {name: scores[name] for name in values} == pytest.approx(values)


def test_scores_of_three_classes_are_one_against_the_rest():
    classes = ("control", "pneumonia", "covid")  # not in alphabetical order
    generator = np.random.default_rng(3)
    truth = generator.integers(0, 3, 60)
    probabilities = generator.dirichlet(np.ones(3), 60)
    labels = np.array(classes)[truth]
    scores = classification_scores(labels, probabilities, positive="covid", classes=classes)
    called = probabilities.argmax(axis=1)
    f1 = [metrics.f1_score(truth == k, called == k) for k in range(3)]
    assert scores["macro_f1"] == pytest.approx(np.mean(f1))
    assert scores["f1_pneumonia"] == pytest.approx(f1[1])
    balanced = metrics.balanced_accuracy_score(truth, called)
    assert scores["balanced_accuracy"] == pytest.approx(balanced)
    assert scores["precision"] == pytest.approx(metrics.precision_score(truth == 2, called == 2))
    precisions = [scores[f"precision_{name}"] for name in classes]
    assert precisions == pytest.approx(metrics.precision_score(truth, called, average=None))
    assert scores["specificity"] == pytest.approx(np.mean(called[truth != 2] != 2))
    assert scores["roc_auc"] == pytest.approx(
        metrics.roc_auc_score(truth == 2, probabilities[:, 2])
    )
    assert scores["brier"] == pytest.approx(
        np.mean(np.sum((probabilities - np.eye(3)[truth]) ** 2, axis=1))
    )


def test_scores_do_not_depend_on_the_order_of_the_classes():
    labels, covid = ["covid", "non_covid", "covid"], np.array([0.9, 0.6, 0.3])
    one_way = scores_of(labels, covid)
    other_way = classification_scores(
        labels, np.stack([1 - covid, covid], axis=1), positive="covid", classes=BINARY[::-1]
    )
    assert one_way == pytest.approx(other_way)


def test_confusion_matrix_counts_true_by_predicted():
    counts = confusion_matrix(
        ["covid", "covid", "non_covid"],
        np.array([[0.9, 0.1], [0.4, 0.6], [0.4, 0.6]]),
        positive="covid",
        classes=BINARY,
    )
    assert counts.loc["covid"].tolist() == [1, 1]
    assert counts.loc["non_covid"].tolist() == [0, 1]
    assert (counts.index.name, counts.columns.name) == ("true", "predicted")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive": "flu", "classes": BINARY}, "the positive class flu is none of"),
        ({"positive": "a", "classes": ("a", "b", "c"), "threshold": 0.3}, "needs two classes"),
    ],
)
def test_predicted_classes_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        predicted_classes(np.full((2, len(options["classes"])), 0.5), **options)


VALID = make_predictions(["covid", "non_covid", "covid"], [0.9, 0.2, 0.4])


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (VALID.drop(columns="scan_id"), "need a column scan_id or image_id"),
        (VALID.drop(columns=["split", "label"]), "lack the column split, label"),
        (VALID.drop(columns="probability_covid"), "two columns probability_<class>"),
        (VALID.iloc[:0], "hold no row"),
        (VALID.assign(scan_id=["a", "b", "a"]), "1 of 3 predictions occur twice: a"),
        (VALID.assign(label=["covid", "flu", None]), "2 of 3 .* label other than covid, non_covid"),
        (VALID.assign(probability_covid=[1.2, 0.2, 0.4]), r"outside \[0, 1\]: scan-000"),
        (VALID.assign(probability_covid=[np.nan, 0.2, 0.4]), r"outside \[0, 1\]: scan-000"),
        (VALID.assign(probability_covid=[0.9, 0.3, 0.4]), "do not sum to 1: scan-001"),
    ],
)
def test_invalid_predictions_are_named(predictions, message):
    with pytest.raises(ValueError, match=message):
        validate_predictions(predictions)


def test_valid_predictions_pass():
    validate_predictions(VALID)
    validate_predictions(VALID.rename(columns={"scan_id": "image_id"}))
    assert class_names(VALID) == BINARY
    assert probability_matrix(VALID)[0] == pytest.approx([0.9, 0.1])


def test_predictions_keep_text_through_a_file(tmp_path):
    file = tmp_path / "racnet.csv"
    numbered = VALID.assign(scan_id=["0001", "0002", "NA"])
    numbered.to_csv(file, index=False)
    pd.testing.assert_frame_equal(read_predictions(file), numbered)


def test_a_damaged_file_is_named(tmp_path):
    file = tmp_path / "racnet.csv"
    VALID.assign(label="flu").to_csv(file, index=False)
    with pytest.raises(ValueError, match=r"racnet.csv: 3 of 3 predictions have a label"):
        read_predictions(file)


def test_patients_come_from_the_manifest():
    manifest = pd.DataFrame(
        {"scan_id": ["scan-002", "scan-000", "scan-001"], "patient_id": ["b", "a", "a"]}
    )
    assert attach_patients(VALID, manifest)["patient_id"].tolist() == ["a", "a", "b"]
    with pytest.raises(ValueError, match="no patient for scan_id scan-001"):
        attach_patients(VALID, manifest.iloc[:2])
    with pytest.raises(ValueError, match="lists the same scan_id twice"):
        attach_patients(VALID, pd.concat([manifest, manifest]))


@pytest.mark.parametrize("split", ["test", "train"])
def test_a_threshold_is_never_chosen_elsewhere_than_on_validation(split):
    mixed = VALID.assign(split=["validation", "validation", split])
    with pytest.raises(ValueError, match=f"validation split only, got rows of: {split}"):
        choose_threshold(mixed, positive="covid")


def test_a_threshold_needs_both_classes():
    with pytest.raises(ValueError, match="both with cases"):
        choose_threshold(VALID.assign(split="validation", label="covid"), positive="covid")


def test_threshold_separates_separable_scans():
    predictions = make_predictions(
        ["covid", "covid", "non_covid"], [0.30, 0.24, 0.20], split="validation"
    )
    assert choose_threshold(predictions, positive="covid") == pytest.approx(0.22)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 20)), min_size=2, max_size=15).filter(
        lambda rows: len({is_covid for is_covid, _ in rows}) == 2
    )
)
def test_no_threshold_is_better_than_the_chosen_one(rows):
    labels = ["covid" if is_covid else "non_covid" for is_covid, _ in rows]
    covid = np.array([step / 20 for _, step in rows])
    chosen = choose_threshold(make_predictions(labels, covid, split="validation"), positive="covid")
    reached = [scores_of(labels, covid, threshold=t)["macro_f1"] for t in np.unique(covid)]
    assert scores_of(labels, covid, threshold=chosen)["macro_f1"] == pytest.approx(max(reached))


def test_a_predictions_table_is_what_the_scores_are_computed_from(tmp_path):
    probabilities = np.array([[0.25, 0.75], [0.9, 0.1]], np.float32)
    table = predictions_table(
        pd.Series(["0007", "0003"], index=[7, 3]),  # as a manifest without some rows gives them
        pd.Series(["test", "train"], index=[7, 3]),
        [1, 0],
        probabilities,
        classes=("non_covid", "covid"),
    )
    columns = ["scan_id", "split", "label", "probability_non_covid", "probability_covid"]
    assert table.columns.tolist() == columns
    assert table["scan_id"].tolist() == ["0007", "0003"]
    assert table["split"].tolist() == ["test", "train"]
    assert table["label"].tolist() == ["covid", "non_covid"]
    assert class_names(table) == ("non_covid", "covid")
    np.testing.assert_array_equal(probability_matrix(table).astype(np.float32), probabilities)
    save_csv(table, tmp_path / "racnet.csv")
    again = read_predictions(tmp_path / "racnet.csv")
    assert again[columns[:3]].values.tolist() == table[columns[:3]].values.tolist()
    np.testing.assert_array_equal(probability_matrix(again).astype(np.float32), probabilities)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6))
def test_every_pair_of_probabilities_makes_valid_predictions(covid):
    covid = np.array(covid, np.float32)
    names = [f"s{number}" for number in range(len(covid))]
    targets, splits = [0] * len(covid), ["test"] * len(covid)
    pairs = np.stack([covid, 1 - covid], axis=1)
    table = predictions_table(names, splits, targets, pairs, classes=BINARY)
    validate_predictions(table)
    assert np.abs(probability_matrix(table) - pairs).max() < 1e-9


@pytest.mark.parametrize(
    ("scan_ids", "targets", "probabilities", "error"),
    [
        (["1"], [0, 1], [[1, 0], [0, 1]], ValueError),
        (["1", "2"], [0, 1], [[1, 0]], ValueError),
        (["1", "2"], [0, 1], [[1, 0, 0], [0, 1, 0]], ValueError),
        (["1", "2"], [0, 2], [[1, 0], [0, 1]], IndexError),
    ],
    ids=["an id short", "a row short", "a class too many", "no such class"],
)
def test_a_predictions_table_of_unequal_lengths_is_refused(scan_ids, targets, probabilities, error):
    with pytest.raises(error):
        predictions_table(scan_ids, ["test"] * 2, targets, np.array(probabilities), classes=BINARY)
