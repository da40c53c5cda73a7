import pandas as pd
import pytest

from lib.data.files import save_csv
from lib.data.manifest import read_manifest, read_quarantine, scans_with_lungs


@pytest.fixture
def prepared(tmp_path):
    """A manifest as the preparation writes it, with everything that reading could spoil."""
    manifest = pd.DataFrame(
        {
            "scan_id": ["0001", "1e5", "NA"],
            "patient_id": ["007", "null", "None"],
            "split": ["train", "test", "validation"],
            "label": ["covid", None, "non-covid"],
            "slices": [1, 700, 25],
            "height": [512, 512, 256],
            "width": [512, 512, 256],
            "spacing_mm": ["5 0.7 0.7", "", "1"],
            "source_sha256": ["0" * 64, "1" * 64, "2" * 64],
            "flags": ["", "padding; 2 blank slices", ""],
            "severity": ["1", None, "03"],
        }
    )
    save_csv(manifest, tmp_path / "phantom" / "manifest.csv")
    return tmp_path / "phantom"


def test_text_stays_text_counts_are_numbers_and_empty_cells_are_none(prepared):
    manifest = read_manifest(prepared)
    assert manifest["scan_id"].tolist() == ["0001", "1e5", "NA"]
    assert manifest["patient_id"].tolist() == ["007", "null", "None"]
    assert manifest["label"].tolist() == ["covid", None, "non-covid"]
    assert manifest["severity"].tolist() == ["1", None, "03"]
    assert manifest["spacing_mm"].tolist() == ["5 0.7 0.7", None, "1"]
    assert manifest["flags"].tolist() == [None, "padding; 2 blank slices", None]
    assert manifest["slices"].tolist() == [1, 700, 25] and manifest["slices"].dtype == "int64"
    assert manifest.dropna(subset="label")["scan_id"].tolist() == ["0001", "NA"]


@pytest.mark.parametrize("labels", [[None, None, None], ["covid", None, None]])
def test_missing_labels_are_none_however_many_there_are(prepared, labels):
    save_csv(read_manifest(prepared).assign(label=labels), prepared / "manifest.csv")
    assert read_manifest(prepared)["label"].tolist() == labels


def test_reading_and_writing_changes_no_byte(prepared):
    before = (prepared / "manifest.csv").read_bytes()
    save_csv(read_manifest(prepared), prepared / "manifest.csv")
    assert (prepared / "manifest.csv").read_bytes() == before


def test_a_manifest_without_scans_can_be_read(prepared):
    save_csv(read_manifest(prepared).iloc[:0], prepared / "manifest.csv")
    assert len(read_manifest(prepared)) == 0


def test_what_was_not_prepared_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        read_manifest(tmp_path / "mosmed")
    message = str(error.value)
    assert message == (
        f"{tmp_path / 'mosmed' / 'manifest.csv'} is not there: run the stage prepare@mosmed first"
    )


def test_the_quarantine_list_is_text(tmp_path):
    row = {"scan_id": "0001", "left_out": "scan", "reason": "NA", "file": "x", "detail": ""}
    save_csv(pd.DataFrame([row]), tmp_path / "quarantine.csv")
    assert read_quarantine(tmp_path).to_dict("records") == [row]


def test_only_scans_with_a_lung_mask_are_paired(prepared):
    manifest = read_manifest(prepared)
    for name in ("0001", "NA"):
        (prepared / "lungs").mkdir(exist_ok=True)
        (prepared / f"lungs/{name}.b2nd").touch()
    pairs = scans_with_lungs(manifest, prepared, "train")
    assert pairs == [(prepared / "scans/0001.b2nd", prepared / "lungs/0001.b2nd")]
    assert [mask.stem for _, mask in scans_with_lungs(manifest, prepared, "validation")] == ["NA"]
    assert scans_with_lungs(manifest, prepared, "test") == []
