import errno
import functools
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from lib.data import scan_map
from lib.data.scan import ScanError
from lib.data.scan_map import ScanMapError, map_scans, worker_processes


@dataclass(frozen=True)
class Item:
    scan_id: str
    source: Path


def source_of(item):
    return [item.source]


def double(item, path, *, times=2, delay=0.0):
    """Work of the tests: the input, repeated."""
    time.sleep(delay)
    content = item.source.read_bytes() * times
    path.write_bytes(content)
    return {"bytes": len(content), "name": item.scan_id}


def double_into_folder(item, path, *, times=2):
    (path / "part").mkdir()
    (path / "part" / "b.bin").write_bytes(item.source.read_bytes() * times)
    (path / "a.bin").write_bytes(b"a")
    return {"times": times}


def slow_first(item, path):
    time.sleep(0.2 if item.scan_id == "s0" else 0.0)
    return double(item, path)


def fail_on_s1(item, path):
    path.write_bytes(b"half")
    if item.scan_id == "s1":
        raise ScanError("truncated file", item.source, "3 of 9 bytes")
    return {}


def die_on_s1(item, path):
    if item.scan_id == "s1":
        os.kill(os.getpid(), signal.SIGKILL)
    return double(item, path)


class HandMadeExecutor(Executor):
    """The least that the interface asks for, finishing in reverse order, as a cluster may."""

    def __init__(self):
        self.calls = []

    def submit(self, function, /, *arguments, **keywords):
        future = Future()
        self.calls.append((future, function, arguments, keywords))
        if len(self.calls) == 1:
            threading.Timer(0.05, self.run).start()
        return future

    def run(self):
        for future, function, arguments, keywords in reversed(self.calls):
            future.set_running_or_notify_cancel()
            future.set_result(function(*arguments, **keywords))


@pytest.fixture
def items(tmp_path):
    return make_items(tmp_path / "raw", 5)


def make_items(folder, count):
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.raw").write_bytes(bytes([number]) * (number + 1))
    return [Item(f"s{number}", folder / f"{number}.raw") for number in range(count)]


def run(items, folder, work=double, **changes):
    arguments = {
        "suffix": ".bin",
        "parameters": {},
        "inputs": source_of,
        "code": [],
        "description": "test",
    }
    return map_scans(work, items, folder, **{**arguments, **changes})


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def skipped(results):
    return [result.scan_id for result in results if result.skipped]


# --------------------------------------------------------------------- results, order, executors
EXECUTORS = {
    "none": nullcontext,
    "one thread": lambda: ThreadPoolExecutor(1),
    "threads": lambda: ThreadPoolExecutor(3),
    "processes": lambda: ProcessPoolExecutor(2),
    "hand-made": HandMadeExecutor,
}


@pytest.mark.parametrize("kind", EXECUTORS)
def test_same_tree_and_order_with_every_executor(items, tmp_path, kind):
    reference = run(items, tmp_path / "reference", slow_first)
    with EXECUTORS[kind]() as executor:
        results = run(items, tmp_path / "out", slow_first, executor=executor)
    assert [result.scan_id for result in results] == ["s0", "s1", "s2", "s3", "s4"]
    assert [result.record for result in results] == [result.record for result in reference]
    assert results[3].record == {"bytes": 8, "name": "s3"}
    assert results[3].path == tmp_path / "out" / "s3.bin"
    assert results[3].path.read_bytes() == bytes([3]) * 8
    assert tree(tmp_path / "out") == tree(tmp_path / "reference")
    assert len(tree(tmp_path / "out")) == 10


def test_few_scans_in_flight_are_enough(items, tmp_path, monkeypatch):
    monkeypatch.setattr(scan_map, "_IN_FLIGHT", 2)
    with ThreadPoolExecutor(2) as threads:
        results = run(items, tmp_path / "out", executor=threads)
    assert [result.scan_id for result in results] == [item.scan_id for item in items]


def test_items_may_be_a_mapping(items, tmp_path):
    results = run({"x": items[0], "a": items[1]}, tmp_path / "out")
    assert [result.scan_id for result in results] == ["x", "a"]
    assert sorted(tree(tmp_path / "out")) == ["a.bin", "a.json", "x.bin", "x.json"]


