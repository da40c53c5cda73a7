import hashlib
from pathlib import Path

import pytest

from lib.data.readers import (
    describe_source,
    read_label_volume,
    read_scan,
    source_files,
    source_sha256,
)
from lib.data.scan import ScanError
from tests.data.readers.made_files import put, write_pictures, write_series


def test_folder_order_is_numeric_and_ignores_hidden_files(tmp_path):
    folder = write_pictures(tmp_path / "s")
    put(folder / "._1.jpg", b"x")
    put(folder / ".DS_Store", b"x")
    put(folder / "Thumbs.db", b"x")
    (folder / "3").mkdir()
    assert [file.name for file in source_files(folder)] == ["1.jpg", "2.jpg", "10.jpg"]
    assert read_scan(folder).voxels[:, 0, 0].tolist() == [0, 40, 80]
    listed = [folder / "10.jpg", folder / "2.jpg"]
    assert read_scan(listed).voxels[:, 0, 0].tolist() == [40, 80]


def test_sha256_of_one_file_and_of_a_folder(tmp_path):
    folder = write_pictures(tmp_path / "s")
    content = [(folder / name).read_bytes() for name in ("1.jpg", "2.jpg", "10.jpg")]
    assert source_sha256(folder / "1.jpg") == hashlib.sha256(content[0]).hexdigest()
    assert source_sha256(folder) == hashlib.sha256(b"".join(content)).hexdigest()


def test_reports_never_show_a_dicom_file_name(tmp_path):
    folder = write_series(tmp_path / "s")
    assert describe_source(folder / "secret_patient_2.dcm", tmp_path) == (
        "s, file 2 of 4 in name order"
    )
    put(folder / "secret_zero", b"")
    for name in ("secret_zero", "secret_not_there.dcm"):
        assert "secret" not in describe_source(folder / name, tmp_path)
    assert describe_source(folder, tmp_path) == "s"
    picture = write_pictures(tmp_path / "p") / "2.jpg"
    assert describe_source(picture, tmp_path) == "p/2.jpg"
    assert describe_source(picture, folder) == "outside the data folder"


@pytest.mark.parametrize("whole_folder", [False, True])
def test_links_out_of_the_root(tmp_path, whole_folder):
    outside = write_pictures(tmp_path / "outside")
    root = tmp_path / "root"
    root.mkdir()
    if whole_folder:
        (root / "s").symlink_to(outside)
    else:
        write_pictures(root / "s")
        (root / "s" / "3.jpg").symlink_to(outside / "1.jpg")
    for read in (read_scan, read_label_volume, source_sha256, source_files):
        with pytest.raises(ScanError, match="outside the data folder"):
            read(root / "s", root=root)
    assert len(read_scan(root / "s").voxels) == (3 if whole_folder else 4)


def test_no_permission(tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "s")

    def refuse(*_, **__):
        raise PermissionError("denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(ScanError, match="no permission"):
            read_scan(folder)
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ScanError, match="no permission"):
        read_scan(folder)
