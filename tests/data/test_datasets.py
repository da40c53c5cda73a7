"""Every adapter on a miniature of its published layout, and the real trees where present."""

import json
import os
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.data.datasets import (
    COVID,
    DATA_SETS,
    LABELS,
    NON_COVID,
    NON_INFORMATIVE,
    NORMAL,
    PNEUMONIA,
    DataSetMissing,
    DataSetProblem,
    Reason,
    covidx_name,
    fixed_split,
    list_scans,
    read_covidx_list,
    read_name_list,
)
from lib.data.datasets.folders import inside, is_safe_id, natural_order, safe_id
from lib.data.splits import SPLITS, TEST, TRAIN, VALIDATION


def touch(root: Path, *names: str) -> Path:
    """Make empty files; nothing that lists a data set may open a picture."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def write(root: Path, name: str, text: str) -> Path:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")
    return root


def by_id(listing) -> dict:
    return {scan.scan_id: scan for scan in listing.scans}


def reasons(listing) -> Counter:
    return Counter(problem.reason for problem in listing.problems)


def names(files) -> list[str]:
    return [file.name for file in files]


# What holds for every data set


@pytest.mark.parametrize("name", DATA_SETS)
@pytest.mark.parametrize("folder", [".", "absent"])
def test_a_missing_data_set_is_one_sentence(name, folder, tmp_path):
    root = tmp_path / folder
    with pytest.raises(DataSetMissing) as error:
        list_scans(name, root)
    message, data_set = str(error.value), DATA_SETS[name]
    assert all(part in message for part in (str(root), data_set.where, data_set.layout))
    assert "\n" not in message and message.endswith(".")


def test_an_unknown_data_set_is_named(tmp_path):
    with pytest.raises(DataSetProblem, match="no data set 'mosmd', only phantom"):
        list_scans("mosmd", tmp_path)


@pytest.mark.parametrize("name", DATA_SETS)
def test_mask_values_map_to_the_study_s_masks(name):
    data_set = DATA_SETS[name]
    assert data_set.name == name
    assert 0 not in data_set.lung_values and 0 not in data_set.lesion_values
    assert set(data_set.lesion_values.values()) <= {1, 2}


# phantom


PHANTOM_HEADER = "scan_id,patient_id,label,split,scanner\n"


def phantom(root: Path, rows: str) -> Path:
    touch(root, *(f"scans/p1/{name}.nii.gz" for name in ("scan", "lungs", "lesions")))
    touch(root, "scans/p2/slices/0.jpg", "scans/p1.json", "scans/.partial/p5~x/p5/scan.nii.gz")
    return write(root, "scans.csv", PHANTOM_HEADER + rows)


@pytest.mark.parametrize("name", ["phantom", "phantom-8-bit"])
def test_phantom(name, tmp_path):
    rows = (
        "p1,a,covid,train,S1\np2,a,pneumonia,validation,S2\n"
        "p3,b,normal,test,S1\np4,b,normal,test,S1\n"
    )
    touch(tmp_path, "scans/p4/lungs.nii.gz", "scans/p9/scan.nii.gz")
    listing = list_scans(name, phantom(tmp_path, rows))
    volume, pictures = listing.scans
    assert (volume.patient_id, volume.label, volume.split) == ("a", COVID, TRAIN)
    assert volume.files == (tmp_path / "scans/p1/scan.nii.gz",)
    assert volume.lung_mask == (tmp_path / "scans/p1/lungs.nii.gz",)
    assert volume.lesion_mask == (tmp_path / "scans/p1/lesions.nii.gz",)
    assert volume.attributes == {"scanner": "S1"}
    assert pictures.files == (tmp_path / "scans/p2/slices",) and pictures.lung_mask is None
    assert [(p.reason, p.detail or p.file.name) for p in listing.problems] == [
        (Reason.LABEL_WITHOUT_SCAN, "p3"),
        (Reason.LABEL_WITHOUT_SCAN, "p4"),
        (Reason.SCAN_WITHOUT_LABEL, "p9"),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("../../etc/passwd,a,covid,train,S\n", "line 2: scan_id may hold"),
        ("p1,a,covd,train,S\n", "line 2: unknown label 'covd'"),
        ("p1,a,covid,dev,S\n", "line 2: unknown split 'dev'"),
        ("p1,a,covid,train\n", "line 2: 5 values expected"),
        ("p1,a,covid,train,S\np1,b,covid,train,S\n", "2 scans .* have the id p1"),
    ],
)
def test_phantom_table_faults(rows, message, tmp_path):
    with pytest.raises(DataSetProblem, match=message):
        list_scans("phantom", phantom(tmp_path, rows))


# COV19-CT-DB


def test_cov19_ct_db_2021(tmp_path):
    touch(
        tmp_path,
        "train/covid/ct_scan_0/0.jpg",
        "train/covid/._ct_scan_0",
        "train/covid/.DS_Store",
        "train/non_covid/ct_scan_0/0.jpg",
        "train/non_covid/ct_scan1073/10.jpg",  # without the second underscore
        "train/non_covid/ct_scan_5/._0.jpg",  # macOS shadow, no slice
        "train/other/ct_scan_1/0.jpg",
        "val/non-covid/ct_scan_3/0.jpg",
        "test/subset1/0b3c-11/0.jpg",
        "test/subset8/0b3c-12/0.jpg",
        "__MACOSX/train/covid/ct_scan_0/0.jpg",
    )
    listing = list_scans("cov19-ct-db-2021", tmp_path)
    assert {s.scan_id: (s.label, s.split) for s in listing.scans} == {
        "test-subset1-0b3c-11": (None, TEST),
        "test-subset8-0b3c-12": (None, TEST),
        "train-covid-ct_scan_0": (COVID, TRAIN),
        "train-non-covid-ct_scan1073": (NON_COVID, TRAIN),
        "train-non-covid-ct_scan_0": (NON_COVID, TRAIN),
        "validation-non-covid-ct_scan_3": (NON_COVID, VALIDATION),
    }
    assert by_id(listing)["train-covid-ct_scan_0"].files == (tmp_path / "train/covid/ct_scan_0",)
    assert reasons(listing) == {Reason.SCAN_WITHOUT_SLICES: 1, Reason.UNRECOGNISED: 1}


@pytest.mark.parametrize("validation", ["val", "valid", "validation", "Validation"])
@pytest.mark.parametrize("non_covid", ["non-covid", "non_covid", "Non-COVID"])
def test_cov19_ct_db_spellings(validation, non_covid, tmp_path):
    touch(tmp_path, f"COV19-CT-DB/{validation}/{non_covid}/ct_scan_7/0.jpg")
    (scan,) = list_scans("cov19-ct-db-2022", tmp_path).scans
    assert (scan.scan_id, scan.split) == ("validation-non-covid-ct_scan_7", VALIDATION)


def cov19_2022(root: Path, table: str) -> Path:
    touch(
        root,
        "train/covid/ct_scan_0/0.jpg",
        "train/covid/ct_scan12/0.jpg",
        "train/non-covid/ct_scan_1/0.jpg",
        "test/test_ct_scan_0/0.jpg",
        "test/ct_scan_1/0.jpg",
    )
    return write(root, "train_partition_covid_categories.csv", table)


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_cov19_ct_db_2022_severity(mark, tmp_path):
    table = mark + "Name;Category\nct_scan_0;1\nct_scan_12;4\nct_scan_1;2\n"
    listing = list_scans("cov19-ct-db-2022", cov19_2022(tmp_path, table))
    scans = by_id(listing)
    assert scans["train-covid-ct_scan_0"].attributes == {"severity": "mild"}
    assert scans["train-covid-ct_scan12"].attributes == {"severity": "critical"}
    assert scans["train-non-covid-ct_scan_1"].attributes == {}  # number 1 of another class
    assert {s.scan_id for s in listing.scans if s.split == TEST} == {
        "test-test_ct_scan_0",
        "test-ct_scan_1",
    }
    (problem,) = listing.problems
    assert (problem.reason, problem.detail) == (Reason.LABEL_WITHOUT_SCAN, "ct_scan_1")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("Name,Category\nct_scan_0,1\n", "must be separated by ';'"),
        ("Name;Severity\nct_scan_0;1\n", "lacks the column Category; it has Name, Severity"),
        ("", "lacks the column Name, Category; it has none"),
        ("Name;Category\nct_scan_0;5\n", "line 2: Category is '5', expected 1 to 4"),
        ("Name;Category\nct_scan_0;1\nct_scan_0;2\n", "line 3: .*listed twice"),
    ],
)
def test_cov19_ct_db_severity_faults(table, message, tmp_path):
    with pytest.raises(DataSetProblem, match=message):
        list_scans("cov19-ct-db-2022", cov19_2022(tmp_path, table))


def test_a_table_in_another_encoding_is_named(tmp_path):
    cov19_2022(tmp_path, "")
    (tmp_path / "train_partition_covid_categories.csv").write_bytes(b"Name;Category\nM\xfcller;1")
    with pytest.raises(DataSetProblem, match=r"categories\.csv is not UTF-8 text"):
        list_scans("cov19-ct-db-2022", tmp_path)


def test_no_slice_is_asked_for_its_size_or_date(tmp_path, monkeypatch):
    touch(tmp_path, *(f"train/covid/ct_scan_0/{k}.jpg" for k in range(20)))
    asked = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda p, **k: asked.append(str(p)) or stat(p, **k))
    list_scans("cov19-ct-db-2022", tmp_path)
    assert asked and not [name for name in asked if name.endswith(".jpg")]


# MosMedData


def mosmed_json(**studies: list[str]) -> str:
    """The published form {class: {study: {study: [files]}}}."""
    return json.dumps(
        {c.replace("_", "-"): {s: {s: [f"{s}.nii.gz"]} for s in ss} for c, ss in studies.items()}
    )


def mosmed(root: Path, prefix: str = "COVID19_1110/studies/") -> Path:
    touch(
        root,
        f"{prefix}CT-0/study_0001.nii.gz",
        f"{prefix}CT-0/._study_0001.nii.gz",
        f"{prefix}CT-1/study_0255.nii.gz",
        f"{prefix}CT-4/study_1110.nii.gz",
        f"{prefix}../masks/study_0255_mask.nii.gz" if prefix else "masks/study_0255_mask.nii.gz",
    )
    write(root, "nii_train.json", mosmed_json(CT_0=["study_0001"], CT_1=["study_0255"]))
    write(root, "nii_test.json", mosmed_json(CT_4=["study_1110"]))
    write(root, "splits/nii_png_train.json", mosmed_json(CT_0=["study_0001"], CT_4=["study_1110"]))
    return write(root, "splits/nii_png_test.json", mosmed_json(CT_1=["study_0255"]))


@pytest.mark.parametrize("prefix", ["", "studies/", "COVID19_1110/studies/"])
@pytest.mark.parametrize(
    ("published_split", "splits"),
    [("nii", [TRAIN, TRAIN, TEST]), ("png", [TRAIN, TEST, TRAIN])],
)
def test_mosmed(prefix, published_split, splits, tmp_path):
    if prefix:
        (tmp_path / prefix).mkdir(parents=True)
    listing = list_scans("mosmed", mosmed(tmp_path, prefix), published_split=published_split)
    assert [s.scan_id for s in listing.scans] == ["study_0001", "study_0255", "study_1110"]
    assert [s.split for s in listing.scans] == splits
    assert [s.label for s in listing.scans] == [NON_COVID, COVID, COVID]
    assert [s.attributes["severity"] for s in listing.scans] == ["CT-0", "CT-1", "CT-4"]
    masks = [s.lesion_mask and names(s.lesion_mask) for s in listing.scans]
    assert masks == [None, ["study_0255_mask.nii.gz"], None]
    assert not listing.problems


def test_mosmed_as_pictures(tmp_path):
    touch(tmp_path, "CT-0/study_0001/study_0001/0000.png", "CT-2/0939/0939/0000.png")
    touch(tmp_path, "CT-1/study_0300/study_0300/notes.txt")
    listing = list_scans("mosmed", tmp_path)
    assert {s.scan_id: s.files for s in listing.scans} == {
        "study_0001": (tmp_path / "CT-0/study_0001/study_0001",),
        "study_0939": (tmp_path / "CT-2/0939/0939",),
    }
    assert reasons(listing) == {Reason.SCAN_WITHOUT_SLICES: 1, Reason.SPLIT_MISSING: 1}


def test_mosmed_disagreements_are_reported(tmp_path):
    touch(mosmed(tmp_path, ""), "CT-1/study_0002.nii.gz", "masks/study_0400_mask.nii.gz")
    write(tmp_path, "nii_test.json", mosmed_json(CT_4=["study_1110"], CT_3=["study_1100"]))
    listing = list_scans("mosmed", tmp_path)
    assert {(p.reason, p.detail or p.file.name) for p in listing.problems} == {
        (Reason.WRONG_CLASS_FOLDER, "study_0002.nii.gz"),
        (Reason.SCAN_WITHOUT_SPLIT, "study_0002"),
        (Reason.FILE_MISSING, "study_1100"),
        (Reason.MASK_WITHOUT_SCAN, "study_0400_mask.nii.gz"),
    }


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("nii_test.json", "{", "is not JSON of the form"),
        ("nii_test.json", "[]", "is not JSON of the form"),
        ("nii_test.json", '{"CT-0": {"../x": {}}}', "names a study that is not"),
        ("nii_test.json", mosmed_json(CT_0=["study_0001"]), "share studies"),
    ],
)
def test_mosmed_split_faults(file, text, message, tmp_path):
    write(mosmed(tmp_path, ""), file, text)
    with pytest.raises(DataSetProblem, match=message):
        list_scans("mosmed", tmp_path)


def test_mosmed_split_must_be_one_of_two_and_complete(tmp_path):
    mosmed(tmp_path, "")
    with pytest.raises(DataSetProblem, match="published_split is 'both'"):
        list_scans("mosmed", tmp_path, published_split="both")
    (tmp_path / "nii_test.json").unlink()
    with pytest.raises(DataSetProblem, match=r"needs both nii_train\.json and"):
        list_scans("mosmed", tmp_path)


def test_mosmed_never_looks_above_its_root(tmp_path):
    touch(tmp_path, "masks/study_0255_mask.nii.gz", "root/CT-1/study_0255.nii.gz")
    (scan,) = list_scans("mosmed", tmp_path / "root").scans
    assert scan.lesion_mask is None


# COVIDx-CT


COVIDX_LISTS = {
    "train": "NCP_96_1328_0035.png 2 9 94 512 405\nNCP_96_1328_0002.png 2 9 94 512 405\n",
    "val": "CP_7_30_0001.png 1 0 0 512 512\nCP_7_31_0001.png 1 0 0 512 512\n",
    "test": "Normal_5_9_0000.png 0 61 113 435 393\nNormal_5_9_0001.png 0 61 113 435 393\n",
}


def covidx(root: Path, **lists: str) -> Path:
    for split, text in (COVIDX_LISTS | lists).items():
        write(root, f"{split}_COVIDx_CT-1.txt", text)
    return root


@pytest.mark.parametrize("folder", ["", "images/"])
def test_covidx_ct(folder, tmp_path):
    pictures = ["NCP_96_1328_0002", "NCP_96_1328_0035", "NCP_96_1328_0099", "Normal_5_9_0000"]
    touch(covidx(tmp_path), *(f"{folder}{name}.png" for name in [*pictures, "CP_7_30_0001"]))
    listing = list_scans("covidx-ct", tmp_path)
    assert {s.scan_id: (s.patient_id, s.label, s.split) for s in listing.scans} == {
        "CP_7_30": ("CP_7", PNEUMONIA, VALIDATION),
        "NCP_96_1328": ("NCP_96", COVID, TRAIN),
        "Normal_5_9": ("Normal_5", NORMAL, TEST),
    }
    files = by_id(listing)["NCP_96_1328"].files  # listed slices only, in order
    assert names(files) == ["NCP_96_1328_0002.png", "NCP_96_1328_0035.png"]
    assert all(file.is_file() for file in files)
    assert [p.detail for p in listing.problems] == [
        "1 of 1 slices of CP_7_31",
        "1 of 2 slices of Normal_5_9",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../NCP_1_2_0003.png 2 0 0 5 5", "line 1: not 'name class"),
        ("NCP_1_2_0003.png,2,0,0,5,5", "line 1: not 'name class"),
        ("NCP_1_2_0003.png 2 0 0 5", "line 1: not 'name class"),
        ("NCP_1_2_0003.png 0 0 0 5 5", "line 1: NCP is class 2"),
        ("NCP_96_1328_0001.png 2 0 0 5 5", "NCP_96_1328 is listed under train and test"),
        ("CP_1_2_0003.png 1 0 0 5 5\nCP_1_2_0003.png 1 0 0 5 5", "lists a slice of CP_1_2 twice"),
    ],
)
def test_covidx_list_faults(line, message, tmp_path):
    touch(covidx(tmp_path, test=line), "NCP_96_1328_0035.png")
    with pytest.raises(DataSetProblem, match=message):
        list_scans("covidx-ct", tmp_path)


def test_covidx_without_a_list(tmp_path):
    touch(covidx(tmp_path), "NCP_96_1328_0035.png", "NCP_96_1328_0002.png")
    for split in ("val", "test"):
        (tmp_path / f"{split}_COVIDx_CT-1.txt").unlink()
    assert reasons(list_scans("covidx-ct", tmp_path)) == {Reason.SPLIT_MISSING: 2}


def test_covidx_name_of_paper_002_s_names():
    assert covidx_name("0_1728_1013_0023.png") == "Normal_1728_1013_0023.png"
    assert covidx_name("1_7_30_0001.png") == "CP_7_30_0001.png"
    assert covidx_name("2_91_1318_0062.png") == "NCP_91_1318_0062.png"
    with pytest.raises(ValueError, match="is not <class>"):
        covidx_name("3_91_1318_0062.png")


# CNCB lesions


@pytest.mark.parametrize(
    ("pictures", "masks"),
    [
        (["image/0/115.jpg", "image/9/73.jpg"], ["mask/0/115.png", "mask/9/74.png"]),
        (["imgs/0_115.jpg", "imgs/9_73.png"], ["masks/0_115.png", "masks/9_74.png"]),
        (["ct_lesion_seg/image/0/115.jpg", "ct_lesion_seg/image/9/73.jpg"],
         ["ct_lesion_seg/mask/0/115.png", "ct_lesion_seg/mask/9/74.png"]),
    ],
    ids=["published", "flat", "wrapped"],
)  # fmt: skip
def test_cncb_lesions(pictures, masks, tmp_path):
    touch(tmp_path, *pictures, *masks)
    write(tmp_path, "splits/train_split_segmentation.txt", "0_115.jpg\n0_23.jpg\n")
    write(tmp_path, "splits/test_split_segmentation.txt", "9_73.jpg\n")
    listing = list_scans("cncb-lesions", tmp_path)
    paired, unpaired = listing.scans
    assert (paired.scan_id, paired.patient_id, paired.split) == ("0_115", "patient-0", TRAIN)
    assert paired.files == (tmp_path / pictures[0],)
    assert paired.lung_mask == paired.lesion_mask == (tmp_path / masks[0],)
    assert (unpaired.scan_id, unpaired.split, unpaired.lung_mask) == ("9_73", TEST, None)
    assert reasons(listing) == {
        Reason.SCAN_WITHOUT_MASK: 1,
        Reason.MASK_WITHOUT_SCAN: 1,
        Reason.FILE_MISSING: 1,
    }


def test_cncb_lists_belong_together(tmp_path):
    touch(tmp_path, "imgs/0_1.jpg", "masks/0_1.png")
    write(tmp_path, "train_split_segmentation.txt", "0_1.jpg\n")
    with pytest.raises(DataSetProblem, match=r"lacks test_split_segmentation\.txt"):
        list_scans("cncb-lesions", tmp_path)
    write(tmp_path, "test_split_segmentation.txt", "0_1.jpg\n")
    with pytest.raises(DataSetProblem, match="name a slice twice"):
        list_scans("cncb-lesions", tmp_path)


# iCTCF


@pytest.mark.parametrize("prefix", ["", "Original CT Scans/"])
def test_ictcf_slices(prefix, tmp_path):
    touch(
        tmp_path,
        f"{prefix}NiCT/NiCT1.jpg",
        f"{prefix}nCT/nCT10.jpg",
        f"{prefix}nCT/0_nCT11.jpg",
        f"{prefix}nCT/Thumbs.db",
        f"{prefix}pCT/pCT1088.jpg",
        f"{prefix}pCT/cover.jpg",
    )
    write(tmp_path, "train_ictcf.txt", "2_pCT1088.jpg\n0_nCT12.jpg\n")
    write(tmp_path, "test_ictcf.txt", "0_nCT11.jpg\n")
    listing = list_scans("ictcf", tmp_path)
    assert {s.scan_id: (s.label, s.split) for s in listing.scans} == {
        "NiCT1": (NON_INFORMATIVE, None),
        "nCT10": (NON_COVID, None),
        "nCT11": (NON_COVID, TEST),
        "pCT1088": (COVID, TRAIN),
    }
    assert {(p.reason, p.detail) for p in listing.problems} == {
        (Reason.UNRECOGNISED, ""),
        (Reason.FILE_MISSING, "nCT12"),
        (Reason.SCAN_WITHOUT_SPLIT, "nCT10"),
    }


def test_ictcf_patients(tmp_path):
    slices = ["IMG-0001-00002.jpg", "IMG-0001-00010.jpg", "IMG-0002-00001.jpg"]
    touch(tmp_path, *(f"Patient 12/CT/{name}" for name in slices), "Patient 13/notes.txt")
    listing = list_scans("ictcf", tmp_path)
    assert [(s.scan_id, s.patient_id, names(s.files)) for s in listing.scans] == [
        ("patient-12-series-0001", "patient-12", slices[:2]),
        ("patient-12-series-0002", "patient-12", slices[2:]),
    ]
    assert reasons(listing) == {Reason.SCAN_WITHOUT_SLICES: 1}


# finding-lungs


def test_finding_lungs(tmp_path):
    touch(
        tmp_path,
        "2d_images/ID_0000_Z_0142.tif",
        "2d_masks/ID_0000_Z_0142.tif",
        "2d_images/ID_0001_Z_0146.tif",
        "2d_images/readme.tif",
        "2d_masks/ID_0002_Z_0001.tif",
        "3d_images/IMG_0001.nii.gz",
        "3d_images/MASK_0001.nii.gz",
    )
    listing = list_scans("finding-lungs", tmp_path)
    masks = {s.scan_id: s.lung_mask and names(s.lung_mask) for s in listing.scans}
    assert masks == {
        "ID_0000_Z_0142": ["ID_0000_Z_0142.tif"],
        "ID_0001_Z_0146": None,
        "IMG_0001": ["MASK_0001.nii.gz"],
    }
    scans = by_id(listing)
    assert scans["IMG_0001"].patient_id == scans["ID_0001_Z_0146"].patient_id == "ID_0001"
    assert scans["IMG_0001"].split == scans["ID_0001_Z_0146"].split == fixed_split("ID_0001")
    assert reasons(listing) == {
        Reason.SCAN_WITHOUT_MASK: 1,
        Reason.MASK_WITHOUT_SCAN: 1,
        Reason.UNRECOGNISED: 1,
    }


def test_the_fixed_split_never_changes():
    held_out = {VALIDATION: {20, 49, 57}, TEST: {2, 15, 25, 27, 29, 32, 38, 55}}
    for part, numbers in held_out.items():
        assert {k for k in range(60) if fixed_split(f"ID_{k:04d}") == part} == numbers
    counts = Counter(fixed_split(f"ID_{k:04d}") for k in range(3000))
    shares = [counts[part] / 3000 for part in SPLITS]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.03)


# COVID-CT-MD, COVID-CT, COVID-SemiSeg


def test_covid_ct_md(tmp_path):
    touch(
        tmp_path,
        "COVID-19 subjects/P001/98C14734-ASSH_101.dcm",
        "Cap subjects/cap001/1",
        "Normal subjects/normal001/IM001.dcm",
        "Normal subjects/normal002/.DS_Store",
        "Index.csv",
    )
    listing = list_scans("covid-ct-md", tmp_path)
    assert {s.scan_id: s.label for s in listing.scans} == {
        "P001": COVID,
        "cap001": PNEUMONIA,
        "normal001": NORMAL,
    }
    assert reasons(listing) == {Reason.SCAN_WITHOUT_SLICES: 1}


@pytest.mark.parametrize(
    ("folder", "pictures", "patient"),
    [
        (
            "CT_COVID",
            ["2020.03.19.20038539-p10-61.png", "2020.03.19.20038539-p9-56%3.png"],
            "covid-2020.03.19.20038539",
        ),
        (
            "CT_COVID",
            ["PIIS0140673620301549_0%0.png", "PIIS0140673620301549_1%0.png"],
            "covid-PIIS0140673620301549",
        ),
        ("CT_COVID", ["bmj.m606.full-p4-22%1.png"], "covid-bmj.m606.full"),
        ("CT_COVID", ["kjr-21-e24-p1-21.png"], "covid-kjr-21-e24"),
        ("CT_COVID", ["a b (2)%1.png"], "covid-a-b-2"),
        ("CT_NonCOVID", ["25%1.jpg", "25%3.jpg"], "non-covid-25"),
        ("CT_NonCOVID", ["1030.png"], "non-covid-1030"),
    ],
)
def test_covid_ct_groups_by_paper(folder, pictures, patient, tmp_path):
    touch(tmp_path, f"train/{folder}/{pictures[0]}", f"val/{folder}/{pictures[-1]}x.txt")
    touch(tmp_path, *(f"val/{folder}/{name}" for name in pictures[1:]))
    listing = list_scans("covid-ct", tmp_path)
    assert len(listing.scans) == len(pictures)
    assert {scan.patient_id for scan in listing.scans} == {patient}


def test_covid_ct_ids_tell_similar_names_apart(tmp_path):
    touch(tmp_path, *(f"train/CT_NonCOVID/{name}" for name in ("1%1.jpg", "1-1.jpg", "1 1.jpg")))
    ids = [scan.scan_id for scan in list_scans("covid-ct", tmp_path).scans]
    assert len(set(ids)) == 3 and all(map(is_safe_id, ids))
    assert {scan_id[:14] for scan_id in ids} == {"non-covid-1-1-"}


def test_covid_semiseg_with_and_without_the_published_tree(tmp_path):
    doctor = "TrainingSet/LungInfection-Train/Doctor-label"
    pseudo = "TrainingSet/LungInfection-Train/Pseudo-label"
    touch(tmp_path / "flat", "Imgs/0.jpg", "Imgs/1.jpg", "GT/0.png", "GT/2.png", "Edge/0.png")
    touch(tmp_path / "tree", *(f"Dataset/{doctor}/{f}" for f in ("Imgs/0.jpg", "GT/0.png")))
    touch(tmp_path / "tree", *(f"Dataset/{pseudo}/{f}" for f in ("Imgs/0.jpg", "GT/0.png")))
    touch(tmp_path / "tree", "Dataset/TestingSet/LungInfection-Test/Imgs/0.jpg")
    touch(tmp_path / "tree", "Dataset/TestingSet/LungInfection-Test/GT/0.png")
    flat = list_scans("covid-semiseg", tmp_path / "flat")
    assert [(s.scan_id, s.split, s.label) for s in flat.scans] == [
        ("slice-0", None, COVID),
        ("slice-1", None, COVID),
    ]
    assert flat.scans[0].lesion_mask == (tmp_path / "flat/GT/0.png",)
    assert reasons(flat) == {Reason.SCAN_WITHOUT_MASK: 1, Reason.MASK_WITHOUT_SCAN: 1}
    tree = list_scans("covid-semiseg", tmp_path / "tree")
    assert [(s.scan_id, s.split) for s in tree.scans] == [("test-0", TEST), ("train-0", TRAIN)]


# A user's own data


def own(root: Path, table: str) -> Path:
    touch(root, "a/Doe_Jane.nii.gz", "b/0.png", "b/1.png", "masks/l.nii.gz")
    return write(root, "scans.csv", table)


def test_own_table(tmp_path):
    table = (
        "\ufeffpath,label,patient_id,split,lung_mask,lesion_mask\n"
        "a/Doe_Jane.nii.gz,COVID,Doe,train,masks/l.nii.gz,\n"
        "b,non_covid,Doe,val,,masks/gone.nii.gz\n"
        "c.nii.gz,covid,,,,\n"
    )
    listing = list_scans("own", own(tmp_path, table))
    volume = next(s for s in listing.scans if s.label == COVID)
    pictures = next(s for s in listing.scans if s.label == NON_COVID)
    assert volume.files == (tmp_path / "a/Doe_Jane.nii.gz",) and volume.split == TRAIN
    assert volume.lung_mask == (tmp_path / "masks/l.nii.gz",) and volume.lesion_mask is None
    assert pictures.files == (tmp_path / "b",) and pictures.split == VALIDATION
    assert pictures.lesion_mask is None
    assert volume.patient_id == pictures.patient_id
    shown = f"{volume.scan_id} {volume.patient_id} {listing.problems}"
    assert "Doe" not in shown and "Jane" not in shown
    assert [(p.reason, p.detail) for p in listing.problems] == [
        (Reason.FILE_MISSING, "scans.csv, line 3, lesion_mask"),
        (Reason.FILE_MISSING, "scans.csv, line 4, path"),
    ]


def test_own_ids_are_stable_and_follow_a_given_scan_id(tmp_path):
    (first,) = list_scans("own", own(tmp_path, "path,label,scan_id\nb,covid,x1\n")).scans
    (moved,) = list_scans("own", own(tmp_path, "path,label,scan_id\na,covid,x1\n")).scans
    assert first.scan_id == moved.scan_id == "scan-ec31682fde56"  # SHA-256 of x1
    assert first.patient_id == "patient-ec31682fde56"


def test_own_folders(tmp_path):
    touch(tmp_path, "covid/Doe/0.dcm", "covid/Roe.nii.gz", "non-covid/Doe/0.dcm", "covid/.x.nii.gz")
    listing = list_scans("own", tmp_path)
    found = {(scan.label, scan.files[0].name) for scan in listing.scans}
    assert found == {(COVID, "Doe"), (COVID, "Roe.nii.gz"), (NON_COVID, "Doe")}
    assert not any(re.search("[DR]oe", scan.scan_id + scan.patient_id) for scan in listing.scans)
    touch(tmp_path, "unsorted/x.nii.gz")
    with pytest.raises(DataSetProblem, match="unknown label 'unsorted', expected covid, non-covid"):
        list_scans("own", tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("path;label\nb;covid\n", "must be separated by ','"),
        ("file,label\nb,covid\n", "lacks the column path; it has file, label"),
        ("path,label\nb,sick\n", "line 2: unknown label 'sick'"),
        ("path,label,split\nb,covid,dev\n", "line 2: unknown split 'dev'"),
        ("path,label\nb,covid,1\n", "line 2: 2 values expected"),
        ("path,label\nb,covid\nb,covid\n", "line 3: the scan of scans.csv, line 2 again"),
        ("path,label\n../b,covid\n", "line 2: the path must lie inside"),
        ("path,label\na/../../b,covid\n", "line 2: the path must lie inside"),
        ("path,label\na/../b,covid\n", "line 2: the path must lie inside"),
        ("path,label\na\\..\\..\\b,covid\n", "line 2: the path must lie inside"),
        ("path,label\n/etc/passwd,covid\n", "line 2: the path must lie inside"),
        ("path,label\nC:\\b,covid\n", "line 2: the path must lie inside"),
        ("path,label\n,covid\n", "line 2: the path must lie inside"),
        ("path,label,lung_mask\nb,covid,../b\n", "line 2: the path must lie inside"),
        ("path,label\nout/x,covid\n", "line 2: the path must lie inside"),
    ],
)
def test_own_table_faults(table, message, tmp_path):
    root = own(touch(tmp_path, "x") / "root", table)
    (root / "out").symlink_to(tmp_path)
    with pytest.raises(DataSetProblem, match=message):
        list_scans("own", root)


# Names


@given(st.text(alphabet="ab/\\.:\0 ", max_size=12))
def test_no_name_leads_outside(name):
    root = Path("/data/raw/set")
    try:
        path = inside(root, name, "t")
    except DataSetProblem:
        return
    assert ".." not in path.parts and path.is_relative_to(root) and path != root


@given(st.text(max_size=20))
def test_safe_ids_are_safe_and_settled(text):
    made = safe_id(text)
    assert made == "" or re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", made)
    assert safe_id(made) == made


@given(st.lists(st.integers(0, 10**6), unique=True))
def test_natural_order_is_by_number(numbers):
    paths = sorted((Path(f"{n}.jpg") for n in numbers), key=natural_order)
    assert all(int(a.stem) < int(b.stem) for a, b in pairwise(paths))


@pytest.mark.parametrize("line", ["a/b.jpg", "..", "..\\b.jpg", "/etc/passwd"])
def test_a_name_list_holds_no_paths(line, tmp_path):
    write(tmp_path, "list.txt", f"\ufeffok.jpg\n\n  two.jpg \n{line}\n")
    with pytest.raises(DataSetProblem, match="line 4: a file name without folders"):
        read_name_list(tmp_path / "list.txt")
    write(tmp_path, "list.txt", "\ufeffok.jpg\n\n  two.jpg \n")
    assert read_name_list(tmp_path / "list.txt") == ["ok.jpg", "two.jpg"]


# Real data


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "folder", "labels"),
    [
        ("finding-lungs", "finding-lungs", {None}),
        ("covid-ct-md", "covid-ct-md", {COVID, PNEUMONIA, NORMAL}),
        ("covid-ct", "covid-ct", {COVID, NON_COVID}),
        ("covid-semiseg", "covid-semiseg", {COVID}),
        ("cov19-ct-db-2022", "cov19-ct-db-sample", {COVID}),
    ],
)
def test_real_trees(name, folder, labels, real_data):
    listing = list_scans(name, real_data / folder)
    ids = [scan.scan_id for scan in listing.scans]
    assert not listing.problems
    assert ids == sorted(set(ids)) and all(map(is_safe_id, ids))
    assert {scan.label for scan in listing.scans} == labels
    for scan in listing.scans:
        assert all(
            p.exists() for p in (*scan.files, *(scan.lung_mask or ()), *(scan.lesion_mask or ()))
        )
        assert (scan.label is None or scan.label in LABELS) and scan.split in (None, *SPLITS)


@pytest.mark.real
def test_every_real_picture_is_listed(real_data):
    counts = {
        "finding-lungs": "2d_images/*.tif",
        "covid-semiseg": "Imgs/*.jpg",
        "covid-ct": "*/*/*.*",
    }
    for name, pattern in counts.items():
        listed = {file for scan in list_scans(name, real_data / name).scans for file in scan.files}
        assert listed == set((real_data / name).glob(pattern)) and listed


@pytest.mark.real
def test_real_covid_ct_official_split_tears_papers_apart(real_data):
    splits = defaultdict(set)
    for scan in list_scans("covid-ct", real_data / "covid-ct").scans:
        splits[scan.patient_id].add(scan.split)
    assert splits["covid-2020.02.10.20021584"] == {TRAIN, VALIDATION}


@pytest.mark.real
@pytest.mark.parametrize(
    ("split", "slices", "patients"),
    [
        ("train", {NORMAL: 27201, PNEUMONIA: 22061, COVID: 12520}, (144, 420, 300)),
        ("val", {NORMAL: 9107, PNEUMONIA: 7400, COVID: 4529}, (47, 190, 95)),
        ("test", {NORMAL: 9450, PNEUMONIA: 7395, COVID: 4346}, (52, 125, 116)),
    ],
)
def test_real_covidx_lists(split, slices, patients, real_data):
    listed = read_covidx_list(real_data / f"splits/covidx-ct/{split}_COVIDx_CT-1.txt")
    assert Counter(s.label for s in listed) == slices
    counts = Counter(label for _, label in {(s.patient_id, s.label) for s in listed})
    assert (counts[NORMAL], counts[PNEUMONIA], counts[COVID]) == patients


@pytest.mark.real
def test_real_covid_ct_mask_net_lists(real_data):
    folder = real_data / "splits/covid-ct-mask-net"
    lists = {file.stem: read_name_list(file) for file in folder.iterdir()}
    assert {name: len(set(listed)) for name, listed in lists.items()} == {
        "train_split_segmentation": 650,
        "test_split_segmentation": 100,
        "train_split_classification": 3000,
        "train_ictcf": 600,
        "test_ictcf": 12976,
    }
    train = {s.name for s in read_covidx_list(real_data / "splits/covidx-ct/train_COVIDx_CT-1.txt")}
    assert {covidx_name(name) for name in lists["train_split_classification"]} <= train


@pytest.mark.real
def test_real_lesion_lists_split_a_tree_of_their_names(real_data, tmp_path):
    for file in (real_data / "splits/covid-ct-mask-net").glob("*_split_segmentation.txt"):
        touch(tmp_path, *(f"imgs/{name}" for name in read_name_list(file)))
        write(tmp_path, f"splits/{file.name}", file.read_text())
    listing = list_scans("cncb-lesions", tmp_path)
    assert Counter(scan.split for scan in listing.scans) == {TRAIN: 650, TEST: 100}
    patients = {(scan.patient_id, scan.split) for scan in listing.scans}
    assert Counter(split for _, split in patients) == {TRAIN: 130, TEST: 20}  # none in both
    assert reasons(listing) == {Reason.SCAN_WITHOUT_MASK: 750}
