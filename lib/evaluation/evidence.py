"""Whether a network looks where the disease is: attributions against the true place of lesions.

Three measures per scan, each also taken of two controls that know nothing of the disease:

* ``roc_auc``: do slices with lesions receive more attribution than slices without?
* ``spearman``: does attribution rise with the area of the lesions in a slice?
* ``lesion_share``: which part of all attribution falls on lesion pixels ("energy-based pointing
  game", Wang et al., Score-CAM, 2020)?

The controls: the same network with random weights, which an attribution method must tell from
the trained one (Adebayo et al., "Sanity checks for saliency maps", 2018), and the lung's own area,
what a network shows that merely follows the lungs; its ``lesion_share`` is the share of the lungs
that is lesion.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file
from scipy import stats

from lib.data.files import whole_file
from lib.evaluation.statistics import bootstrap_interval, mean_statistic, weighted_roc_auc

NETWORK, RANDOM_WEIGHTS, LUNG_AREA = "network", "random_weights", "lung_area"
ATTRIBUTIONS = (NETWORK, RANDOM_WEIGHTS, LUNG_AREA)
MEASURES = ("roc_auc", "spearman", "lesion_share")
TABLES = ("evidence", "slices", "summary", "by_label")
PROFILE_COLUMNS = ["scan_id", "slice", "lesion_area", *ATTRIBUTIONS]
SIMILARITY = "similarity_random_weights"  # of trained and random network: near 1 is a warning


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a network looked at in a scan beside what there was to see, on the network's own grid.

    Attributes:
        scan_id: pseudonymous name of the scan.
        slices: numbers of the slices that were looked at, shape (slices,).
        grey: uint8, shape (slices, height, width).
        lungs: share of each pixel that is lung, 0 to 1, same shape.
        lesions: share of each pixel that is lesion, 0 to 1, same shape.
        network: signed contribution of each pixel to the network's output, same shape.
        random_weights: likewise of the same network before any training.
        output_change: what the contributions of ``network`` should add up to.
    """

    scan_id: str
    slices: np.ndarray
    grey: np.ndarray
    lungs: np.ndarray
    lesions: np.ndarray
    network: np.ndarray
    random_weights: np.ndarray
    output_change: float

    def __post_init__(self) -> None:
        shape = (len(self.slices), *self.grey.shape[1:])
        for name in ("grey", "lungs", "lesions", NETWORK, RANDOM_WEIGHTS):
            found = getattr(self, name).shape
            if found != shape:
                raise ValueError(f"{self.scan_id}: {name} has shape {found}, expected {shape}")

    @property
    def attributions(self) -> dict[str, np.ndarray]:
        """Absolute attribution of each pixel by network and controls."""
        contributions = (np.abs(self.network), np.abs(self.random_weights), self.lungs)
        return dict(zip(ATTRIBUTIONS, contributions, strict=True))


# ------------------------------------------------------------------------------------- measures
def evidence_scores(attribution: np.ndarray, lesions: np.ndarray) -> dict[str, float]:
    """How well an attribution agrees with the place of the lesions.

    Args:
        attribution: of each pixel, at least 0, shape (slices, height, width).
        lesions: share of each pixel that is lesion, 0 to 1, same shape.

    Returns:
        The three ``MEASURES``. nan: ``roc_auc`` where all slices hold lesion or none, ``spearman``
        where attribution or area is the same in all slices, all three without any lesion, and
        ``lesion_share`` without any attribution.

    Raises:
        ValueError: if the shapes differ or an attribution is negative.
    """
    if attribution.shape != lesions.shape:
        raise ValueError(
            f"attribution and lesion mask differ in shape: {attribution.shape} and {lesions.shape}"
        )
    if (attribution < 0).any():
        raise ValueError("an attribution is negative; take absolute contributions")
    per_slice, area = per_slice_mean(attribution), per_slice_mean(lesions)
    if not area.any():
        return dict.fromkeys(MEASURES, np.nan)
    total = attribution.sum(dtype=np.float64)
    inside = (attribution * lesions).sum(dtype=np.float64)
    return {
        "roc_auc": float(weighted_roc_auc(area > 0, per_slice, np.ones((1, len(area))))[0]),
        "spearman": rank_correlation(per_slice, area),
        "lesion_share": float(inside / total) if total else np.nan,
    }


