"""Tests of lib/reporting/mask_net_audit.py: the findings of FACTS 5.3, and their remarks."""

import pytest

from lib.reporting.audit import audit_summary
from lib.reporting.mask_net_audit import (
    IMAGES,
    MASK_NET_MEANING,
    MATRIX,
    OWN_SCORES,
    RATE,
    SHARES,
    WEIGHTS,
    mask_net_checks,
    mask_net_figure,
)
from lib.reporting.published import published_values


@pytest.fixture(scope="module")
def mask_net():
    return mask_net_checks()


def failed(checks, finding):
    chosen = checks[(checks["finding"] == finding) & ~checks["holds"]]
    return chosen.set_index(["system", "segmentation"])["derived"].to_dict()


def test_the_headline_of_mask_net_is_the_authors_matrix_and_its_f1_a_mean_sensitivity(mask_net):
    rows = mask_net[mask_net["finding"] == MATRIX].set_index("metrics")
    assert rows["holds"].sum() == 5
    assert rows["derived"].to_dict() == {
        "Sensitivity (control)": "92.095",
        "Sensitivity (pneumonia)": "91.619",
        "Sensitivity (covid)": "90.796",
        "Accuracy": "91.663",
        "F1, read as macro F1": "91.667",
        "F1, read as class-weighted F1": "91.720",
        "F1, read as F1 of mean precision and sensitivity": "91.722",
        "F1, read as mean sensitivity": "91.504",
    }
    assert rows.at["F1, read as mean sensitivity", "holds"]


def test_scores_of_mask_net_are_possible_on_the_released_list(mask_net):
    for finding, checks in ((RATE, 9), (SHARES, 4)):
        assert mask_net.loc[mask_net["finding"] == finding, "holds"].tolist() == [True] * checks
    both = mask_net[(mask_net["finding"] == SHARES) & (mask_net["table"] == "README")]
    assert both["derived"].tolist() == ["20,268 of 21,191, 95.644"]


def test_numbers_of_images_that_disagree(mask_net):
    assert failed(mask_net, IMAGES) == {
        ("COVIDx-CT-1", "all"): "104,009 in the list",
        ("COVIDx-CT-1", "test"): "21,191 in the list",
        ("confusion matrix", "test"): "21,191 in the list; 9 of pneumonia are missing",
        ("CNCB lesions", "training"): "650 in the list",
        ("CNCB lesions", "test"): "100 in the list",
        ("COVIDNet-CT", "test to training"): "0.34300; 0.3532 is 21,192 to about 60,000",
    }
    lesions = mask_net[(mask_net["system"] == "CNCB lesions") & ~mask_net["holds"]]
    assert set(lesions["table"]) == {"README"}
    derived = mask_net.set_index(["system", "segmentation"])["derived"]
    assert derived["COVIDx-CT-1", "remaining"].startswith("58,782 of 61,782")
    assert derived["iCTCF", "training"].iloc[-1].endswith("less 12,976 leaves 1,004")


def test_numbers_of_parameters_that_disagree(mask_net):
    found = failed(mask_net, WEIGHTS)
    assert list(found) == [
        ("S", "all"), ("COVID-CT-Mask-Net", "all"), ("S + batch norm", "trained"),
    ]  # fmt: skip
    assert found["S", "all"].startswith("2,364,419; two layers")
    assert found["S + batch norm", "trained"].startswith("2,409,859")


def test_one_sensitivity_of_a_competitor_is_a_precision(mask_net):
    assert list(failed(mask_net, OWN_SCORES)) == [("ResNet18", "none")]
    remarks = published_values("mask_net", "Table 5").set_index("system")["remark"]
    assert remarks["ResNet18"].startswith("no count out of 30")


def test_what_mask_net_calls_f1_is_remarked_wherever_it_stands(mask_net):
    values = published_values("mask_net")
    called = values[values["metric"] == "balanced_accuracy"]
    assert called["remark"].str.contains("printed as F1-score").tolist() == [True] * 3
    summary = audit_summary(mask_net, meaning=MASK_NET_MEANING)
    assert [name.lower() for name in summary["finding"]] == [
        name.lower() for name in MASK_NET_MEANING
    ]
    assert summary["contradicted"].sum() == (~mask_net["holds"]).sum() == 13


def test_the_figure_of_mask_net_shows_the_matrix_and_its_readings():
    left, right = mask_net_figure().axes
    texts = [text.get_text() for text in left.texts]
    assert texts[0] == "8,703\n92.10 %" and len(texts) == 9
    marked = [line.get_xdata()[-1] for line in right.lines if line.get_marker() == "o"]
    assert marked == pytest.approx([91.667, 91.720, 91.722, 91.504], abs=1e-3)
