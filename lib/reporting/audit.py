"""Are published numbers consistent? Every finding derived from what a paper prints.

The first paper, SAM2CLIP2SAM (FACTS 8.1), and the second, 3-D CNN with BERT (FACTS 4.10); of the
third see `lib.reporting.mask_net_audit`.

A check takes one printed number, or the numbers of one row, and says what they would have to be or
what they imply. It *holds* where both can be true together. That a check fails does not say why: a
slip of the pen, another test set, an average over several runs, or values that were not measured
look alike from here.
"""

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib.evaluation import audit
from lib.reporting import published
from lib.reporting.pictures import LINE_COLOURS, STYLE, legend_beside, new_figure
from lib.reporting.published import NO_SEGMENTATION, PublishedCount
from lib.reporting.tables import heading

ROUND_STEP = 0.25  # percentage points; one last digit in 25 is a multiple by chance
CLASS_F1 = ("f1_covid", "f1_non_covid")
DETECTION = ("precision", "sensitivity", "f1_covid")
BLUE, VERMILLION, GREEN = LINE_COLOURS[:3]

EQUATION_9 = "macro F1 is the mean of its parts"
CLASS_RATIO = "ratio of classes as for the competitors"
CLASS_F1_COUNTS = "both class F1 scores are possible"
SENSITIVITY = "sensitivity is possible"
PRECISION = "precision is possible"
F1_OF_PARTS = "F1 follows from precision and sensitivity"
WHOLE_ROW = "the row is possible as a whole"
ROUND_GAIN = "gain over the row before is not round"
MARGIN = "margin in the text is that of the table"
TOTALS = "numbers of scans add up"
ACCURACY = "accuracy is possible"
ACCURACY_AND_F1 = "accuracy and macro F1 are possible together"
BASELINE = "baseline is the accuracy of table 1"

MEANING = {
    EQUATION_9: "Equation 9. Parts and mean lost digits, so 0.015 apart is allowed.",
    CLASS_RATIO: "Two class F1 scores bound the ratio of COVID-19 to other scans, whatever the "
    "errors. Rows that were measured on the same scans share a ratio.",
    CLASS_F1_COUNTS: "Outcomes that give both F1 scores on so many scans. How many of the released "
    "test scans show COVID-19 is not public: as many as all competitors allow.",
    SENSITIVITY: "Share of the COVID-19 scans of the test set: a count out of 255 by the split "
    "file, 256 as printed; possible by either is enough.",
    PRECISION: "Counts out of the same COVID-19 scans and 76 others; by either is enough.",
    F1_OF_PARTS: "Bounds from the rounding of precision and sensitivity.",
    WHOLE_ROW: "Outcomes that give precision, sensitivity and F1 at once, on 255 and 76 scans.",
    ROUND_GAIN: f"A gain that is a multiple of {ROUND_STEP} percentage points occurs by chance in "
    "one cell of 25.",
    MARGIN: "Margins that the text calls F1 against those of the table.",
    TOTALS: "All scans against the sum of the parts.",
}
BERT_MEANING = {
    ACCURACY: "A count out of the 374 validation scans.",
    ACCURACY_AND_F1: "All outcomes on 165 COVID-19 and 209 other scans that print the accuracy. "
    "For two classes the macro F1 never exceeds the accuracy, on whatever scans.",
    BASELINE: "Section 5.3.2 takes the embeddings of the network with MSC and affine transforms.",
}


class Check(NamedTuple):
    """One printed number, or row of numbers, and what follows from it.

    Attributes:
        finding: what was checked, a key of `MEANING`.
        table: of the paper.
        system: row of the table.
        segmentation: of that row.
        metrics: columns that take part, joined by ``" + "``.
        printed: the numbers as printed, joined likewise.
        derived: what they should be or imply.
        holds: whether printed and derived can be true together.
    """

    finding: str
    table: str
    system: str
    segmentation: str
    metrics: str
    printed: str
    derived: str
    holds: bool


def audit_checks() -> pd.DataFrame:
    """All checks of the first paper's two tables and of what its text says about them.

    Returns:
        One row per check with the fields of `Check`, in the order of the findings and tables.
    """
    checks = [
        *_equation_9(printed_table("Table 1")),
        *_class_ratio(printed_table("Table 1")),
        *_class_f1_counts(printed_table("Table 1")),
        *_detection(printed_table("Table 2")),
        *_round_gains(),
        *_margins(),
        *_totals(),
    ]
    return pd.DataFrame(checks).sort_values("finding", key=_place, kind="stable", ignore_index=True)


