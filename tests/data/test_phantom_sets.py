from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data.manifest import read_manifest
from lib.data.phantom import plan_phantoms
from lib.data.phantom_sets import (
    WITH_TUBE,
    WITHOUT_TUBE,
    by_tube,
    confounded_plans,
    draw_data_set,
    scanner_plans,
)
from lib.data.store import open_volume

COUNTS = {"train": 8, "validation": 4, "test": 6}


@settings(max_examples=20, deadline=None)
@given(strength=st.floats(-1, 1), seed=st.integers(0, 50))
def test_strengths_differ_by_the_tube_in_what_is_learned_from_alone(strength, seed):
    plans = confounded_plans([0.0, strength], seed=seed, scans_per_class=COUNTS)
    for plain, confounded in zip(plans[0.0], plans[strength], strict=True):
        assert replace(plain, confounder=False) == replace(confounded, confounder=False)
        assert plain.split != "test" or plain == confounded


def test_at_full_strength_the_tube_tells_the_label_and_in_the_test_part_nothing():
    (plan,) = confounded_plans([1.0], seed=3, scans_per_class=COUNTS).values()
    learned = [record for record in plan if record.split != "test"]
    assert all(record.confounder == (record.label == "covid") for record in learned)
    for label in ("covid", "pneumonia", "normal"):
        worn = [r.confounder for r in plan if (r.split, r.label) == ("test", label)]
        assert sum(worn) == 3 and len(worn) == 6


def test_a_strength_beyond_a_correlation_is_refused():
    with pytest.raises(ValueError, match=r"confounder_correlation lies in \[-1, 1\]"):
        confounded_plans([1.5], seed=0, scans_per_class=COUNTS)


def test_a_scan_is_drawn_once_for_all_strengths_that_want_it():
    plans = confounded_plans([0.0, 0.5, 1.0], seed=0, scans_per_class=COUNTS)
    drawn = by_tube(plans.values())
    for tube, records in drawn.items():
        assert len({r.scan_id for r in records}) == len(records) <= len(plans[0.0])
        assert {r.confounder for r in records} == {tube == WITH_TUBE}
    for plan in plans.values():
        assert all(r in drawn[WITH_TUBE if r.confounder else WITHOUT_TUBE] for r in plan)


def test_scanners_see_the_same_patients():
    plans = scanner_plans(["A", "B"], scans_per_class=COUNTS, seed=1)
    assert {r.scanner for r in plans["A"]} == {"A"}
    assert [replace(r, scanner="B") for r in plans["A"]] == plans["B"]


def test_a_data_set_is_drawn_prepared_and_not_made_again(tmp_path):
    records = plan_phantoms(scans_per_class={"train": 1}, slices=(2, 3), seed=0)
    manifest = draw_data_set(records, tmp_path, size=32, hounsfield=True)
    assert manifest["scan_id"].tolist() == [r.scan_id for r in records]
    assert manifest["label"].tolist() == [r.label for r in records]
    assert read_manifest(tmp_path)["scan_id"].tolist() == manifest["scan_id"].tolist()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.b2nd")}
    assert {path.parent.name for path in files} == {"scans", "lungs"}
    lungs = open_volume(tmp_path / f"lungs/{records[0].scan_id}.b2nd").load()
    assert lungs.shape == (records[0].slices, 32, 32) and lungs.any()
    draw_data_set(records, tmp_path, size=32, hounsfield=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.b2nd")} == files