def test_no_items(tmp_path):
    assert run([], tmp_path / "out") == []
    assert tree(tmp_path / "out") == {}


def test_result_may_be_a_folder(items, tmp_path):
    folder = tmp_path / "out"
    run(items, folder, double_into_folder, suffix="")
    assert (folder / "s2" / "part" / "b.bin").read_bytes() == bytes([2]) * 6
    assert len(skipped(run(items, folder, double_into_folder, suffix=""))) == 5
    results = run(items, folder, double_into_folder, suffix="", parameters={"times": 3})
    assert skipped(results) == []
    assert (folder / "s2" / "part" / "b.bin").read_bytes() == bytes([2]) * 9
    run(items[:2], folder, double_into_folder, suffix="")
    assert sorted(path.name for path in folder.iterdir()) == ["s0", "s0.json", "s1", "s1.json"]


def test_sidecar_holds_record_and_checksum(items, tmp_path):
    run(items, tmp_path / "out")
    sidecar = json.loads((tmp_path / "out" / "s1.json").read_text())
    assert sidecar["record"] == {"bytes": 4, "name": "s1"}
    assert sidecar["files"] == [["s1.bin", hashlib.sha256(bytes([1]) * 4).hexdigest()]]


# ------------------------------------------------------------------------------------- restart
def change_input(items, folder):
    items[2].source.write_bytes(b"new")
    return {}, ["s2"]


def damage_result(items, folder):
    (folder / "s2.bin").write_bytes(bytes([9]) * 6)  # the size is the same
    return {}, ["s2"]


def lose_result(items, folder):
    (folder / "s2.bin").unlink()
    return {}, ["s2"]


def lose_sidecar(items, folder):
    (folder / "s2.json").unlink()
    return {}, ["s2"]


def cut_sidecar(items, folder):
    (folder / "s2.json").write_text('{"fingerprint": "')
    return {}, ["s2"]


def foreign_sidecar(items, folder):
    (folder / "s2.json").write_text("[1, 2]")
    return {}, ["s2"]


def leave_alone(items, folder):
    return {}, []


def touch_everything(items, folder):
    for path in [*folder.iterdir(), *(item.source for item in items)]:
        os.utime(path, (0, 0))
    return {}, []


def change_parameters(items, folder):
    return {"parameters": {"times": 3}}, ["s0", "s1", "s2", "s3", "s4"]


@pytest.mark.parametrize(
    "change",
    [
        change_input,
        damage_result,
        lose_result,
        lose_sidecar,
        cut_sidecar,
        foreign_sidecar,
        leave_alone,
        touch_everything,
        change_parameters,
    ],
)
def test_second_run_redoes_what_changed(items, tmp_path, change):
    folder = tmp_path / "out"
    first = run(items, folder)
    assert skipped(first) == []
    arguments, redone = change(items, folder)
    second = run(items, folder, **arguments)
    assert skipped(second) == [f"s{n}" for n in range(5) if f"s{n}" not in redone]
    run(items, tmp_path / "fresh", **arguments)
    assert tree(folder) == tree(tmp_path / "fresh")
    if not redone:
        assert [result.record for result in second] == [result.record for result in first]


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("x = 1\n", "x = 1\n", True),
        ("x = 1\n", "x = 2\n", False),
    ],
)
def test_code_is_part_of_the_fingerprint(items, tmp_path, before, after, same):
    code = tmp_path / "method.py"
    code.write_text(before)
    run(items, tmp_path / "out", code=[code])
    code.write_text(after)
    assert (len(skipped(run(items, tmp_path / "out", code=[code]))) == 5) is same


@pytest.mark.parametrize(
    ("code", "same"),
    [([scan_map], True), ([], False), ([json], False), ([scan_map, "numpy"], False)],
)
def test_modules_and_packages_as_code(items, tmp_path, code, same):
    run(items, tmp_path / "out", code=[scan_map])
    assert (len(skipped(run(items, tmp_path / "out", code=code))) == 5) is same


