"""From what a network says of the slices of a scan to the diagnosis of the scan, calibrated.

COVID-CT-Mask-Net judges slices and stops there (section 4: all its tables count slices), so the
rule is ours:

1. the probabilities of a scan are the mean over the share q of its slices that are the most
   suspicious of disease, that is, whose probability of ``control`` is the lowest. A mean over
   all slices drowns a small lesion in healthy slices, and slices without a lesion of a diseased
   scan are none that the network was trained on (FACTS 7.3: of diseased scans only slices with
   lesions are listed). A maximum makes one wrong slice of a healthy scan its diagnosis. q lies
   between the two;
2. they are raised to 1/T and divided by their sum (temperature scaling; Guo et al., ICML 2017): the
   network's loss takes the slices of a scan for independent pictures and says nothing about scans.

q and T are all there is to learn, from the validation part alone: that of the phantom has 15 scans.
A temperature does not change which class is the most probable one; q does.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from lib.data.pictures import CONTROL, class_of
from lib.data.splits import VALIDATION
from lib.evaluation.calibration import PROBABILITY_FLOOR
from lib.evaluation.classification import (
    PROBABILITY_PREFIX,
    SUM_TOLERANCE,
    class_names,
    predictions_table,
    probability_matrix,
)

TEMPERATURE_RANGE = (1 / 20, 20.0)
ROUNDING = 1e-9  # ceil(0.07 * 100) is 7, though 0.07 * 100 > 7 in floating point


class DiagnosisRule(NamedTuple):
    """How the slices of a scan become its diagnosis.

    Attributes:
        share: q, of the slices that count, above 0 and at most 1 (all).
        temperature: T; above 1 it makes probabilities more even, below 1 more certain.
    """

    share: float
    temperature: float = 1.0


class RuleChoice(NamedTuple):
    """What was chosen on the validation part, and by what.

    Attributes:
        rule: the chosen one.
        losses: for each share the mean log loss per scan of ``validation`` scans, ``uncalibrated``
            and ``left_out``, the temperature fitted without the patient; nan where it could not be
            tried.
        reason: why these values, in one sentence.
    """

    rule: DiagnosisRule
    losses: pd.DataFrame
    reason: str


def read_slice_predictions(file: Path) -> pd.DataFrame:
    """Read and check the predictions for all slices of scans.

    Args:
        file: a CSV file with scan_id, slice and one column ``probability_<class>`` per class.

    Returns:
        The table; names are text.

    Raises:
        ValueError: as `check_slice_predictions`, with the file's name in front.
    """
    text = {"image_id": str, "scan_id": str, "patient_id": str}
    slices = pd.read_csv(file, dtype=text, keep_default_na=False, na_values=[""])
    try:
        check_slice_predictions(slices)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return slices


def check_slice_predictions(slices: pd.DataFrame) -> None:
    """Check that slices can be put together to scans.

    Args:
        slices: columns scan_id, slice, ``probability_<class>``.

    Raises:
        ValueError: when a column is missing, there is no row, a slice occurs twice, or the
            probabilities of a slice are outside [0, 1] or do not sum to 1.
    """
    missing = [name for name in ("scan_id", "slice") if name not in slices]
    if missing:
        raise ValueError(f"slice predictions lack the column {', '.join(missing)}")
    if len(class_names(slices)) < 2:
        raise ValueError(f"slice predictions need two columns {PROBABILITY_PREFIX}<class> or more")
    if slices.empty:
        raise ValueError("slice predictions hold no row")
    probabilities = probability_matrix(slices)
    faults = {
        "occur twice": slices.duplicated(["scan_id", "slice"]).to_numpy(),
        "have a probability outside [0, 1]": ~((probabilities >= 0) & (probabilities <= 1)).all(1),
        "have probabilities that do not sum to 1": (
            np.abs(probabilities.sum(axis=1) - 1) > SUM_TOLERANCE
        ),
    }
    for fault, rows in faults.items():
        if rows.any():
            first = slices.loc[rows].iloc[0]
            where = f"first slice {first['slice']} of scan {first['scan_id']}"
            raise ValueError(f"{rows.sum()} of {len(slices)} slices {fault}, {where}")


def scans_with_class(
    manifest: pd.DataFrame, labels_of: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """Scans whose label belongs to a class, with the name of the class as label.

    Args:
        manifest: scan_id, patient_id, split, label.
        labels_of: for each class the labels of the manifest that belong to it.

    Returns:
        scan_id, patient_id, split, label (the class); other scans are left out.

    Raises:
        ValueError: as `lib.data.pictures.class_of`.
    """
    scans = manifest[["scan_id", "patient_id", "split", "label"]]
    scans = scans.assign(label=class_of(scans["label"].fillna(""), labels_of))
    return scans[scans["label"] != ""].reset_index(drop=True)


def slice_weights(suspicion: np.ndarray, share: float) -> np.ndarray:
    """How much each slice of a scan counts: the same for the most suspicious ones, 0 for others.

    The number that count is the share of all, rounded up, so one at least. Slices that tie for the
    last places share them, so that the order of the slices does not matter.

    Args:
        suspicion: of each slice, shape (slices,), one slice or more.
        share: above 0, at most 1.

    Returns:
        Weights of sum 1, shape (slices,).

    Raises:
        ValueError: for a share out of range or a scan without a slice.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of slices is above 0 and at most 1, got {share}")
    if not len(suspicion):
        raise ValueError("a scan without a slice has no diagnosis")
    places = int(np.ceil(share * len(suspicion) - ROUNDING))
    last = np.sort(suspicion)[-places]
    above, tied = suspicion > last, suspicion == last
    return (above + tied * (places - above.sum()) / tied.sum()) / places


