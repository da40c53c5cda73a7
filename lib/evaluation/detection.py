"""Average precision of segmented lesions, by the rule of paper 002 and by COCO's (FACTS 5.1).

The two differ in more than detail, so that a value of one says little about the other:

- The paper's is Matterport's: one average precision per image over all classes together, then the
  mean over images. An image without lesions where none is found counts 1, one where either side
  alone is empty counts 0. Among the predictions that overlap a true lesion by more than the
  threshold, the one that overlaps most and has its class is the hit, whatever its score.
- COCO's ranks the predictions of all images together, class by class, takes the mean precision at
  101 recalls, then the mean over classes that occur. Predictions choose true lesions in order of
  their scores, at the threshold or above it. An image without lesions counts by its false
  positives alone.
"""

import io
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lib.evaluation.statistics import bootstrap_interval, mean_statistic

THRESHOLDS = tuple(np.round(np.arange(0.5, 1, 0.05), 2).tolist())  # 0.5, 0.55, ... 0.95
IMAGE_COLUMNS = tuple(f"AP@{threshold:.2f}" for threshold in THRESHOLDS)
# What table 6 of the paper prints, and the thresholds whose mean it is
SUMMARIES = {"AP@0.5": [0], "AP@0.75": [5], "mAP": list(range(len(THRESHOLDS)))}
NO_LIMIT = 100_000  # predictions per image; COCO's own 100 would cut where the paper does not


class Lesions(NamedTuple):
    """Lesions of one image, predicted or true.

    Attributes:
        masks: bool, shape (lesions, height, width).
        labels: class, from 1 on, shape (lesions,).
        scores: of predictions, shape (lesions,); None for true lesions.
    """

    masks: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None


def average_precisions(predicted: Sequence[Lesions], true: Sequence[Lesions]) -> pd.DataFrame:
    """Both rules side by side, at the thresholds of the paper's table 6.

    Args:
        predicted: lesions found in each image, with scores.
        true: lesions of the same images.

    Returns:
        Rows ``paper`` and ``coco``, columns ``AP@0.5``, ``AP@0.75`` and ``mAP`` (mean over 0.5 to
        0.95 in steps of 0.05), 0 to 1; nan where there is nothing to average.

    Raises:
        ValueError: if images, lesions, masks or scores do not belong together.
    """
    found = {
        "paper": paper_precisions(predicted, true).mean(0) if len(true) else _undefined(THRESHOLDS),
        "coco": coco_precisions(predicted, true),
    }
    table = {
        name: [at[picked].mean() for at in found.values()] for name, picked in SUMMARIES.items()
    }
    return pd.DataFrame(table, index=list(found))


def image_precisions(
    images: pd.DataFrame, predicted: Sequence[Lesions], true: Sequence[Lesions]
) -> pd.DataFrame:
    """A table of images with their average precisions by the paper's rule.

    Args:
        images: what is known of each image, a row each.
        predicted: lesions found in them, with scores.
        true: lesions of the same images.

    Returns:
        The columns of ``images``, then ``AP@0.50``, ``AP@0.55``, ... ``AP@0.95``, 0 to 1.

    Raises:
        ValueError: if images, lesions, masks or scores do not belong together.
    """
    values = paper_precisions(predicted, true)
    return images.assign(**dict(zip(IMAGE_COLUMNS, values.T, strict=True)))


def summarise_precisions(
    images: pd.DataFrame, predicted: Sequence[Lesions], true: Sequence[Lesions], *, seed: int
) -> pd.DataFrame:
    """Both rules with intervals.

    Args:
        images: of `image_precisions`, with patient_id.
        predicted: lesions found in the same images, with scores.
        true: lesions of the same images.
        seed: of resampling the patients.

    Returns:
        Columns rule (``paper`` or ``coco``), metric (`SUMMARIES`), value, low, high (95 %, patients
        resampled) and n, the number of images. COCO's rule has no interval: its precision ranks all
        images at once, so that every resample would have to be matched and ranked anew.
    """
    names = list(SUMMARIES)
    columns = [images[np.take(IMAGE_COLUMNS, picked)].mean(axis=1) for picked in SUMMARIES.values()]
    values = images[["patient_id"]].assign(**dict(zip(names, columns, strict=True)))
    mean = partial(mean_statistic, columns=names)
    paper = bootstrap_interval(values, mean, seed=seed)[["value", "low", "high"]]
    coco = average_precisions(predicted, true).loc[["coco"]].T.set_axis(["value"], axis=1)
    both = pd.concat({"paper": paper, "coco": coco}, names=["rule", "metric"])
    return both.reset_index().assign(n=len(images))


def paper_precisions(
    predicted: Sequence[Lesions],
    true: Sequence[Lesions],
    thresholds: Sequence[float] = THRESHOLDS,
) -> np.ndarray:
    """Average precision of every image by the paper's rule; its mean is what the paper reports.

    Predictions of equal score keep their order.

    Args:
        predicted: lesions found in each image, with scores.
        true: lesions of the same images.
        thresholds: IoU that a hit must exceed.

    Returns:
        Shape (images, thresholds).

    Raises:
        ValueError: if images, lesions, masks or scores do not belong together.
    """
    _check(predicted, true)
    rows = [
        [_image_precision(found, drawn, overlaps, threshold) for threshold in thresholds]
        for found, drawn in zip(predicted, true, strict=True)
        for overlaps in [mask_overlaps(found.masks, drawn.masks)]
    ]
    return np.array(rows, float).reshape(len(true), len(thresholds))


