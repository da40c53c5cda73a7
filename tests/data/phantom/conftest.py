"""Phantoms that many tests look at; drawing one takes a tenth of a second at any size."""

from dataclasses import replace

import pytest

from lib.data.phantom import COVID, LABELS, PhantomRecord, make_phantom

SIZE = 96
NUMBERED = ((0, "A", 14), (1, "B", 10), (2, "A", 24))  # number, scanner, slices


@pytest.fixture(scope="session")
def record():
    """A small COVID-19 scan; tests replace what they are about."""
    return PhantomRecord(
        scan_id="scan_0000",
        patient_id="patient_0000",
        label=COVID,
        split="train",
        scanner="A",
        slices=3,
        confounder=False,
        difficulty=0.5,
        seed=0,
    )


@pytest.fixture(scope="session")
def records(record):
    """Three scans of every class, of different patients, by (label, number)."""
    return {
        (label, number): replace(
            record,
            label=label,
            scanner=scanner,
            slices=slices,
            scan_id=f"{label}_{number}",
            patient_id=f"{label}_{number}",
        )
        for label in LABELS
        for number, scanner, slices in NUMBERED
    }


@pytest.fixture(scope="session")
def phantoms(records):
    """The phantoms of `records`, by (label, number)."""
    return {key: make_phantom(record, size=SIZE) for key, record in records.items()}
