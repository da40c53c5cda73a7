"""Tests of lib/reporting/mask_net_tables.py, on made-up predictions."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn import metrics

from lib.evaluation.classification import PROBABILITY_PREFIX
from lib.reporting.mask_net_tables import (
    NOTHING_LEFT,
    SystemRow,
    benchmark_table,
    best_variant,
    judged_scans,
    lesion_table,
    picture_score_table,
    plain_score_table,
    read_calibration,
    read_lesion_scores,
    read_picture_runs,
    remaining_table,
    scan_table,
    variant_effect_table,
)
from lib.reporting.published import MASK_NET_OWN, published_values
from lib.reporting.tables import printable

CLASSES = ("control", "pneumonia", "covid")
PARTS = ("train", "remaining", "validation", "test")
S = SystemRow("COVID-CT-Mask-Net, S", "mask_net_head", "COVID-CT-Mask-Net, S")
NORMS = SystemRow(
    "COVID-CT-Mask-Net, S + batch norm",
    "mask_net_head_and_norms",
    "COVID-CT-Mask-Net, S + batch norm",
)
OPTIONS = {"data_sets": ["phantom"], "seed": 0, "repetitions": 40}
TABLE_4 = published_values("mask_net", "Table 4")


def made_pictures(classes=CLASSES):
    """Twelve scans of two pictures per part; the remaining ones are of training's patients."""
    rows = [
        {
            "image_id": f"{part}-{scan:02d}-{number}",
            "scan_id": f"{part}-{scan:02d}",
            "slice": number,
            "patient_id": f"{'train' if part == 'remaining' else part}-{scan % 9}",
            "split": part,
            "label": classes[scan % len(classes)],
            "lesion_pixels": scan % len(classes),
        }
        for part in PARTS
        for scan in range(12)
        for number in range(2)
    ]
    return pd.DataFrame(rows)


def made_run(strength=1.0, *, seed=0, noise=0, classes=CLASSES):
    """Predictions of all pictures; the label is seen through noise."""
    pictures = made_pictures(classes)
    truth = pictures["label"].map(classes.index).to_numpy()
    heard = np.random.default_rng([seed, noise]).normal(size=(len(truth), len(classes)))
    odds = np.exp(heard + strength * np.eye(len(classes))[truth])
    frame = pictures[["image_id", "split", "label", "patient_id"]].assign(seed=seed)
    names = [PROBABILITY_PREFIX + name for name in classes]
    frame[names] = odds / odds.sum(1, keepdims=True)
    return frame


def called(frame):
    names = np.array([name.removeprefix(PROBABILITY_PREFIX) for name in frame if "prob" in name])
    return names[frame.filter(like=PROBABILITY_PREFIX).to_numpy().argmax(1)]


def part_of(frame, part):
    return frame[frame["split"] == part]


def cells(table, **wanted):
    for name, value in wanted.items():
        table = table[table[name] == value]
    (row,) = table.to_dict("records")
    return row


def test_a_score_stands_with_its_interval_beside_the_published_one():
    frame = made_run()
    names = ["precision_pneumonia", "balanced_accuracy", "macro_f1"]
    table = picture_score_table(
        {"phantom": {NORMS.run: frame}}, [S, NORMS], TABLE_4, metrics=names, **OPTIONS
    )
    assert table["score"].unique().tolist() == [
        "Precision (pneumonia)", "Balanced accuracy (printed as F1)", "Macro F1",
    ]  # fmt: skip
    used = part_of(frame, "test")
    precision = metrics.precision_score(
        used["label"], called(used), labels=["pneumonia"], average=None
    )
    row = cells(table, score="Precision (pneumonia)", system=NORMS.system)
    assert row["measured"] == pytest.approx(precision.item())
    assert row["measured_low"] <= row["measured"] <= row["measured_high"]
    assert (row["n"], row["seeds"], row["not_measured"]) == (24, 1, "")
    row = cells(table, score="Balanced accuracy (printed as F1)", system=NORMS.system)
    assert row["measured"] == pytest.approx(
        metrics.balanced_accuracy_score(used["label"], called(used))
    )
    assert (row["measured_published"], row["published_on"]) == (0.915, "COVIDx-CT-1, test")
    assert "mean of the three sensitivities" in row["remarks"]
    row = cells(table, score="Macro F1", system=S.system)
    assert (row["n"], row["not_measured"]) == (0, "not run")
    assert np.isnan(row["measured"]) and np.isnan(row["measured_published"])


def test_several_seeds_give_their_mean_with_students_interval():
    frames = [made_run(seed=seed) for seed in range(3)]
    runs = {"phantom": {S.run: pd.concat(frames, ignore_index=True)}}
    row = cells(plain_score_table(runs, [S], metrics=["accuracy"], **OPTIONS))
    found = [np.mean(called(f) == f["label"]) for f in (part_of(f, "test") for f in frames)]
    interval = stats.t.interval(0.95, 2, np.mean(found), stats.sem(found))
    assert (row["n"], row["seeds"]) == (24, 3)
    assert row["accuracy"] == pytest.approx(np.mean(found))
    assert [row["accuracy_low"], row["accuracy_high"]] == pytest.approx(np.clip(interval, 0, 1))


