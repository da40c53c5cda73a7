"""Splits: the published one where there is one, else grouped by patient.

The test part is named here once, as ``TEST``. Nothing that is chosen (a checkpoint, a threshold, a
learning rate) may look at it; the functions that choose take ``VALIDATION`` only.
"""

import hashlib
from collections.abc import Mapping

import pandas as pd

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)


def assign_splits(scans: pd.DataFrame, *, fractions: Mapping[str, float], seed: int) -> pd.Series:
    """Fill in the split of every scan, never tearing a patient apart.

    A published split is kept. A data set published without a validation part (MosMedData) gets one
    from its training patients; one published without any split is divided into all three parts.
    Patients are drawn within each label, in an order that depends on the seed and the patient's
    pseudonym only, so that neither row order nor an added patient reshuffles the others.

    Args:
        scans: columns scan_id, patient_id, label, split (None where unpublished).
        fractions: share of patients per split, for example ``{"validation": 0.15, "test": 0.2}``;
            the rest trains.
        seed: changes the draw.

    Returns:
        The split of each row, with the index of ``scans``.

    Raises:
        ValueError: for a split name other than train, validation, test, or shares above 1.
    """
    unknown = set(scans["split"].dropna()) - set(SPLITS)
    if unknown or not 0 <= sum(fractions.values()) < 1 or not set(fractions) <= set(SPLITS):
        raise ValueError(
            f"splits are {SPLITS}, shares add to less than 1; got {unknown or fractions}"
        )
    published = scans["split"].notna()
    split = scans["split"].astype(object).where(published)
    if published.any() and VALIDATION not in set(split[published]):
        open_rows = published & (split == TRAIN)
        split[open_rows] = _draw(scans[open_rows], {VALIDATION: fractions.get(VALIDATION, 0)}, seed)
    if not published.all():
        decided = dict(zip(scans["patient_id"][published], split[published], strict=True))
        open_scans = scans[~published]
        drawn = _draw(open_scans, fractions, seed)
        # a patient who already sits in a published part stays there
        pairs = zip(open_scans["patient_id"], drawn, strict=True)
        split[~published] = [decided.get(patient, draw) for patient, draw in pairs]
    return split.astype(str)


def _draw(scans: pd.DataFrame, fractions: Mapping[str, float], seed: int) -> pd.Series:
    """Draw whole patients for each split, stratified by the label of their first scan."""
    first = scans.sort_values("scan_id").groupby("patient_id")["label"].first().fillna("")
    chosen: dict[str, str] = {}
    for label in sorted(first.unique()):
        patients = sorted(first.index[first == label], key=lambda p: _rank(seed, p))
        start = 0
        for name in (TEST, VALIDATION):
            stop = start + round(fractions.get(name, 0) * len(patients))
            chosen |= dict.fromkeys(patients[start:stop], name)
            start = stop
        chosen |= dict.fromkeys(patients[start:], TRAIN)
    return scans["patient_id"].map(chosen)


def _rank(seed: int, patient_id: str) -> str:
    """A reproducible random place in the queue."""
    return hashlib.sha256(f"{seed}:{patient_id}".encode()).hexdigest()


def patients_in_several_splits(manifest: pd.DataFrame) -> list[str]:
    """Patients whose scans sit in more than one split, sorted.

    Args:
        manifest: columns patient_id, split.
    """
    counts = manifest.groupby("patient_id")["split"].nunique()
    return sorted(counts.index[counts > 1])
