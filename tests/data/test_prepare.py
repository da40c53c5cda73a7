from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lib.data import integrity, prepare
from lib.data.datasets import DATA_SETS, Listing, ListingProblem, Reason, ScanSource
from lib.data.files import save_csv
from lib.data.integrity import Finding
from lib.data.manifest import read_manifest
from lib.data.scan import ScanError
from lib.data.scan_map import ScanFailure, ScanResult
from lib.data.store import open_volume
from tests.data.made_data_sets import chest, contents, lungs, prepare_data_set
from tests.data.readers.made_files import write_dicom, write_nifti, write_pictures

OWN = DATA_SETS["own"]


@pytest.fixture
def source(tmp_path) -> ScanSource:
    """A scan with both masks, in `raw/`; `scans/` is there to take it."""
    raw = tmp_path / "raw"
    raw.mkdir()
    (tmp_path / "scans").mkdir()
    masks = {"lung_mask": (raw / "lungs.nii.gz",), "lesion_mask": (raw / "lesions.nii.gz",)}
    write_nifti(raw / "scan.nii.gz", chest())
    for (file,) in masks.values():
        write_nifti(file, lungs())
    return ScanSource("s1", "p1", (raw / "scan.nii.gz",), "covid", **masks)


def prepared_scan(source: ScanSource, tmp_path: Path, **options) -> dict:
    path = tmp_path / "scans" / f"{source.scan_id}.b2nd"
    return prepare.prepare_scan(source, path, root=tmp_path / "raw", **options)


def prepared_mask(source: ScanSource, tmp_path: Path, *, kind="lungs", data_set=OWN):
    path = tmp_path / f"{kind}.b2nd"
    folders = {"scans": tmp_path / "scans", "root": tmp_path / "raw"}
    record = prepare.prepare_mask(source, path, kind=kind, data_set=data_set, **folders)
    return record, open_volume(path)


# Scans


def test_a_scan_is_stored_as_it_was_read_and_described(source, tmp_path):
    record = prepared_scan(source, tmp_path)
    stored = open_volume(tmp_path / "scans" / "s1.b2nd")
    np.testing.assert_array_equal(stored.load(), chest())
    assert stored.spacing_mm == pytest.approx((5.0, 0.7, 0.8))
    assert (record["slices"], record["height"], record["width"]) == (5, 40, 40)
    assert record["spacing_mm"] == pytest.approx([5.0, 0.7, 0.8])
    assert len(record["slice_hashes"]) == 5
    assert record["source_sha256"] == prepare.source_sha256(source.files[0])


def test_a_transposed_scan_is_turned_with_its_spacing(source, tmp_path):
    write_nifti(source.files[0], chest().transpose(0, 2, 1)[:, 1:])
    record = prepared_scan(source, tmp_path, transposed=True)
    stored = open_volume(tmp_path / "scans" / "s1.b2nd")
    np.testing.assert_array_equal(stored.load(), chest()[:, :, 1:])
    assert stored.spacing_mm == pytest.approx((5.0, 0.8, 0.7))
    assert (record["height"], record["width"]) == (40, 39)


def test_damaged_slices_are_left_out_on_request(source, tmp_path):
    folder = write_pictures(tmp_path / "raw" / "slices", size=(40, 40))
    (folder / "2.jpg").write_bytes(b"")
    pictures = replace(source, files=(folder,))
    with pytest.raises(ScanError, match="empty file"):
        prepared_scan(pictures, tmp_path)
    record = prepared_scan(pictures, tmp_path, skip_unreadable=True)
    assert record["slices"] == 2
    assert "1 unreadable slices left out" in record["flags"]


def test_a_scan_of_listed_slices_keeps_the_numeric_order(source, tmp_path):
    folder = write_pictures(tmp_path / "raw" / "slices", size=(40, 40))
    listed = replace(source, files=tuple(folder / f"{n}.jpg" for n in (10, 1, 2)))
    prepared_scan(listed, tmp_path)
    assert open_volume(tmp_path / "scans" / "s1.b2nd").load()[:, 0, 0].tolist() == [0, 40, 80]
    assert [p.name for p in prepare.scan_inputs(listed, root=folder)] == [
        *("1.jpg", "2.jpg", "10.jpg")
    ]


@pytest.mark.parametrize(
    ("target", "reason"),
    [("../outside.nii", "outside the data folder"), ("nowhere.nii", "no such file")],
)
def test_inputs_are_refused_before_they_are_opened(source, tmp_path, target, reason):
    write_nifti(tmp_path / "outside.nii", chest())
    link = tmp_path / "raw" / "link.nii"
    link.symlink_to(target)
    with pytest.raises(ScanError) as error:
        prepare.scan_inputs(replace(source, files=(link,)), root=tmp_path / "raw")
    assert (error.value.reason, error.value.file) == (reason, link)