def test_parts_without_pictures_are_told_from_runs_that_are_not_there():
    frame = part_of(made_run(), "validation")
    table = plain_score_table(
        {"phantom": {S.run: frame}},
        [S, NORMS],
        metrics=["accuracy"],
        parts=["validation", "test"],
        not_measured="only in full",
        **OPTIONS,
    )
    found = table.set_index(["part", "system"])["not_measured"]
    assert found["validation", S.system] == ""
    assert found["test", S.system] == "no labelled picture in this part"
    assert found["test", NORMS.system] == "only in full"


def test_scores_of_a_class_that_a_data_set_lacks_are_empty():
    frame = made_run(classes=("control", "covid"))
    table = plain_score_table(
        {"phantom": {S.run: frame}}, [S], metrics=["sensitivity_pneumonia", "accuracy"], **OPTIONS
    )
    assert np.isnan(table["sensitivity_pneumonia"].item()) and table["accuracy"].item() > 0


def test_the_best_variant_is_chosen_on_the_validation_part():
    good, tempting = made_run(6.0), made_run(6.0)
    for frame, wrong in ((good, "test"), (tempting, "validation")):
        rows = (frame["split"] == wrong) & (frame["label"] == "covid")
        frame.loc[rows, ["probability_control", "probability_covid"]] = [0.9, 0.0]
        frame.loc[rows, "probability_pneumonia"] = 0.1
    runs = {"phantom": {S.run: tempting, NORMS.run: good}}
    variants = [S.run, "mask_net_everything", NORMS.run]
    assert best_variant(runs["phantom"], variants) == NORMS.run
    assert best_variant({}, variants) == S.run
    table = benchmark_table(
        runs,
        variants,
        [SystemRow("ResNet18", "resnet18_location", "ResNet18", "ResNet18")],
        published_values("mask_net", "Table 5"),
        own=published_values("mask_net", MASK_NET_OWN),
        best="COVID-CT-Mask-Net (best)",
        metrics=["sensitivity_covid"],
        **OPTIONS,
    )
    row = cells(table, system="COVID-CT-Mask-Net (best)")
    assert (row["run"], row["measured"], row["measured_published"]) == (NORMS.run, 0.0, 0.908)
    row = cells(table, system="ResNet18")
    assert (row["n"], row["measured_published"], row["own_published"]) == (0, 0.812, 0.867)


def test_of_equal_sensitivity_the_variant_of_higher_mean_sensitivity_is_the_best():
    all_covid, right = made_run(9.0), made_run(9.0)
    names = [PROBABILITY_PREFIX + name for name in CLASSES]
    all_covid[names] = [0.1, 0.1, 0.8]
    assert best_variant({"a": all_covid, "b": right}, ["a", "b"]) == "b"


def test_competitors_own_scores_of_the_positive_class_are_found_by_our_names():
    covnet = SystemRow("COVNet", "covnet", "COVNet", "COVNet", "scan")
    table = picture_score_table(
        {},
        [covnet],
        published_values("mask_net", "Table 5"),
        own=published_values("mask_net", MASK_NET_OWN),
        metrics=["specificity", "roc_auc", "sensitivity_pneumonia"],
        **OPTIONS,
    )
    assert table["own_published"].tolist() == [0.96, 0.96, 0.87]
    assert table["published_on"].eq("434 exams, its own").all() and table["level"].eq("scan").all()


def test_remaining_pictures_say_whose_patients_they_are():
    pictures = {"phantom": made_pictures()}
    runs = {"phantom": {S.run: made_run()}}
    table = remaining_table(runs, [S], pictures, metrics=["accuracy"], **OPTIONS)
    assert table["patients_also_trained"].tolist() == ["9 of 9"]
    assert table["n"].tolist() == [24]
    without = {"phantom": pictures["phantom"].query("split != 'remaining'")}
    runs = {"phantom": {S.run: made_run().query("split != 'remaining'")}}
    table = remaining_table(runs, [S], without, metrics=["accuracy"], **OPTIONS)
    assert printable(table)["Accuracy"].tolist() == [NOTHING_LEFT]


