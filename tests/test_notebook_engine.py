"""papermill with the engine of this study."""

import ast
import json
import os
import time
from pathlib import Path
from unittest import mock

import nbformat
import papermill
import pytest

from lib.notebook_engine import MALLOC_SETTINGS

ENGINE = "quick"
LEAVES_A_FILE = "import atexit, pathlib; atexit.register(pathlib.Path('asked to end').touch)"


@pytest.fixture(autouse=True)
def environment():
    with mock.patch.dict(os.environ):  # which the engine changes
        for name in MALLOC_SETTINGS:
            os.environ.pop(name, None)
        yield


def run(folder: Path, *cells: str, engine: str | None = ENGINE) -> nbformat.NotebookNode:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": ""}
    nbformat.write(notebook, folder / "given.ipynb")
    return papermill.execute_notebook(
        folder / "given.ipynb",
        folder / "executed.ipynb",
        engine_name=engine,
        cwd=folder,
        progress_bar=False,
    )


def is_running(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().split()[2] != "Z"


@pytest.mark.parametrize(("engine", "asked"), [(ENGINE, False), (None, True)])
def test_the_kernel_is_not_asked_to_end_but_all_outputs_are_there(tmp_path, engine, asked):
    executed = run(tmp_path, LEAVES_A_FILE, "print('last words')", "6 * 7", engine=engine)
    *_, printed, value = executed.cells
    assert printed.outputs[0].text == "last words\n"
    assert value.outputs[0].data["text/plain"] == "42"
    assert json.loads((tmp_path / "executed.ipynb").read_text())["cells"][-1]["outputs"]
    assert (tmp_path / "asked to end").exists() == asked


@pytest.mark.parametrize("own", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_free_memory_is_kept_unless_the_user_says_how(tmp_path, monkeypatch, own):
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    ask = "import os; print({k: int(v) for k, v in os.environ.items() if k.startswith('MALLOC_')})"
    told = ast.literal_eval(run(tmp_path, ask).cells[0].outputs[0].text)
    assert told == ({name: int(value) for name, value in own.items()} or MALLOC_SETTINGS)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_no_process_outlives_its_kernel(tmp_path):
    pool = "\n".join(
        [
            "import os",
            "from lib.data.scan_map import worker_processes",
            "from multiprocessing.resource_tracker import _resource_tracker",
            "with worker_processes(2) as executor:",
            "    workers = {executor.submit(os.getpid).result() for _ in range(4)}",
            "print(os.getpid(), _resource_tracker._pid, *workers)",
        ]
    )
    printed = run(tmp_path, pool).cells[0].outputs[0].text
    waited_until = time.monotonic() + 10  # the resource tracker ends when it sees the kernel gone
    started = {int(pid) for pid in printed.split()}
    assert len(started) >= 3 and os.getpid() not in started
    while any(map(is_running, started)) and time.monotonic() < waited_until:
        time.sleep(0.05)
    assert not any(map(is_running, started))


def test_a_notebook_that_fails_says_so(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="no such scan"):
        run(tmp_path, "raise ValueError('no such scan')", "print('not reached')")
