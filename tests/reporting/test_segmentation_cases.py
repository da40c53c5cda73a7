import numpy as np
import pandas as pd
import pytest

from lib.data.store import save_volume
from lib.reporting.segmentation_cases import (
    best_median_worst,
    first_of_each_label,
    scan_files,
    shown_part,
)

NAMES = ["a", "b", "c"]
METHODS = ["first", "last"]


@pytest.fixture
def data(tmp_path):
    """Three stored scans; the two methods agree fully on a, by half on b, not at all on c."""
    area = {"a": slice(0, 4), "b": slice(2, 4), "c": slice(4, 8)}
    for folder in ("prepared/set/scans", "segmented/set/first", "segmented/set/last"):
        (tmp_path / folder).mkdir(parents=True)
    for name in NAMES:
        voxels = np.zeros((3, 8, 8), np.int16)
        first, last = np.zeros((3, 8, 8), np.uint8), np.zeros((3, 8, 8), np.uint8)
        first[1, 0:4], last[1, area[name]] = 1, 1
        save_volume(tmp_path / f"prepared/set/scans/{name}.b2nd", voxels)
        save_volume(tmp_path / f"segmented/set/first/{name}.b2nd", first)
        save_volume(tmp_path / f"segmented/set/last/{name}.b2nd", last)
    return tmp_path


def test_the_test_part_is_shown_or_everything():
    manifest = pd.DataFrame({"scan_id": NAMES, "split": ["train", "test", "test"]})
    assert shown_part(manifest)["scan_id"].tolist() == ["b", "c"]
    assert len(shown_part(manifest.assign(split="train"))) == 3


def test_the_first_scan_of_each_label_is_shown_and_a_missing_label_counts_as_one(data):
    part = pd.DataFrame({"scan_id": ["c", "b", "a"], "label": ["covid", "covid", None]})
    cases = first_of_each_label(part, scan_files(data, "set", NAMES, METHODS))
    assert [case.title.split(",")[0] for case in cases] == ["b (covid)", "a"]
    assert all(case.truth is None and list(case.masks) == METHODS for case in cases)


def test_cases_are_ranked_by_dice_where_it_is_known(data):
    scores = pd.DataFrame({"scan_id": ["b", "c", "a"], "dice_both": [0.9, 0.8, 0.7]})
    cases = best_median_worst(scores, scan_files(data, "set", NAMES, METHODS), ["last"])
    titles = [case.title.split(",")[0] for case in cases]
    assert titles == ["highest Dice 0.900: b", "median Dice 0.800: c", "lowest Dice 0.700: a"]
    assert [list(case.masks) for case in cases] == [["last"]] * 3


def test_cases_are_ranked_by_agreement_where_no_truth_is_known(data):
    scores = pd.DataFrame({"scan_id": [], "dice_both": []}, dtype=object)
    cases = best_median_worst(scores, scan_files(data, "set", NAMES, METHODS), METHODS)
    titles = [case.title.split(",")[0] for case in cases]
    assert titles[0] == "highest agreement 1.000: a"
    assert titles[1].startswith("median agreement 0.667: b") and titles[2].endswith("c")