def suspicion_of_disease(slices: pd.DataFrame) -> np.ndarray:
    """Probability of all classes but ``control``, shape (slices,).

    Where no class is the control all slices are equally suspicious, so all count.
    """
    if CONTROL not in class_names(slices):
        return np.zeros(len(slices))
    return 1 - slices[PROBABILITY_PREFIX + CONTROL].to_numpy(np.float64)


def weigh_slices(slices: pd.DataFrame, share: float) -> pd.Series:
    """`slice_weights` of the slices of every scan, with the index of ``slices``."""
    suspicion = pd.Series(suspicion_of_disease(slices), slices.index)
    grouped = suspicion.groupby(slices["scan_id"].to_numpy(), sort=False)
    return grouped.transform(lambda values: slice_weights(values.to_numpy(), share))


def scan_probabilities(slices: pd.DataFrame, share: float) -> pd.DataFrame:
    """Probabilities of scans: means over their most suspicious slices.

    Args:
        slices: as `check_slice_predictions` takes them.
        share: of the slices that count; 1 is the mean over all.

    Returns:
        One row per scan, indexed and sorted by scan_id, one column per class as in ``slices``; rows
        sum to 1.
    """
    columns = [PROBABILITY_PREFIX + name for name in class_names(slices)]
    weighted = slices[columns].mul(weigh_slices(slices, share), axis=0)
    means = weighted.groupby(slices["scan_id"].to_numpy()).sum().rename_axis("scan_id")
    return means.div(means.sum(axis=1), axis=0)


def majority_vote(slices: pd.DataFrame) -> pd.DataFrame:
    """Share of the slices of each scan whose most probable class is each one.

    The vote to compare the rule with. A slice between classes votes for the first of them.

    Args:
        slices: as `check_slice_predictions` takes them.

    Returns:
        As `scan_probabilities`.
    """
    columns = [PROBABILITY_PREFIX + name for name in class_names(slices)]
    votes = np.eye(len(columns))[probability_matrix(slices).argmax(axis=1)]
    frame = pd.DataFrame(votes, columns=columns)
    return frame.groupby(slices["scan_id"].to_numpy()).mean().rename_axis("scan_id")


