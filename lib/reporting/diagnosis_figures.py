"""Figures of diagnoses of scans: what their slices say, and whether probabilities can be believed.

Colours and saving are those of `lib.reporting.pictures`.
"""

from collections.abc import Mapping

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lib.data.splits import SPLITS
from lib.evaluation.calibration import expected_calibration_error
from lib.evaluation.classification import PROBABILITY_PREFIX, class_names, probability_matrix
from lib.reporting.pictures import STYLE, grid, legend_beside, legend_name, line_style
from lib.reporting.segmentation_figures import choose_cases

COUNTED_COLOUR = "0.88"
PANEL_INCHES = 3.0


def example_diagnoses(diagnoses: pd.DataFrame, split: str) -> pd.DataFrame:
    """Of every class the scan diagnosed as well as the median one, and the one diagnosed worst.

    Args:
        diagnoses: a predictions table by scan_id.
        split: the part to take them from.

    Returns:
        Rows of the table: first the median scan of each class, then the worst (the lowest
        probability of the true class); a class of fewer than three scans has no worst one.
    """
    tested = diagnoses[diagnoses["split"] == split].set_index("scan_id")
    typical, worst = [], []
    for name in class_names(diagnoses):
        of_class = tested.loc[tested["label"] == name, PROBABILITY_PREFIX + name]
        cases = choose_cases(of_class)
        typical += [cases.get("median", cases["highest"])] if cases else []
        worst += [cases["lowest"]] if "lowest" in cases else []
    return tested.loc[typical + worst].reset_index()


@matplotlib.rc_context(STYLE)
def slices_along_scans(slices: pd.DataFrame, diagnoses: pd.DataFrame) -> Figure:
    """Probabilities of every slice of some scans, from the first slice to the last.

    Args:
        slices: scan_id, slice, ``probability_<class>`` and ``weight``, above 0 for the slices that
            the diagnosis comes from; of these scans at least.
        diagnoses: a predictions table with the scans to show.

    Returns:
        One panel per scan, its true class and diagnosis above it.

    Raises:
        ValueError: when there is no scan.
    """
    classes = class_names(slices)
    columns = max(1, min(len(classes), len(diagnoses)))
    figure, axes = grid(len(diagnoses), columns, cell=(PANEL_INCHES, 2.5))
    called = probability_matrix(diagnoses)
    for axis, (_, scan), row in zip(axes, diagnoses.iterrows(), called, strict=True):
        own = slices[slices["scan_id"] == scan["scan_id"]].sort_values("slice")
        _draw_slices(axis, own)
        diagnosis = f"{classes[row.argmax()]}, {row.max():.2f}"
        axis.set_title(f"{scan['scan_id']}: {scan['label']}\ndiagnosis {diagnosis}")
    for axis in axes[::columns]:
        axis.set_ylabel("Probability")
    for axis in axes[-columns:]:
        axis.set_xlabel("Slice")
    lines = [
        Line2D([], [], marker="o", markersize=3, label=name, **line_style(number))
        for number, name in enumerate(classes)
    ]
    legend_beside(figure, [*lines, Patch(color=COUNTED_COLOUR, label="slices that count")])
    return figure


def _draw_slices(axis: Axes, slices: pd.DataFrame) -> None:
    """Curves of all classes; the slices that count are shaded."""
    for index in slices.loc[slices["weight"] > 0, "slice"]:
        axis.axvspan(index - 0.5, index + 0.5, color=COUNTED_COLOUR, linewidth=0, zorder=0)
    for number, name in enumerate(class_names(slices)):
        values = slices[PROBABILITY_PREFIX + name]
        axis.plot(slices["slice"], values, marker="o", markersize=3, **line_style(number))
    axis.set(xlim=(slices["slice"].min() - 0.5, slices["slice"].max() + 0.5), ylim=(-0.03, 1.03))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


@matplotlib.rc_context(STYLE)
def reliability_curves(runs: Mapping[str, pd.DataFrame]) -> Figure:
    """Share of right diagnoses against their confidence, before and after calibration.

    Args:
        runs: for each its table of `lib.evaluation.calibration.reliability_by_part`, as
            ``data/scores/<data set>/diagnoses/<run>/calibration.csv`` holds it.

    Returns:
        One panel per run and part: each bin with its 95 % interval, and the line on which both are
        equal; below it probabilities promise too much. Above each panel the expected calibration
        errors (ECE).

    Raises:
        ValueError: when there is no run.
    """
    shown = [
        (name, split, table[table["split"] == split])
        for name, table in runs.items()
        for split in SPLITS
        if (table["split"] == split).any()
    ]
    systems = list(dict.fromkeys(name for *_, table in shown for name in table["system"]))
    columns = len({split for _, split, _ in shown})
    if not shown:
        raise ValueError("a figure needs something to show")
    figure, axes = grid(len(shown), columns, cell=(PANEL_INCHES, PANEL_INCHES + 0.5))
    for axis, (name, split, table) in zip(axes, shown, strict=True):
        errors = _draw_reliability(axis, table, systems)
        scans = table.loc[table["system"] == table["system"].iloc[0], "n"].sum()
        heading = f"{legend_name(name)}\n" if len(runs) > 1 else ""
        axis.set_title(f"{heading}{split}, {scans} scans\nECE {errors}")
        axis.set(xlabel="Confidence")
    for axis in axes[::columns]:
        axis.set_ylabel("Share that is right")
    lines = [
        Line2D([], [], marker="o", label=legend_name(name), **line_style(number))
        for number, name in enumerate(systems)
    ]
    legend_beside(figure, [*lines, Line2D([], [], color="0.7", label="as sure as right")])
    return figure


def _draw_reliability(axis: Axes, table: pd.DataFrame, systems: list[str]) -> str:
    """Curves of one run and part; returns their calibration errors as text."""
    axis.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=0)
    errors = []
    for number, name in enumerate(systems):
        rows = table[table["system"] == name]
        if rows.empty:
            continue
        low = (rows["accuracy"] - rows["accuracy_low"]).clip(lower=0)
        high = (rows["accuracy_high"] - rows["accuracy"]).clip(lower=0)
        axis.errorbar(
            rows["confidence"], rows["accuracy"], yerr=[low, high], marker="o", markersize=4,
            elinewidth=0.9, capsize=2, **line_style(number),
        )  # fmt: skip
        errors.append(f"{expected_calibration_error(rows):.2f} {name.split()[0]}")
    axis.set(xlim=(-0.02, 1.04), ylim=(-0.02, 1.04))
    axis.set_aspect("equal")
    return ", ".join(errors)
