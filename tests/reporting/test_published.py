"""Tests of lib/reporting/published.py: the numbers against the papers' own arithmetic."""

import numpy as np
import pytest

from lib.reporting.published import (
    MASK_NET_NUMBERS,
    MASK_NET_UNKNOWN,
    PUBLISHED,
    published_values,
    stated_number,
)

# Half a unit of the last printed digit, and a little for rounding either way.
PRINTED_TOLERANCE = 0.0051
# The BERT paper cuts digits off in places: it prints 337 of 374, 90.107 %, as 90.10.
CUT_OFF = 0.005
HEADLINE = (
    "sensitivity_covid", "sensitivity_pneumonia", "sensitivity_control",
    "accuracy", "balanced_accuracy",
)  # fmt: skip


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


def test_mask_net_headline_is_the_same_wherever_it_stands():
    rows = [
        [value.value for value in PUBLISHED if value.table == name and value.metric in HEADLINE]
        for name in ("abstract", "Table 4")
    ]
    assert rows[0] == rows[1] == [90.80, 91.62, 92.10, 91.66, 91.50]
    best = [value for value in table("mask_net", "Table 5") if "best" in value.system]
    assert [value.value for value in best] == rows[0]


def test_every_table_of_mask_net_has_values_or_says_what_is_unknown():
    assert list(MASK_NET_UNKNOWN) == [f"Table {number}" for number in range(1, 10)]
    scored = {value.table for value in PUBLISHED if value.paper == "mask_net"}
    stated = {number.table for number in MASK_NET_NUMBERS}
    assert set(MASK_NET_UNKNOWN) - scored - stated == set()
    keys = [(n.table, n.subject, n.name, n.source) for n in MASK_NET_NUMBERS]
    assert len(set(keys)) == len(keys)


def test_unverified_scores_of_competitors_say_so():
    own = table("mask_net", "own publications of Table 5")
    assert {value.system for value in own} == {
        "COVIDNet-CT-A", "COVIDNet-CT-B", "COVNet", "LightCNN", "ResNet18",
    }  # fmt: skip
    sure = {value.system for value in own if not value.remark}
    assert sure == {"COVIDNet-CT-A", "COVIDNet-CT-B"}  # read in the authors' README


def test_a_stated_number_is_found_by_what_it_is_of():
    assert stated_number("Table 3", "COVID-CT-Mask-Net", "roi score") == -0.01
    with pytest.raises(ValueError, match=r"Table 9 of .* states no accuracy of iCTCF \(text\)"):
        stated_number("Table 9", "iCTCF", "accuracy")


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
