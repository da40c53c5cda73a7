"""Tests of lib/reporting/effects.py."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from sklearn.metrics import f1_score, roc_auc_score

from lib.evaluation.statistics import delong_test, holm_adjusted
from lib.reporting.effects import segmentation_effect_table, systems_figure
from lib.reporting.published import published_values
from lib.reporting.tables import SystemRun, classification_table, printable

PUBLISHED = published_values("sam2clip2sam", "Table 1")
SEGMENTATIONS = ("none", "conventional", "sam2clip2sam")
ENDS = ("none", "sam2clip2sam")


def make_predictions(strength, seed, patients=30, data_seed=0):
    """Two scans per patient; the label is seen with some strength through noise."""
    truth = np.random.default_rng(data_seed).permutation(np.arange(2 * patients) % 2 == 0)
    noise = np.random.default_rng(seed).normal(size=2 * patients)
    covid = 1 / (1 + np.exp(-(strength * (2 * truth - 1.0) + noise)))
    return pd.DataFrame(
        {
            "scan_id": [f"scan-{number:03d}" for number in range(2 * patients)],
            "patient_id": np.arange(2 * patients) % patients,
            "split": "test",
            "label": np.where(truth, "covid", "non_covid"),
            "probability_non_covid": 1 - covid,
            "probability_covid": covid,
        }
    )


def make_runs(system="RACNet", data_set="phantom", strengths=(0.2, 0.6, 2.0)):
    return {
        SystemRun(system, name, data_set): make_predictions(strength, seed)
        for seed, (name, strength) in enumerate(zip(SEGMENTATIONS, strengths, strict=True), start=1)
    }


def make_table(runs, **options):
    options = {"positive": "covid", "seed": 0, "repetitions": 100} | options
    return segmentation_effect_table(runs, PUBLISHED, **options)


def test_every_input_is_compared_with_none_and_sam2clip2sam_with_the_conventional_one():
    table = make_table(make_runs() | {SystemRun("RACNet", "mine", "phantom"): None})
    pairs = list(zip(table["segmentation"], table["reference"], strict=True))
    assert pairs == [
        ("conventional", "none"),
        ("sam2clip2sam", "none"),
        ("mine", "none"),
        ("sam2clip2sam", "conventional"),
    ]
    assert table["n"].tolist() == [60, 60, 0, 60]
    assert table["patients"].tolist() == [30, 30, 0, 30]


def test_differences_are_those_of_the_scores():
    runs = make_runs()
    row = make_table(runs).iloc[1]  # SAM2CLIP2SAM against none
    plain, segmented = (runs[SystemRun("RACNet", name, "phantom")] for name in ENDS)
    macro, area = [], []
    for frame in (segmented, plain):
        truth = frame["label"] == "covid"
        macro.append(f1_score(truth, frame["probability_covid"] >= 0.5, average="macro"))
        area.append(roc_auc_score(truth, frame["probability_covid"]))
    assert row["macro_f1_difference"] == pytest.approx(macro[0] - macro[1])
    assert row["roc_auc_difference"] == pytest.approx(area[0] - area[1])
    assert row["macro_f1_difference_low"] < row["macro_f1_difference"]
    assert row["macro_f1_difference"] < row["macro_f1_difference_high"]
    assert row["macro_f1_difference_published"] == pytest.approx(0.9681 - 0.9306)


def test_tests_see_one_scan_per_patient():
    runs = make_runs()
    row = make_table(runs).iloc[1]
    plain, segmented = (runs[SystemRun("RACNet", name, "phantom")].head(30) for name in ENDS)
    truth = (plain["label"] == "covid").to_numpy()
    right = [(part["probability_covid"].to_numpy() >= 0.5) == truth for part in (segmented, plain)]
    won, lost = (right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum()
    assert row["p_mcnemar"] == pytest.approx(binomtest(won, won + lost).pvalue)
    scores = [part["probability_covid"] for part in (segmented, plain)]
    assert row["p_delong"] == pytest.approx(delong_test(truth, *scores).p_value)


def test_holm_takes_all_comparisons_of_a_data_set_together():
    runs = make_runs() | make_runs("MDAP") | make_runs("MDAP", data_set="mosmed")
    table = make_table(runs)
    assert table["comparisons"].tolist() == [6] * 6 + [3] * 3
    phantom = table[table["data_set"] == "phantom"]
    for name in ("p_mcnemar", "p_delong"):
        expected = holm_adjusted(phantom[name])
        assert phantom[f"{name}_holm"].tolist() == pytest.approx(expected.tolist())
        assert (phantom[f"{name}_holm"] >= phantom[name]).all()


def test_equal_predictions_show_no_effect():
    frame = make_predictions(1.0, 3)
    runs = {SystemRun("RACNet", name, "phantom"): frame for name in ENDS}
    row = make_table(runs).iloc[0]
    assert row["macro_f1_difference"] == 0
    assert row[["macro_f1_difference_low", "macro_f1_difference_high"]].isna().all()
    assert (row["p_mcnemar"], row["p_delong"]) == (1, 1)


def test_a_comparison_that_was_not_made_keeps_its_row_and_says_why():
    runs = make_runs() | {SystemRun("MDAP", name, "phantom"): None for name in ENDS}
    table = make_table(runs, not_measured="only in the full study")
    row = table.iloc[-1]
    assert (row["system"], row["n"], row["comparisons"]) == ("MDAP", 0, 3)
    assert np.isnan(row["p_mcnemar_holm"])
    text = printable(table).iloc[-1]
    assert text["Macro F1, difference"] == "only in the full study"
    assert text["Macro F1, difference, published"] == "0.0200"


def test_without_a_pair_there_is_an_empty_table_with_its_columns():
    table = make_table({SystemRun("RACNet", "none", "phantom"): make_predictions(1.0, 1)})
    assert len(table) == 0
    assert {"system", "macro_f1_difference", "p_delong_holm", "comparisons"} <= set(table.columns)


def test_runs_on_other_scans_are_refused_by_name():
    runs = make_runs()
    runs[SystemRun("RACNet", "none", "phantom")] = make_predictions(0.2, 1, data_seed=5)
    message = r"phantom / RACNet / conventional / none: .* differ in label"
    with pytest.raises(ValueError, match=message):
        make_table(runs)


def test_the_figure_shows_measured_and_published_values_of_every_row():
    runs = make_runs() | {SystemRun("MDAP", "none", "phantom"): None}
    options = {"positive": "covid", "columns": ["macro_f1"], "seed": 0, "repetitions": 20}
    table = classification_table(runs, PUBLISHED, **options)
    (axis,) = systems_figure(table, "macro_f1").axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["RACNet", "MDAP"]
    marks = [line for line in axis.lines if line.get_marker() == "o"]
    rings = [line.get_xdata()[0] for line in marks if line.get_fillstyle() == "none"]
    dots = [line.get_xdata()[0] for line in marks if line.get_fillstyle() == "full"]
    assert rings == table["macro_f1_published"].tolist()
    np.testing.assert_array_equal(dots, table["macro_f1"])