def test_an_unusable_scan_leaves_no_file(source, tmp_path):
    write_nifti(source.files[0], np.full((3, 40, 40), -1000, np.int16))
    with pytest.raises(ScanError, match="constant intensity"):
        prepared_scan(source, tmp_path)
    assert list((tmp_path / "scans").iterdir()) == []


# Masks


def two_lungs(right: int, left: int) -> np.ndarray:
    return np.array([0, right, left], np.uint8)[lungs()]


TOLD_APART = replace(OWN, lung_values=(1, 2), lung_sides_known=True)

LUNG_MASKS = {
    "sides known": (TOLD_APART, two_lungs(1, 2), lungs()),
    "sides known, a third value": (TOLD_APART, two_lungs(1, 3), two_lungs(1, 0)),
    "one value, any": (OWN, two_lungs(255, 255), lungs()),
    "one value of several": (replace(OWN, lung_values=(7,)), two_lungs(7, 8), two_lungs(1, 0)),
    "two values, sides unknown": (replace(OWN, lung_values=(5, 6)), two_lungs(6, 5), lungs()),
    "empty": (OWN, two_lungs(0, 0), two_lungs(0, 0)),
}


@pytest.mark.parametrize("name", LUNG_MASKS)
def test_lung_masks_come_in_the_study_s_values(name, source, tmp_path):
    data_set, labels, expected = LUNG_MASKS[name]
    prepared_scan(source, tmp_path)
    write_nifti(source.lung_mask[0], labels)
    record, mask = prepared_mask(source, tmp_path, data_set=data_set)
    np.testing.assert_array_equal(mask.load(), expected)
    assert mask.dtype == np.uint8
    assert mask.spacing_mm == open_volume(tmp_path / "scans" / "s1.b2nd").spacing_mm
    values, counts = np.unique(expected, return_counts=True)
    assert record == {"voxels": {str(v): int(n) for v, n in zip(values, counts, strict=True)}}


@pytest.mark.parametrize(
    ("meaning", "labels", "expected"),
    [
        ({1: 1, 2: 2}, two_lungs(1, 2), two_lungs(1, 2)),
        ({2: 1, 3: 2}, two_lungs(3, 2), two_lungs(2, 1)),
        ({1: 1}, two_lungs(1, 2), two_lungs(1, 0)),
        ({255: 2}, two_lungs(255, 254), two_lungs(2, 0)),
    ],
)
def test_lesion_masks_come_in_the_study_s_values(meaning, labels, expected, source, tmp_path):
    prepared_scan(source, tmp_path)
    write_nifti(source.lesion_mask[0], labels)
    data_set = replace(OWN, lesion_values=meaning)
    _, mask = prepared_mask(source, tmp_path, kind="lesions", data_set=data_set)
    np.testing.assert_array_equal(mask.load(), expected)


def test_a_transposed_mask_fits_its_transposed_scan(source, tmp_path):
    data_set = replace(OWN, transposed=True)
    write_nifti(source.files[0], chest()[:, 1:].transpose(0, 2, 1))
    write_nifti(source.lung_mask[0], lungs()[:, 1:].transpose(0, 2, 1))
    prepared_scan(source, tmp_path, transposed=True)
    _, mask = prepared_mask(source, tmp_path, data_set=data_set)
    np.testing.assert_array_equal(mask.load(), lungs()[:, 1:])


def test_a_mask_of_another_shape_is_named_with_both_shapes(source, tmp_path):
    prepared_scan(source, tmp_path)
    write_nifti(source.lung_mask[0], lungs()[1:])
    with pytest.raises(ScanError) as error:
        prepared_mask(source, tmp_path)
    assert (error.value.reason, error.value.file) == (
        "mask does not fit the scan",
        source.lung_mask[0],
    )
    assert error.value.detail == "(4, 40, 40), (5, 40, 40)"
    assert not (tmp_path / "lungs.b2nd").exists()


def test_masks_are_made_for_stored_scans_that_have_one(source, tmp_path):
    sources = {
        "s1": source,
        "s2": replace(source, scan_id="s2", lesion_mask=None),
        "s3": replace(source, scan_id="s3"),
    }
    assert list(prepare.with_mask(sources, {"s1", "s2"}, "lungs")) == ["s1", "s2"]
    assert list(prepare.with_mask(sources, {"s1", "s2"}, "lesions")) == ["s1"]
    inputs = prepare.mask_inputs(source, kind="lungs", scans=tmp_path, root=tmp_path)
    assert inputs == (*source.lung_mask, tmp_path / "s1.b2nd")


# Tables


def result(scan_id: str, **record) -> ScanResult:
    plain = {"slices": 2, "height": 40, "width": 30, "spacing_mm": None, "source_sha256": "ab"}
    return ScanResult(scan_id, Path(scan_id), plain | {"flags": [], "slice_hashes": []} | record)