def temperature_scaled(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities raised to 1/T and divided by their sum.

    Args:
        probabilities: shape (scans, classes); those below 1e-6 count as 1e-6.
        temperature: T, above 0.

    Returns:
        Same shape, rows of sum 1, same order of the classes in each row.
    """
    return softmax(_floored_log(probabilities) / temperature, axis=1)


def fit_temperature(probabilities: np.ndarray, targets: np.ndarray, *, spread: float) -> float:
    """The temperature of the lowest log loss on some scans, held near 1 where they are few.

    Where every scan is right the log loss alone has its minimum at temperature 0: certainty,
    learned from a dozen scans. So log T is taken as normally distributed around 0 beforehand, and
    the most probable T is returned: its distance from 1 must be paid for by scans. In eight trials
    with made networks from unsure to too sure (15 scans to fit on, 30 others to judge, 15 draws
    each) a spread of 0.5 had a lower log loss than T = 1 in seven, than no prior in all, and than
    Platt's targets (n + 1) / (n + classes) in seven. Where the right T is 2 it costs a little.

    Args:
        probabilities: shape (scans, classes).
        targets: index of the true class of each scan; classes may be absent.
        spread: standard deviation of log T beforehand, above 0; infinity leaves it to the scans.

    Returns:
        The temperature, between 1/20 and 20.

    Raises:
        ValueError: when there is no scan or the spread is not above 0.
    """
    if not len(targets):
        raise ValueError("a temperature needs scans to be fitted on")
    if not spread > 0:
        raise ValueError(f"the spread of the temperature is above 0, got {spread}")
    logits, true = _floored_log(probabilities), np.eye(probabilities.shape[1])[targets]

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logits / np.exp(log_temperature), axis=1)
        return (log_temperature / spread) ** 2 / 2 - float((true * scaled).sum())

    found = minimize_scalar(loss, bounds=np.log(TEMPERATURE_RANGE), options={"xatol": 1e-6})
    return float(np.exp(found.x))


def _floored_log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(np.asarray(probabilities, np.float64), PROBABILITY_FLOOR))


def choose_rule(
    slices: pd.DataFrame, scans: pd.DataFrame, *, shares: Sequence[float], spread: float
) -> RuleChoice:
    """Choose the share q and fit the temperature T on the validation part.

    For every share the scans of each patient are judged with a temperature fitted on the scans of
    all others; the share of the lowest log loss is taken, of equals the largest, which is nearest
    to a plain mean. T is then fitted on all.

    Args:
        slices: of these scans, perhaps of others too, as `check_slice_predictions` takes them.
        scans: scan_id, patient_id, split, label (a class): of the validation part only. A class
            without a scan here is judged by the same rule; nothing is learned about it.
        shares: to choose from.
        spread: of the temperature, see `fit_temperature`.

    Returns:
        The choice. With one patient or scans of one class only nothing can be chosen: it is then
        the mean of all slices at temperature 1.

    Raises:
        ValueError: when there is no share, no scan, a scan of another part, a label that is no
            class of the slices, or a scan without slices.
    """
    if not len(shares):
        raise ValueError("there is no share of slices to choose from")
    foreign = sorted(set(scans["split"]) - {VALIDATION})
    if foreign:
        raise ValueError(
            f"a rule is chosen on the {VALIDATION} part only, got {', '.join(foreign)}"
        )
    targets = _targets(slices, scans)
    patients, _ = pd.factorize(scans["patient_id"])
    able = len(set(patients)) > 1 and len(set(targets)) > 1
    rows = {}
    for share in shares:
        judged = _judged(slices, scans, share)
        rows[float(share)] = {"uncalibrated": _mean_loss(judged, targets), "left_out": np.nan}
        if able:
            left_out = leave_one_patient_out(judged, targets, patients, spread=spread)
            rows[float(share)]["left_out"] = _mean_loss(left_out, targets)
    losses = pd.DataFrame.from_dict(rows, orient="index").rename_axis("share").sort_index()
    if not able:
        reason = "one patient or one class only, so nothing can be chosen: mean of all slices"
        return RuleChoice(DiagnosisRule(1.0), losses, reason)
    best = np.isclose(losses["left_out"], losses["left_out"].min(), rtol=0, atol=1e-9)
    share = float(losses.index[best].max())
    temperature = fit_temperature(_judged(slices, scans, share), targets, spread=spread)
    reason = f"lowest log loss of {len(scans)} validation scans, each patient left out in turn"
    return RuleChoice(DiagnosisRule(share, temperature), losses, reason)


def _mean_loss(probabilities: np.ndarray, targets: np.ndarray) -> float:
    return -float(_floored_log(probabilities)[np.arange(len(targets)), targets].mean())


def leave_one_patient_out(
    probabilities: np.ndarray, targets: np.ndarray, patients: np.ndarray, *, spread: float
) -> np.ndarray:
    """Probabilities at the temperature that all other patients give.

    Args:
        probabilities: shape (scans, classes).
        targets: index of the true class of each scan.
        patients: of each scan; two or more.
        spread: see `fit_temperature`.

    Returns:
        Shape (scans, classes).
    """
    scaled = np.empty_like(probabilities)
    for patient in np.unique(patients):
        own = patients == patient
        temperature = fit_temperature(probabilities[~own], targets[~own], spread=spread)
        scaled[own] = temperature_scaled(probabilities[own], temperature)
    return scaled


def _judged(slices: pd.DataFrame, scans: pd.DataFrame, share: float) -> np.ndarray:
    """Uncalibrated probabilities of scans in their order, shape (scans, classes)."""
    wanted = slices[slices["scan_id"].isin(scans["scan_id"])]
    return scan_probabilities(wanted, share).loc[scans["scan_id"]].to_numpy()


def _targets(slices: pd.DataFrame, scans: pd.DataFrame) -> np.ndarray:
    """Index of the true class of each scan; checks that scans and slices fit."""
    classes = class_names(slices)
    if scans.empty:
        raise ValueError("there is no scan with a class to diagnose")
    unknown = sorted(set(scans["label"]) - set(classes))
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is none of the classes {', '.join(classes)}")
    without = scans.loc[~scans["scan_id"].isin(slices["scan_id"]), "scan_id"]
    if len(without):
        raise ValueError(f"{len(without)} scans have no predicted slice, first {without.iloc[0]}")
    return scans["label"].map(classes.index).to_numpy()


def diagnoses_table(slices: pd.DataFrame, scans: pd.DataFrame, rule: DiagnosisRule) -> pd.DataFrame:
    """Diagnoses of scans.

    Args:
        slices: of all the scans, as `check_slice_predictions` takes them.
        scans: scan_id, split, label (a class).
        rule: the chosen one.

    Returns:
        A predictions table (`lib.evaluation.classification`), in the order of ``scans``. The
        diagnosis is the most probable class, of equals the first.

    Raises:
        ValueError: as `choose_rule`, for scans and slices that do not fit.
    """
    targets = _targets(slices, scans)
    probabilities = temperature_scaled(_judged(slices, scans, rule.share), rule.temperature)
    return _predictions(scans, targets, probabilities, class_names(slices))


def compared_diagnoses(
    slices: pd.DataFrame, scans: pd.DataFrame, rule: DiagnosisRule
) -> dict[str, pd.DataFrame]:
    """The rule, calibrated and not, beside simple ways to judge a scan.

    Args:
        slices: as for `diagnoses_table`.
        scans: likewise.
        rule: the chosen one.

    Returns:
        For each way its predictions table: ``vote of slices``, ``mean of all slices``, ``most
        suspicious slices`` and ``calibrated``, the rule itself.
    """
    targets, classes = _targets(slices, scans), class_names(slices)
    votes = majority_vote(slices).loc[scans["scan_id"]].to_numpy()
    return {
        "vote of slices": _predictions(scans, targets, votes, classes),
        "mean of all slices": diagnoses_table(slices, scans, DiagnosisRule(1.0)),
        "most suspicious slices": diagnoses_table(slices, scans, DiagnosisRule(rule.share)),
        "calibrated": diagnoses_table(slices, scans, rule),
    }


def _predictions(
    scans: pd.DataFrame, targets: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]
) -> pd.DataFrame:
    return predictions_table(
        scans["scan_id"].to_numpy(), scans["split"].to_numpy(), targets, probabilities,
        classes=classes,
    )  # fmt: skip


def choice_record(choice: RuleChoice) -> dict[str, Any]:
    """A choice as JSON values: share, temperature, reason, and the losses of every share."""
    losses = choice.losses.reset_index().to_dict("records")
    return {
        **choice.rule._asdict(),
        "reason": choice.reason,
        "log_losses": [
            {name: None if np.isnan(value) else value for name, value in row.items()}
            for row in losses
        ],
    }
