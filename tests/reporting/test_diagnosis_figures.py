"""Tests of lib/reporting/diagnosis_figures.py: what is drawn, read back from the figure."""

import numpy as np
import pandas as pd
import pytest

from lib.reporting.diagnosis_figures import (
    example_diagnoses,
    reliability_curves,
    slices_along_scans,
)

CLASSES = ("control", "covid")


def diagnoses(*rows):
    table = pd.DataFrame(rows, columns=["scan_id", "split", "label", "probability_covid"])
    table.insert(3, "probability_control", 1 - table["probability_covid"])
    return table


def reliability(split, system, confidence=(0.6, 0.9), accuracy=(0.5, 1.0), n=(4, 4)):
    columns = {"confidence": confidence, "accuracy": accuracy, "n": n}
    table = pd.DataFrame(columns).assign(split=split, system=system)
    return table.assign(accuracy_low=[0.15, 0.51], accuracy_high=[0.85, 1.0])


def slices(scan_id="a", weights=(0, 0.5, 0.5, 0)):
    table = pd.DataFrame({"scan_id": scan_id, "slice": range(4), "weight": weights})
    table["probability_control"] = [0.9, 0.2, 0.3, 0.8]
    return table.assign(probability_covid=1 - table["probability_control"])


def test_examples_are_the_median_and_the_worst_of_every_class():
    table = diagnoses(
        ("a", "test", "covid", 0.9),
        ("b", "test", "covid", 0.5),
        ("c", "test", "covid", 0.1),
        ("d", "test", "control", 0.3),
        ("e", "validation", "control", 0.9),
    )
    assert example_diagnoses(table, "test")["scan_id"].tolist() == ["d", "b", "c"]
    assert example_diagnoses(table, "validation")["scan_id"].tolist() == ["e"]
    assert example_diagnoses(table, "train").empty


def test_a_panel_shows_all_slices_which_count_and_the_diagnosis():
    scan = diagnoses(("a", "test", "control", 0.75))
    shuffled = pd.concat([slices(), slices("other")]).sample(frac=1, random_state=0)
    (axis,) = slices_along_scans(shuffled, scan).axes
    assert axis.get_title() == "a: control\ndiagnosis covid, 0.75"
    control, covid = axis.lines
    np.testing.assert_array_equal(control.get_xdata(), range(4))
    np.testing.assert_array_equal(control.get_ydata(), [0.9, 0.2, 0.3, 0.8])
    np.testing.assert_allclose(covid.get_ydata(), [0.1, 0.8, 0.7, 0.2])
    shaded = sorted(patch.get_x() for patch in axis.patches)
    assert shaded == [0.5, 1.5]


def test_scans_of_one_slice_and_many_scans_have_their_panels():
    scans = diagnoses(*[(name, "test", "covid", 0.5) for name in "abc"])
    figure = slices_along_scans(pd.concat([slices(name)[:1] for name in "abc"]), scans)
    assert len(figure.axes) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "control", "covid", "slices that count",
    ]  # fmt: skip


def test_reliability_has_a_panel_per_part_with_intervals_and_errors():
    table = pd.concat([
        reliability(split, system)
        for split in ("validation", "test")
        for system in ("before calibration", "after calibration")
    ])  # fmt: skip
    figure = reliability_curves({"run": table})
    validation, test = figure.axes
    assert validation.get_title() == "validation, 8 scans\nECE 0.10 before, 0.10 after"
    assert test.get_title().startswith("test, 8 scans")
    before, after = test.containers
    np.testing.assert_array_equal(before.lines[0].get_xdata(), [0.6, 0.9])
    np.testing.assert_array_equal(before.lines[0].get_ydata(), [0.5, 1.0])
    (bars,) = before.lines[2]
    np.testing.assert_allclose([s[:, 1] for s in bars.get_segments()], [[0.15, 0.85], [0.51, 1.0]])
    assert before.lines[0].get_color() != after.lines[0].get_color()


def test_several_runs_are_named_and_an_absent_part_takes_no_place():
    both = pd.concat([reliability("validation", "before"), reliability("test", "before")])
    figure = reliability_curves({"first": both, "second": both})
    assert [axis.get_title().split("\n")[0] for axis in figure.axes] == [
        "first", "first", "second", "second",
    ]  # fmt: skip
    assert len(reliability_curves({"first": reliability("test", "before")}).axes) == 1


def test_nothing_to_show_is_said():
    with pytest.raises(ValueError, match="a figure needs something to show"):
        reliability_curves({})
    with pytest.raises(ValueError, match="a figure needs something to show"):
        slices_along_scans(slices(), diagnoses())