def failure(scan_id: str, reason: str, **about) -> ScanResult:
    return ScanResult(scan_id, Path(scan_id), error=ScanFailure(reason, "", "", **about))


def sources_of(root: Path, *scan_ids: str, **about) -> dict[str, ScanSource]:
    return {s: ScanSource(s, f"p{s}", (root / s,), "covid", **about) for s in scan_ids}


def test_the_quarantine_names_each_failure_and_copy_once_in_a_fixed_order(tmp_path):
    sources = sources_of(tmp_path, "a", "b", "c", "d")
    for source in sources.values():
        source.files[0].mkdir()
    results = {
        "scan": [
            failure("d", "MemoryError"),
            failure("b", "empty file", file=tmp_path / "b" / "2.png", detail="no bytes"),
            result("a"),
        ],
        "lungs": [failure("a", "mask does not fit the scan", file=tmp_path / "a.nii")],
    }
    copies = [
        Finding("own", "c", "same pixels under two names", "100% of ...", quarantined=True),
        Finding("own", "a", "same scan in two data sets", "100% of ...", quarantined=False),
    ]
    for order in (1, -1):
        shuffled = {part: results[part][::order] for part in list(results)[::order]}
        table = prepare.quarantine_table(shuffled, copies[::order], sources, tmp_path)
        assert table.columns.tolist() == prepare.QUARANTINE_COLUMNS
        assert table.values.tolist() == [
            ["a", "lungs", "mask does not fit the scan", "a.nii", ""],
            ["b", "scan", "empty file", "b/2.png", "no bytes"],
            ["c", "scan", "same pixels under two names", "c", "100% of ..."],
            ["d", "scan", "MemoryError", "d", ""],
        ]


def test_an_empty_quarantine_has_its_columns(tmp_path):
    table = prepare.quarantine_table({"scan": [result("a")]}, [], {}, tmp_path)
    assert table.columns.tolist() == prepare.QUARANTINE_COLUMNS and table.empty


def test_the_quarantine_does_not_show_dicom_file_names(tmp_path):
    file = tmp_path / "s" / "Mustermann.dcm"
    file.parent.mkdir()
    write_dicom(file, np.zeros((4, 4), np.uint16))
    results = {"scan": [failure("s", "not CT", file=file)]}
    table = prepare.quarantine_table(results, [], sources_of(tmp_path, "s"), tmp_path)
    assert table["file"].tolist() == ["s, file 1 of 1 in name order"]


def manifest_of(results, sources, *, quarantined=(), shares=None) -> pd.DataFrame:
    return prepare.manifest_table(
        results, sources, quarantined=quarantined, shares=shares or {}, seed=0
    )


def test_the_manifest_has_one_row_per_usable_scan(tmp_path):
    sources = sources_of(
        tmp_path, "1", "2", "3", "4", split="test", attributes={"severity": "mild"}
    )
    results = [
        result("3", spacing_mm=[5.0, 0.70312512, 0.70312512], flags=["padding", "1 blank slices"]),
        result("1"),
        failure("2", "4-D"),
        result("4"),
    ]
    manifest = manifest_of(results, sources, quarantined={"4"})
    assert manifest.columns.tolist() == [*prepare.MANIFEST_COLUMNS, "severity"]
    assert manifest.values.tolist() == [
        ["1", "p1", "test", "covid", 2, 40, 30, "", "ab", "", "mild"],
        [
            *("3", "p3", "test", "covid", 2, 40, 30),
            *("5 0.7031 0.7031", "ab", "padding; 1 blank slices", "mild"),
        ],
    ]


def test_what_was_measured_is_not_overwritten_by_what_the_data_set_says(tmp_path):
    attributes = {"slices": "99", "flags": "none", "scanner": "A"}
    manifest = manifest_of([result("1")], sources_of(tmp_path, "1", attributes=attributes))
    assert manifest.columns.tolist() == [*prepare.MANIFEST_COLUMNS, "scanner"]
    assert manifest.loc[0, ["slices", "flags", "scanner"]].tolist() == [2, "", "A"]


def test_an_attribute_of_some_scans_is_empty_for_the_others(tmp_path):
    sources = sources_of(tmp_path, "1") | sources_of(tmp_path, "2", attributes={"severity": "03"})
    save_csv(manifest_of([result("1"), result("2")], sources), tmp_path / "manifest.csv")
    assert read_manifest(tmp_path)["severity"].tolist() == [None, "03"]