def per_slice_mean(pixels: np.ndarray) -> np.ndarray:
    """Mean over the pixels of each slice, float64, shape (slices,)."""
    return pixels.mean(axis=(1, 2), dtype=np.float64)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's correlation; nan where one of the two never changes."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(stats.spearmanr(first, second).statistic)


def evidence_row(evidence: Evidence) -> dict[str, object]:
    """One row of the table of evidence: each measure of the network and of the controls.

    Args:
        evidence: of one scan.

    Returns:
        ``scan_id``, ``slices``, ``slices_with_lesion``, ``<measure>_<attribution>`` of all pairs,
        ``similarity_random_weights`` (rank correlation of the attribution per slice of both
        networks), ``unexplained`` (the part of the output's change that contributions miss).
    """
    attributions = evidence.attributions
    scores = {
        f"{measure}_{name}": value
        for name, attribution in attributions.items()
        for measure, value in evidence_scores(attribution, evidence.lesions).items()
    }
    trained, random = (per_slice_mean(attributions[n]) for n in (NETWORK, RANDOM_WEIGHTS))
    missing = abs(evidence.network.sum(dtype=np.float64) - evidence.output_change)
    change = abs(evidence.output_change)
    return {
        "scan_id": evidence.scan_id,
        "slices": len(evidence.slices),
        "slices_with_lesion": int(evidence.lesions.any(axis=(1, 2)).sum()),
        **{name: scores[name] for name in score_columns()},
        SIMILARITY: rank_correlation(trained, random),
        "unexplained": missing / change if change else np.nan,
    }


def score_columns() -> list[str]:
    """Names of all measures of all attributions."""
    return [f"{measure}_{name}" for measure in MEASURES for name in ATTRIBUTIONS]


def evidence_tables(
    found: Iterable[tuple[str, Evidence | None]],
    manifest: pd.DataFrame,
    *,
    examples: Path,
    seed: int,
) -> dict[str, pd.DataFrame]:
    """All tables of a run, made scan by scan, so that one scan is in memory at a time.

    Args:
        found: name and evidence of each scan; None for one without any lesion in the slices that
            the network sees, which is counted but not measured.
        manifest: of the data set.
        examples: folder for the slice with the most attribution of each scan, see `save_example`.
        seed: of the intervals.

    Returns:
        ``evidence``, a row per scan with patient and label (no measure without lesion); ``slices``,
        a row per slice of `slice_profile`; ``summary`` of `summarise_evidence`; ``by_label``, the
        same for the scans of each label.
    """
    rows, profiles = [], [pd.DataFrame(columns=PROFILE_COLUMNS)]
    for scan_id, evidence in found:
        if evidence is None:
            rows.append({"scan_id": scan_id, "slices_with_lesion": 0})
            continue
        rows.append(evidence_row(evidence))
        profiles.append(slice_profile(evidence))
        save_example(evidence, examples / f"{scan_id}.safetensors")
    known = manifest[["scan_id", "patient_id", "label"]]
    measured = ["slices", "slices_with_lesion", *score_columns(), SIMILARITY, "unexplained"]
    table = pd.DataFrame(rows, columns=["scan_id", *measured]).merge(known, on="scan_id")
    by_label = {
        label: summarise_evidence(scans, seed=seed)
        for label, scans in table.groupby("label")
        if scans["slices_with_lesion"].gt(0).any()
    }
    empty = {"": summarise_evidence(table.iloc[:0], seed=seed)}
    return {
        "evidence": table[[*known.columns, *measured]],
        "slices": pd.concat(profiles[1:] or profiles, ignore_index=True),
        "summary": summarise_evidence(table, seed=seed),
        "by_label": pd.concat(by_label or empty, names=["label"]).reset_index("label"),
    }


