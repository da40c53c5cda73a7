import numpy as np
import pandas as pd
import pytest

from lib.data.integrity import (
    duplicate_findings,
    find_same_scans,
    findings_table,
    inspect_scan,
    manifest_findings,
    slice_hash,
    stop_if_too_many,
)
from lib.data.scan import Scan, ScanError


def chest(slices=8, side=40, seed=0) -> np.ndarray:
    """Air around a block of noisy soft tissue."""
    rng = np.random.default_rng(seed)
    voxels = np.full((slices, side, side), -1000, np.int16)
    voxels[:, 10:30, 10:30] = rng.normal(40, 10, (slices, 20, 20))
    return voxels


def test_a_sound_scan_is_described():
    record = inspect_scan(Scan(chest(), (5.0, 1.0, 1.0), ("padding",)), "scan")
    assert (record["slices"], record["height"], record["width"]) == (8, 40, 40)
    assert record["spacing_mm"] == [5.0, 1.0, 1.0]
    assert record["flags"] == ["padding"]
    assert len(set(record["slice_hashes"])) == 8


@pytest.mark.parametrize(
    ("voxels", "reason"),
    [
        (np.full((3, 40, 40), 7, np.int16), "constant intensity"),
        (np.zeros((3, 40, 40), np.uint8), "constant intensity"),
        (chest()[:, :31], "slice too small"),
        (chest() + 1024, "implausible Hounsfield units"),  # the rescale intercept was lost: no air
        (chest() // 100 - 990, "implausible Hounsfield units"),  # no soft tissue
        (np.where(chest() > 60, 30_000, chest()), "implausible Hounsfield units"),
    ],
)
def test_unusable_scans_are_named(voxels, reason):
    with pytest.raises(ScanError) as error:
        inspect_scan(Scan(voxels), "the/scan")
    assert error.value.reason == reason
    assert "the/scan" in str(error.value)


def test_blank_and_repeated_slices_are_remarked():
    voxels = chest()
    voxels[0] = -1000
    voxels[3] = voxels[2]
    assert inspect_scan(Scan(voxels), "x")["flags"] == ["1 blank slices", "1 repeated slices"]


def test_slice_hash_sees_pixels_size_and_type_only():
    image = chest()[0]
    assert slice_hash(image) == slice_hash(image.copy(order="F"))
    assert slice_hash(image) != slice_hash(image.reshape(20, 80))
    assert slice_hash(image) != slice_hash(image.view(np.uint16).astype(np.uint16))
    assert slice_hash(np.zeros((4, 4))) == ""


def hashes(*, seed, slices=8):
    return [slice_hash(image) for image in chest(slices, seed=seed)]


def test_same_pixels_under_two_names_quarantine_the_second():
    scans = {("a", "s1"): hashes(seed=1), ("a", "s2"): hashes(seed=2), ("a", "s3"): hashes(seed=1)}
    (finding,) = duplicate_findings(scans)
    assert (finding.scan_id, finding.reason) == ("s3", "same pixels under two names")
    assert finding.quarantined
    assert "100% of its slices are those of a/s1" in finding.detail


def test_of_many_alike_the_first_stays_and_each_other_is_named_once():
    scans = {("a", f"s{number}"): hashes(seed=1) for number in range(4)}
    findings = duplicate_findings(scans)
    assert [f.scan_id for f in findings] == ["s1", "s2", "s3"]
    assert all(f.quarantined and "those of a/s0" in f.detail for f in findings)


def test_a_scan_that_is_left_out_puts_out_no_other():
    first, last = hashes(seed=1), hashes(seed=2)
    scans = {("a", "1"): first, ("a", "2"): first[:4] + last[:4], ("a", "3"): last}
    assert [finding.scan_id for finding in duplicate_findings(scans)] == ["2"]


def test_a_thinned_copy_in_another_data_set_is_found_and_both_stay():
    scans = {("a", "s1"): hashes(seed=1, slices=12), ("b", "t9"): hashes(seed=1, slices=12)[::4]}
    findings = duplicate_findings(scans)
    assert [(f.data_set, f.quarantined) for f in findings] == [("b", False), ("a", False)]


def test_blank_slices_and_a_single_common_slice_are_no_evidence():
    first, second = ["", "", *hashes(seed=1)], ["", "", *hashes(seed=2)]
    second[2] = first[2]
    assert find_same_scans({("a", "1"): first, ("a", "2"): second}) == []


def test_manifest_remarks():
    manifest = pd.DataFrame(
        {
            "scan_id": ["1", "2", "3"],
            "patient_id": ["p", "p", "q"],
            "split": ["train", "test", "test"],
            "label": ["covid", "covid", None],
            "flags": ["", "padding", np.nan],
        }
    )
    table = findings_table(manifest_findings("set", manifest))
    assert table["reason"].tolist() == [
        "patient in two splits",
        "mended while reading",
        "patient in two splits",
        "no label",
    ]
    assert findings_table([]).columns.tolist() == table.columns.tolist()


def test_too_many_bad_scans_stop_the_run():
    stop_if_too_many(2, 100, largest_share=0.02, data_set="x")
    stop_if_too_many(0, 0, largest_share=0.0, data_set="x")
    with pytest.raises(RuntimeError, match="3 of 100 scans of x are unusable, more than the 2%"):
        stop_if_too_many(3, 100, largest_share=0.02, data_set="x")
