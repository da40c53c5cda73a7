import os
import stat

import pandas as pd
import pytest

from lib.data.files import save_csv, whole_file


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_complete_and_not_before(tmp_path):
    path = tmp_path / "new" / "deep" / "table.csv"
    with whole_file(path) as partial:
        partial.write_text("complete")
        assert partial.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "complete"
    assert names(path.parent) == ["table.csv"]


def test_the_old_file_stays_whole_until_the_new_one_is(old):
    with whole_file(old) as partial:
        for part in ("a", "b", "c"):
            with partial.open("a") as stream:
                stream.write(part)
            assert old.read_text() == "old"
    assert old.read_text() == "abc"


@pytest.mark.parametrize("written", [None, "half"])
def test_an_exception_leaves_the_old_file_and_nothing_else(old, written):
    with pytest.raises(KeyboardInterrupt), whole_file(old) as partial:
        if written:
            partial.write_text(written)
        raise KeyboardInterrupt
    assert old.read_text() == "old"
    assert names(old.parent) == ["table.csv"]


def test_a_full_disk_at_the_last_moment_leaves_the_old_file(old, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), whole_file(old) as partial:
        partial.write_text("new")
    assert old.read_text() == "old"
    assert names(old.parent) == ["table.csv"]


def test_what_a_killed_try_left_is_overwritten(old):
    with whole_file(old) as partial:
        partial.write_text("new")
    leftover = partial
    leftover.write_text("much longer than what comes next")
    with whole_file(old) as partial, partial.open("a") as stream:
        assert partial == leftover
        stream.write("newer")
    assert old.read_text() == "newer"
    assert names(old.parent) == ["table.csv"]


def test_what_a_killed_try_left_is_never_taken_for_a_result(old):
    old.with_name(".table.csv.partial").write_text("half")
    with pytest.raises(FileNotFoundError), whole_file(old):
        pass  # writes nothing
    assert old.read_text() == "old"


@pytest.mark.parametrize("link", ["hardlink_to", "symlink_to"])
def test_a_link_into_a_read_only_cache_is_replaced_and_never_written(tmp_path, link):
    cached, path = tmp_path / "cache", tmp_path / "table.csv"
    cached.write_text("cached")
    cached.chmod(0o444)
    getattr(path, link)(cached)
    before = cached.stat()
    with whole_file(path) as partial:
        partial.write_text("new")
    assert (path.read_text(), cached.read_text()) == ("new", "cached")
    after = cached.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not path.is_symlink() and path.stat().st_ino != after.st_ino
    assert stat.S_IMODE(after.st_mode) == 0o444
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IWUSR


def test_the_same_table_gives_the_same_bytes(tmp_path):
    table = pd.DataFrame({"scan_id": ["0001", "a,b"], "dice": [0.1 + 0.2, float("nan")]}, [7, 9])
    save_csv(table, tmp_path / "1.csv")
    save_csv(table.reset_index(drop=True), tmp_path / "2.csv")
    expected = b'scan_id,dice\n0001,0.30000000000000004\n"a,b",\n'
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "2.csv").read_bytes() == expected
