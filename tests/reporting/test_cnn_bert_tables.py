"""Tests of lib/reporting/cnn_bert_tables.py, on made-up predictions."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score

from lib.evaluation.statistics import bootstrap_interval, classification_statistic
from lib.reporting.cnn_bert_tables import (
    TableRow,
    cnn_bert_benchmark_table,
    cnn_bert_effect_table,
    cnn_bert_table,
    read_cnn_bert_runs,
    read_evidence_tables,
)
from lib.reporting.effects import systems_figure
from lib.reporting.published import published_values
from lib.reporting.tables import printable

TABLE_1, TABLE_2, TABLE_3 = (published_values("cnn_bert", f"Table {k}") for k in (1, 2, 3))
BASELINE = TableRow("baseline without MLP", "rml_msc_affine")
POOLED = TableRow("MLP, both, sigmoid", "rml_msc_affine", "both_sigmoid")
ABSENT = TableRow("MLP, max, ReLU", "rml_msc_affine", "max_relu")
WANTED = {"configurations": ["rml_affine_without_bert", "rml_msc_affine"], "seeds": [0, 2]}
OPTIONS = {"data_sets": ["phantom"], "positive": "covid", "seed": 0, "repetitions": 50}


def made_run(strength, *, seed=0, noise=0, configuration="rml_msc_affine", perceptron="", **more):
    """Predictions of 30 scans of 24 patients per part; the label is seen through noise."""
    truth = np.random.default_rng(0).permutation(np.arange(60) % 2 == 0)
    heard = np.random.default_rng([seed, noise]).normal(size=60)
    covid = 1 / (1 + np.exp(-(strength * (2 * truth - 1.0) + heard)))
    return pd.DataFrame(
        {
            "data_set": "phantom",
            "configuration": configuration,
            "perceptron": perceptron,
            "seed": seed,
            "scan_id": [f"scan-{number:02d}" for number in range(60)],
            "patient_id": [f"{number // 30}-{number % 24}" for number in range(60)],
            "split": np.where(np.arange(60) < 30, "validation", "test"),
            "label": np.where(truth, "covid", "non_covid"),
            "probability_non_covid": 1 - covid,
            "probability_covid": covid,
            **more,
        }
    )


def score(frame, part, measure, **options):
    used = frame[frame["split"] == part]
    called = np.where(used["probability_covid"] >= 0.5, "covid", "non_covid")
    return measure(used["label"], called, **options)


def cells(table, part, system):
    (row,) = table[(table["part"] == part) & (table["system"] == system)].to_dict("records")
    return row


def test_one_seed_gives_bootstrap_intervals_over_patients_on_both_parts():
    frame = made_run(1.0)
    table = cnn_bert_table(frame, [BASELINE], TABLE_2, metrics=["accuracy"], **OPTIONS)
    assert table["part"].tolist() == ["validation", "test"]
    for part in table["part"]:
        row, used = cells(table, part, BASELINE.system), frame[frame["split"] == part]
        expected = bootstrap_interval(
            used,
            lambda rows, weights: classification_statistic(rows, weights, positive="covid"),
            seed=0,
            repetitions=50,
        ).loc["accuracy"]
        assert row["accuracy"] == pytest.approx(score(frame, part, accuracy_score))
        assert [row["accuracy_low"], row["accuracy_high"]] == [expected["low"], expected["high"]]
        assert (row["n"], row["seeds"], row["interval_over"]) == (30, 1, "patients")


def test_several_seeds_give_their_mean_with_students_interval():
    frames = [made_run(1.0, seed=seed) for seed in range(3)]
    table = cnn_bert_table(
        pd.concat(frames), [BASELINE], TABLE_2, metrics=["accuracy", "macro_f1"], **OPTIONS
    )
    row = cells(table, "test", BASELINE.system)
    found = [score(frame, "test", f1_score, average="macro") for frame in frames]
    low, high = stats.t.interval(0.95, 2, np.mean(found), stats.sem(found))
    assert row["macro_f1"] == pytest.approx(np.mean(found))
    assert [row["macro_f1_low"], row["macro_f1_high"]] == pytest.approx([max(low, 0), min(high, 1)])
    assert (row["n"], row["seeds"], row["interval_over"]) == (30, 3, "seeds")


def test_published_values_stand_beside_the_part_that_they_were_measured_on():
    table = cnn_bert_table(made_run(1.0), [BASELINE], TABLE_2, metrics=["accuracy"], **OPTIONS)
    validation, test = (cells(table, part, BASELINE.system) for part in ("validation", "test"))
    assert validation["accuracy_published"] == 0.9118
    assert validation["published_on"] == "COV19-CT-DB (ICCV 2021), validation"
    assert "section 5.3.2" in validation["remarks"]
    assert np.isnan(test["accuracy_published"]) and test["remarks"] == ""


def test_a_row_that_was_not_run_says_why_and_shows_what_was_published():
    rows = [BASELINE, ABSENT]
    for frame in (made_run(1.0), made_run(1.0).iloc[:0]):
        table = cnn_bert_table(
            frame, rows, TABLE_2, metrics=["accuracy"], not_measured="only in full", **OPTIONS
        )
        text = printable(table).set_index(["Part", "System"]).loc["validation", ABSENT.system]
        assert text["Accuracy"] == "only in full"
        assert text["Accuracy, published"] == "0.9144"
        assert len(table) == 4


def test_scans_of_several_sets_are_counted_for_perceptrons():
    sets = np.where(np.arange(60) % 10 == 0, 2, 1)
    pooled = [made_run(2.0, seed=k, perceptron="both_sigmoid", sets=sets) for k in (0, 1)]
    frame = pd.concat([made_run(1.0), *pooled])
    table = cnn_bert_table(frame, [BASELINE, POOLED], TABLE_2, metrics=["accuracy"], **OPTIONS)
    assert cells(table, "test", POOLED.system)["several_sets"] == 3
    assert pd.isna(cells(table, "test", BASELINE.system)["several_sets"])
    plain = cnn_bert_table(frame, [BASELINE], TABLE_2, metrics=["accuracy"], **OPTIONS)
    assert "several_sets" not in plain


NETWORKS = {"rml_msc": "3D-CNN-BERT, RML, MSC", "rml_msc_affine": "3D-CNN-BERT, RML, MSC+A"}


def test_the_best_of_the_test_part_is_chosen_on_the_validation_part():
    tempting, chosen = made_run(1.0, configuration="rml_msc"), made_run(1.0)
    for frame, good, bad in ((tempting, "test", "validation"), (chosen, "validation", "test")):
        for part, right in ((good, True), (bad, False)):
            here, covid = frame["split"] == part, frame["label"] == "covid"
            frame.loc[here, "probability_covid"] = np.where(covid[here] == right, 0.9, 0.2)
    frame = pd.concat([tempting, chosen])
    frame["probability_non_covid"] = 1 - frame["probability_covid"]
    table = cnn_bert_benchmark_table(
        frame, NETWORKS, "both_sigmoid", TABLE_3, metrics=["accuracy", "macro_f1"], **OPTIONS
    )
    best = cells(table, "test", "3D-CNN-BERT, best")
    assert (best["run"], best["macro_f1"]) == ("rml_msc_affine", 0.0)
    assert best["macro_f1_published"] == 0.8822
    assert "does not say" in best["remarks"]
    absent = cells(table, "test", "3D-CNN-BERT + MLP, best")
    assert (absent["n"], absent["macro_f1_published"]) == (0, 0.874)
    assert (table["part"] == "validation").sum() == 4 and (table["part"] == "test").sum() == 6
    impossible = cells(table, "validation", "3D-CNN-BERT, RML, MSC+A")
    assert "impossible together" in impossible["remarks"]


def test_effects_are_differences_on_the_same_scans_seed_by_seed():
    frames = {
        (seed, name): made_run(strength, seed=seed, noise=noise, perceptron=name)
        for seed in (0, 1)
        for noise, (name, strength) in enumerate((("", 0.5), ("both_sigmoid", 2.0)))
    }
    options = {**OPTIONS, "seeds": [0, 1]}
    pairs = [(POOLED, BASELINE), (ABSENT, BASELINE)]
    table = cnn_bert_effect_table(pd.concat(frames.values()), pairs, **options)
    assert len(table) == 8
    here = (table["part"] == "test") & (table["seed"] == "1")
    (row,) = table[here & (table["run"] == POOLED.run)].to_dict("records")
    ours, theirs = (score(frames[1, name], "test", accuracy_score) for name in ("both_sigmoid", ""))
    assert row["accuracy_difference"] == pytest.approx(ours - theirs)
    assert row["accuracy_difference_low"] <= ours - theirs <= row["accuracy_difference_high"]
    assert (row["reference"], row["comparisons"]) == ("rml_msc_affine", 2)
    absent = table[table["run"] == ABSENT.run]
    assert absent["n"].eq(0).all() and absent["not_measured"].eq("not run").all()


def test_files_are_read_with_what_their_names_say(tmp_path):
    columns = ["scan_id", "split", "label", "probability_non_covid", "probability_covid"]
    frame = made_run(1.0)
    folder = tmp_path / "phantom"
    (folder / "cnn_bert_rml_msc_affine_seed2_mlp").mkdir(parents=True)
    (folder / "other_mlp").mkdir()
    for name in (
        "cnn_bert_rml_affine_without_bert_seed0-unet_refined.csv",
        "cnn_bert_rml_msc_affine_seed2_mlp/mean_tanh.csv",
        "cnn_bert_rml_msc_affine_seed2-morphology.csv",  # other masks than the paper's
        "cnn_bert_rml_msc_affine_seed1-unet_refined.csv",  # left from another study
        "cnn_bert_rrr_msc_seed0-unet_refined.csv",
        "racnet-none.csv",
        "other_mlp/mean_tanh.csv",
    ):
        frame[columns].to_csv(folder / name, index=False)
    found = read_cnn_bert_runs(tmp_path, {"phantom": frame[["scan_id", "patient_id"]]}, **WANTED)
    names = ["data_set", "configuration", "perceptron", "seed"]
    assert found[names].drop_duplicates().to_numpy().tolist() == [
        ["phantom", "rml_affine_without_bert", "", 0],
        ["phantom", "rml_msc_affine", "mean_tanh", 2],
    ]
    assert found["patient_id"].tolist() == 2 * frame["patient_id"].tolist()
    assert read_cnn_bert_runs(tmp_path / "none", {"phantom": frame}, **WANTED).empty


def test_a_part_without_labelled_scans_is_told_from_a_run_that_is_not_there():
    frame = made_run(1.0)
    table = cnn_bert_table(
        frame[frame["split"] == "validation"],
        [BASELINE, ABSENT],
        TABLE_2,
        metrics=["accuracy"],
        **OPTIONS,
    )
    assert table.set_index(["part", "system"])["not_measured"].to_dict() == {
        ("validation", BASELINE.system): "",
        ("validation", ABSENT.system): "not run",
        ("test", BASELINE.system): "no labelled scan in this part",
        ("test", ABSENT.system): "not run",
    }


def test_evidence_of_all_runs_stands_in_one_table(tmp_path):
    columns = {"measure": ["roc_auc"], "attribution": "network", "measured": 3, "low": 0.5}
    folder = tmp_path / "phantom/evidence_cnn_bert_rml_msc_seed0"
    folder.mkdir(parents=True)
    whole = pd.DataFrame(columns | {"value": 0.75, "high": 0.9})
    whole.to_csv(folder / "summary.csv", index=False)
    whole.assign(label="covid", value=0.8).to_csv(folder / "by_label.csv", index=False)
    table = read_evidence_tables(tmp_path, ["phantom", "other"])
    assert table[["run", "label", "value"]].to_numpy().tolist() == [
        ["cnn_bert_rml_msc_seed0", "all", 0.75],
        ["cnn_bert_rml_msc_seed0", "covid", 0.8],
    ]
    assert "0.75 [0.50, 0.90]" in printable(table).to_string()
    assert read_evidence_tables(tmp_path, ["other"]).empty


def test_a_published_value_that_stands_twice_is_refused():
    twice = pd.concat([TABLE_2, TABLE_2])
    with pytest.raises(ValueError, match="baseline without MLP on validation occur twice"):
        cnn_bert_table(made_run(1.0), [BASELINE], twice, metrics=["accuracy"], **OPTIONS)


def test_the_figure_of_the_systems_takes_these_tables():
    table = cnn_bert_table(
        made_run(1.0), [BASELINE, ABSENT], TABLE_2, metrics=["accuracy"], **OPTIONS
    )
    figure = systems_figure(table.rename(columns={"part": "segmentation"}), "accuracy")
    (axis,) = figure.axes
    rings = [line.get_xdata()[0] for line in axis.lines if line.get_fillstyle() == "none"]
    assert sorted(value for value in rings if not np.isnan(value)) == [0.9118, 0.9144]
