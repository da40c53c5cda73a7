"""Tests of lib/reporting/mask_net_sizes.py: counts of FACTS 5, and settings of real modules."""

import pandas as pd
import pytest

from lib.reporting.mask_net_sizes import (
    classifier_setting_table,
    lesion_setting_table,
    network_sizes,
    parameter_table,
    picture_count_table,
    plain,
    setting_table,
    two_class_table,
)

LEARNED = {"epochs": 9, "learning_rate": 1e-3, "weight_decay": 1e-4}


@pytest.fixture(scope="module")
def parameters():
    return parameter_table().set_index(["system", "trained"])


def made_pictures():
    """Three scans; training and remaining pictures of one, one slice without a class."""
    rows = [
        ("a", "p1", "train", "covid", 9),
        ("a", "p1", "train", "covid", 4),
        ("a", "p1", "remaining", "covid", 2),
        ("a", "p1", "", "", 0),
        ("b", "p2", "train", "control", 0),
        ("c", "p3", "test", "control", 0),
        ("c", "p3", "test", "control", pd.NA),
        ("d", "p4", "test", "covid", 7),
    ]
    table = pd.DataFrame(rows, columns=["scan_id", "patient_id", "split", "label", "lesion_pixels"])
    return table.astype({"lesion_pixels": "Int64"})


def test_parameters_are_those_of_the_facts(parameters):
    assert parameters.at[("S", "all"), "parameters_paper"] == 2_364_419
    ours = parameters.loc["COVID-CT-Mask-Net"]["trained_paper"].to_dict()
    assert ours == {"S": 2_364_419, "S + batch norm": 2_417_539, "all weights": 31_469_672}
    lesions = parameters.loc["Mask R-CNN"]
    assert lesions["parameters_paper"].unique().tolist() == [31_728_744]
    backbone = 23_508_032 + 3_344_384
    assert lesions["trained_paper"].to_dict() == {
        "heads": 31_728_744 - backbone,
        "full": 31_728_744,
    }
    assert (parameters["parameters_small"] < parameters["parameters_paper"]).all()


def test_what_is_stated_stands_beside_with_its_source(parameters):
    assert parameters.at[("S", "all"), "stated"] == "2.26 (text); 2.36 (README)"
    assert parameters.at[("Mask R-CNN", "full"), "stated"] == "31.78 (README)"
    assert parameters.at[("COVNet", "all"), "stated"] == ""
    assert ("LightCNN", "all, approximation") in parameters.index


def test_counting_trained_weights_leaves_no_trace():
    assert network_sizes("small") == network_sizes("small")


def test_pictures_are_counted_as_each_system_uses_them():
    table = picture_count_table({"made": made_pictures()}).set_index("system")
    # slices with lesions; those left over by the sample are trained on too
    assert table.loc["Mask R-CNN", ["train", "test"]].tolist() == ["3", "1"]
    ours = table.loc["COVID-CT-Mask-Net"]
    assert ours[["train", "validation", "test"]].tolist() == ["3", "0", "3"]
    assert (ours["train_stated"], ours["test_stated"]) == ("3,000 (text)", "21,192 (text)")
    assert (ours["test_to_training"], ours["test_to_training_stated"]) == ("1.00", "7.06 (text)")
    assert table.loc["COVNet", ["counts", "train", "test"]].tolist() == ["scans", "2", "2"]
    assert table.at["COVIDNet-CT", "train_stated"] == "about 60,000 (text)"
    assert table.at["COVNet", "remarks"] == "about 500 (text) in all"


def test_a_data_set_without_training_has_no_ratio():
    table = picture_count_table({"made": made_pictures().query("split == 'test'")})
    assert table["test_to_training"].eq("").all()


def test_pictures_of_two_classes():
    table = two_class_table({"made": made_pictures()}).set_index("part")
    assert table.index.tolist() == ["train", "test", "remaining"]
    row = table.loc["train"]
    assert row[["patients", "pictures", "control", "covid"]].tolist() == [2, 3, 1, 2]
    assert row["share_of_covid"] == pytest.approx(2 / 3)
    assert (row["stated"], table.at["remaining", "stated"]) == ("iCTCF: 600 (text)", "")
    assert "pneumonia" not in table


def test_settings_of_the_lesion_model_are_read_from_it():
    table = lesion_setting_table({"paper": LEARNED, "small": LEARNED | {"epochs": 2}})
    table = table.set_index("setting")
    assert table.columns.tolist() == ["stated", "stated_in", "head2023", "paper2020", "small"]
    stated = table[table["stated_in"] == "code"]
    assert (stated["stated"] == stated["head2023"]).all() and len(stated) == 13
    assert table.loc["RPN batch", ["head2023", "paper2020"]].tolist() == ["256", "1,024"]
    assert table.loc["Epochs", ["stated", "paper2020", "small"]].tolist() == ["100", "9", "2"]
    assert (table != "").all(axis=None)


def test_settings_of_the_classifier_are_read_from_it():
    presets = {"paper": LEARNED, "small": LEARNED}
    presets["configurations"] = {"head": {"paper": {}, "small": {"epochs": 40}}}
    presets["fine_tuned"] = {"paper": {"epochs": 10}, "small": {"epochs": 3}}
    table = classifier_setting_table(presets).set_index("setting")
    for name in ("RoI output", "RoI score", "RPN NMS", "RoI NMS", "RPN output"):
        assert table.at[name, "stated"] == table.at[name, "paper"] != ""
    assert table.loc["Epochs of fine-tuning"].tolist() == ["10", "text", "10", "3"]
    assert table.loc["Epochs where S alone is trained"].tolist() == ["", "", "9", "40"]


def test_a_subject_of_which_nothing_is_stated_is_refused():
    with pytest.raises(ValueError, match="nothing is stated of U-Net in Table 2"):
        setting_table("Table 2", "U-Net", {})


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-5, "1e-5"), (0.75, "0.75"), (21_036, "21,036"), (-0.01, "-0.01"), (2.0, "2"), (0, "0")],
)
def test_numbers_are_as_short_as_they_are_exact(value, text):
    assert plain(value) == text
    assert float(text.replace(",", "")) == value
