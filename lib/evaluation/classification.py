"""Scores of a classifier, computed from its predictions and from nothing else.

A predictions table has one row per scan or image: ``scan_id`` (or ``image_id``), ``split``,
``label`` (the name of a class) and one column ``probability_<class>`` per class. Scores are
fractions between 0 and 1, never percent. scikit-learn computes them; where a score is not defined
it is nan, so that no average hides it:

==================================================  =============================================
no case of the positive class                       sensitivity and ROC AUC are nan
no case of any other class                          specificity and ROC AUC are nan
nothing predicted positive                          precision is 0
nothing predicted as a class                        precision of that class is 0
a class that nobody has                             balanced accuracy is nan
a class that nobody has and that nobody predicted   its F1 and with it the macro F1 are nan
==================================================  =============================================
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn import metrics

from lib.data.splits import VALIDATION

IDENTIFIERS = ("scan_id", "image_id")
PROBABILITY_PREFIX = "probability_"
DEFAULT_THRESHOLD = 0.5
SUM_TOLERANCE = 1e-3  # probabilities written with four decimals still pass


def class_names(predictions: pd.DataFrame) -> tuple[str, ...]:
    """Names of the classes, in the order of the probability columns.

    Args:
        predictions: a predictions table.

    Returns:
        One name per column ``probability_<class>``.
    """
    columns = predictions.columns.astype(str)
    return tuple(
        name.removeprefix(PROBABILITY_PREFIX)
        for name in columns
        if name.startswith(PROBABILITY_PREFIX)
    )


def probability_matrix(predictions: pd.DataFrame) -> np.ndarray:
    """Probabilities of all classes.

    Args:
        predictions: a predictions table.

    Returns:
        Shape (rows, classes), float64, in the order of :func:`class_names`.
    """
    columns = [PROBABILITY_PREFIX + name for name in class_names(predictions)]
    return predictions[columns].to_numpy(np.float64)


def identifier_column(predictions: pd.DataFrame) -> str:
    """Which column names the rows: ``scan_id`` or, for single pictures, ``image_id``.

    Raises:
        ValueError: when there is neither.
    """
    for name in IDENTIFIERS:
        if name in predictions.columns:
            return name
    raise ValueError(f"predictions need a column {' or '.join(IDENTIFIERS)}")


def predictions_table(
    scan_ids: Sequence[str],
    splits: Sequence[str],
    targets: Sequence[int],
    probabilities: np.ndarray,
    *,
    classes: Sequence[str],
    identifier: str = "scan_id",
) -> pd.DataFrame:
    """A predictions table, as it is written to ``data/predictions``.

    Args:
        scan_ids: of the scans; or names of pictures.
        splits: the split of each scan.
        targets: index of the true class of each scan.
        probabilities: shape (scans, classes).
        classes: their names, in the order of the columns.
        identifier: one of `IDENTIFIERS`, the column of the names.

    Returns:
        One row per scan: its name, split, label, one probability column per class.
    """
    frame = pd.DataFrame(
        {identifier: scan_ids, "split": splits, "label": [classes[target] for target in targets]}
    )
    frame[[f"{PROBABILITY_PREFIX}{name}" for name in classes]] = probabilities
    return frame


def validate_predictions(predictions: pd.DataFrame) -> None:
    """Check that a predictions table can be scored.

    Args:
        predictions: a predictions table; every row must be labelled.

    Raises:
        ValueError: when a column is missing, the table is empty, an identifier occurs twice, a
            label is not the name of a class, or the probabilities of a row are outside [0, 1] or
            do not sum to 1. The message names the first offenders.
    """
    identifier = identifier_column(predictions)
    missing = [name for name in ("split", "label") if name not in predictions.columns]
    if missing:
        raise ValueError(f"predictions lack the column {', '.join(missing)}")
    classes = class_names(predictions)
    if len(classes) < 2:
        raise ValueError(f"predictions need two columns {PROBABILITY_PREFIX}<class> or more")
    if predictions.empty:
        raise ValueError("predictions hold no row")
    probabilities = probability_matrix(predictions)
    outside = ~((probabilities >= 0) & (probabilities <= 1)).all(axis=1)  # nan is outside as well
    faults = {
        "occur twice": predictions[identifier].duplicated(),
        f"have a label other than {', '.join(classes)}": ~predictions["label"].isin(classes),
        "have a probability outside [0, 1]": outside,
        "have probabilities that do not sum to 1": (
            np.abs(probabilities.sum(axis=1) - 1) > SUM_TOLERANCE
        ),
    }
    for fault, rows in faults.items():
        if np.any(rows):
            offenders = predictions.loc[np.asarray(rows), identifier].astype(str)
            raise ValueError(
                f"{len(offenders)} of {len(predictions)} predictions {fault}: "
                + ", ".join(offenders.head(3))
            )


def read_predictions(file: Path) -> pd.DataFrame:
    """Read and check a predictions table.

    Args:
        file: a CSV file.

    Returns:
        The table, with identifiers, splits and labels as text, so that ``0001`` stays ``0001``
        and a class named ``1`` stays a name.

    Raises:
        ValueError: as :func:`validate_predictions`, with the file's name in front.
    """
    text = dict.fromkeys((*IDENTIFIERS, "patient_id", "split", "label"), str)
    predictions = pd.read_csv(file, dtype=text, keep_default_na=False, na_values=[""])
    try:
        validate_predictions(predictions)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return predictions


def attach_patients(predictions: pd.DataFrame, manifest: pd.DataFrame) -> pd.DataFrame:
    """Predictions with the column ``patient_id``, which intervals are resampled by.

    Args:
        predictions: a predictions table.
        manifest: the manifest of the same data set, with the same identifier column and
            ``patient_id``.

    Returns:
        A copy of the predictions, same rows in the same order.

    Raises:
        ValueError: when the manifest does not list a predicted scan, or lists one twice.
    """
    identifier = identifier_column(predictions)
    patients = manifest.set_index(identifier)["patient_id"]
    if not patients.index.is_unique:
        raise ValueError(f"the manifest lists the same {identifier} twice")
    patient_id = predictions[identifier].map(patients)
    if patient_id.isna().any():
        unknown = predictions.loc[patient_id.isna(), identifier].iloc[0]
        raise ValueError(f"the manifest has no patient for {identifier} {unknown}")
    return predictions.assign(patient_id=patient_id)


def predicted_classes(
    probabilities: np.ndarray,
    *,
    positive: str,
    classes: Sequence[str],
    threshold: float = DEFAULT_THRESHOLD,
) -> np.ndarray:
    """The class each row is assigned to.

    Two classes: positive where its probability reaches the threshold. More classes: the most
    probable one, the first of equals; a threshold then has no meaning.

    Args:
        probabilities: shape (rows, classes).
        positive: the class to detect.
        classes: names of the columns.
        threshold: for two classes only.

    Returns:
        Names, shape (rows,).

    Raises:
        ValueError: when ``positive`` is not a class, or a threshold is given for many classes.
    """
    names = np.asarray(classes, dtype=object)
    if positive not in classes:
        raise ValueError(f"the positive class {positive} is none of {', '.join(classes)}")
    if len(names) > 2:
        if threshold != DEFAULT_THRESHOLD:
            raise ValueError(f"a threshold needs two classes, got {len(names)}")
        return names[probabilities.argmax(axis=1)]
    column = list(classes).index(positive)
    return names[np.where(probabilities[:, column] >= threshold, column, 1 - column)]


def confusion_matrix(
    labels: Sequence[str],
    probabilities: np.ndarray,
    *,
    positive: str,
    classes: Sequence[str],
    threshold: float = DEFAULT_THRESHOLD,
) -> pd.DataFrame:
    """Counts of true (rows) against predicted (columns) classes.

    Args:
        labels: true class names, shape (rows,).
        probabilities: shape (rows, classes).
        positive: the class to detect.
        classes: names of the columns of ``probabilities``.
        threshold: for two classes only.

    Returns:
        Integer counts, indexed by class name both ways.
    """
    predicted = predicted_classes(
        probabilities, positive=positive, classes=classes, threshold=threshold
    )
    counts = metrics.confusion_matrix(np.asarray(labels, dtype=object), predicted, labels=classes)
    return pd.DataFrame(
        counts, index=pd.Index(classes, name="true"), columns=pd.Index(classes, name="predicted")
    )


def classification_scores(
    labels: Sequence[str],
    probabilities: np.ndarray,
    *,
    positive: str,
    classes: Sequence[str],
    threshold: float = DEFAULT_THRESHOLD,
) -> dict[str, float]:
    """All scores of one system on one set of scans.

    With more than two classes, precision, sensitivity, specificity and ROC AUC are those of the
    positive class against all others together. The Brier score lies in [0, 1] for two classes and
    in [0, 2] for more (Brier's own sum over the classes).

    Args:
        labels: true class names, shape (rows,).
        probabilities: shape (rows, classes), each row summing to 1.
        positive: the class to detect, for example ``"covid"``.
        classes: names of the columns of ``probabilities``.
        threshold: see :func:`predicted_classes`.

    Returns:
        ``macro_f1`` (paper 000, equation 9), ``accuracy``, ``balanced_accuracy`` (the mean of the
        sensitivities of all classes, which paper 002 prints as its F1, FACTS 5.3), ``precision``,
        ``sensitivity``, ``specificity``, ``roc_auc``, ``brier``, for every class ``f1_<class>``,
        ``sensitivity_<class>`` and ``precision_<class>``, and the counts ``n`` and ``n_positive``.
        Undefined scores are nan (see the head of this module).
    """
    truth = np.asarray(labels, dtype=object)
    predicted = predicted_classes(
        probabilities, positive=positive, classes=classes, threshold=threshold
    )
    is_positive, called_positive = truth == positive, predicted == positive
    per_class = {"labels": list(classes), "average": None, "zero_division": np.nan}
    f1 = metrics.f1_score(truth, predicted, **per_class)
    sensitivity = metrics.recall_score(truth, predicted, **per_class)
    precision = metrics.precision_score(truth, predicted, **per_class | {"zero_division": 0})
    return {
        "macro_f1": float(np.mean(f1)),
        "accuracy": float(metrics.accuracy_score(truth, predicted)),
        "balanced_accuracy": float(np.mean(sensitivity)),
        "precision": float(precision[list(classes).index(positive)]),
        "sensitivity": float(sensitivity[list(classes).index(positive)]),
        "specificity": float(
            metrics.recall_score(~is_positive, ~called_positive, zero_division=np.nan)
        ),
        "roc_auc": _roc_auc(is_positive, probabilities[:, list(classes).index(positive)]),
        "brier": brier_score(truth, probabilities, classes=classes),
        **{f"f1_{name}": float(value) for name, value in zip(classes, f1, strict=True)},
        **{
            f"sensitivity_{name}": float(value)
            for name, value in zip(classes, sensitivity, strict=True)
        },
        **{
            f"precision_{name}": float(value)
            for name, value in zip(classes, precision, strict=True)
        },
        "n": len(truth),
        "n_positive": int(is_positive.sum()),
    }


def _roc_auc(is_positive: np.ndarray, probability: np.ndarray) -> float:
    """ROC AUC, nan where only one class is present."""
    if is_positive.all() or not is_positive.any():
        return float("nan")
    return float(metrics.roc_auc_score(is_positive, probability))


def brier_score(
    labels: Sequence[str], probabilities: np.ndarray, *, classes: Sequence[str]
) -> float:
    """Brier score, in [0, 1] for two classes and in [0, 2] for more (Brier's own sum).

    Args:
        labels: true class names, shape (rows,).
        probabilities: shape (rows, classes); rows are divided by their sums.
        classes: names of the columns of ``probabilities``.
    """
    order = np.argsort(np.asarray(classes, dtype=str))  # scikit-learn wants alphabetical order
    rows = probabilities[:, order]
    rows = rows / rows.sum(axis=1, keepdims=True)
    names = [classes[k] for k in order]
    return float(metrics.brier_score_loss(np.asarray(labels, object), rows, labels=names))


def choose_threshold(predictions: pd.DataFrame, *, positive: str) -> float:
    """The threshold with the highest macro F1 on the validation split.

    Only the thresholds that separate two neighbouring probabilities differ; each is placed half
    way between them. Of equally good ones the nearest to 0.5 is taken.

    Args:
        predictions: a predictions table of two classes, rows of the validation split only.
        positive: the class to detect.

    Returns:
        A threshold for :func:`classification_scores`.

    Raises:
        ValueError: when a row is not of the validation split, above all one of the test split:
            choosing there would leak the answer; or when there are not two classes, both with
            cases.
    """
    validate_predictions(predictions)
    foreign = sorted(set(predictions["split"]) - {VALIDATION})
    if foreign:
        raise ValueError(
            f"a threshold is chosen on the {VALIDATION} split only, "
            f"got rows of: {', '.join(map(str, foreign))}"
        )
    if len(class_names(predictions)) != 2 or predictions["label"].nunique() != 2:
        raise ValueError("a threshold needs two classes, both with cases")
    probability = predictions[PROBABILITY_PREFIX + positive].to_numpy(np.float64)
    true_negatives, false_positives, false_negatives, true_positives, reached = (
        metrics.confusion_matrix_at_thresholds(predictions["label"] == positive, probability)
    )
    errors = false_positives + false_negatives
    macro_f1 = true_positives / (2 * true_positives + errors)  # half of F1 each, so their sum
    macro_f1 = macro_f1 + true_negatives / (2 * true_negatives + errors)
    halfway = (reached + np.append(reached[1:], 0.0)) / 2  # reached is decreasing
    best = halfway[np.isclose(macro_f1, macro_f1.max())]
    return float(best[np.argmin(np.abs(best - DEFAULT_THRESHOLD))])
