"""Are published numbers consistent? Every finding derived from what a paper prints.

The first paper, SAM2CLIP2SAM (FACTS 8.1), the second, 3-D CNN with BERT (FACTS 4.10), and the
third, COVID-CT-Mask-Net (FACTS 5.1 to 5.3).

A check takes one printed number, or the numbers of one row, and says what they would have to be or
what they imply. It *holds* where both can be true together. That a check fails does not say why: a
slip of the pen, another test set, an average over several runs, or values that were not measured
look alike from here.
"""

from collections.abc import Iterable, Iterator
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
CONTROL_FIRST = ("sensitivity_control", "sensitivity_pneumonia", "sensitivity_covid")
READINGS = {
    "macro_f1": "macro F1",
    "weighted_f1": "class-weighted F1",
    "f1_of_means": "F1 of mean precision and sensitivity",
    "balanced_accuracy": "mean sensitivity",
}
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
MATRIX = "score is that of the confusion matrix"
RATE = "sensitivity is a count of the test images"
SHARES = "accuracy follows from the sensitivities"
IMAGES = "numbers of images agree"
WEIGHTS = "numbers of parameters agree"
OWN_SCORES = "score of a competitor is possible"

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
MASK_NET_MEANING = {
    MATRIX: "The authors' own matrix of the headline model, 21,182 images. Four readings of F1: "
    "macro, class-weighted, of mean precision and mean sensitivity, and mean sensitivity alone.",
    RATE: "Counts out of the 9,450 control, 7,395 common pneumonia and 4,346 COVID-19 images of "
    "the released list.",
    SHARES: "All that is right in the three classes, on the released list, against the accuracy.",
    IMAGES: "Against the released lists; shares and ratios may have been rounded or cut off.",
    WEIGHTS: "Against the layers as built, in the code's sizes.",
    OWN_SCORES: "From the competitors' own numbers, with the digits they are printed with.",
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
        *_equation_9(_wide("Table 1")),
        *_class_ratio(_wide("Table 1")),
        *_class_f1_counts(_wide("Table 1")),
        *_detection(_wide("Table 2")),
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


def mask_net_checks() -> pd.DataFrame:
    """All checks of what COVID-CT-Mask-Net, its README and its matrix state.

    Returns:
        Rows as of :func:`audit_checks`; where the subject is no system, ``segmentation`` is the
        part that is counted.
    """
    return pd.DataFrame(
        [
            *_matrix(), *_rates(), *_shares(), *_covidx_images(), *_other_images(),
            *_image_shares(), *_weights(), *_own_scores(),
        ]
    )  # fmt: skip


def audit_summary(checks: pd.DataFrame) -> pd.DataFrame:
    """One row per finding: what was checked, how often it holds, where it does not.

    Args:
        checks: of :func:`audit_checks`, :func:`bert_checks` or :func:`mask_net_checks`.

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
                "meaning": (MEANING | BERT_MEANING | MASK_NET_MEANING)[finding]
                + _likelihood(finding, part),
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


def _wide(table: str, paper: str = published.SAM2CLIP2SAM_PAPER) -> pd.DataFrame:
    """A published table in percent: rows by system and segmentation as printed, metric columns."""
    values = published.published_values(paper, table)
    keys = ["system", "segmentation"]
    return values.set_index([*keys, "metric"])["value"].unstack(sort=False)


def _check(finding: str, table: str, key: object, cells: pd.Series, derived: str, holds: bool):
    system, segmentation = key
    metrics = " + ".join(heading(name) for name in cells.index)
    printed = " + ".join(f"{value:.2f}" for value in cells)
    return Check(finding, table, system, segmentation, metrics, printed, derived, bool(holds))


def _equation_9(table: pd.DataFrame) -> Iterator[Check]:
    for key, row in table.iterrows():
        parts = row[list(CLASS_F1)]
        holds = audit.is_mean_of(row["macro_f1"], parts)
        yield _check(
            EQUATION_9, "Table 1", key, row[["macro_f1"]], f"mean {parts.mean():.3f}", holds
        )


def class_ratios() -> pd.DataFrame:
    """Ratio of COVID-19 to other scans that each row of table 1 allows.

    Returns:
        ``low`` and ``high`` by system and segmentation, as printed.
    """
    table = _wide("Table 1")
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
        yield _check(CLASS_RATIO, "Table 1", key, table.loc[key, list(CLASS_F1)], text, holds)


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
            yield _check(CLASS_F1_COUNTS, "Table 1", key, cells, text, holds)


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
        yield _check(
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
        yield _check(PRECISION, "Table 2", key, row[["precision"]], text, any(map(len, pairs)))
        low, high = audit.f1_bounds(row["precision"], row["sensitivity"])
        fits = low - audit.ABOVE <= row["f1_covid"] <= high + audit.BELOW
        yield _check(
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
    return _check(WHOLE_ROW, "Table 2", key, row, text, len(outcomes))


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
        yield _check(ROUND_GAIN, row.table, key, cell, text, not row.round)


def _margins() -> Iterator[Check]:
    for margin in published.MARGINS:
        table = _wide(margin.table)
        gaps = (table.loc[margin.better] - table.loc[margin.worse]).round(audit.DECIMALS)
        fits = gaps.index[np.abs(gaps - margin.value) <= audit.ABOVE + audit.SLACK]
        holds = margin.metric in fits
        text = f"{heading(margin.metric)} {gaps[margin.metric]:.2f}"
        if not holds and len(fits):
            text += f"; {margin.value:.2f} is the difference of {heading(fits[0]).lower()}"
        cell = pd.Series({margin.metric: margin.value})
        yield _check(MARGIN, margin.table, margin.better, cell, f"{margin.said}: {text}", holds)


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
        for key, row in _wide(name, published.CNN_BERT_PAPER)[["accuracy"]].dropna().iterrows():
            hits = audit.counts_for_rate(row["accuracy"], validation.total)
            nearest = round(row["accuracy"] * validation.total / audit.PERCENT)
            share = audit.PERCENT * nearest / validation.total
            text = f"nearest: {nearest} of {validation.total}, {share:.3f}"
            yield _check(ACCURACY, name, key, row, text, len(hits))


def _accuracy_and_f1() -> Iterator[Check]:
    """Of the validation rows of table 3."""
    (validation,) = _counts(published.COV19_CT_DB_2021, published.VALIDATION_PART)
    classes = (validation.positives, validation.negatives)
    for key, row in _wide("Table 3", published.CNN_BERT_PAPER).dropna().iterrows():
        outcomes = audit.outcomes_with_accuracy(row["accuracy"], *classes)
        low, high = outcomes[:, 2].min(), outcomes[:, 2].max()
        fits = outcomes[audit.prints_as(outcomes[:, 2], row["macro_f1"])]
        found = "; ".join(f"TP {found:.0f}, TN {right:.0f}" for found, right, _ in fits)
        text = f"macro F1 {low:.3f} to {high:.3f}: {found or 'no outcome'}"
        yield _check(ACCURACY_AND_F1, "Table 3", key, row, text, len(fits))


def _baseline() -> Check:
    """The network that the perceptrons of table 2 are compared with."""
    key = ("baseline without MLP", published.UNET)
    row = _wide("Table 2", published.CNN_BERT_PAPER).loc[key]
    named = _wide("Table 1", published.CNN_BERT_PAPER).loc[published.MLP_BASELINE]
    (accuracy,) = named
    text = f"{published.MLP_BASELINE[0]} has {accuracy:.2f}"
    return _check(BASELINE, "Table 2", key, row, text, row["accuracy"] == accuracy)


def _mask_net_table(table: str) -> pd.DataFrame:
    return _wide(table, published.MASK_NET_PAPER)


def _matrix() -> Iterator[Check]:
    """The headline against the authors' matrix; what is printed as F1 in all its readings."""
    counts = np.array(published.HEADLINE_CONFUSION)
    scores = audit.confusion_scores(counts)
    sensitivities = audit.PERCENT * np.diagonal(counts) / counts.sum(axis=1)
    scores |= dict(zip(CONTROL_FIRST, sensitivities, strict=True))
    ((key, row),) = _mask_net_table("abstract").iterrows()
    for name in (*CONTROL_FIRST, "accuracy"):
        holds = audit.prints_as(scores[name], row[name])
        yield _check(MATRIX, "abstract", key, row[[name]], f"{scores[name]:.3f}", holds)
    printed = row["balanced_accuracy"]
    for name, reading in READINGS.items():
        text, holds = f"{scores[name]:.3f}", bool(audit.prints_as(scores[name], printed))
        yield Check(
            MATRIX, "abstract", *key, f"F1, read as {reading}", f"{printed:.2f}", text, holds
        )


def _rates() -> Iterator[Check]:
    totals = dict(zip(CONTROL_FIRST, published.COVIDX_IMAGES["test"], strict=True))
    for table in ("abstract", published.MASK_NET_README):
        for key, row in _mask_net_table(table).iterrows():
            for name, value in row[row.index.intersection(CONTROL_FIRST)].dropna().items():
                found = audit.counts_for_rate(value, totals[name])
                text = f"{' or '.join(map(str, found)) or 'none'} of {totals[name]:,}"
                yield _check(RATE, table, key, row[[name]], text, len(found))


def _shares() -> Iterator[Check]:
    totals = published.COVIDX_IMAGES["test"]
    for table in ("abstract", published.MASK_NET_README):
        rows = _mask_net_table(table)[["accuracy", *CONTROL_FIRST]].dropna()
        for key, row in rows.iterrows():
            yield _share(table, key, row, totals, audit.DECIMALS)
    own = _mask_net_table(published.MASK_NET_OWN)
    for key, row in own.loc[["COVIDNet-CT-A", "COVIDNet-CT-B"]].iterrows():
        cells = row[["accuracy", *CONTROL_FIRST]]
        yield _share(published.MASK_NET_OWN, key, cells, totals, 1)


def _share(table: str, key: object, row: pd.Series, totals: Iterable[int], decimals: int) -> Check:
    sums = audit.counts_for_rates(row[list(CONTROL_FIRST)], totals, decimals=decimals)
    total = sum(totals)
    accuracies = audit.PERCENT * sums / total
    holds = audit.prints_as(accuracies, row["accuracy"], decimals=decimals).any()
    text = f"{_span(sums)} of {total:,}, {_span(accuracies, '.3f')}"
    return _check(SHARES, table, key, row, text, holds)


def _span(values: np.ndarray, form: str = ",") -> str:
    """The ends of a range of numbers, one where they are the same."""
    if len(values) == 0:
        return "none"
    ends = dict.fromkeys(f"{value:{form}}" for value in (values[0], values[-1]))
    return " to ".join(ends)


def _covidx_images() -> Iterator[Check]:
    """Numbers of images of COVIDx-CT-1 against the released lists."""
    ours = published.MASK_NET
    images = {part: sum(counts) for part, counts in published.COVIDX_IMAGES.items()}
    left = images["training"] - int(published.stated_number("Table 1", ours, "training images"))
    yield _count_check("COVIDx-CT-1", "all", ("COVIDNet-CT", "images"), sum(images.values()))
    for part in ("validation", "test"):
        yield _count_check("COVIDx-CT-1", part, (ours, f"{part} images"), images[part])
    text = f"of {images['training']:,} in the list are not trained on"
    yield _count_check(
        "COVIDx-CT-1", "remaining", (ours, "images"), left, text=text, table="Table 7"
    )
    matrix = np.array(published.HEADLINE_CONFUSION)
    missing = np.array(published.COVIDX_IMAGES["test"]) - matrix.sum(axis=1)
    text = f"{images['test']:,} in the list; {missing[1]} of pneumonia are missing"
    printed, holds = f"{matrix.sum():,}", not missing.any()
    yield Check(IMAGES, "abstract", "confusion matrix", "test", "images", printed, text, holds)


def _other_images() -> Iterator[Check]:
    """Numbers of images for lesions and of iCTCF, likewise."""
    for source in ("text", published.MASK_NET_README):
        for part, count in published.LESION_IMAGES.items():
            names = ("Mask R-CNN", f"{part} images")
            yield _count_check("CNCB lesions", part, names, count, source=source)
    ictcf = published.ICTCF_IMAGES
    for part in ("training", "test"):
        names, text = ("iCTCF", f"{part} images"), "in the list of the author's single-shot model"
        yield _count_check("iCTCF", part, names, ictcf[part], text=text, table="Table 8")
    room = ictcf["all"] - ictcf["test"]
    text = f"{ictcf['all']:,} (assumed) less {ictcf['test']:,} leaves {room:,}"
    printed, holds = f"{ictcf['training']:,}", room >= ictcf["training"]
    yield Check(IMAGES, "Table 8", "iCTCF", "training", "room for images", printed, text, holds)


def _count_check(
    subject: str,
    part: str,
    names: tuple[str, str],
    counted: int,
    *,
    text: str = "in the list",
    table: str = "Table 1",
    source: str = "text",
) -> Check:
    """A number that the paper states, by subject and name, against a count of our own."""
    printed = published.stated_number(table, *names, source=source)
    where = table if source == "text" else source
    derived = f"{counted:,} {text}"
    return Check(
        IMAGES, where, subject, part, "images", f"{printed:,.0f}", derived, printed == counted
    )


def _image_shares() -> Iterator[Check]:
    """Ratios and percentages of images, with the digits that they are printed with."""
    stated, images = published.stated_number, published.COVIDX_IMAGES
    sizes = {part: sum(counts) for part, counts in images.items()}
    trained = stated("Table 1", published.MASK_NET, "training images")
    yield _ratio_check(published.MASK_NET, "test to training", sizes["test"] / trained, 2)
    ratio = sizes["test"] / sizes["training"]
    test, about = (
        stated("Table 1", *names)
        for names in ((published.MASK_NET, "test images"), ("COVIDNet-CT", "training images about"))
    )
    note = f"; {test / about:.4f} is {test:,.0f} to about {about:,.0f}"
    yield _ratio_check("COVIDNet-CT", "test to training", ratio, 3, note)
    for part in ("validation", "test"):
        names = ("control percent", "pneumonia percent", "covid percent")
        for name, count in zip(names, images[part], strict=True):
            share = audit.PERCENT * count / sizes[part]
            yield _ratio_check(f"{part} split", name, share, 0)


def _ratio_check(subject: str, name: str, value: float, decimals: int, note: str = "") -> Check:
    printed = published.stated_number("Table 1", subject, name)
    holds = bool(audit.prints_as(value, printed, decimals=decimals))
    texts = (f"{printed:.{decimals}f}", f"{value:.{decimals + 2}f}{note}")
    return Check(IMAGES, "Table 1", subject, name, "share", *texts, holds)


def _weights() -> Iterator[Check]:
    """Numbers of parameters in text and README, in millions, against the layers as built."""
    parts = published.MASK_NET_PARAMETERS
    lesions = parts["Mask R-CNN"] + parts["running statistics"]
    two_layers = audit.dense_parameters(published.S_WIDTHS[::2] + published.S_WIDTHS[-1:])
    with_masks, without = (lesions + parts["S"] - less for less in (0, parts["mask branch"]))
    head = f"{parts['S']:,}; two layers, as the text says: {two_layers:,}"
    readme = published.MASK_NET_README
    rows = [
        ("S", "text", [parts["S"], two_layers], head),
        ("S", readme, [parts["S"]], f"{parts['S']:,}"),
        ("Mask R-CNN", readme, [lesions], f"{lesions:,}, running statistics included"),
        (published.MASK_NET, readme, [without],
         f"{without:,} without the mask branch, which the text leaves out; {with_masks:,} with it"),
    ]  # fmt: skip
    for subject, source, counts, text in rows:
        printed = published.stated_number("Table 1", subject, "million parameters", source=source)
        holds = any(audit.prints_as(count / 1e6, printed) for count in counts)
        yield Check(WEIGHTS, source, subject, "all", "million", f"{printed:.2f}", text, holds)
    said, trained = (parts["S"] + parts[name] for name in ("batch norm", "batch norm, named so"))
    text = f"{trained:,} in the code, which takes layers by name and misses the shortcuts'"
    printed = f"S and all batch norms: {said:,}"
    key = ("S + batch norm", "trained")
    yield Check(WEIGHTS, "text", *key, "parameters", printed, text, said == trained)


def _own_scores() -> Iterator[Check]:
    """Two scores of table 5's competitors; 30 of ResNet18's 90 images show COVID-19."""
    ((key, row),) = _mask_net_table("Table 5")[["sensitivity_covid"]].drop(
        index=f"{published.MASK_NET} (best)", level=0
    ).iterrows()  # fmt: skip
    (value,), images = row, published.RESNET18_COVID_IMAGES
    found = audit.counts_for_rate(value, images, decimals=1)
    share = value * images / audit.PERCENT
    own = _mask_net_table(published.MASK_NET_OWN)
    theirs = own.loc[key]
    text = (
        f"{' or '.join(map(str, found)) or 'none'} of {images} (it would be {share:.1f}); its own "
        f"paper: sensitivity {theirs['sensitivity_covid']}, precision {theirs['precision_covid']}"
    )
    yield _check(OWN_SCORES, "Table 5", key, row, text, len(found))
    key = ("LightCNN", NO_SEGMENTATION)
    row = own.loc[key]
    low, high = audit.f1_bounds(row["precision_covid"], row["sensitivity_covid"])
    holds = low - audit.ABOVE <= row["f1_covid"] <= high + audit.BELOW
    text = f"{low:.3f} to {high:.3f} by its precision and sensitivity"
    yield _check(OWN_SCORES, published.MASK_NET_OWN, key, row[["f1_covid"]], text, holds)


@matplotlib.rc_context(STYLE)
def mask_net_figure() -> Figure:
    """The authors' confusion matrix, and what its F1 may be.

    Returns:
        Two panels. Left: counts of the matrix, shaded by their share of the true class. Right: the
        readings of F1 as bars from the printed value, which a line marks.
    """
    figure = new_figure((9.5, 3.3))
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.2))
    _draw_matrix(left)
    _draw_readings(right)
    return figure


