"""Are the published numbers of COVID-CT-Mask-Net consistent (FACTS 5.1 to 5.3)?

As in `lib.reporting.audit`, for the third paper: its abstract and text, the README of its code, the
authors' own confusion matrix and what its competitors say of themselves.
"""

from collections.abc import Iterable, Iterator

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.evaluation import audit
from lib.reporting import published
from lib.reporting.audit import Check, printed_table, row_check
from lib.reporting.pictures import LINE_COLOURS, STYLE, new_figure
from lib.reporting.published import NO_SEGMENTATION

CONTROL_FIRST = ("sensitivity_control", "sensitivity_pneumonia", "sensitivity_covid")
READINGS = {
    "macro_f1": "macro F1",
    "weighted_f1": "class-weighted F1",
    "f1_of_means": "F1 of mean precision and sensitivity",
    "balanced_accuracy": "mean sensitivity",
}
BLUE, VERMILLION, GREEN = LINE_COLOURS[:3]

MATRIX = "score is that of the confusion matrix"
RATE = "sensitivity is a count of the test images"
SHARES = "accuracy follows from the sensitivities"
IMAGES = "numbers of images agree"
WEIGHTS = "numbers of parameters agree"
OWN_SCORES = "score of a competitor is possible"

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


def _mask_net_table(table: str) -> pd.DataFrame:
    return printed_table(table, published.MASK_NET_PAPER)


def _matrix() -> Iterator[Check]:
    """The headline against the authors' matrix; what is printed as F1 in all its readings."""
    counts = np.array(published.HEADLINE_CONFUSION)
    scores = audit.confusion_scores(counts)
    sensitivities = audit.PERCENT * np.diagonal(counts) / counts.sum(axis=1)
    scores |= dict(zip(CONTROL_FIRST, sensitivities, strict=True))
    ((key, row),) = _mask_net_table("abstract").iterrows()
    for name in (*CONTROL_FIRST, "accuracy"):
        holds = audit.prints_as(scores[name], row[name])
        yield row_check(MATRIX, "abstract", key, row[[name]], f"{scores[name]:.3f}", holds)
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
                yield row_check(RATE, table, key, row[[name]], text, len(found))


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
    return row_check(SHARES, table, key, row, text, holds)


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
    yield row_check(OWN_SCORES, "Table 5", key, row, text, len(found))
    key = ("LightCNN", NO_SEGMENTATION)
    row = own.loc[key]
    low, high = audit.f1_bounds(row["precision_covid"], row["sensitivity_covid"])
    holds = low - audit.ABOVE <= row["f1_covid"] <= high + audit.BELOW
    text = f"{low:.3f} to {high:.3f} by its precision and sensitivity"
    yield row_check(OWN_SCORES, published.MASK_NET_OWN, key, row[["f1_covid"]], text, holds)


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
