"""Figures of what 3-D CNN with BERT attends to, and of where its evidence lies.

Cases are chosen by a rule: the scans with the highest, the median and the lowest ROC AUC of the
attribution per slice (the next measure where no scan has one). Numbers come from
`lib.evaluation.evidence`.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lib.evaluation.attention import attention_table, mean_attention
from lib.evaluation.evidence import (
    ATTRIBUTIONS,
    LUNG_AREA,
    MEASURES,
    NETWORK,
    RANDOM_WEIGHTS,
    read_evidence,
    read_example,
)
from lib.reporting import preprocessing_figure
from lib.reporting.pictures import (
    LESION_OUTLINES,
    LINE_COLOURS,
    STYLE,
    draw_outline,
    legend_beside,
    new_figure,
)
from lib.reporting.preprocessing_figure import preprocessing_case
from lib.reporting.segmentation_cases import shown_part
from lib.reporting.segmentation_figures import choose_cases

HEAD_COLUMNS = 4  # small panels beside one another
CLASS_NAMES = {"covid": "COVID-19", "non_covid": "no COVID-19"}
ATTRIBUTION_COLOUR, LESION_COLOUR, LUNG_COLOUR = LINE_COLOURS[0], LINE_COLOURS[4], "0.45"
ATTRIBUTION_NAMES = {
    NETWORK: "trained network",
    RANDOM_WEIGHTS: "random weights",
    LUNG_AREA: "lung area",
}
MEASURE_NAMES = {
    "roc_auc": "ROC AUC, slice holds lesion",
    "spearman": "Spearman, with lesion area",
    "lesion_share": "Share inside lesions",
}
RULE_NAMES = ("AUC", "correlation", "share inside lesions")  # of a case, in the measures' order
NO_INFORMATION = {"roc_auc": 0.5, "spearman": 0.0}  # grey lines
OUTLINE = next(iter(LESION_OUTLINES.values()))[1]
OVERLAY_QUANTILE = 0.995  # of a slice's attribution, shown at full strength
OVERLAY_OPACITY = 0.75
OVERLAY_WHITE = 360  # grey value shown white, above all there are: the slice is dimmed


@dataclass(frozen=True, eq=False)
class EvidenceCase:
    """One row of :func:`evidence_figure`.

    Attributes:
        title: which scan, and by which rule.
        profile: columns slice, network, lung_area, lesion_area, shares that sum to 1.
        number: of the slice with the most attribution.
        grey: that slice as the network sees it, uint8, shape (height, width).
        attribution: absolute, of its pixels, same shape.
        lesions: share of each pixel that is lesion, same shape.
    """

    title: str
    profile: pd.DataFrame
    number: int
    grey: np.ndarray
    attribution: np.ndarray
    lesions: np.ndarray


# ------------------------------------------------------------------------------------ attention
@matplotlib.rc_context(STYLE)
def attention_figure(table: pd.DataFrame, *, seed: int, title: str = "") -> Figure:
    """Attention of the class token over itself and the time steps, by class.

    Args:
        table: of ``lib.evaluation.attention.attention_table``.
        seed: of the intervals.
        title: of the figure.

    Returns:
        Left the mean over heads and scans with 95 % intervals over patients, right each head. The
        dotted line is attention that is the same everywhere.

    Raises:
        ValueError: when there is no scan.
    """
    if table.empty:
        raise ValueError("the attention figure needs a scan with attention")
    heads = sorted(table["head"].unique())
    columns = min(HEAD_COLUMNS, len(heads))
    rows = -(-len(heads) // columns)
    figure = new_figure((3.6 + 1.7 * columns, max(3.2, 1.8 * rows)))
    large, small = figure.subfigures(1, 2, width_ratios=(3.6, 1.7 * columns))
    axis = large.subplots()
    _draw_attention(axis, mean_attention(table, seed=seed))
    axis.set(title="Mean of all heads", xlabel="Slices of the clip", ylabel="Attention")
    panels = small.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel in panels.ravel()[len(heads) :]:
        panel.remove()
    for panel, head in zip(panels.ravel(), heads, strict=False):
        _draw_attention(panel, mean_attention(table[table["head"] == head], seed=seed))
        panel.set_title(f"Head {head}")
        panel.tick_params(axis="x", labelrotation=90, labelsize=7)
    for drawn in (axis, panels[0, 0]):  # the small ones share one axis
        drawn.set_ylim(bottom=0)  # at last, since it ends the fitting of the top
    if title:
        figure.suptitle(title)
    classes = [name for name in CLASS_NAMES if name in set(table["label"])]
    counts = table.groupby("label")["scan_id"].nunique()
    legend_beside(figure, [
        Line2D([], [], color=LINE_COLOURS[number], marker="o",
               label=f"{CLASS_NAMES[name]} (n = {counts[name]})")
        for number, name in enumerate(classes)
    ])  # fmt: skip
    return figure


def _draw_attention(axis: Axes, means: pd.DataFrame) -> None:
    """Mean and interval of each token, classes side by side."""
    tokens = list(dict.fromkeys(means["token"]))
    for number, name in enumerate(name for name in CLASS_NAMES if name in set(means["label"])):
        rows = means[means["label"] == name].set_index("token").loc[tokens]
        places = np.arange(len(tokens)) + 0.16 * (number - 0.5)
        whiskers = _whiskers(rows)
        axis.errorbar(
            places, rows["value"], whiskers, fmt="o", markersize=3.5, linewidth=1.2,
            color=LINE_COLOURS[number],
        )  # fmt: skip
    axis.axhline(1 / len(tokens), color="0.6", linestyle=":", linewidth=1, zorder=0)
    axis.set_xticks(
        range(len(tokens)), [name.replace("-", "\N{EN DASH}").replace(" ", "\n") for name in tokens]
    )


def _whiskers(rows: pd.DataFrame) -> np.ndarray:
    """Lengths below and above the values; none where there is no interval."""
    lengths = np.stack([rows["value"] - rows["low"], rows["high"] - rows["value"]])
    return np.nan_to_num(np.clip(lengths.astype(np.float64), 0, None))


# ------------------------------------------------------------------------------------- evidence
@matplotlib.rc_context(STYLE)
def evidence_figure(
    cases: Sequence[EvidenceCase], summary: pd.DataFrame, *, title: str = ""
) -> Figure:
    """Where the evidence lies: example scans, and all scans in numbers.

    Args:
        cases: example scans, a row each.
        summary: of ``lib.evaluation.evidence.summarise_evidence``.
        title: of the figure.

    Returns:
        Of each case the attribution per slice beside the true lesion area, and its slice with the
        most attribution; below them the three measures of network and controls.

    Raises:
        ValueError: when there is no case.
    """
    if not cases:
        raise ValueError("the evidence figure needs a scan with lesions")
    figure = new_figure((7.2, 2.3 * len(cases) + 1.8))
    examples, numbers = figure.subfigures(2, 1, height_ratios=(2.3 * len(cases), 1.8))
    axes = examples.subplots(len(cases), 2, squeeze=False, width_ratios=(2.2, 1))
    for (left, right), case in zip(axes, cases, strict=True):
        _draw_profile(left, case)
        draw_overlay(right, case)
    axes[-1, 0].set_xlabel("Slice, from the head")
    for axis, measure in zip(
        numbers.subplots(1, len(MEASURES), sharey=True), MEASURES, strict=True
    ):
        _draw_measure(axis, summary, measure)
    if title:
        figure.suptitle(title)
    legend_beside(figure, [
        Patch(color=ATTRIBUTION_COLOUR, label="attribution of the slice"),
        Patch(color=LESION_COLOUR, label="true lesion area"),
        Line2D([], [], color=LUNG_COLOUR, drawstyle="steps-mid", label="lung area"),
        Line2D([], [], color=OUTLINE, label="true outline of lesions"),
        Patch(color="#FF5030", label="attribution of the pixel"),
    ])  # fmt: skip
    return figure


def _draw_profile(axis: Axes, case: EvidenceCase) -> None:
    """Bars of attribution and lesion area, slice by slice."""
    profile, width = 100 * case.profile.drop(columns="slice"), 0.4
    slices = case.profile["slice"].to_numpy()
    axis.bar(slices - width / 2, profile[NETWORK], width, color=ATTRIBUTION_COLOUR)
    axis.bar(slices + width / 2, profile["lesion_area"], width, color=LESION_COLOUR)
    axis.plot(slices, profile[LUNG_AREA], color=LUNG_COLOUR, linewidth=1, drawstyle="steps-mid")
    axis.set(title=case.title, ylabel="Share of the scan (%)")
    axis.xaxis.get_major_locator().set_params(integer=True)


def draw_overlay(axis: Axes, case: EvidenceCase) -> None:
    """The slice with the most attribution: grey, attribution in red, lesions outlined."""
    strongest = np.quantile(case.attribution, OVERLAY_QUANTILE) or 1.0
    opacity = OVERLAY_OPACITY * np.clip(case.attribution / strongest, 0, 1)
    red = np.broadcast_to(np.array([1.0, 0.31, 0.19, 0.0]), (*case.grey.shape, 4)).copy()
    red[..., 3] = opacity
    axis.imshow(case.grey, cmap="gray", vmin=0, vmax=OVERLAY_WHITE, interpolation="nearest")
    axis.imshow(red, interpolation="nearest")
    if (case.lesions >= 0.5).any():
        draw_outline(axis, case.lesions >= 0.5, OUTLINE)
    axis.set_title(f"slice {case.number}")
    axis.set_axis_off()


def _draw_measure(axis: Axes, summary: pd.DataFrame, measure: str) -> None:
    """One measure of network and controls, with intervals."""
    rows = summary[summary["measure"] == measure].set_index("attribution")
    rows = rows.reindex(ATTRIBUTIONS)[["value", "low", "high"]].astype(np.float64)
    places = np.arange(len(rows))
    colours = (ATTRIBUTION_COLOUR, LINE_COLOURS[1], LUNG_COLOUR)
    for place, colour, (_, row) in zip(places, colours, rows.iterrows(), strict=True):
        axis.errorbar(row["value"], place, xerr=_whiskers(row.to_frame().T).reshape(2, 1),
                      fmt="o", markersize=4, color=colour)  # fmt: skip
    if measure in NO_INFORMATION:
        axis.axvline(NO_INFORMATION[measure], color="0.6", linestyle=":", linewidth=1, zorder=0)
    else:
        axis.set_xlim(left=0)
    axis.set_yticks(places, [ATTRIBUTION_NAMES[name] for name in ATTRIBUTIONS])
    axis.set(xlabel=MEASURE_NAMES[measure], ylim=(len(rows) - 0.5, -0.5))


def evidence_cases(folder: Path) -> list[EvidenceCase]:
    """The scans with the highest, the median and the lowest ROC AUC of the attribution.

    Where no scan has slices of both kinds, the next of ``MEASURES`` that any scan has ranks them.

    Args:
        folder: ``data/scores/<data set>/evidence_<run>``.

    Returns:
        Fewer where fewer scans were measured; none where no scan has a lesion.
    """
    tables = read_evidence(folder)
    table, slices, cases = tables["evidence"].set_index("scan_id"), tables["slices"], []
    columns = [f"{name}_{NETWORK}" for name in MEASURES]
    number = int(table[columns].notna().any().to_numpy().argmax())
    values, rule = table[columns[number]], RULE_NAMES[number]
    for place, scan_id in choose_cases(values).items():
        example = read_example(folder / f"examples/{scan_id}.safetensors")
        title = f"{place} {rule} {values[scan_id]:.2f}: {scan_id} ({table.at[scan_id, 'label']})"
        profile = slices[slices["scan_id"] == scan_id]
        fullest = int(example.pop("slice")[0])
        cases.append(EvidenceCase(title, profile.drop(columns="scan_id"), fullest, **example))
    return cases


# ------------------------------------------------------------------------------------ all three
def cnn_bert_figures(
    data: Path,
    data_set: str,
    run: str,
    manifest: pd.DataFrame,
    *,
    positive: Container[str],
    seed: int,
) -> Mapping[str, Figure]:
    """The figures of 3-D CNN with BERT that a data set has the files for.

    Args:
        data: folder of all data.
        data_set: its name.
        run: whose evidence is shown, for example ``cnn_bert_rml_msc_affine_seed0``.
        manifest: of the data set.
        positive: labels that count as COVID-19.
        seed: of the intervals.

    Returns:
        By kind: ``figure1`` where the masks of the U-Net are there; ``attention`` where the run was
        embedded; ``evidence`` where it was explained and scans hold lesions.
    """
    figures = {}
    shown = (preprocessing_figure.NETWORK, preprocessing_figure.REFINED)
    if all((data / "segmented" / data_set / name).is_dir() for name in shown):
        figures["figure1"] = preprocessing_case(data, data_set, manifest, positive=positive)
    embeddings = data / "embeddings" / data_set / run
    if embeddings.is_dir():
        scans = shown_part(manifest.dropna(subset="label"))
        table = attention_table(embeddings, scans, positive=positive)
        figures["attention"] = attention_figure(table, seed=seed, title=f"{data_set}: {run}")
    folder = data / "scores" / data_set / f"evidence_{run}"
    cases = evidence_cases(folder) if folder.is_dir() else []
    if cases:
        summary = read_evidence(folder)["summary"]
        figures["evidence"] = evidence_figure(cases, summary, title=f"{data_set}: {run}")
    return figures