def _draw_matrix(axis: Axes) -> None:
    counts = np.array(published.HEADLINE_CONFUSION)
    shares = counts / counts.sum(axis=1, keepdims=True)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        share = shares[row, column]
        text = f"{count:,}\n{audit.PERCENT * share:.2f} %"
        colour = "white" if share > 0.5 else "black"
        axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    names = ("control", "pneumonia", "COVID-19")
    sizes = [f"{name}\n{total:,}" for name, total in zip(names, counts.sum(axis=1), strict=True)]
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), sizes)
    axis.set(xlabel="Predicted", ylabel="True")
    axis.grid(visible=False)
    axis.set_title(f"Confusion matrix of {counts.sum():,} test images", loc="left")


def _draw_readings(axis: Axes) -> None:
    scores = audit.confusion_scores(published.HEADLINE_CONFUSION)
    ((_, row),) = _mask_net_table("abstract").iterrows()
    printed = row["balanced_accuracy"]
    for place, name in enumerate(READINGS):
        fits = audit.prints_as(scores[name], printed)
        colour = BLUE if fits else VERMILLION
        axis.plot([printed, scores[name]], [place, place], color=colour, linewidth=3, alpha=0.4)
        axis.plot(scores[name], place, "o", color=colour)
        text = f"{scores[name]:.2f}"
        axis.annotate(
            text, (scores[name], place), (8, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.axvline(printed, color=GREEN, linewidth=2, zorder=0)
    axis.text(printed, -0.75, f"printed {printed:.2f}", ha="center", fontsize=8, color=GREEN)
    axis.set_yticks(range(len(READINGS)), READINGS.values())
    axis.set(xlabel="Percent", xlim=(91.4, 91.8), ylim=(len(READINGS) - 0.5, -0.6))
    axis.set_title("What the printed F1 is", loc="left", pad=16)


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
    values = _wide("Table 2")["sensitivity"]
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