def mask_overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of every mask with every other one, 0 for two empty ones.

    Args:
        first: bool, shape (n, height, width).
        second: bool, shape (m, height, width).

    Returns:
        Shape (n, m).
    """
    ours, theirs = (
        np.reshape(masks, (len(masks), math.prod(masks.shape[1:]))).astype(np.float32)
        for masks in (first, second)
    )
    common = ours @ theirs.T
    union = ours.sum(1)[:, None] + theirs.sum(1)[None] - common
    return common / np.maximum(union, 1)


def _image_precision(
    predicted: Lesions, true: Lesions, overlaps: np.ndarray, threshold: float
) -> float:
    """Area under the falling envelope of precision over recall in one image."""
    if not len(predicted.labels) or not len(true.labels):
        return float(len(predicted.labels) == len(true.labels))
    fits = (overlaps > threshold) & (predicted.labels[:, None] == true.labels[None])
    best = np.where(fits, overlaps, -1).argmax(0)  # prediction that hits each true lesion, if any
    hits = np.zeros(len(predicted.labels), bool)
    hits[best[fits.any(0)]] = True
    ranked = hits[np.argsort(-predicted.scores, kind="stable")]
    precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[ranked].sum() / len(true.labels))  # recall rises where there is a hit


def coco_precisions(
    predicted: Sequence[Lesions],
    true: Sequence[Lesions],
    thresholds: Sequence[float] = THRESHOLDS,
) -> np.ndarray:
    """Average precision of a set of images by pycocotools, lesions of all sizes.

    Args:
        predicted: lesions found in each image, with scores.
        true: lesions of the same images.
        thresholds: IoU that a hit must reach.

    Returns:
        Mean over the classes that occur in the truth, shape (thresholds,); nan where none does.

    Raises:
        ValueError: if images, lesions, masks or scores do not belong together.
    """
    _check(predicted, true)
    annotations = _annotations(true)
    if not annotations:
        return _undefined(thresholds)
    with redirect_stdout(io.StringIO()):  # it prints its progress
        found = _table(predicted, _annotations(predicted))
        evaluation = COCOeval(_table(true, annotations), found, "segm")
        evaluation.params.iouThrs = np.array(thresholds)
        evaluation.params.maxDets = [NO_LIMIT]
        evaluation.params.areaRng = [[0, np.inf]]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    # (thresholds, recalls, classes of the truth, areas, limits)
    return evaluation.eval["precision"][..., 0, 0].mean((1, 2))


def _table(images: Sequence[Lesions], annotations: list[dict[str, Any]]) -> COCO:
    """COCO's table of images, the classes that occur in them, and lesions."""
    table = COCO()
    table.dataset = {
        "images": [
            {"id": number, "height": np.shape(image.masks)[1], "width": np.shape(image.masks)[2]}
            for number, image in enumerate(images, start=1)
        ],
        "categories": [{"id": label} for label in {a["category_id"] for a in annotations}],
        "annotations": annotations,
    }
    table.createIndex()
    return table


def _annotations(images: Sequence[Lesions]) -> list[dict[str, Any]]:
    """COCO's records of all lesions, scores with those that have them.

    Numbers start at 1: COCO takes number 0 for "not matched".
    """
    records = [
        {
            "image_id": number,
            "category_id": int(image.labels[lesion]),
            "segmentation": encoded,
            "area": int(run_lengths.area(encoded)),
            "iscrowd": 0,
            "score": 0.0 if image.scores is None else float(image.scores[lesion]),
        }
        for number, image in enumerate(images, start=1)
        for lesion, mask in enumerate(image.masks)
        for encoded in [run_lengths.encode(np.asfortranarray(mask, np.uint8))]
    ]
    return [record | {"id": number} for number, record in enumerate(records, start=1)]


def _undefined(thresholds: Sequence[float]) -> np.ndarray:
    """A value for each threshold where there is none."""
    return np.full(len(thresholds), np.nan)


def _check(predicted: Sequence[Lesions], true: Sequence[Lesions]) -> None:
    """Refuse lists that do not belong together."""
    if len(predicted) != len(true):
        raise ValueError(f"{len(predicted)} images with predictions, {len(true)} with the truth")
    for number, (found, drawn) in enumerate(zip(predicted, true, strict=True)):
        if found.scores is None or len(found.scores) != len(found.labels):
            raise ValueError(f"image {number}: every prediction needs a score")
        if any(len(lesions.masks) != len(lesions.labels) for lesions in (found, drawn)):
            raise ValueError(f"image {number}: every mask needs a label")
        if np.shape(found.masks)[1:] != np.shape(drawn.masks)[1:]:
            raise ValueError(
                f"image {number}: predicted masks are {np.shape(found.masks)[1:]}, true ones "
                f"{np.shape(drawn.masks)[1:]}"
            )
