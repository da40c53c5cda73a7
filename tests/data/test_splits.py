import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.data.splits import SPLITS, TEST, TRAIN, assign_splits, patients_in_several_splits

SHARES = {"validation": 0.2, "test": 0.3}


def scans_of(patients: list[tuple[str, str]], split=None) -> pd.DataFrame:
    rows = [
        {"scan_id": f"{patient}-{k}", "patient_id": patient, "label": label, "split": split}
        for patient, label in patients
        for k in range(2)
    ]
    return pd.DataFrame(rows)


PATIENTS = [(f"p{i:03d}", ["covid", "normal"][i % 2]) for i in range(40)]


@given(seed=st.integers(0, 99), order=st.permutations(range(80)))
def test_patients_stay_whole_whatever_the_row_order(seed, order):
    scans = scans_of(PATIENTS)
    split = assign_splits(scans, fractions=SHARES, seed=seed)
    shuffled = scans.iloc[list(order)]
    assert assign_splits(shuffled, fractions=SHARES, seed=seed).sort_index().equals(split)
    assert patients_in_several_splits(scans.assign(split=split)) == []
    assert split.value_counts().to_dict() == {"train": 40, "test": 24, "validation": 16}
    counts = scans.assign(split=split).groupby("label")["split"].value_counts()
    assert counts["covid"].to_dict() == counts["normal"].to_dict()


def test_seed_changes_the_draw():
    draws = {tuple(assign_splits(scans_of(PATIENTS), fractions=SHARES, seed=s)) for s in range(5)}
    assert len(draws) == 5


def test_published_test_part_is_kept_and_validation_comes_from_training_patients():
    train, test = scans_of(PATIENTS[:30], "train"), scans_of(PATIENTS[30:], "test")
    scans = pd.concat([train, test], ignore_index=True)
    split = assign_splits(scans, fractions=SHARES, seed=0)
    assert (split[scans["split"] == "test"] == TEST).all()
    assert set(split[scans["split"] == "train"]) == {"train", "validation"}
    assert patients_in_several_splits(scans.assign(split=split)) == []


def test_a_complete_published_split_is_untouched_even_where_it_tears_a_patient():
    scans = scans_of(PATIENTS[:3])
    scans["split"] = ["train", "test", "validation", "validation", "test", "test"]
    split = assign_splits(scans, fractions=SHARES, seed=0)
    assert split.tolist() == scans["split"].tolist()
    assert patients_in_several_splits(scans) == ["p000"]


def test_an_unlisted_scan_follows_its_patient():
    scans = scans_of(PATIENTS, TRAIN)
    scans.loc[scans["patient_id"] == "p007", "split"] = ["test", None]
    split = assign_splits(scans, fractions=SHARES, seed=0)
    assert (split[scans["patient_id"] == "p007"] == TEST).all()
    assert set(split) == set(SPLITS)


@pytest.mark.parametrize(
    ("split", "fractions"), [("dev", SHARES), (None, {"test": 1.2}), (None, {"dev": 0.1})]
)
def test_unknown_names_and_impossible_shares_are_refused(split, fractions):
    with pytest.raises(ValueError, match="splits are"):
        assign_splits(scans_of(PATIENTS, split), fractions=fractions, seed=0)