def bert_checks() -> pd.DataFrame:
    """All checks of the tables of 3-D CNN with BERT.

    Returns:
        Rows as of :func:`audit_checks`.
    """
    return pd.DataFrame([*_accuracies(), *_accuracy_and_f1(), _baseline()])


def audit_summary(
    checks: pd.DataFrame, *, meaning: Mapping[str, str] = MappingProxyType(MEANING | BERT_MEANING)
) -> pd.DataFrame:
    """One row per finding: what was checked, how often it holds, where it does not.

    Args:
        checks: of :func:`audit_checks` or :func:`bert_checks`, or of another audit.
        meaning: of every finding.

    Returns:
        Columns ``finding``, ``checks``, ``contradicted``, ``where`` and ``meaning``.
    """
    rows = []
    for finding, part in checks.groupby("finding", sort=False):
        failed = part[~part["holds"]]
        where = failed["system"] + " / " + failed["segmentation"] + ": " + failed["metrics"]
        rows.append(
            {
                "finding": finding[:1].upper() + finding[1:],
                "checks": len(part),
                "contradicted": len(failed),
                "where": "; ".join(dict.fromkeys(where)),
                "meaning": meaning[finding] + _likelihood(finding, part),
            }
        )
    return pd.DataFrame(rows)


def _place(findings: pd.Series) -> pd.Series:
    return findings.map(list(MEANING).index)


def _likelihood(finding: str, checks: pd.DataFrame) -> str:
    """How likely so many round gains are by chance; nothing for the other findings."""
    if finding != ROUND_GAIN:
        return ""
    chance = audit.chance_of_round_gains(int((~checks["holds"]).sum()), len(checks), ROUND_STEP)
    return f" So many or more of independent ones: probability {chance:.0e}."


def printed_table(table: str, paper: str = published.SAM2CLIP2SAM_PAPER) -> pd.DataFrame:
    """A published table in percent: rows by system and segmentation as printed, metric columns.

    Args:
        table: for example ``"Table 1"``.
        paper: as named in `lib.reporting.published`.
    """
    values = published.published_values(paper, table)
    keys = ["system", "segmentation"]
    return values.set_index([*keys, "metric"])["value"].unstack(sort=False)


def row_check(
    finding: str, table: str, key: tuple[str, str], cells: pd.Series, derived: str, holds: bool
) -> Check:
    """A check of some cells of a row.

    Args:
        finding: what is checked.
        table: of the paper.
        key: system and segmentation of the row.
        cells: printed percentages by metric.
        derived: what they should be or imply.
        holds: whether both can be true together.
    """
    system, segmentation = key
    metrics = " + ".join(heading(name) for name in cells.index)
    printed = " + ".join(f"{value:.2f}" for value in cells)
    return Check(finding, table, system, segmentation, metrics, printed, derived, bool(holds))


def _equation_9(table: pd.DataFrame) -> Iterator[Check]:
    for key, row in table.iterrows():
        parts = row[list(CLASS_F1)]
        holds = audit.is_mean_of(row["macro_f1"], parts)
        yield row_check(
            EQUATION_9, "Table 1", key, row[["macro_f1"]], f"mean {parts.mean():.3f}", holds
        )


def class_ratios() -> pd.DataFrame:
    """Ratio of COVID-19 to other scans that each row of table 1 allows.

    Returns:
        ``low`` and ``high`` by system and segmentation, as printed.
    """
    table = printed_table("Table 1")
    bounds = [audit.class_ratio_bounds(*row) for row in table[list(CLASS_F1)].to_numpy()]
    return pd.DataFrame(bounds, index=table.index, columns=["low", "high"])


def competitors_ratio(ratios: pd.DataFrame) -> tuple[float, float]:
    """The ratios that all competitors without segmentation allow at once."""
    official = ratios.loc[_competitors(ratios)]
    return official["low"].max(), official["high"].min()


