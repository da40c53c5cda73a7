"""Nothing that the preparation writes, prints or warns of may name a patient."""

import shutil
import warnings
from pathlib import Path

import blosc2
import numpy as np
import pydicom
import pytest
from pydicom.uid import RLELossless, generate_uid

from lib.data.store import open_volume
from tests.data.made_data_sets import chest, contents, prepare_data_set
from tests.data.readers.made_files import cut, put, write_dicom, write_pictures, write_series

PATIENT_ID = "MRN-0815-4711"
PLANTED = {
    "PatientID": PATIENT_ID,
    "PatientName": "Mustermann^Erika",
    "PatientBirthDate": "19531224",
    "PatientAddress": "Sesamstrasse 42",
    "OtherPatientIDs": "INS-99-1234567",
    "StudyDate": "20200317",
    "StudyTime": "112233.445566",
    "StudyID": "STUDY-31415",
    "AccessionNumber": "ACC-55-77213",
    "InstitutionName": "St. Elsewhere Hospital",
    "StationName": "CT-BASEMENT-3",
    "ReferringPhysicianName": "Quincy^Medical",
    "StudyDescription": "Erika, second opinion",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.11",
    "SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.22",
    "FrameOfReferenceUID": "1.2.826.0.1.3680043.8.498.33",
    "SOPInstanceUID": "1.2.826.0.1.3680043.8.498.44",
}
PARTS_OF_NAMES = ("mustermann", "erika", "quincy")  # each alone is too much

REAL_FIELDS = (
    *("PatientID", "AccessionNumber", "StudyDate", "StationName"),
    *("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"),
)


def spellings(text: str) -> list[bytes]:
    """Lower case in the encodings that a file could hold it in."""
    return [text.lower().encode(code) for code in ("utf-8", "utf-16-le", "utf-16-be")]


def found_in(content: bytes, values: set[str]) -> set[str]:
    """Values that occur in some bytes, in any case."""
    lowered = content.lower()
    return {value for value in values if any(text in lowered for text in spellings(value))}


def leaks(folder: Path, values: set[str]) -> set[tuple[str, str]]:
    """(file, value) of every value in the name or the bytes of a file, attributes included."""
    files = contents(folder)
    for name in files:
        if name.endswith(".b2nd"):
            volume = open_volume(folder / name)
            assert volume.attributes == {}
            array = blosc2.open(str(folder / name), mode="r")
            files[name] += repr(array.schunk.vlmeta.getall()).encode()
    return {
        (name, value)
        for name, content in files.items()
        for value in found_in(name.encode() + content, values)
    }


def series(folder: Path, **fields) -> Path:
    """A series whose headers and file names tell who the patient is."""
    random = int.from_bytes(folder.name.encode(), "big") % 2**32
    write_series(folder, chest(seed=random), **(PLANTED | fields))
    for number, file in enumerate(sorted(folder.glob("*.dcm"))):
        file.rename(folder / f"{PATIENT_ID}_{number}.dcm")
    return folder


def first(folder: Path) -> Path:
    return folder / f"{PATIENT_ID}_0.dcm"


def another(folder: Path, name: str, **fields) -> Path:
    """One more slice in a series, with a header of its own."""
    pixels = np.zeros((40, 40), np.uint16)
    return write_dicom(folder / name, pixels, (0, 0, 90), **(PLANTED | fields))


