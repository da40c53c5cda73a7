"""Which scans a phantom data set holds: records, and the plan of a balanced set of them."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

COVID, PNEUMONIA, NORMAL = "covid", "pneumonia", "normal"
LABELS = (COVID, PNEUMONIA, NORMAL)


@dataclass(frozen=True)
class PhantomRecord:
    """One planned scan, a row of ``scans.csv``; everything that `make_phantom` depends on.

    Attributes:
        scan_id: pseudonymous identity; says nothing about the label.
        patient_id: scans of one patient share the anatomy and the split.
        label: one of `LABELS`.
        split: for example ``"train"``.
        scanner: key of `SCANNERS`.
        slices: number of axial slices.
        confounder: whether the tube and wire lie on the chest.
        difficulty: 0 (large lesions, clean normal scans) to 1 (small lesions, dependent density).
        seed: the study's seed.
    """

    scan_id: str
    patient_id: str
    label: str
    split: str
    scanner: str
    slices: int
    confounder: bool
    difficulty: float
    seed: int


def plan_phantoms(
    *,
    scans_per_class: Mapping[str, int],
    seed: int,
    confounder_correlation: Mapping[str, float] | None = None,
    slices: tuple[int, int] = (16, 26),
    scanner_b_share: float = 0.4,
    second_scan_share: float = 0.15,
    difficulty: float = 0.5,
    extra_slices: Sequence[int] = (),
    labels: Collection[str] = LABELS,
) -> list[PhantomRecord]:
    """Plan a balanced data set; nothing is drawn yet.

    Args:
        scans_per_class: scans of each label, by split, for example ``{"train": 24, "test": 10}``.
        seed: of the plan and of every scan in it.
        confounder_correlation: by split, in [-1, 1]: 1 puts the confounder on every COVID-19 scan
            and on no other, -1 the reverse, 0 (also for a split not named) on half of each class.
        slices: smallest and largest number of slices.
        scanner_b_share: share of scans from scanner B, equal in every class.
        second_scan_share: share of scans that are the second one of their patient.
        difficulty: see `PhantomRecord`.
        extra_slices: one extra scan per entry with exactly that many slices, for example
            ``(1, 700)``, in the first split, labels in turn.
        labels: those to draw, in any order. Data sets of other seeds show other patients, also
            where their numbers are equal.

    Returns:
        Records sorted by scan_id, which does not tell class or split.

    Raises:
        ValueError: if a count, share, correlation, slice range or label makes no sense.
    """
    correlation = dict(confounder_correlation or {})
    drawn = _in_order(labels)
    _check_plan(scans_per_class, correlation, slices, extra_slices)
    _check_shares(scanner_b_share, second_scan_share, difficulty)
    rng = np.random.default_rng(seed)
    common = {"difficulty": float(difficulty), "seed": int(seed)}
    records = []
    for split, count in scans_per_class.items():
        for label in drawn:
            sign = 1 if label == COVID else -1
            confounder = _share_of(count, (1 + sign * correlation.get(split, 0.0)) / 2, rng)
            scanner_b = _share_of(count, scanner_b_share, rng)
            lengths = rng.integers(slices[0], slices[1], count, endpoint=True)
            patients = _group_patients(f"{split} {label}", count, second_scan_share)
            rows = zip(patients, scanner_b, lengths, confounder, strict=True)
            records += [_unnumbered(label, split, *row, **common) for row in rows]
    split = next(iter(scans_per_class))
    for i, length in enumerate(extra_slices):
        label = drawn[i % len(drawn)]
        records.append(_unnumbered(label, split, f"extra {i}", i % 2, length, False, **common))
    return _number_records(records, rng)


def _in_order(labels: Collection[str]) -> tuple[str, ...]:
    """Labels in the order of `LABELS`, on which the draw depends."""
    if not labels or not set(labels) <= set(LABELS):
        raise ValueError(f"labels are some of {', '.join(LABELS)}, got {', '.join(labels)}")
    return tuple(label for label in LABELS if label in labels)


def _check_plan(
    scans_per_class: Mapping[str, int],
    correlation: Mapping[str, float],
    slices: tuple[int, int],
    extra_slices: Sequence[int],
) -> None:
    if not scans_per_class or min(scans_per_class.values()) < 0:
        raise ValueError(f"scans_per_class needs a count of scans per split, got {scans_per_class}")
    unknown = set(correlation) - set(scans_per_class)
    if unknown:
        raise ValueError(f"confounder_correlation names splits without scans: {sorted(unknown)}")
    if any(abs(value) > 1 for value in correlation.values()):
        raise ValueError(f"confounder_correlation lies in [-1, 1], got {correlation}")
    if not 1 <= slices[0] <= slices[1] or any(length < 1 for length in extra_slices):
        raise ValueError(f"a scan has at least one slice, got {slices} and {extra_slices}")


def _check_shares(*shares: float) -> None:
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"shares and difficulty lie in [0, 1], got {shares}")


def _share_of(count: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """``count`` booleans in random order of which exactly ``round(share * count)`` are true."""
    return rng.permutation(np.arange(count) < round(share * count))


def _group_patients(prefix: str, count: int, second_scan_share: float) -> list[str]:
    """Patient of each of ``count`` scans; the last ones are second scans of the first patients."""
    patients = max(1, count - round(second_scan_share * count), -(-count // 2))
    return [f"{prefix} {i % patients}" for i in range(count)]


def _unnumbered(
    label: str,
    split: str,
    patient: str,
    scanner_b: bool,
    slices: int,
    confounder: bool,
    **common: float,
) -> PhantomRecord:
    """A record without a scan_id, in the plain types that can be compared after a round trip."""
    return PhantomRecord(
        scan_id="",
        patient_id=patient,
        label=label,
        split=split,
        scanner="B" if scanner_b else "A",
        slices=int(slices),
        confounder=bool(confounder),
        **common,
    )


def _number_records(
    records: Sequence[PhantomRecord], rng: np.random.Generator
) -> list[PhantomRecord]:
    """Number scans and patients at random, so that no number tells the class."""
    order = rng.permutation(len(records))
    names = dict.fromkeys(records[i].patient_id for i in rng.permutation(len(records)))
    patient_ids = {name: f"patient_{number:04d}" for number, name in enumerate(names)}
    return [
        replace(
            records[i],
            scan_id=f"scan_{number:04d}",
            patient_id=patient_ids[records[i].patient_id],
        )
        for number, i in enumerate(order)
    ]


def generator(record: PhantomRecord, identity: str, purpose: str) -> np.random.Generator:
    """Random numbers for one purpose of one patient or scan, whatever else is drawn."""
    digest = hashlib.sha256(f"{record.seed}/{identity}/{purpose}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))
