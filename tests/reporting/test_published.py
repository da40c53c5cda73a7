"""Tests of lib/reporting/published.py: the numbers against the papers' own arithmetic."""

import numpy as np
import pytest

from lib.reporting.published import PUBLISHED, published_values

# Half a unit of the last printed digit, and a little for rounding either way.
PRINTED_TOLERANCE = 0.0051
# The BERT paper cuts digits off in places: it prints 337 of 374, 90.107 %, as 90.10.
CUT_OFF = 0.005


def remarked(values):
    return {(value.system, value.segmentation) for value in values if value.remark}


def table(paper, name):
    return [value for value in PUBLISHED if (value.paper, value.table) == (paper, name)]


def reachable(percent, scans):
    """Whether some count out of that many scans is printed as this percentage."""
    shares = 100 * np.arange(scans + 1) / scans
    return bool((np.abs(shares - percent) <= PRINTED_TOLERANCE).any())


def test_every_number_stands_once_and_names_its_source():
    keys = [(v.paper, v.table, v.system, v.segmentation, v.data_set, v.metric) for v in PUBLISHED]
    assert len(set(keys)) == len(keys)
    assert all(0 < value.value <= 100 and value.source for value in PUBLISHED)


def test_macro_f1_contradicts_equation_9_in_exactly_the_remarked_rows():
    wide = published_values("sam2clip2sam", "Table 1").pivot(
        index=["system", "segmentation"], columns="metric", values="value"
    )
    mean = (wide["f1_covid"] + wide["f1_non_covid"]) / 2
    contradictory = wide.index[(wide["macro_f1"] - mean).abs() > PRINTED_TOLERANCE]
    rows = [(name, "sam2clip2sam") for name in ("MDAP", "FDVTS", "ACVLab")]
    assert sorted(contradictory) == sorted(rows)
    assert mean[rows].tolist() == pytest.approx([89.375, 89.865, 89.865])
    said = [
        value
        for value in table("sam2clip2sam", "Table 1")
        if value.metric == "macro_f1" and "equation 9" in value.remark
    ]
    assert remarked(said) == set(rows)


def test_sensitivities_that_no_count_of_scans_gives_are_remarked():
    sensitivities = [
        value for value in table("sam2clip2sam", "Table 2") if value.metric == "sensitivity"
    ]
    impossible = {
        (value.system, value.segmentation)
        for value in sensitivities
        if not reachable(value.value, 255) and not reachable(value.value, 256)
    }
    assert len(impossible) == 7
    assert remarked(sensitivities) == impossible


def test_f1_of_table_2_follows_from_precision_and_sensitivity():
    wide = published_values("sam2clip2sam", "Table 2").pivot(
        index=["system", "segmentation"], columns="metric", values="value"
    )
    f1 = 2 * wide["precision"] * wide["sensitivity"] / (wide["precision"] + wide["sensitivity"])
    assert (f1 - wide["f1_covid"]).abs().max() < 0.02  # inputs are rounded


def test_accuracies_of_the_bert_paper_are_counts_of_374_scans():
    accuracies = [*table("cnn_bert", "Table 1"), *table("cnn_bert", "Table 2")]
    impossible = {
        value.system
        for value in accuracies
        if not reachable(value.value, 374) and not reachable(value.value + CUT_OFF, 374)
    }
    assert impossible == {"3D-CNN-BERT, RRR, MSC", "MLP, both, tanh"}
    said = [value for value in accuracies if "no count of scans" in value.remark]
    assert {value.system for value in said} == impossible


def test_mask_net_numbers_follow_from_the_authors_confusion_matrix():
    counts = np.array([[8703, 738, 9], [406, 6767, 213], [14, 386, 3946]])  # control, CP, COVID-19
    sensitivity = 100 * np.diag(counts) / counts.sum(axis=1)
    printed = {value.metric: value.value for value in table("mask_net", "abstract")}
    names = ("sensitivity_control", "sensitivity_pneumonia", "sensitivity_covid")
    assert [printed[name] for name in names] == pytest.approx(sensitivity, abs=0.006)
    assert printed["accuracy"] == pytest.approx(100 * np.trace(counts) / counts.sum(), abs=0.006)
    assert printed["macro_f1"] == pytest.approx(sensitivity.mean(), abs=0.01)


def test_lookup_gives_fractions_beside_percent():
    frame = published_values("sam2clip2sam", "Table 1")
    assert len(frame) == 27
    row = frame.set_index(["system", "segmentation", "metric"]).loc[("RACNet", "none", "f1_covid")]
    assert (row["value"], row["fraction"]) == (92.18, 0.9218)
    tables = {"Table 1", "Table 2", "Table 3", "section 5.3.1"}
    assert set(published_values("cnn_bert")["table"]) == tables


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match=r"no published values of mask_net Table 9; there are:"):
        published_values("mask_net", "Table 9")
