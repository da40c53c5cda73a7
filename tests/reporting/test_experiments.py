from itertools import product

import numpy as np
import pandas as pd
import pytest

from lib.reporting.experiments import confounder_figure, cross_data_figure


def interval(table, low=0.1, high=0.05):
    return table.assign(
        macro_f1_low=table["macro_f1"] - low, macro_f1_high=table["macro_f1"] + high
    )


def test_the_confounder_figure_has_a_panel_per_system_and_a_line_per_input():
    keys = list(product(["RACNet", "MDAP"], ["none", "true lungs"], [1.0, 0.0]))
    table = pd.DataFrame(keys, columns=["system", "input", "strength"])
    table = interval(table.assign(macro_f1=np.linspace(0.3, 0.9, 8)))
    table.loc[3, ["macro_f1_low", "macro_f1_high"]] = np.nan
    axes = confounder_figure(table, "macro_f1").axes
    assert [axis.get_title() for axis in axes] == ["RACNet", "MDAP"]
    for axis, rows in zip(axes, (table[:4], table[4:]), strict=True):
        lines = [bars.lines[0] for bars in axis.containers]
        drawn = [line.get_ydata().tolist() for line in lines]
        values = rows["macro_f1"].tolist()
        assert drawn == [[values[1], values[0]], [values[3], values[2]]]  # by strength
    (segments,) = axes[0].containers[0].lines[2]
    ends = [segment[:, 1].tolist() for segment in segments.get_segments()]
    value = table["macro_f1"].tolist()
    assert ends[0] == pytest.approx([value[1] - 0.1, value[1] + 0.05])


def test_the_matrix_has_what_was_trained_on_in_rows():
    names = list(product(["B", "A"], ["A", "B"]))
    table = pd.DataFrame(names, columns=["trained_on", "tested_on"])
    table = table.assign(comparison="scanners", system="RACNet", input="none")
    table = interval(table.assign(macro_f1=[0.5, 0.9, 0.8, 0.6]))
    table.loc[3, "macro_f1_low"] = np.nan
    (axis,) = cross_data_figure(table, "macro_f1").axes
    rows, columns = (
        [label.get_text() for label in labels]
        for labels in (axis.get_yticklabels(), axis.get_xticklabels())
    )
    assert rows == columns == ["B", "A"]
    written = [text.get_text() for text in axis.texts]
    assert written == ["0.90\n[0.80, 0.95]", "0.50\n[0.40, 0.55]", "0.60", "0.80\n[0.70, 0.85]"]
