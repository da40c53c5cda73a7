from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from lib.data.phantom import COVID, NORMAL, SCANNERS, make_phantom, plan_phantoms
from lib.data.scan import (
    CONSOLIDATION,
    GROUND_GLASS_OPACITY,
    HOUNSFIELD_LOWEST,
    LEFT_LUNG,
    RIGHT_LUNG,
    apply_window,
)


def same(first, second):
    return all(
        np.array_equal(a, b)
        for a, b in (
            (first.scan.voxels, second.scan.voxels),
            (first.lungs, second.lungs),
            (first.lesions, second.lesions),
        )
    )


def test_scan_depends_on_its_record_alone():
    plan = plan_phantoms(scans_per_class={"train": 1}, seed=3, slices=(2, 4))
    forward = [make_phantom(record, size=40) for record in plan]
    with ThreadPoolExecutor(2) as pool:
        backward = list(pool.map(lambda record: make_phantom(record, size=40), reversed(plan)))
    assert all(same(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    assert len({phantom.scan.voxels.tobytes() for phantom in forward}) == len(plan)


def test_seed_scan_and_patient_all_count(record):
    changes = ({}, {"seed": 1}, {"scan_id": "other"}, {"patient_id": "other"})
    drawn = [make_phantom(replace(record, slices=1, **change), size=40) for change in changes]
    assert len({phantom.scan.voxels.tobytes() for phantom in drawn}) == len(changes)


def test_masks_follow_the_contract(phantoms):
    for phantom in phantoms.values():
        assert phantom.scan.voxels.dtype == np.int16
        assert phantom.scan.voxels.shape == phantom.lungs.shape == phantom.lesions.shape
        assert phantom.lungs.dtype == phantom.lesions.dtype == np.uint8
        assert set(np.unique(phantom.lungs)) == {0, RIGHT_LUNG, LEFT_LUNG}
        assert set(np.unique(phantom.lesions)) <= {0, GROUND_GLASS_OPACITY, CONSOLIDATION}
        assert (phantom.lungs[phantom.lesions > 0] > 0).all()


def test_lungs_are_open_in_the_middle_and_closed_at_both_ends(phantoms):
    for phantom in phantoms.values():
        slices, size, _ = phantom.lungs.shape
        assert not phantom.lungs[0].any() and not phantom.lungs[-1].any()
        for lungs in phantom.lungs[slices // 4 : 2 * slices // 3]:
            right, left = lungs == RIGHT_LUNG, lungs == LEFT_LUNG
            assert min(right.sum(), left.sum()) > 0.0125 * size**2
            # The patient's right is on the left of the picture.
            assert np.nonzero(right)[1].mean() + size / 5 < np.nonzero(left)[1].mean()


def test_lungs_have_the_size_and_density_of_lungs(phantoms):
    for phantom in phantoms.values():
        healthy = (phantom.lungs > 0) & (phantom.lesions == 0)
        values = phantom.scan.voxels[healthy]
        assert -920 < np.median(values) < -760
        assert 30 < values.std() < 220
        litres = (phantom.lungs > 0).sum() * np.prod(phantom.scan.spacing_mm) / 1e6
        assert 3.0 < litres < 8.5


def test_tissues_outside_the_lungs_are_all_there(phantoms, records):
    for key, phantom in phantoms.items():
        middle = phantom.scan.voxels[len(phantom.scan.voxels) // 2]
        parts = {
            "air": middle < -900,
            "fat": (middle > -150) & (middle < -50),
            "soft tissue": (middle > 0) & (middle < 100),
            "bone": middle > 250,
        }
        for name, part in parts.items():
            assert part.mean() > 0.005, name
        padding = SCANNERS[records[key].scanner].padding
        assert phantom.scan.voxels.min() >= min(HOUNSFIELD_LOWEST, padding or HOUNSFIELD_LOWEST)


def test_scanners_differ_in_noise(phantoms):
    noise = []
    for number in (0, 1):  # scanners A and B
        liver = phantoms[NORMAL, number].scan.voxels[-1, 38:56, 24:38].astype(float)
        assert liver.mean() == pytest.approx(58, abs=15)
        noise.append(np.diff(liver, axis=1).std())
    assert noise[1] > 1.3 * noise[0] > 0


@pytest.mark.parametrize("slices", [1, 2, 60, pytest.param(700, marks=pytest.mark.slow)])
def test_any_number_of_slices_and_all_differ(record, slices):
    phantom = make_phantom(replace(record, slices=slices), size=32)
    assert phantom.scan.voxels.shape == (slices, 32, 32)
    assert len({picture.tobytes() for picture in phantom.scan.voxels}) == slices
    assert set(np.unique(phantom.lungs)) == {0, RIGHT_LUNG, LEFT_LUNG}
    assert 290 < phantom.scan.spacing_mm[0] * slices < 370


def test_picture_is_the_lung_window_of_the_hounsfield_scan(phantoms, records):
    hounsfield = phantoms[COVID, 1]
    picture = make_phantom(records[COVID, 1], size=hounsfield.lungs.shape[1], hounsfield=False)
    assert picture.scan.voxels.dtype == np.uint8
    np.testing.assert_array_equal(picture.scan.voxels, apply_window(hounsfield.scan.voxels))
    np.testing.assert_array_equal(picture.lungs, hounsfield.lungs)
    np.testing.assert_array_equal(picture.lesions, hounsfield.lesions)


@pytest.mark.parametrize("number", [0, 1])  # scanners A and B
def test_confounder_changes_nothing_in_the_lungs(phantoms, records, number):
    without = phantoms[COVID, number]
    marked = make_phantom(
        replace(records[COVID, number], confounder=True), size=without.lungs.shape[1]
    )
    np.testing.assert_array_equal(marked.lungs, without.lungs)
    np.testing.assert_array_equal(marked.lesions, without.lesions)
    changed = marked.scan.voxels != without.scan.voxels
    assert not changed[without.lungs > 0].any()
    brighter = marked.scan.voxels.astype(int) - without.scan.voxels
    assert (brighter.max(axis=(1, 2)) > 500).all()  # it can be seen in every slice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "flu"}, "label or scanner.*'flu'"),
        ({"scanner": "C"}, "label or scanner.*'C'"),
        ({"slices": 0}, "1 slice or more, got 64 and 0"),
    ],
)
def test_unknown_record_is_refused(record, change, message):
    with pytest.raises(ValueError, match=message):
        make_phantom(replace(record, **change), size=64)


def test_picture_too_small_for_a_chest_is_refused(record):
    with pytest.raises(ValueError, match="32 pixels"):
        make_phantom(record, size=31)
