"""Pictures of what 3-D CNN with BERT makes of scans: embeddings of sets, and of whole scans."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from lib.data.splits import TEST, TRAIN, VALIDATION
from lib.reporting.pictures import STYLE, new_figure

MARKERS = {TRAIN: "o", VALIDATION: "s", TEST: "X"}
LARGEST_DEVIATION = 3.0  # that the shades tell apart


@matplotlib.rc_context(STYLE)
def embedding_rows(embeddings: Sequence[np.ndarray], labels: Sequence[str]) -> Figure:
    """Embeddings of all sets, the scans one below the other, classes together.

    Args:
        embeddings: of each scan, shape (sets, width).
        labels: of each scan.

    Returns:
        One picture, a row per set and a column per feature, in deviations from the feature's mean;
        lines between the classes.
    """
    order = np.argsort(np.asarray(labels), kind="stable")
    values = np.concatenate([embeddings[place] for place in order])
    deviation = values.std(0)
    values = (values - values.mean(0)) / np.where(deviation > 0, deviation, 1)
    counts = pd.Series([len(e) for e in embeddings]).groupby(np.asarray(labels)).sum()
    ends = counts.cumsum()

    figure = new_figure((7, 4.5))
    axis = figure.subplots()
    limits = {"vmin": -LARGEST_DEVIATION, "vmax": LARGEST_DEVIATION}
    picture = axis.imshow(values, aspect="auto", cmap="RdBu_r", interpolation="nearest", **limits)
    for end in ends.iloc[:-1]:
        axis.axhline(end - 0.5, color="black", linewidth=1)
    axis.set(xlabel="feature", ylabel="set of slices")
    axis.set_yticks(ends - counts / 2 - 0.5, counts.index)
    figure.colorbar(picture, label="deviations from the mean")
    return figure


@matplotlib.rc_context(STYLE)
def pooled_embeddings(features: np.ndarray, labels: Sequence[str], splits: Sequence[str]) -> Figure:
    """Pooled embeddings of scans in the two directions in which the training part varies most.

    Args:
        features: shape (scans, width).
        labels: of each scan.
        splits: the part of each scan.

    Returns:
        A point per scan, coloured by label, marked by part; axes name their share of the variance.
    """
    components = PCA(2).fit(features[np.asarray(splits) == TRAIN])
    shares = components.explained_variance_ratio_
    names = [f"component {number}: {share:.0%}" for number, share in enumerate(shares, 1)]
    places = pd.DataFrame(components.transform(features), columns=names)
    figure = new_figure((6.5, 4.2))
    axis = figure.subplots()
    sns.scatterplot(
        places.assign(label=list(labels), part=list(splits)),
        x=names[0], y=names[1], hue="label", style="part",
        markers=MARKERS, palette="colorblind", alpha=0.8, ax=axis,
    )  # fmt: skip
    sns.move_legend(axis, "upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure
