"""Figures of results: learning curves, ROC curves, confusion matrices.

Style, colours and saving are those of `lib.reporting.pictures`.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_curve

from lib.data.splits import TEST
from lib.evaluation.classification import (
    DEFAULT_THRESHOLD,
    PROBABILITY_PREFIX,
    class_names,
    confusion_matrix,
    probability_matrix,
)
from lib.evaluation.statistics import bootstrap_interval, classification_statistic
from lib.reporting.pictures import (
    PICTURE_INCHES,
    STYLE,
    grid,
    legend_beside,
    legend_name,
    line_style,
    panels,
    wrapped,
)
from lib.reporting.tables import heading

SHARED_CURVES = ("lungs", "lesions")  # folders of learning curves whose files share a figure


def read_learning_curves(folder: Path) -> dict[str, dict[str, pd.DataFrame]]:
    """Histories of all trainings of the study, in the groups that share a figure.

    Args:
        folder: files ``<data set>/<classifier>-<segmentation>.csv``, perhaps with a column
            ``network``, ``<data set>/<classifier>_seed<k>.csv`` of classifiers of pictures, and
            ``lungs/<network>-<data set>.csv``, and the like in ``lesions``.

    Returns:
        For each figure (``lungs``, ``lesions``, and ``<data set>_<classifier>``) the histories that
        `learning_curves` takes.
    """
    groups: dict[str, dict[str, pd.DataFrame]] = {}
    for path in sorted(folder.glob("*/*.csv")):
        system, _, run = path.stem.partition("-")
        part, table = path.parent.name, pd.read_csv(path)
        group = groups.setdefault(part if part in SHARED_CURVES else f"{part}_{system}", {})
        networks = table.groupby("network") if "network" in table else [(system, table)]
        group |= {", ".join(filter(None, (network, run))): rows for network, rows in networks}
    return groups


@matplotlib.rc_context(STYLE)
def learning_curves(histories: Mapping[str, pd.DataFrame]) -> Figure:
    """What was measured after each epoch of training.

    Args:
        histories: for each system a table with columns ``train_<quantity>`` and
            ``validation_<quantity>``, and its rows' ``epoch`` (else they count from 1). Other
            columns are not drawn.

    Returns:
        One panel per quantity; validation drawn full, training faint.

    Raises:
        ValueError: when no history holds such a column.
    """
    parts = ("train_", "validation_")
    quantities = list(
        dict.fromkeys(
            column.split("_", 1)[1]
            for history in histories.values()
            for column in history.columns
            if column.startswith(parts)
        )
    )
    figure, axes = panels(len(quantities), size=(3.6, 2.9))
    for axis, quantity in zip(axes, quantities, strict=True):
        for number, history in enumerate(histories.values()):
            line = line_style(number)
            for part, opacity in zip(parts, (0.35, 1.0), strict=True):
                if part + quantity in history:
                    values = history[part + quantity]
                    marker = "o" if len(values) == 1 else None
                    epochs = history.get("epoch", np.arange(1, len(history) + 1))
                    axis.plot(epochs, values, alpha=opacity, marker=marker, **line)
        axis.set(xlabel="Epoch", ylabel=heading(quantity))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    lines = [
        Line2D([], [], label=legend_name(name), **line_style(number))
        for number, name in enumerate(histories)
    ]
    faint = Line2D([], [], color="grey", alpha=0.35, label="training (faint)")
    legend_beside(figure, [*lines, faint])
    return figure


@matplotlib.rc_context(STYLE)
def probabilities_by_part(predictions: pd.DataFrame, positive: str) -> Figure:
    """Probability of a class, scan by scan, apart by part and true class.

    Args:
        predictions: of one system, all parts.
        positive: the class.

    Returns:
        One row of points per part and true class; a line at the threshold.
    """
    rows = predictions.assign(part=predictions["split"] + ", " + predictions["label"])
    figure, (axis,) = panels(1, size=(6.4, 3.6))
    seaborn.stripplot(
        rows.sort_values("part"), x=f"{PROBABILITY_PREFIX}{positive}", y="part", hue="label",
        alpha=0.6, legend=False, ax=axis,
    )  # fmt: skip
    axis.set(xlim=(-0.02, 1.02), xlabel=f"Probability: {positive}", ylabel="")
    axis.axvline(DEFAULT_THRESHOLD, color="0.8", zorder=0)
    return figure


@matplotlib.rc_context(STYLE)
def roc_curves(
    predictions: Mapping[str, pd.DataFrame], *, positive: str, seed: int, split: str = TEST
) -> Figure:
    """ROC curves of several systems, with the areas and their 95 % intervals in the legend.

    Args:
        predictions: for each system its predictions with the column ``patient_id``.
        positive: the class to detect.
        seed: of the bootstrap over patients.
        split: rows to use.

    Returns:
        One panel; the ring on each curve is the threshold 0.5.
    """
    figure, (axis,) = panels(1, size=(4.2, 4.0))
    axis.plot([0, 1], [0, 1], color="lightgrey", linewidth=1, zorder=0)
    handles = []
    for number, (name, frame) in enumerate(predictions.items()):
        tested = frame[frame["split"] == split]
        line = line_style(number)
        _draw_roc(axis, tested, positive, line)
        statistic = partial(classification_statistic, positive=positive)
        area = bootstrap_interval(tested, statistic, seed=seed).loc["roc_auc"]
        handles.append(Line2D([], [], label=f"{legend_name(name)}\n{_auc_text(area)}", **line))
    axis.set(xlabel="1 − specificity", ylabel="Sensitivity", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axis.set_aspect("equal")
    legend_beside(figure, handles)
    return figure


@matplotlib.rc_context(STYLE)
def confusion_matrices(
    predictions: Mapping[str, pd.DataFrame],
    *,
    positive: str,
    split: str = TEST,
    threshold: float = DEFAULT_THRESHOLD,
) -> Figure:
    """Counts of true against predicted classes, shaded by the share of each true class.

    Args:
        predictions: for each system its predictions.
        positive: the class to detect.
        split: rows to use.
        threshold: for two classes only.

    Returns:
        One square per system.
    """
    columns = min(4, max(1, len(predictions)))
    most = max((len(class_names(frame)) for frame in predictions.values()), default=0)
    width = max(PICTURE_INCHES, float(most))  # an inch per class name
    figure, axes = grid(len(predictions), columns, cell=(width, width + 0.25))
    figure.get_layout_engine().set(h_pad=0.1)  # inches: labels keep clear of the title below
    for axis, (name, frame) in zip(axes, predictions.items(), strict=True):
        tested = frame[frame["split"] == split]
        counts = confusion_matrix(
            tested["label"],
            probability_matrix(tested),
            positive=positive,
            classes=class_names(tested),
            threshold=threshold,
        )
        _draw_confusion(axis, counts)
        axis.set_title(wrapped(name, width))
    return figure


def _draw_roc(axis: Axes, tested: pd.DataFrame, positive: str, line: Mapping[str, object]) -> None:
    """One curve and its point at the threshold 0.5; nothing where a class is absent."""
    is_positive = tested["label"] == positive
    if is_positive.nunique() < 2:
        return
    probability = tested[PROBABILITY_PREFIX + positive]
    false_rate, true_rate, _ = roc_curve(is_positive, probability, drop_intermediate=False)
    axis.plot(false_rate, true_rate, **line)
    called = probability >= DEFAULT_THRESHOLD
    point = called[~is_positive].mean(), called[is_positive].mean()
    axis.plot(*point, marker="o", markersize=6, fillstyle="none", color=line["color"])


def _auc_text(area: pd.Series) -> str:
    """The area with its interval, for a legend."""
    if np.isnan(area["value"]):
        return "AUC undefined: one class absent"
    text = f"AUC {area['value']:.2f}"
    return text if np.isnan(area["low"]) else f"{text} [{area['low']:.2f}, {area['high']:.2f}]"


def _draw_confusion(axis: Axes, counts: pd.DataFrame) -> None:
    """One heat map of shares with the counts written in."""
    shares = counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
    names = [str(name).replace("_", "-") for name in counts.index]
    written = counts.astype(str) + "\n" + (100 * shares).round().astype(int).astype(str) + " %"
    seaborn.heatmap(
        shares, ax=axis, annot=written, fmt="", cmap="Blues", vmin=0, vmax=1, square=True,
        cbar=False, xticklabels=names, yticklabels=names, linewidths=0.5, linecolor="lightgrey",
    )  # fmt: skip
    axis.set(xlabel="Predicted", ylabel="True")