def test_folder_as_input(items, tmp_path):
    def folder_of(item):
        return [item.source.parent]

    run(items[:1], tmp_path / "out", inputs=folder_of)
    assert len(skipped(run(items[:1], tmp_path / "out", inputs=folder_of))) == 1
    (items[0].source.parent / "more.raw").write_bytes(b"")
    assert len(skipped(run(items[:1], tmp_path / "out", inputs=folder_of))) == 0


def test_tree_does_not_depend_on_the_place(tmp_path):
    for place in ("here", "elsewhere/deeper"):
        run(make_items(tmp_path / place / "raw", 3), tmp_path / place / "out", code=[scan_map])
    assert tree(tmp_path / "here" / "out") == tree(tmp_path / "elsewhere/deeper" / "out")


# ------------------------------------------------------------------------------------- clean-up
def test_stale_results_go_and_other_files_stay(items, tmp_path):
    folder = tmp_path / "out"
    run(items, folder)
    (folder / "manifest.csv").write_text("mine")
    (folder / "metrics.json").write_text('{"dice": 0.9}')
    (folder / "foreign.bin").write_bytes(b"mine")
    (folder / scan_map._PARTIAL).mkdir()
    (folder / scan_map._PARTIAL / "s1~abc").mkdir()
    (folder / scan_map._PARTIAL / "s1~abc" / "s1.bin").write_bytes(b"half")
    results = run(items[:2], folder)
    assert skipped(results) == ["s0", "s1"]
    mine = ["foreign.bin", "manifest.csv", "metrics.json"]
    assert sorted(tree(folder)) == sorted([*mine, "s0.bin", "s0.json", "s1.bin", "s1.json"])


def test_other_suffix_replaces_the_result(items, tmp_path):
    run(items, tmp_path / "out")
    run(items, tmp_path / "out", suffix=".raw")
    run(items, tmp_path / "fresh", suffix=".raw")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


@pytest.mark.parametrize("result", ["../keep", "/keep", "..", "gone/../../keep", "", None, 3])
def test_stale_sidecar_cannot_reach_outside(items, tmp_path, result):
    folder = tmp_path / "out"
    run(items[:1], folder)
    (tmp_path / "keep").write_bytes(b"keep")
    sidecar = {"files": [], "fingerprint": "", "record": {}, "result": result}
    for name in ("gone.json", "...json"):
        (folder / name).write_text(json.dumps(sidecar))
    run(items[:1], folder)
    assert sorted(tree(folder)) == ["s0.bin", "s0.json"]
    assert (tmp_path / "keep").read_bytes() == b"keep"


def test_cached_hard_links_are_not_written_to(items, tmp_path):
    """A cache that shares its read-only files with the folder, as DVC's may, stays as it was."""
    folder, cache = tmp_path / "out", tmp_path / "cache"
    run(items, folder)
    cache.mkdir()
    for path in folder.iterdir():
        path.chmod(0o444)
        (cache / path.name).hardlink_to(path)
    before = tree(cache)
    run(items, folder, parameters={"times": 5})
    assert tree(cache) == before
    assert (folder / "s1.bin").read_bytes() == bytes([1]) * 10


# --------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("kind", EXECUTORS)
def test_one_bad_scan_does_not_stop_the_others(items, tmp_path, kind):
    run(items, tmp_path / "out")
    with EXECUTORS[kind]() as executor:
        results = run(items, tmp_path / "out", fail_on_s1, executor=executor, code=[json])
    assert [result.scan_id for result in results if result.error] == ["s1"]
    error = results[1].error
    assert (error.reason, error.disk_full) == ("truncated file", False)
    assert "3 of 9 bytes" in error.message
    assert "fail_on_s1" in error.traceback
    assert results[1].record is None
    left = sorted(tree(tmp_path / "out"))
    assert left == sorted(f"s{n}.{end}" for n in (0, 2, 3, 4) for end in ("bin", "json"))


