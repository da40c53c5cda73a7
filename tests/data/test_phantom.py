from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import nibabel
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import distance_transform_edt

from lib.data.phantom import (
    COVID,
    LABELS,
    NORMAL,
    PNEUMONIA,
    SCANNERS,
    PhantomRecord,
    make_phantom,
    plan_phantoms,
    write_phantom,
    write_plan,
)
from lib.data.scan import (
    CONSOLIDATION,
    GROUND_GLASS_OPACITY,
    HOUNSFIELD_LOWEST,
    LEFT_LUNG,
    RIGHT_LUNG,
    apply_window,
)

RECORD = PhantomRecord(
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
SIZE = 96


def same(first, second):
    return all(
        np.array_equal(a, b)
        for a, b in (
            (first.scan.voxels, second.scan.voxels),
            (first.lungs, second.lungs),
            (first.lesions, second.lesions),
        )
    )


@pytest.fixture(scope="module")
def phantoms():
    """Two scans of every class, one from each scanner, by (label, scanner)."""
    return {
        (label, scanner): make_phantom(
            replace(
                RECORD,
                label=label,
                scanner=scanner,
                slices=14,
                scan_id=f"{label}_{scanner}",
                patient_id=f"{label}_{scanner}",
            ),
            size=SIZE,
        )
        for label in LABELS
        for scanner in SCANNERS
    }


# ---------------------------------------------------------------- the plan


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
    ],
)
def test_plan_refuses_nonsense(change, message):
    with pytest.raises(ValueError, match=message):
        plan_phantoms(**{"scans_per_class": {"train": 2}, "seed": 0} | change)


# ---------------------------------------------------------------- the drawing