def written(frame, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.drop(columns=["patient_id", "seed"]).to_csv(path, index=False)


def test_files_are_read_with_what_their_names_say(tmp_path):
    pictures = made_pictures()
    names = ("mask_net_head_seed0", "mask_net_head_seed1", "mask_net_head_seed7", "other_seed0")
    for name in names:
        written(made_run(), tmp_path / f"phantom/pictures/{name}.csv")
    found = read_picture_runs(
        tmp_path,
        {"phantom": pictures, "empty": pictures},
        systems=[S.run, NORMS.run],
        seeds=[0, 1],
    )
    assert found["empty"] == {} and list(found["phantom"]) == [S.run]
    frame = found["phantom"][S.run]
    assert frame["seed"].tolist() == [0] * 96 + [1] * 96
    assert frame["patient_id"].tolist() == 2 * pictures["patient_id"].tolist()


def test_a_system_that_judges_scans_has_one_row_per_scan(tmp_path):
    pictures = made_pictures()
    frame = made_run()
    names = [PROBABILITY_PREFIX + name for name in CLASSES]
    frame[names] = frame[names].to_numpy()[np.arange(96) // 2 * 2]  # of the first of two pictures
    written(frame, tmp_path / "phantom/pictures/covnet_seed0.csv")
    wanted = {"systems": ["covnet"], "seeds": [0], "of_scans": ["covnet", "mask_net_head"]}
    found = read_picture_runs(tmp_path, {"phantom": pictures}, **wanted)["phantom"]["covnet"]
    assert found["scan_id"].tolist() == pictures["scan_id"].unique().tolist()
    np.testing.assert_array_equal(found[names], frame[names].iloc[::2])
    with pytest.raises(
        ValueError, match="pictures of scan train-00 differ in label or probability"
    ):
        judged_scans(made_run(), pictures)


def test_lesions_are_scored_by_both_rules_beside_what_is_published(tmp_path):
    folder = tmp_path / "phantom/lesions/both"
    folder.mkdir(parents=True)
    pd.DataFrame(
        {
            "rule": ["paper", "coco"],
            "metric": "mAP",
            "value": [0.4, 0.3],
            "low": [0.35, np.nan],
            "high": [0.45, np.nan],
            "n": 50,
        }
    ).to_csv(folder / "summary.csv", index=False)
    systems = {"both_heads": "Mask R-CNN, heads", "both": "Mask R-CNN, full"}
    scores = read_lesion_scores(tmp_path, ["phantom", "other"], systems)
    published = {"paper": published_values("mask_net", "Table 6")}
    table = lesion_table(scores, systems, published, data_sets=["phantom", "other"])
    assert len(table) == 12
    row = cells(table, data_set="phantom", score="mAP", configuration="both")
    assert (row["paper_rule"], row["coco_rule"], row["n"]) == (0.4, 0.3, 50)
    assert (row["paper_published"], row["published_on"]) == (0.352, "CNCB lesions, test")
    assert cells(table, data_set="phantom", score="AP@0.5", configuration="both")["n"] == 0
    text = printable(table)
    assert "0.40 [0.35, 0.45]" in text["Paper's rule"].tolist()
    assert (text["COCO's rule"] == "not run").sum() == 11


def test_diagnoses_stand_beside_their_calibration(tmp_path):
    frame = made_run(3.0).rename(columns={"image_id": "scan_id"})
    for number, before in enumerate((0.2, 0.4)):
        folder = tmp_path / f"phantom/diagnoses/mask_net_head_seed{number}"
        folder.mkdir(parents=True)
        rows = [  # part, system, predictions, and by how much they promise too much
            ("validation", "before calibration", 9, 0.9),
            ("test", "after calibration", 3, 0.1),
            ("test", "before calibration", 3, before),
            ("test", "before calibration", 1, before),
        ]
        table = pd.DataFrame(rows, columns=["split", "system", "n", "gap"])
        table = table.assign(accuracy=0.5, confidence=table["gap"] + 0.5)
        table.to_csv(folder / "calibration.csv", index=False)
    chosen = {"systems": [S.run], "seeds": [0, 1]}
    calibration = read_calibration(tmp_path, ["phantom", "other"], **chosen)
    assert calibration["before"].tolist() == pytest.approx([0.2, 0.4])
    table = scan_table({"phantom": {S.run: frame}}, [S, NORMS], calibration, **OPTIONS)
    row = cells(table, system=S.system)
    assert row["calibration_error_before"] == pytest.approx(0.3)
    assert row["calibration_error_after"] == pytest.approx(0.1)
    assert row["n"] == 24 and 0 < row["macro_f1"] <= 1
    row = cells(table, system=NORMS.system)
    assert (row["n"], row["not_measured"]) == (0, "not run")
    assert np.isnan(row["calibration_error_before"])


def test_effects_are_differences_on_the_same_pictures():
    ours, theirs = made_run(3.0, noise=1), made_run(0.5, noise=2)
    runs = {"phantom": {NORMS.run: ours, S.run: theirs}}
    pairs = [(NORMS.run, S.run), ("mask_net_everything", S.run)]
    table = variant_effect_table(runs, pairs, seeds=[0], **OPTIONS)
    row = cells(table, run=NORMS.run)
    right = [
        np.mean(called(f) == f["label"]) for f in (part_of(ours, "test"), part_of(theirs, "test"))
    ]
    assert row["accuracy_difference"] == pytest.approx(right[0] - right[1])
    assert (row["seed"], row["reference"], row["n"], row["patients"]) == ("0", S.run, 24, 9)
    assert 0 <= row["p_mcnemar"] <= 1
    assert cells(table, run="mask_net_everything")["not_measured"] == "not run"