def _competitors(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Rows of the competitors as they entered the competition, without segmentation."""
    return [key for key in table.index if key[0] != "RACNet" and key[1] == NO_SEGMENTATION]


def _class_ratio(table: pd.DataFrame) -> Iterator[Check]:
    ratios = class_ratios()
    low, high = competitors_ratio(ratios)
    for key, bounds in ratios.iterrows():
        text = f"{bounds['low']:.3f} to {bounds['high']:.3f}; competitors {low:.3f} to {high:.3f}"
        holds = bounds["low"] <= high and bounds["high"] >= low
        yield row_check(CLASS_RATIO, "Table 1", key, table.loc[key, list(CLASS_F1)], text, holds)


def _counts(data_set: str, *parts: str) -> list[PublishedCount]:
    return [
        next(c for c in published.SCAN_COUNTS if (c.data_set, c.part) == (data_set, part))
        for part in parts
    ]


def _class_f1_counts(table: pd.DataFrame) -> Iterator[Check]:
    """On each part of known size; where its classes are unknown, with those of the competitors."""
    parts = (published.RELEASED_TEST, published.REMAINDER, published.VALIDATION_PART)
    for count in _counts(published.COV19_CT_DB, *parts):
        outcomes = {
            key: audit.counts_for_class_f1(*row, count.total)
            for key, row in table[list(CLASS_F1)].iterrows()
        }
        positives = {key: audit.possible_positives(found) for key, found in outcomes.items()}
        allowed = set.intersection(*(set(positives[key]) for key in _competitors(table)))
        if count.positives is not None:
            allowed = {count.positives}
        for key, found in outcomes.items():
            holds = not allowed.isdisjoint(positives[key])
            text = f"{_scans(count, allowed)}: {_outcome_text(found, positives[key])}"
            cells = table.loc[key, list(CLASS_F1)]
            yield row_check(CLASS_F1_COUNTS, "Table 1", key, cells, text, holds)


def _scans(count: PublishedCount, allowed: set[int]) -> str:
    span = f"{min(allowed):,} to {max(allowed):,}" if len(allowed) > 1 else f"{min(allowed):,}"
    return f"{count.part}, {count.total:,} scans, of which {span} with COVID-19"


def _outcome_text(outcomes: np.ndarray, positives: np.ndarray) -> str:
    if len(outcomes) == 0:
        return "no outcome"
    found, errors, right = outcomes[0]
    more = f" and {len(outcomes) - 1} more" if len(outcomes) > 1 else ""
    return (
        f"TP {found}, errors {errors}, TN {right}{more}; "
        f"{positives[0]:,} to {positives[-1]:,} positives"
    )


def _detection(table: pd.DataFrame) -> Iterator[Check]:
    tests = _counts(published.MOSMED, published.SPLIT_FILE, published.AS_PRINTED)
    for key, row in table.iterrows():
        hits = [audit.counts_for_rate(row["sensitivity"], test.positives) for test in tests]
        yield row_check(
            SENSITIVITY, "Table 2", key, row[["sensitivity"]], _hit_text(tests, hits),
            any(map(len, hits)),
        )  # fmt: skip
        pairs = [
            audit.counts_for_precision(row["precision"], test.positives, test.negatives)
            for test in tests
        ]
        text = ", ".join(
            f"{len(outcomes)} outcomes with {test.positives}"
            for outcomes, test in zip(pairs, tests, strict=True)
        )
        yield row_check(PRECISION, "Table 2", key, row[["precision"]], text, any(map(len, pairs)))
        low, high = audit.f1_bounds(row["precision"], row["sensitivity"])
        fits = low - audit.ABOVE <= row["f1_covid"] <= high + audit.BELOW
        yield row_check(
            F1_OF_PARTS, "Table 2", key, row[["f1_covid"]], f"{low:.3f} to {high:.3f}", fits
        )
        yield _whole_row(key, row[list(DETECTION)], tests[0])


def _hit_text(tests: Iterable[PublishedCount], hits: Iterable[np.ndarray]) -> str:
    """Which counts give a sensitivity, for example ``251 of 255, none of 256``."""
    return ", ".join(
        f"{' or '.join(map(str, found)) or 'none'} of {test.positives}"
        for test, found in zip(tests, hits, strict=True)
    )


def _whole_row(key: object, row: pd.Series, test: PublishedCount) -> Check:
    outcomes = audit.counts_for_detection(*row, test.positives, test.negatives)
    text = "; ".join(f"TP {found}, FP {false}" for found, false in outcomes) or "no outcome"
    return row_check(WHOLE_ROW, "Table 2", key, row, text, len(outcomes))


def published_gains() -> pd.DataFrame:
    """What each row gains over the row before it, of the same system.

    Returns:
        Columns ``table``, ``system``, ``segmentation``, ``metric``, ``value`` as printed, ``gain``
        in percentage points, ``over`` (segmentation of the row before) and ``round``.
    """
    names = (published.SAM2CLIP2SAM_PAPER,)
    values = pd.concat(published.published_values(*names, t) for t in ("Table 1", "Table 2"))
    before = values.groupby(["table", "system", "metric"], sort=False)[["value", "segmentation"]]
    before = before.shift()
    gains = values.assign(
        gain=(values["value"] - before["value"]).round(audit.DECIMALS), over=before["segmentation"]
    ).dropna(subset="gain")
    gains["round"] = [audit.is_round(gain, ROUND_STEP) for gain in gains["gain"]]
    columns = ["table", "system", "segmentation", "metric", "value", "gain", "over", "round"]
    return gains[columns].reset_index(drop=True)


def _round_gains() -> Iterator[Check]:
    for row in published_gains().itertuples():
        cell = pd.Series({row.metric: row.value})
        text = f"gain {row.gain:.2f} over {row.over}"
        key = (row.system, row.segmentation)
        yield row_check(ROUND_GAIN, row.table, key, cell, text, not row.round)


def _margins() -> Iterator[Check]:
    for margin in published.MARGINS:
        table = printed_table(margin.table)
        gaps = (table.loc[margin.better] - table.loc[margin.worse]).round(audit.DECIMALS)
        fits = gaps.index[np.abs(gaps - margin.value) <= audit.ABOVE + audit.SLACK]
        holds = margin.metric in fits
        text = f"{heading(margin.metric)} {gaps[margin.metric]:.2f}"
        if not holds and len(fits):
            text += f"; {margin.value:.2f} is the difference of {heading(fits[0]).lower()}"
        cell = pd.Series({margin.metric: margin.value})
        yield row_check(MARGIN, margin.table, margin.better, cell, f"{margin.said}: {text}", holds)


def _totals() -> Iterator[Check]:
    """The parts of each data set against the whole, once per way of counting the test part."""
    tests = {
        published.COV19_CT_DB: ("Table 1", published.VALIDATION_PART, published.RELEASED_TEST),
        published.MOSMED: ("Table 2", None, published.AS_PRINTED),
    }
    for data_set, (table, validation, test) in tests.items():
        names = [name for name in ("training", validation, test) if name]
        (whole, *parts) = _counts(data_set, published.WHOLE, *names)
        summed = sum(part.total for part in parts)
        text = " + ".join(f"{part.total:,}" for part in parts) + f" = {summed:,}"
        printed = f"{whole.total:,}"
        holds = summed == whole.total
        yield Check(TOTALS, table, data_set, test, "scans", printed, text, holds)


def _accuracies() -> Iterator[Check]:
    """Of all three tables of the second paper."""
    (validation,) = _counts(published.COV19_CT_DB_2021, published.VALIDATION_PART)
    for name in ("Table 1", "Table 2", "Table 3"):
        table = printed_table(name, published.CNN_BERT_PAPER)
        for key, row in table[["accuracy"]].dropna().iterrows():
            hits = audit.counts_for_rate(row["accuracy"], validation.total)
            nearest = round(row["accuracy"] * validation.total / audit.PERCENT)
            share = audit.PERCENT * nearest / validation.total
            text = f"nearest: {nearest} of {validation.total}, {share:.3f}"
            yield row_check(ACCURACY, name, key, row, text, len(hits))


def _accuracy_and_f1() -> Iterator[Check]:
    """Of the validation rows of table 3."""
    (validation,) = _counts(published.COV19_CT_DB_2021, published.VALIDATION_PART)
    classes = (validation.positives, validation.negatives)
    for key, row in printed_table("Table 3", published.CNN_BERT_PAPER).dropna().iterrows():
        outcomes = audit.outcomes_with_accuracy(row["accuracy"], *classes)
        low, high = outcomes[:, 2].min(), outcomes[:, 2].max()
        fits = outcomes[audit.prints_as(outcomes[:, 2], row["macro_f1"])]
        found = "; ".join(f"TP {found:.0f}, TN {right:.0f}" for found, right, _ in fits)
        text = f"macro F1 {low:.3f} to {high:.3f}: {found or 'no outcome'}"
        yield row_check(ACCURACY_AND_F1, "Table 3", key, row, text, len(fits))


def _baseline() -> Check:
    """The network that the perceptrons of table 2 are compared with."""
    key = ("baseline without MLP", published.UNET)
    row = printed_table("Table 2", published.CNN_BERT_PAPER).loc[key]
    named = printed_table("Table 1", published.CNN_BERT_PAPER).loc[published.MLP_BASELINE]
    (accuracy,) = named
    text = f"{published.MLP_BASELINE[0]} has {accuracy:.2f}"
    return row_check(BASELINE, "Table 2", key, row, text, row["accuracy"] == accuracy)


@matplotlib.rc_context(STYLE)
def audit_figure() -> Figure:
    """Three findings to look at: ratio of classes, possible sensitivities, round gains.

    Returns:
        Three panels. Left: the ratios of COVID-19 to other scans that each row of table 1 allows,
        with the ratios of known parts. Middle: how far each sensitivity of table 2 is from the
        nearest one that a count out of 255 or 256 gives. Right: gains over the row before.
    """
    figure = new_figure((11.5, 3.8))
    left, middle, right = figure.subplots(1, 3)  # each with its own names of rows
    _draw_ratios(left)
    _draw_sensitivities(middle)
    _draw_gains(right)
    legend_beside(
        figure,
        [
            Line2D([], [], color=BLUE, marker="o", label="holds"),
            Line2D([], [], color=VERMILLION, marker="o", label="does not hold"),
            Line2D([], [], color=GREEN, linewidth=4, alpha=0.4, label="expected"),
        ],
    )
    return figure


def _draw_ratios(axis: Axes) -> None:
    ratios = class_ratios()
    low, high = competitors_ratio(ratios)
    axis.axvspan(low, high, color=GREEN, alpha=0.25, linewidth=0)
    for place, bounds in enumerate(ratios.itertuples()):
        shared = bounds.low <= high and bounds.high >= low
        ends = [bounds.low, bounds.high]
        axis.plot(ends, [place, place], color=BLUE if shared else VERMILLION, linewidth=4)
    for count in _counts(published.COV19_CT_DB, published.REMAINDER, published.VALIDATION_PART):
        ratio = count.positives / count.negatives
        axis.axvline(ratio, color="0.4", linestyle=":", linewidth=1)
        axis.text(ratio, -0.9, count.part, ha="center", va="bottom", fontsize=7, color="0.3")
    _name_rows(axis, ratios.index)
    axis.set(xscale="log", xlabel="COVID-19 scans per other scan")
    axis.set_title("Table 1: classes behind the F1 scores", loc="left", pad=14)
    axis.set_xticks([0.1, 0.2, 0.5, 1.0], ["0.1", "0.2", "0.5", "1"])
    axis.minorticks_off()


def _draw_sensitivities(axis: Axes) -> None:
    values = printed_table("Table 2")["sensitivity"]
    axis.axvspan(0, audit.BELOW, color=GREEN, alpha=0.4, linewidth=0)
    tests = _counts(published.MOSMED, published.SPLIT_FILE, published.AS_PRINTED)
    for test, marker in zip(tests, "os", strict=True):
        share = values * test.positives / audit.PERCENT
        gaps = (share - share.round()).abs() * audit.PERCENT / test.positives
        colours = [BLUE if gap <= audit.BELOW + audit.SLACK else VERMILLION for gap in gaps]
        fill = colours if marker == "o" else "none"
        axis.scatter(
            gaps,
            range(len(gaps)),
            marker=marker,
            facecolors=fill,
            edgecolors=colours,
            clip_on=False,
        )
    _name_rows(axis, values.index)
    axis.set(xlim=(0, 0.2), xlabel="Percentage points to the nearest\ncount of 255 (●) or 256 (□)")
    axis.set_title("Table 2: sensitivities that a count gives", loc="left", pad=14)


def _draw_gains(axis: Axes) -> None:
    gains = published_gains()
    rows = gains["system"] + " / " + gains["segmentation"] + gains["table"]
    places = pd.factorize(rows)[0]
    for tick in np.arange(0, gains["gain"].max() + ROUND_STEP, ROUND_STEP):
        axis.axvline(tick, color="0.85", linewidth=0.8, zorder=0)
    colours = np.where(gains["round"], VERMILLION, BLUE)
    shift = gains.groupby(rows, sort=False).cumcount() * 0.24 - 0.24  # a cell per line
    axis.scatter(gains["gain"], places + shift, c=colours, s=16, clip_on=False)
    names = gains.drop_duplicates(["table", "system", "segmentation"])
    _name_rows(axis, list(zip(names["system"], names["segmentation"], strict=True)))
    axis.set(
        xlabel=f"Percentage points over the row\nbefore; lines every {ROUND_STEP}", xlim=(0, None)
    )
    axis.set_title("Tables 1 and 2: round gains", loc="left", pad=14)


def _name_rows(axis: Axes, keys: Iterable[tuple[str, str]]) -> None:
    names = [f"{system} / {segmentation}" for system, segmentation in keys]
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_ylim(len(names) - 0.4, -0.8)
