"""Killed at random moments and run again, the stages leave the bytes of an undisturbed run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from .conftest import environment, notebook_code

RUNS = {  # how often each stage is killed, and where its results lie
    "prepare": (4, ["data/prepared"]),
    "segment_morphology": (3, ["data/segmented"]),
    "classify": (3, ["data/models", "data/predictions"]),
}
EARLIEST = 0.05  # seconds

# Imports everything once, then runs the code of a notebook in a forked process group for each line
# that it reads, so that a kill costs no new start. What it forks has no threads yet.
HOST = """
import json, multiprocessing, os, sys, traceback
import matplotlib
matplotlib.use("agg")
cells = json.load(open(sys.argv[1]))
for code in cells.values():
    exec(code[0], {})
import lib.data.scan_map
lib.data.scan_map.get_context = lambda method: multiprocessing.get_context("fork")
print("ready", flush=True)
for line in sys.stdin:
    folder, stage = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(folder)
        space = {"__name__": "notebook", "display": lambda *shown: None}
        try:
            for number, cell in enumerate(cells[stage]):
                exec(compile(cell, f"{stage}, cell {number}", "exec"), space)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Host:
    """Runs notebooks in copies of the study, and kills them."""

    def __init__(self, study: Path, folder: Path) -> None:
        stages = ["phantom", *RUNS]
        cells = {name: notebook_code(study / f"notebooks/{name}.ipynb") for name in stages}
        (folder / "cells.json").write_text(json.dumps(cells))
        (folder / "host.py").write_text(HOST)
        self.errors = (folder / "errors.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "host.py"), str(folder / "cells.json")],
            cwd=study,
            env=environment(study),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        """The next line that is not a notebook's own."""
        for line in self.process.stdout:
            if line.strip() == "ready" or line.strip().lstrip("-").isdigit():
                return line.strip()
        self.errors.seek(0)
        raise AssertionError(self.errors.read()[-4000:])

    def run(self, study: Path, stage: str, *, kill_after: float | None = None) -> tuple[int, float]:
        """Exit code (negative: the signal that ended it) and seconds of one run."""
        self.process.stdin.write(json.dumps([str(study), stage]) + "\n")
        self.process.stdin.flush()
        pid, begin = int(self._answer()), time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            with suppress(ProcessLookupError):  # it has ended just before
                os.killpg(pid, signal.SIGKILL)
        return int(self._answer()), time.monotonic() - begin

    def finish(self, study: Path, stage: str) -> float:
        code, seconds = self.run(study, stage)
        self.errors.seek(0)
        assert code == 0, self.errors.read()[-4000:]
        return seconds


def contents(study: Path, folders: list[str]) -> dict[str, bytes]:
    """Every file of a result."""
    files = [p for name in folders for p in sorted((study / name).rglob("*")) if p.is_file()]
    return {path.relative_to(study).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def host(make_study, tmp_path_factory):
    host = Host(make_study("host"), tmp_path_factory.mktemp("host"))
    yield host
    host.process.kill()


def test_ten_kills_change_no_byte(host, make_study):
    calm, killed = make_study("calm"), make_study("killed")
    for study in (calm, killed):
        host.finish(study, "phantom")
    moments = random.Random(7)
    endings = []
    for stage, (times, results) in RUNS.items():
        duration = host.finish(calm, stage)
        for _ in range(times):
            after = moments.uniform(EARLIEST, duration)
            endings.append(host.run(killed, stage, kill_after=after)[0])
        host.finish(killed, stage)
        assert contents(killed, results) == contents(calm, results), stage
        assert contents(calm, results)
    assert len(endings) == 10
    assert endings.count(-signal.SIGKILL) >= 7  # the others ended just before their kill