def without_header_checks(folder: Path) -> None:
    """Values that pydicom would quote in a warning, as real archives hold them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file in folder.iterdir():
            header = pydicom.dcmread(file)
            header.PatientBirthDate = "Erika's birthday"
            header.AccessionNumber = PLANTED["AccessionNumber"] * 3
            header.save_as(file)


BAD = {
    "truncated": lambda folder: cut(first(folder), 0.6),
    "zero bytes": lambda folder: put(first(folder), b""),
    "no suffix": lambda folder: put(folder / f"{PATIENT_ID}_Mustermann_Erika", b""),
    "report": lambda folder: put(folder / f"{PATIENT_ID}.dcm", b"Mustermann, Erika: covid " * 40),
    "no rescale": lambda folder: another(folder, f"{PATIENT_ID}_x.dcm", RescaleSlope=None),
    "other series": lambda folder: another(
        folder, f"{PATIENT_ID}_x.dcm", SeriesInstanceUID=generate_uid()
    ),
    "other modality": lambda folder: another(folder, f"{PATIENT_ID}_x.dcm", Modality="MR"),
    "wrong position": lambda folder: another(
        folder, f"{PATIENT_ID}_x.dcm", PixelSpacing=[0.7, -0.7]
    ),
    "slice twice": lambda folder: shutil.copy(first(folder), folder / f"{PATIENT_ID}_x.dcm"),
    "pictures beside": lambda folder: write_pictures(folder, ("1.jpg",)),
    "link": lambda folder: (folder / f"{PATIENT_ID}_x.dcm").symlink_to("/etc/hostname"),
    "link to nowhere": lambda folder: (folder / f"{PATIENT_ID}_x.dcm").symlink_to("nowhere.dcm"),
}


def write_patients(folder: Path) -> None:
    """Two good scans, one with a header against all rules, a copy and the bad ones."""
    folder.mkdir(parents=True)
    for name in ("good", "odd header", *BAD):
        series(folder / name)
    shutil.copytree(folder / "good", folder / "good again")
    without_header_checks(folder / "odd header")
    for name, spoil in BAD.items():
        spoil(folder / name)


@pytest.mark.parametrize(("data_set", "label"), [("own", "covid"), ("covid-ct-md", "Cap subjects")])
def test_nothing_of_the_planted_identity_is_left(data_set, label, tmp_path, capfd):
    raw, prepared = tmp_path / "raw", tmp_path / "prepared"
    write_patients(raw / label)
    values = {*PLANTED.values(), *PARTS_OF_NAMES}
    assert {value for _, value in leaks(raw, values)} == values | {PATIENT_ID}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        quarantine, manifest = prepare_data_set(data_set, raw, prepared)
    assert len(manifest) == 2 and len(quarantine) == len(BAD) + 1  # and the copy
    assert len(list(prepared.rglob("*.b2nd"))) == 3
    assert leaks(prepared, values) == set()
    said = [*capfd.readouterr(), *(str(warning.message) for warning in warned)]
    assert found_in("\n".join(said).encode(), values) == set()


def test_scans_that_are_single_files_are_not_named_after_them(tmp_path):
    raw = tmp_path / "raw" / "covid"
    raw.mkdir(parents=True)
    pixels = (chest(1)[0].astype(np.int32) + 1024).astype(np.uint16)
    write_dicom(raw / f"{PATIENT_ID}.dcm", pixels, **PLANTED)
    put(raw / f"{PATIENT_ID}_2.dcm", b"")
    cut(write_dicom(raw / f"{PATIENT_ID}_3.dcm", pixels, **PLANTED))
    quarantine, manifest = prepare_data_set("own", raw.parent, tmp_path / "prepared")
    assert (len(manifest), len(quarantine)) == (1, 2)
    assert leaks(tmp_path / "prepared", {*PLANTED.values(), *PARTS_OF_NAMES}) == set()


def compress_and_cut(file: Path) -> None:
    header = pydicom.dcmread(file)
    header.compress(RLELossless)
    header.save_as(file)
    cut(file)


def name_the_patient_in_the_character_set(file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = pydicom.dcmread(file)
        header.SpecificCharacterSet = "Mustermann"
        header.save_as(file)


@pytest.mark.parametrize("damage", [compress_and_cut, name_the_patient_in_the_character_set])
def test_no_warning_of_the_decoder_names_a_patient(damage, tmp_path):
    folder = tmp_path / "raw" / "covid" / "scan"
    folder.mkdir(parents=True)
    damage(first(series(folder)))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        prepare_data_set("own", tmp_path / "raw", tmp_path / "prepared")
    said = "\n".join(str(warning.message) for warning in warned)
    assert found_in(said.encode(), {PATIENT_ID, *PARTS_OF_NAMES}) == set()


@pytest.mark.parametrize("code", ["utf-8", "utf-16-le", "utf-16-be"])
def test_the_search_finds_what_is_there(code, tmp_path):
    (tmp_path / "inner").mkdir()
    put(tmp_path / "inner" / "file.bin", b"\0\xff" + "MUSTERMANN^erika".encode(code) + b"\xff")
    put(tmp_path / "acc-55-77213.txt", b"")
    assert leaks(tmp_path, set(PLANTED.values())) == {
        ("inner/file.bin", PLANTED["PatientName"]),
        ("acc-55-77213.txt", PLANTED["AccessionNumber"]),
    }


def real_identity(root: Path) -> set[str]:
    """Identifying header values of all files, and the file names, longer than four characters."""
    values = set()
    for file in root.rglob("*.dcm"):
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(REAL_FIELDS))
        values |= {str(header.get(name, "")) for name in REAL_FIELDS} | {file.stem}
    return {value for value in values if len(value) > 4}


@pytest.mark.real
def test_nothing_of_a_real_identity_is_left(real_data, tmp_path):
    raw = tmp_path / "raw"
    shutil.copytree(real_data / "covid-ct-md", raw)
    values = real_identity(raw)
    put(sorted(raw.rglob("*.dcm"))[0], b"")
    quarantine, manifest = prepare_data_set("covid-ct-md", raw, tmp_path / "prepared")
    assert (len(manifest), len(quarantine)) == (2, 1)
    assert len(values) > 100
    assert leaks(tmp_path / "prepared", values) == set()