def summarise_evidence(table: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Means over scans with 95 % intervals, patients drawn, and the network less each control.

    Args:
        table: ``evidence`` of `evidence_tables`.
        seed: of the resampling.

    Returns:
        A row per measure and attribution (the network, the controls, ``network - <control>``)
        with ``value``, ``low``, ``high``, and the number of scans ``measured`` for it; left out are
        those ``undefined`` for it and those ``without_lesion``. Empty without a scan with lesions.
    """
    lesions = table[table["slices_with_lesion"] > 0].astype(dict.fromkeys(score_columns(), float))
    columns = {(m, a): f"{m}_{a}" for m in MEASURES for a in ATTRIBUTIONS}
    for measure in MEASURES:
        for control in (RANDOM_WEIGHTS, LUNG_AREA):
            name = f"{measure}_{NETWORK} - {control}"
            difference = lesions[f"{measure}_{NETWORK}"] - lesions[f"{measure}_{control}"]
            lesions = lesions.assign(**{name: difference})
            columns[measure, f"{NETWORK} - {control}"] = name
    columns["similarity", f"{NETWORK}, {RANDOM_WEIGHTS}"] = SIMILARITY
    names = ["measure", "attribution", "value", "low", "high"]
    if lesions.empty:
        return pd.DataFrame(columns=[*names, "measured", "undefined", "without_lesion"])
    statistic = partial(mean_statistic, columns=list(columns.values()))
    means = bootstrap_interval(lesions, statistic, seed=seed).loc[list(columns.values())]
    measured = lesions[list(columns.values())].notna().sum()
    summary = pd.DataFrame(list(columns), columns=names[:2]).assign(
        **{name: means[name].to_numpy() for name in names[2:]}, measured=measured.to_numpy()
    )
    summary["undefined"] = len(lesions) - summary["measured"]
    return summary.assign(without_lesion=len(table) - len(lesions))


def slice_profile(evidence: Evidence) -> pd.DataFrame:
    """Attribution, lungs and lesions of each slice, as shares of the scan's sum.

    Args:
        evidence: of one scan.

    Returns:
        Columns scan_id, slice, lesion_area, and one per attribution; each sums to 1, or is nan
        where there is none.
    """
    parts = {"lesion_area": evidence.lesions} | evidence.attributions
    sums = {name: per_slice_mean(pixels) for name, pixels in parts.items()}
    shares = {name: v / v.sum() if v.any() else v * np.nan for name, v in sums.items()}
    known = {"scan_id": evidence.scan_id, "slice": evidence.slices}
    return pd.DataFrame(known | shares, columns=PROFILE_COLUMNS)


# ------------------------------------------------------------------------------------- examples
def save_example(evidence: Evidence, path: Path) -> None:
    """Keep the slice with the most attribution for a figure: grey, attribution, lesions, number.

    Args:
        evidence: of one scan.
        path: a ``.safetensors`` file.
    """
    attribution = evidence.attributions[NETWORK]
    place = int(per_slice_mean(attribution).argmax())
    tensors = {
        "grey": evidence.grey[place],
        "attribution": attribution[place].astype(np.float32),
        "lesions": evidence.lesions[place].astype(np.float32),
        "slice": evidence.slices[place : place + 1].astype(np.int64),
    }
    with whole_file(path) as partial_file:
        save_file({name: np.ascontiguousarray(v) for name, v in tensors.items()}, partial_file)


def read_example(path: Path) -> dict[str, np.ndarray]:
    """The slice that `save_example` kept: ``grey``, ``attribution``, ``lesions``, ``slice``."""
    return load_file(path)


def read_evidence(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables of `evidence_tables`, read back from ``<name>.csv`` in a folder."""
    text = {"scan_id": str, "patient_id": str}
    return {name: pd.read_csv(folder / f"{name}.csv", dtype=text) for name in TABLES}
