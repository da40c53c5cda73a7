"""Figures of the experiments: the confounder outside the lungs, and the step to other data."""

from collections.abc import Mapping

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib.reporting.pictures import STYLE, grid, legend_beside, legend_name, line_style
from lib.reporting.tables import HIGH, LOW, heading

MOST_COLUMNS = 3
SPREAD = 0.006  # between the inputs, so that their intervals do not hide one another


@matplotlib.rc_context(STYLE)
def confounder_figure(scores: pd.DataFrame, metric: str) -> Figure:
    """A score on the test part against the strength of the confounder in the training part.

    Args:
        scores: of ``lib.evaluation.repeated.repeated_scores`` with the keys system, input and
            strength.
        metric: a score that it holds.

    Returns:
        One panel per system; one line with 95 % intervals per input.
    """
    systems = list(dict.fromkeys(scores["system"]))
    inputs = list(dict.fromkeys(scores["input"]))
    columns = min(MOST_COLUMNS, max(1, len(systems)))
    figure, axes = grid(len(systems), columns, cell=(3.6, 2.9))
    for axis, system in zip(axes, systems, strict=True):
        for number, name in enumerate(inputs):
            chosen = (scores["system"] == system) & (scores["input"] == name)
            shift = SPREAD * (2 * number - (len(inputs) - 1))
            _draw_strengths(axis, scores[chosen].sort_values("strength"), metric, number, shift)
        axis.set(title=system, ylim=(0.0, 1.02), ylabel=f"{heading(metric)}, test part")
        axis.set(xlabel="Correlation of tube and label in training", xlim=(-0.06, 1.06))
    handles = [
        Line2D([], [], marker="o", label=legend_name(name), **line_style(number))
        for number, name in enumerate(inputs)
    ]
    legend_beside(figure, handles)
    return figure


def _draw_strengths(axis: Axes, rows: pd.DataFrame, metric: str, number: int, shift: float) -> None:
    """One line of a system; an interval that does not exist is not drawn."""
    values = rows[metric].to_numpy(float)
    below = values - rows[metric + LOW].to_numpy(float)
    above = rows[metric + HIGH].to_numpy(float) - values
    lengths = np.clip([below, above], 0, None)
    axis.errorbar(
        rows["strength"] + shift,
        values,
        yerr=lengths,
        marker="o",
        markersize=4,
        capsize=3,
        elinewidth=1.0,
        **line_style(number),
    )


@matplotlib.rc_context(STYLE)
def cross_data_figure(scores: pd.DataFrame, metric: str) -> Figure:
    """A matrix of scores: rows are what was trained on, columns what was tested on.

    Args:
        scores: of ``lib.evaluation.repeated.repeated_scores`` with the keys comparison, system,
            input, trained_on and tested_on.
        metric: a score that it holds.

    Returns:
        One matrix per comparison, system and input, each cell with its 95 % interval.
    """
    groups = list(scores.groupby(["comparison", "system", "input"], sort=False))
    columns = min(MOST_COLUMNS, max(1, len(groups)))
    figure, axes = grid(len(groups), columns, cell=(3.4, 3.0))
    for axis, ((comparison, system, name), rows) in zip(axes, groups, strict=True):
        _draw_matrix(axis, rows, metric)
        axis.set(title=f"{comparison}\n{system}, input: {name}")
        axis.set(xlabel="Tested on", ylabel="Trained on")
    figure.suptitle(f"{heading(metric)} with 95 % interval")
    return figure


def _draw_matrix(axis: Axes, rows: pd.DataFrame, metric: str) -> None:
    """One matrix, data sets in the same order both ways."""
    names = list(dict.fromkeys([*rows["trained_on"], *rows["tested_on"]]))
    written = [_written(row, metric) for row in rows.to_dict("records")]
    placed = rows.assign(written=written).set_index(["trained_on", "tested_on"])
    values = placed[metric].unstack().reindex(index=names, columns=names)
    texts = placed["written"].unstack().reindex(index=names, columns=names).fillna("")
    seaborn.heatmap(
        values, ax=axis, annot=texts, fmt="", cmap="Blues", vmin=0, vmax=1, square=True,
        cbar=False, linewidths=0.5, linecolor="lightgrey",
    )  # fmt: skip


def _written(row: Mapping[str, float], metric: str) -> str:
    """A value above its interval, where it has one."""
    bounds = (row[metric + LOW], row[metric + HIGH])
    text = f"{row[metric]:.2f}"
    return text if np.isnan(bounds).any() else f"{text}\n[{bounds[0]:.2f}, {bounds[1]:.2f}]"