@pytest.mark.parametrize(
    ("work", "reason", "message"),
    [
        (lambda item, path: {}, "FileNotFoundError", "wrote no result"),
        (lambda item, path: path.write_bytes(b""), "TypeError", "returned int, not a record"),
        (lambda item, path: path.touch() or {"x": {1}}, "TypeError", "set"),
        (lambda item, path: path.touch() or {"x": float("nan")}, "ValueError", "JSON"),
        (lambda item, path: item.missing, "AttributeError", "missing"),
    ],
)
def test_bad_work_is_an_error_of_the_scan(items, tmp_path, work, reason, message):
    (result,) = run(items[:1], tmp_path / "out", work)
    assert result.error.reason == reason
    assert message in result.error.message
    assert tree(tmp_path / "out") == {}


def test_missing_input_is_an_error_of_the_scan(items, tmp_path):
    run(items, tmp_path / "out")
    items[3].source.unlink()
    results = run(items, tmp_path / "out")
    assert results[3].error.reason == "FileNotFoundError"
    assert skipped(results) == ["s0", "s1", "s2", "s4"]
    assert "s3.bin" not in tree(tmp_path / "out")


def test_without_keep_going_one_exception_names_the_scan(items, tmp_path):
    with pytest.raises(ScanMapError, match=r"scan s1 failed: truncated file: ") as caught:
        run(items, tmp_path / "out", fail_on_s1, keep_going=False)
    assert "fail_on_s1" in caught.value.__notes__[0]
    assert "s0.json" in tree(tmp_path / "out")
    assert "s2.json" not in tree(tmp_path / "out")