def test_scan_depends_on_its_record_alone():
    plan = plan_phantoms(scans_per_class={"train": 2}, seed=3, slices=(2, 4))
    forward = [make_phantom(record, size=48) for record in plan]
    with ThreadPoolExecutor(2) as pool:
        backward = list(pool.map(lambda record: make_phantom(record, size=48), reversed(plan)))
    assert all(same(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    voxels = {phantom.scan.voxels.tobytes() for phantom in forward}
    assert len(voxels) == len(plan)


@pytest.mark.parametrize("change", [{"seed": 1}, {"scan_id": "other"}, {"patient_id": "other"}])
def test_seed_scan_and_patient_all_count(change):
    changed = make_phantom(replace(RECORD, **change), size=48)
    assert not same(make_phantom(RECORD, size=48), changed)


def test_slices_of_a_scan_all_differ():
    voxels = make_phantom(replace(RECORD, slices=60), size=48).scan.voxels
    assert len({picture.tobytes() for picture in voxels}) == 60


def test_masks_follow_the_contract(phantoms):
    for phantom in phantoms.values():
        assert phantom.scan.voxels.dtype == np.int16
        assert phantom.scan.voxels.shape == phantom.lungs.shape == phantom.lesions.shape
        assert phantom.lungs.dtype == phantom.lesions.dtype == np.uint8
        assert set(np.unique(phantom.lungs)) == {0, RIGHT_LUNG, LEFT_LUNG}
        assert set(np.unique(phantom.lesions)) <= {0, GROUND_GLASS_OPACITY, CONSOLIDATION}
        assert (phantom.lungs[phantom.lesions > 0] > 0).all()


def test_right_lung_is_on_the_left_of_the_picture(phantoms):
    for phantom in phantoms.values():
        for lungs in phantom.lungs[3:11]:
            columns = [np.nonzero(lungs == side)[1] for side in (RIGHT_LUNG, LEFT_LUNG)]
            assert columns[0].mean() + SIZE / 5 < columns[1].mean()


@pytest.mark.parametrize("slices", [10, 24])
def test_lungs_are_open_in_the_middle_and_closed_at_both_ends(slices):
    for number in range(3):
        record = replace(RECORD, slices=slices, patient_id=f"patient_{number}", label=NORMAL)
        lungs = make_phantom(record, size=40).lungs
        assert not lungs[0].any() and not lungs[-1].any()
        for picture in lungs[slices // 4 : 2 * slices // 3]:
            assert (picture == RIGHT_LUNG).sum() > 20 and (picture == LEFT_LUNG).sum() > 20


def test_lungs_have_the_size_and_density_of_lungs(phantoms):
    for phantom in phantoms.values():
        healthy = (phantom.lungs > 0) & (phantom.lesions == 0)
        values = phantom.scan.voxels[healthy]
        assert -920 < np.median(values) < -760
        assert 30 < values.std() < 220
        litres = (phantom.lungs > 0).sum() * np.prod(phantom.scan.spacing_mm) / 1e6
        assert 3.0 < litres < 8.5


def test_tissues_outside_the_lungs_are_all_there(phantoms):
    for (_, scanner), phantom in phantoms.items():
        middle = phantom.scan.voxels[len(phantom.scan.voxels) // 2]
        parts = {
            "air": middle < -900,
            "fat": (middle > -150) & (middle < -50),
            "soft tissue": (middle > 0) & (middle < 100),
            "bone": middle > 250,
        }
        for name, part in parts.items():
            assert part.mean() > 0.005, name
        assert phantom.scan.voxels.min() >= min(
            HOUNSFIELD_LOWEST, SCANNERS[scanner].padding or HOUNSFIELD_LOWEST
        )


def test_scanners_differ_in_noise():
    noise = {}
    for scanner in SCANNERS:
        record = replace(RECORD, scanner=scanner, slices=9, label=NORMAL)
        liver = make_phantom(record, size=128).scan.voxels[-1, 50:75, 30:50].astype(float)
        assert liver.mean() == pytest.approx(58, abs=15)
        noise[scanner] = np.diff(liver, axis=1).std()
    assert noise["B"] > 1.3 * noise["A"] > 0


@pytest.mark.parametrize(("slices", "size"), [(1, 64), (2, 64), (700, 32)])
def test_any_number_of_slices(slices, size):
    phantom = make_phantom(replace(RECORD, slices=slices), size=size)
    assert phantom.scan.voxels.shape == (slices, size, size)
    assert set(np.unique(phantom.lungs)) == {0, RIGHT_LUNG, LEFT_LUNG}
    assert 290 < phantom.scan.spacing_mm[0] * slices < 370


def test_picture_is_the_lung_window_of_the_hounsfield_scan():
    hounsfield = make_phantom(RECORD, size=64)
    picture = make_phantom(RECORD, size=64, hounsfield=False)
    assert picture.scan.voxels.dtype == np.uint8
    np.testing.assert_array_equal(picture.scan.voxels, apply_window(hounsfield.scan.voxels))
    np.testing.assert_array_equal(picture.lungs, hounsfield.lungs)


@pytest.mark.parametrize("change", [{"label": "flu"}, {"scanner": "C"}, {"slices": 0}])
def test_unknown_record_is_refused(change):
    with pytest.raises(ValueError):
        make_phantom(replace(RECORD, **change), size=64)


# ---------------------------------------------------------------- the classes


def lesion_share(phantom, side):
    lung = phantom.lungs == side
    return (phantom.lesions[lung] > 0).mean()


@pytest.mark.parametrize("number", range(4))
def test_covid_is_bilateral_peripheral_and_posterior(number):
    record = replace(RECORD, slices=16, patient_id=f"patient_{number}", scan_id=f"scan_{number}")
    phantom = make_phantom(record, size=SIZE)
    assert min(lesion_share(phantom, side) for side in (RIGHT_LUNG, LEFT_LUNG)) > 0.001
    depth = distance_transform_edt(phantom.lungs > 0, phantom.scan.spacing_mm)
    lesions, healthy = phantom.lesions > 0, (phantom.lungs > 0) & (phantom.lesions == 0)
    assert np.median(depth[lesions]) < 0.8 * np.median(depth[healthy])
    assert np.nonzero(lesions)[1].mean() > np.nonzero(healthy)[1].mean()


@pytest.mark.parametrize("number", range(4))
def test_pneumonia_is_consolidated_in_one_lung(number):
    record = replace(
        RECORD, slices=16, label=PNEUMONIA, patient_id=f"patient_{number}", scan_id=f"scan_{number}"
    )
    phantom = make_phantom(record, size=SIZE)
    shares = sorted(lesion_share(phantom, side) for side in (RIGHT_LUNG, LEFT_LUNG))
    assert shares[0] == 0 and shares[1] > 0.01
    assert (phantom.lesions == CONSOLIDATION).sum() > 0.2 * (phantom.lesions > 0).sum()


def test_pneumonia_has_air_bronchograms():
    record = replace(RECORD, label=PNEUMONIA, slices=20, difficulty=0.0)
    phantom = make_phantom(record, size=192)
    dense = phantom.lesions == CONSOLIDATION
    inner = distance_transform_edt(dense, phantom.scan.spacing_mm) > 3
    assert (phantom.scan.voxels[inner] < -250).sum() >= 3
    assert np.median(phantom.scan.voxels[inner]) > -60


def test_normal_scans_have_no_lesion(phantoms):
    assert not any(phantoms[NORMAL, scanner].lesions.any() for scanner in SCANNERS)


def test_lesions_have_their_density(phantoms):
    for (label, _), phantom in phantoms.items():
        glass = phantom.scan.voxels[phantom.lesions == GROUND_GLASS_OPACITY]
        dense = phantom.scan.voxels[phantom.lesions == CONSOLIDATION]
        if label != NORMAL:
            assert -720 < np.median(glass) < -280
        if label == PNEUMONIA:
            assert -80 < np.median(dense) < 80


def test_difficulty_makes_lesions_smaller():
    def load(difficulty):
        records = [replace(RECORD, scan_id=f"s{i}", slices=6) for i in range(3)]
        phantoms = [make_phantom(replace(r, difficulty=difficulty), size=48) for r in records]
        return sum((p.lesions > 0).sum() / (p.lungs > 0).sum() for p in phantoms)

    assert load(0.0) > 1.5 * load(1.0)


@pytest.mark.parametrize("scanner", list(SCANNERS))
def test_confounder_changes_nothing_in_the_lungs(scanner):
    record = replace(RECORD, scanner=scanner, slices=12)
    without = make_phantom(record, size=SIZE)
    marked = make_phantom(replace(record, confounder=True), size=SIZE)
    np.testing.assert_array_equal(marked.lungs, without.lungs)
    np.testing.assert_array_equal(marked.lesions, without.lesions)
    changed = marked.scan.voxels != without.scan.voxels
    assert not changed[without.lungs > 0].any()
    brighter = marked.scan.voxels.astype(int) - without.scan.voxels
    assert (brighter.max(axis=(1, 2)) > 500).all()  # it can be seen in every slice


# ---------------------------------------------------------------- the files


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def in_our_convention(image):
    """Voxels (towards feet, back, left) of an image of any orientation, by nibabel alone."""
    right_front_head = nibabel.as_closest_canonical(image)
    return np.asanyarray(right_front_head.dataobj)[::-1, ::-1, ::-1].transpose(2, 1, 0)


@pytest.mark.parametrize(("scanner", "codes"), [("A", "LPS"), ("B", "RAS")])
def test_written_scan_reads_back_equal(tmp_path, scanner, codes):
    record = replace(RECORD, scanner=scanner)
    write_phantom(record, tmp_path, size=48)
    phantom = make_phantom(record, size=48)
    for part, expected in (
        ("scans", phantom.scan.voxels),
        ("lungs", phantom.lungs),
        ("lesions", phantom.lesions),
    ):
        image = nibabel.load(tmp_path / part / f"{record.scan_id}.nii.gz")
        assert "".join(nibabel.aff2axcodes(image.affine)) == codes
        assert image.get_data_dtype() == expected.dtype
        np.testing.assert_array_equal(in_our_convention(image), expected)
        spacing = image.header.get_zooms()[::-1]
        np.testing.assert_allclose(spacing, phantom.scan.spacing_mm, rtol=1e-5)


def test_written_pictures_are_one_file_per_slice(tmp_path):
    write_phantom(RECORD, tmp_path, size=64, hounsfield=False)
    folder = tmp_path / "scans" / RECORD.scan_id
    assert sorted(path.name for path in folder.iterdir()) == ["0.jpg", "1.jpg", "2.jpg"]
    expected = make_phantom(RECORD, size=64, hounsfield=False).scan.voxels
    for index, picture in enumerate(expected):
        with Image.open(folder / f"{index}.jpg") as image:
            assert image.mode == "L"
            assert np.abs(np.asarray(image).astype(int) - picture).mean() < 4
    assert (tmp_path / "lungs" / f"{RECORD.scan_id}.nii.gz").is_file()


@pytest.mark.parametrize("hounsfield", [True, False])
def test_second_write_gives_the_same_bytes(tmp_path, hounsfield):
    write_phantom(RECORD, tmp_path, size=48, hounsfield=hounsfield)
    first = contents(tmp_path)
    write_phantom(RECORD, tmp_path, size=48, hounsfield=hounsfield)
    assert contents(tmp_path) == first
    assert not [name for name in first if "partial" in name]


def test_plan_file_holds_one_row_per_scan(tmp_path):
    plan = plan_phantoms(scans_per_class={"train": 2, "test": 1}, seed=0)
    path = write_plan(plan, tmp_path)
    assert path == tmp_path / "scans.csv"
    table = pd.read_csv(path)
    assert list(table.columns[:5]) == ["scan_id", "patient_id", "label", "split", "scanner"]
    assert [PhantomRecord(**row) for row in table.to_dict("records")] == plan


@pytest.mark.parametrize("scan_id", ["../escape", "a/b", "", ".hidden"])
def test_scan_id_cannot_leave_the_folder(tmp_path, scan_id):
    with pytest.raises(ValueError, match="scan_id"):
        write_phantom(replace(RECORD, scan_id=scan_id), tmp_path / "root", size=48)
    assert not contents(tmp_path)
