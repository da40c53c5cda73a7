"""Attention of the class token of 3-D CNN with BERT over itself and the time steps.

Source: Tan and Liu 2021, section 4.1; FACTS 4.8.
"""

from collections.abc import Container
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import safe_open

from lib.evaluation.statistics import bootstrap_interval, mean_statistic

CLASS_TOKEN = "class token"


def read_attention(path: Path) -> tuple[np.ndarray, int]:
    """Attention of the class token of one scan, mean over its sets of slices.

    Args:
        path: stored embeddings of a scan, tensors ``attention`` of shape (sets, heads, steps + 1)
            and ``positions`` of shape (sets, slices).

    Returns:
        float64, shape (heads, steps + 1), the class token itself first, each head summing to 1; and
        the number of slices of a set.

    Raises:
        FileNotFoundError: if the scan was not embedded.
        ValueError: if its network has no class token, or the weights of a head do not sum to 1.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: run the stage embed_scans first")
    with safe_open(path, "numpy") as tensors:
        attention = tensors.get_tensor("attention").astype(np.float64)
        slices = tensors.get_slice("positions").get_shape()[1]
    if attention.ndim == 3 and attention.shape[1] == 0:
        raise ValueError(f"{path} holds no attention: this network has no BERT head")
    if attention.ndim != 3 or not np.allclose(attention.sum(-1), 1, atol=1e-3):
        raise ValueError(
            f"{path}: attention has shape (sets, heads, steps + 1) and sums to 1 over the last, "
            f"got {attention.shape} and {attention.sum(-1).ravel()[:1]}"
        )
    return attention.mean(0), slices


def attention_table(folder: Path, scans: pd.DataFrame, *, positive: Container[str]) -> pd.DataFrame:
    """Attention of the class token of many scans.

    Args:
        folder: ``data/embeddings/<data set>/<run>``.
        scans: rows of the manifest, with labels.
        positive: labels that count as COVID-19.

    Returns:
        A row per scan and head: scan_id, patient_id, label (covid or non_covid), head (from 1), and
        a column per token: ``class token``, then ``1-8``, ``9-16``, ... for the time steps.
    """
    rows = []
    for scan in scans.itertuples():
        label = "covid" if scan.label in positive else "non_covid"
        known = {"scan_id": scan.scan_id, "patient_id": scan.patient_id, "label": label}
        attention, slices = read_attention(folder / f"{scan.scan_id}.safetensors")
        names = token_names(attention.shape[1] - 1, slices)
        for head, weights in enumerate(attention, start=1):
            rows.append(known | {"head": head} | dict(zip(names, weights, strict=True)))
    return pd.DataFrame(rows)


def token_names(steps: int, slices: int) -> list[str]:
    """The class token, and each time step by the slices of the clip that it stands for.

    Args:
        steps: number of time steps.
        slices: of the clip, a multiple of the steps.

    Raises:
        ValueError: if the slices cannot be divided evenly.
    """
    if steps < 1 or slices % steps:
        raise ValueError(f"{slices} slices do not make {steps} equal time steps")
    part = slices // steps
    return [CLASS_TOKEN, *(f"{k * part + 1}-{(k + 1) * part}" for k in range(steps))]


def mean_attention(table: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Mean attention of each class with 95 % intervals, patients drawn.

    Args:
        table: of `attention_table`, or some of its rows.
        seed: of the resampling.

    Returns:
        Columns label, token, value, low, high, scans; scans count alike, whatever their heads.
    """
    tokens = [name for name in table.columns if name == CLASS_TOKEN or name[0].isdigit()]
    per_scan = table.groupby(["label", "scan_id", "patient_id"], as_index=False)[tokens].mean()
    parts = []
    for label, rows in per_scan.groupby("label"):
        means = bootstrap_interval(rows, partial(mean_statistic, columns=tokens), seed=seed)
        means = means.rename_axis("token").reset_index().drop(columns="undefined")
        parts.append(means.assign(label=label, scans=len(rows)))
    return pd.concat(parts, ignore_index=True)