@pytest.mark.parametrize("kind", ["none", "one thread"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_stops_the_map(items, tmp_path, kind, code):
    done = []

    def fill(item, path):
        if len(done) == 2:
            path.write_bytes(b"half")
            try:
                raise OSError(code, os.strerror(code))
            except OSError as error:
                raise RuntimeError("cannot save") from error  # as a library may wrap it
        done.append(item.scan_id)
        return double(item, path)

    stop = pytest.raises(ScanMapError, match=r"^the disk that holds .*out was full at scan s2; ")
    with EXECUTORS[kind]() as executor, stop:
        run(items, tmp_path / "out", fill, executor=executor)
    left = [name for name in tree(tmp_path / "out") if not name.startswith(scan_map._PARTIAL)]
    assert left == ["s0.bin", "s0.json", "s1.bin", "s1.json"]
    assert skipped(run(items, tmp_path / "out")) == ["s0", "s1"]


def test_full_disk_while_renaming(items, tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ScanMapError, match="was full at scan s0"):
        run(items, tmp_path / "out")
    assert list(tree(tmp_path / "out")) == [scan_map._PARTIAL]


@pytest.mark.parametrize("kind", ["none", "one thread"])
def test_interrupt_leaves_complete_results(items, tmp_path, kind):
    def interrupted(item, path):
        if item.scan_id == "s2":
            raise KeyboardInterrupt
        return double(item, path)

    with EXECUTORS[kind]() as executor, pytest.raises(KeyboardInterrupt):
        run(items, tmp_path / "out", interrupted, executor=executor)
    results = run(items, tmp_path / "out")
    assert skipped(results)[:2] == ["s0", "s1"]
    assert "s2" not in skipped(results)
    run(items, tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_dead_worker_is_named_and_the_next_run_resumes(items, tmp_path):
    with (
        ProcessPoolExecutor(1) as executor,
        pytest.raises(ScanMapError, match=r"worker process died .* in hand: s1; run again"),
    ):
        run(items, tmp_path / "out", die_on_s1, executor=executor)
    assert skipped(run(items, tmp_path / "out")) == ["s0"]
    run(items, tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_work_that_cannot_be_sent_to_a_process(items, tmp_path):
    with (
        ProcessPoolExecutor(1) as executor,
        pytest.raises(ScanMapError, match=r"executor could not run scan s0: .*pickle"),
    ):
        run(items[:1], tmp_path / "out", lambda item, path: {}, executor=executor)


BAD_IDS = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/etc/x",
    "a\\b",
    "a\n",
    ".hidden",
    "-x",
    "a~b",
    "ä",
    "a b",
]


@pytest.mark.parametrize("scan_id", BAD_IDS)
def test_unsafe_scan_ids(items, tmp_path, scan_id):
    with pytest.raises(ValueError, match="not a safe file name"):
        run({scan_id: items[0]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scan_ids", "changes", "message"),
    [
        (["a", "A"], {}, "taken"),
        (["a"], {"suffix": ".json"}, "taken"),
        (["a", "a.json"], {"suffix": ""}, "taken"),
        (["a"], {"suffix": "/../x"}, "suffix"),
        (["a"], {"parameters": {"path": Path("/x")}}, "plain values"),
        (["a"], {"parameters": {"x": float("inf")}}, "plain values"),
    ],
)
def test_wrong_arguments(items, tmp_path, scan_ids, changes, message):
    with pytest.raises(ValueError, match=message):
        run(dict.fromkeys(scan_ids, items[0]), tmp_path / "out", **changes)


def test_two_items_of_one_name(items, tmp_path):
    with pytest.raises(ValueError, match="same scan_id"):
        run([items[0], items[0]], tmp_path / "out")


# ---------------------------------------------------------------------------------------- kills
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def die_at(number, folder):
    """End this process without any clean-up at its n-th operation on a file below ``folder``."""
    count = 0

    def watch(event, arguments):
        nonlocal count
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(folder)):
            count += 1
            if count == number:
                os._exit(9)

    sys.addaudithook(watch)


@pytest.mark.parametrize(
    ("work", "suffix"), [(double, ".bin"), (double_into_folder, "")], ids=["file", "folder"]
)
def test_killed_at_any_file_operation(tmp_path, work, suffix):
    """The folder holds a changed, a new and a stale result; every moment of the run is tried.

    The next run asks for one scan fewer, the one after for both.
    """
    items = make_items(tmp_path / "raw", 3)
    changed = functools.partial(run, work=work, suffix=suffix)
    for count in (1, 2):
        changed(items[:count], tmp_path / f"fresh{count}")
    kills, status = -1, None
    while status != 0:
        kills += 1
        folder = tmp_path / f"out{kills}"
        items[0].source.write_bytes(b"older")
        changed(items[::2], folder)
        items[0].source.write_bytes(bytes(1))
        child = os.fork()
        if child == 0:
            die_at(kills + 1, folder)
            changed(items[:2], folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        for count in (1, 2):
            changed(items[:count], folder)
            assert tree(folder) == tree(tmp_path / f"fresh{count}"), f"operation {kills + 1}"
    assert kills > 20


def child_main(place, workers):
    """What the killed process runs: see the test below."""
    items = [Item(path.stem, path) for path in sorted(Path(place, "raw").iterdir())]
    executor = ProcessPoolExecutor(workers) if workers else None
    run(items, Path(place, "out"), executor=executor, parameters={"delay": 0.02})


def test_killed_processes_leave_what_an_undisturbed_run_leaves(tmp_path, repository):
    moments = random.Random(0)
    items = make_items(tmp_path / "killed" / "raw", 30)
    folder = tmp_path / "killed" / "out"
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "undisturbed" / "raw").symlink_to(tmp_path / "killed" / "raw")
    child_main(tmp_path / "undisturbed", workers=0)
    code = (
        f"import sys; sys.path[:0] = [{str(repository)!r}, {str(Path(__file__).parent)!r}];"
        f"import test_scan_map; test_scan_map.child_main({str(folder.parent)!r}, int(sys.argv[1]))"
    )
    for workers in (0, 2, 0, 2):
        complete = len(list(folder.glob("*.json")))
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(workers)],
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while len(list(folder.glob("*.json"))) < complete + 3 and child.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.03))
        assert child.poll() is None, "the map ended before it could be killed"
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    complete = len(list(folder.glob("*.json")))
    assert 12 <= complete < 30
    results = run(items_by_stem(items), folder, parameters={"delay": 0.02})
    assert complete - 1 <= len(skipped(results)) < 30
    assert tree(folder) == tree(tmp_path / "undisturbed" / "out")


def items_by_stem(items):
    return {path.stem: Item(path.stem, path) for path in sorted(item.source for item in items)}


@pytest.mark.parametrize(("count", "kind"), [(1, type(None)), (2, ProcessPoolExecutor)])
def test_one_process_needs_no_pool(count, kind):
    with worker_processes(count) as executor:
        assert isinstance(executor, kind)