def test_unpublished_splits_are_drawn_by_patient(tmp_path):
    names = [f"{number:02d}" for number in range(40)]
    sources = {s: replace(v, patient_id=s[0]) for s, v in sources_of(tmp_path, *names).items()}
    shares = {"test": 0.25, "validation": 0.25}
    manifest = manifest_of(map(result, names), sources, shares=shares)
    assert manifest["split"].value_counts().to_dict() == {"train": 20, "test": 10, "validation": 10}
    assert (manifest.groupby("patient_id")["split"].nunique() == 1).all()
    again = manifest_of(map(result, names[::-1]), sources, shares=shares)
    pd.testing.assert_frame_equal(again, manifest)


def test_a_manifest_without_scans_can_be_written_and_read(tmp_path):
    manifest = manifest_of([failure("1", "4-D")], sources_of(tmp_path, "1"))
    save_csv(manifest, tmp_path / "manifest.csv")
    assert read_manifest(tmp_path).columns.tolist() == prepare.MANIFEST_COLUMNS


def test_findings_hold_the_listing_s_problems_and_remarks_on_scans(tmp_path):
    (tmp_path / "covid" / "empty").mkdir(parents=True)
    problems = [
        ListingProblem(Reason.SCAN_WITHOUT_SLICES, tmp_path / "covid" / "empty"),
        ListingProblem(Reason.FILE_MISSING, tmp_path / "scans.csv", "line 3"),
    ]
    sources = sources_of(tmp_path, "1", "2", split="test")
    sources |= {"2": replace(sources["2"], label=None)}
    manifest = manifest_of([result("1", flags=["padding"]), result("2")], sources)
    findings = prepare.preparation_findings("own", Listing([], problems), manifest, tmp_path)
    assert findings.columns.tolist() == [
        *("data_set", "scan_id", "reason", "detail"),
        "quarantined",
    ]
    assert findings.values.tolist() == [
        ["own", "", "listed file missing", "scans.csv line 3", False],
        ["own", "", "scan without slices", "covid/empty", False],
        ["own", "1", "mended while reading", "padding", False],
        ["own", "2", "no label", "", False],
    ]


# All together


@pytest.fixture
def phantom_like(tmp_path) -> Path:
    """Three scans in the layout of the phantom data set; the mask of the second is too short."""
    root = tmp_path / "raw"
    rows = ["scan_id,patient_id,label,split,scanner,slices"]
    for number, split in enumerate(("train", "validation", "test"), start=1):
        folder = root / "scans" / f"000{number}"
        folder.mkdir(parents=True)
        write_nifti(folder / "scan.nii.gz", chest(seed=number))
        write_nifti(folder / "lungs.nii.gz", lungs()[number == 2 :])
        rows.append(f"000{number},00{number},{'covid' if number < 3 else ''},{split},A,99")
    (root / "scans.csv").write_text("\n".join(rows) + "\n")
    return root


def test_a_scan_stays_when_its_mask_does_not_fit(phantom_like, tmp_path):
    quarantine, manifest = prepare_data_set("phantom", phantom_like, tmp_path / "prepared")
    (row,) = quarantine.to_dict("records")
    assert row == {
        "scan_id": "0002",
        "left_out": "lungs",
        "reason": "mask does not fit the scan",
        "file": "scans/0002/lungs.nii.gz",
        "detail": "(4, 40, 40), (5, 40, 40)",
    }
    assert manifest["scan_id"].tolist() == ["0001", "0002", "0003"]
    assert manifest["slices"].tolist() == [5, 5, 5]
    folders = {
        part: sorted((tmp_path / "prepared" / part).glob("*.b2nd")) for part in ("scans", "lungs")
    }
    assert [len(files) for files in folders.values()] == [3, 2]
    read = read_manifest(tmp_path / "prepared")
    assert read["scan_id"].tolist() == ["0001", "0002", "0003"]
    assert read["patient_id"].tolist() == ["001", "002", "003"]
    assert read["label"].tolist() == ["covid", "covid", None]


def test_hashes_are_the_same_from_the_results_and_from_the_store(phantom_like, tmp_path):
    scans = tmp_path / "prepared" / "scans"
    prepare_data_set("phantom", phantom_like, tmp_path / "prepared")
    stored = integrity.stored_slice_hashes(scans, "phantom")
    records = {
        path.stem: integrity.inspect_scan(open_volume(path).scan(), path)
        for path in scans.glob("*.b2nd")
    }
    results = [result(scan_id, **record) for scan_id, record in records.items()]
    assert stored == prepare.slice_hashes([*results, failure("x", "4-D")], "phantom")
    assert all(len(set(hashes)) == 5 for hashes in stored.values())


def test_preparing_twice_changes_no_byte(phantom_like, tmp_path):
    prepare_data_set("phantom", phantom_like, tmp_path / "prepared")
    once = contents(tmp_path / "prepared")
    prepare_data_set("phantom", phantom_like, tmp_path / "prepared")
    assert contents(tmp_path / "prepared") == once
    prepare_data_set("phantom", phantom_like, tmp_path / "elsewhere")
    assert contents(tmp_path / "elsewhere") == once
