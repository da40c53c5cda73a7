import hashlib
import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data.phantom import COVID, LABELS, plan_phantoms
from lib.data.phantom.plan import generator


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    train=st.integers(1, 20),
    test=st.integers(0, 9),
    second=st.floats(0, 1),
)
def test_plan_is_balanced_grouped_and_repeatable(seed, train, test, second):
    arguments = {
        "scans_per_class": {"train": train, "test": test},
        "seed": seed,
        "slices": (5, 9),
        "second_scan_share": second,
    }
    plan = plan_phantoms(**arguments)
    assert plan == plan_phantoms(**arguments)
    table = pd.DataFrame(plan)
    assert table.scan_id.is_unique and table.scan_id.is_monotonic_increasing
    assert table.slices.between(5, 9).all()
    for split, count in arguments["scans_per_class"].items():
        counts = table[table.split == split].label.value_counts()
        assert [counts.get(label, 0) for label in LABELS] == [count] * 3
    patients = table.groupby("patient_id")
    assert (patients.split.nunique() == 1).all()
    assert (patients.label.nunique() == 1).all()
    assert patients.size().max() <= 2


def test_some_patients_have_two_scans():
    plan = plan_phantoms(scans_per_class={"train": 20}, seed=0, second_scan_share=0.2)
    sizes = pd.DataFrame(plan).groupby("patient_id").size()
    assert (sizes == 2).sum() == 3 * 4


@pytest.mark.parametrize("correlation", [-1.0, -0.6, 0.0, 0.6, 0.9, 1.0])
def test_confounder_follows_its_correlation_in_its_split_only(correlation):
    plan = plan_phantoms(
        scans_per_class={"train": 60, "test": 60},
        seed=1,
        confounder_correlation={"train": correlation},
    )
    table = pd.DataFrame(plan)
    positive = table.label == COVID
    for split, expected in (("train", correlation), ("test", 0.0)):
        rows = table.split == split
        measured = np.corrcoef(positive[rows], table.confounder[rows])[0, 1]
        assert measured == pytest.approx(expected, abs=0.05)
        scanner = table.scanner[rows] == "B"
        assert np.corrcoef(positive[rows], scanner)[0, 1] == pytest.approx(0, abs=1e-9)


def test_scan_number_does_not_tell_the_class():
    plan = plan_phantoms(scans_per_class={"train": 100}, seed=2)
    positive = [record.label == COVID for record in plan]
    assert abs(np.corrcoef(np.arange(len(plan)), positive)[0, 1]) < 0.15


def test_extra_lengths_come_on_top():
    plan = plan_phantoms(
        scans_per_class={"train": 2, "test": 1}, seed=0, slices=(4, 6), extra_slices=(1, 700)
    )
    assert len(plan) == 3 * 3 + 2
    assert {(r.slices, r.split) for r in plan if not 4 <= r.slices <= 6} == {
        (1, "train"),
        (700, "train"),
    }


def test_the_default_phantoms_stay_what_they_were():
    """Published figures of the study rest on these; a change of the plan must be on purpose."""
    plan = plan_phantoms(
        scans_per_class={"train": 12, "validation": 5, "test": 10},
        seed=0,
        slices=(12, 22),
        extra_slices=(1, 50),
        labels=LABELS[::-1],  # their order does not matter
    )
    text = json.dumps([asdict(record) for record in plan])
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "ba1f9f42c56c3fdbd959c484c8194fbaf52d71fd57d2e316540b466ada2dcc4e"
    )


def test_some_labels_alone_are_balanced_too():
    plan = plan_phantoms(
        scans_per_class={"train": 4, "test": 3},
        seed=5,
        labels=["normal", COVID],
        extra_slices=(1, 2, 30),
        slices=(4, 6),
    )
    counts = pd.DataFrame(plan).groupby(["split", "label"]).size().to_dict()
    assert counts == {
        ("train", COVID): 6,
        ("train", "normal"): 5,
        ("test", COVID): 3,
        ("test", "normal"): 3,
    }


def test_equal_numbers_of_another_seed_are_other_patients():
    first, second = (
        plan_phantoms(scans_per_class={"train": 2}, seed=seed)[0] for seed in (0, 1000)
    )
    assert first.scan_id == second.scan_id
    anatomies = [generator(record, "patient_0000", "anatomy") for record in (first, second)]
    assert anatomies[0].random() != anatomies[1].random()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scans_per_class": {}}, "count of scans"),
        ({"scans_per_class": {"train": -1}}, "count of scans"),
        ({"confounder_correlation": {"train": 1.5}}, r"\[-1, 1\]"),
        ({"confounder_correlation": {"tset": 0.5}}, "tset"),
        ({"slices": (0, 3)}, "at least one slice"),
        ({"slices": (9, 3)}, "at least one slice"),
        ({"extra_slices": (0,)}, "at least one slice"),
        ({"difficulty": 2.0}, r"\[0, 1\]"),
        ({"scanner_b_share": -0.1}, r"\[0, 1\]"),
        ({"labels": []}, "labels are some of covid, pneumonia, normal, got "),
        ({"labels": ["flu"]}, "labels are some of covid, pneumonia, normal, got flu"),
    ],
)
def test_plan_refuses_nonsense(change, message):
    with pytest.raises(ValueError, match=message):
        plan_phantoms(**{"scans_per_class": {"train": 2}, "seed": 0} | change)
