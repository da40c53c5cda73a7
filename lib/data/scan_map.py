"""Work mapped over scans: progress bar, atomic results, restarts; a bad scan spoils only itself.

A folder of results belongs to one map. Each scan leaves two entries: the result
``<scan_id><suffix>``, and beside it ``<scan_id>.json`` with the record that the work returned, the
SHA-256 of every file of the result, and a **fingerprint** of all that the result depends on: the
scan's identifier, the contents of its input files, the parameters, and the text of the code. No
path, time or machine enters any of them, so a run that was killed and resumed leaves the very bytes
of an undisturbed one, in any folder and with any number of workers.

A scan is skipped when its fingerprint is the same *and* its result still has the recorded SHA-256.
Sizes and times of files would be quicker to compare, but a checkout from a cache changes the times,
and a damaged file may keep its size; hashing takes a few hundredths of a second per scan.

Everything is written in ``<folder>/.partial`` and renamed when it is complete and on the disk, the
sidecar last. Nothing is ever written in place, so results may be hard links into a read-only cache
(DVC's ``persist: true``). One run per folder at a time.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from tqdm import tqdm

from lib.data.scan import ScanError

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

_PARTIAL = ".partial"
_ID_END = "~"  # ends the scan_id in a temporary name; no scan_id has one
_IN_FLIGHT = 256  # scans handed to an executor at a time; more than its workers, less than a study
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


class ScanMapError(RuntimeError):
    """A map that had to stop; complete results are kept and a second run goes on from there."""


@dataclass(frozen=True)
class ScanFailure:
    """Why a scan has no result.

    Attributes:
        reason: the reason of a `ScanError` (``"truncated file"``), a missing permission in the
            same words, else the exception's type.
        message: what the exception says.
        traceback: where it was raised, as text, for a person.
        file: the file at fault, of a `ScanError`.
        detail: its sentence for a person, of a `ScanError`.
        disk_full: whether there was no space left to write the result.
    """

    reason: str
    message: str
    traceback: str
    file: Path | None = None
    detail: str = ""
    disk_full: bool = False


@dataclass(frozen=True)
class ScanResult:
    """What became of one scan.

    Attributes:
        scan_id: the scan.
        path: its result; there is no such file where ``error`` is set.
        record: what the work returned for this scan, read back from JSON; None after an error.
        error: why there is no result, or None.
        skipped: whether an earlier run had left a complete and unchanged result.
    """

    scan_id: str
    path: Path
    record: dict[str, Any] | None = None
    error: ScanFailure | None = None
    skipped: bool = False


def map_scans(
    work: Callable[..., Mapping[str, Any]],
    items: Mapping[str, Any] | Sequence[Any],
    folder: Path | str,
    *,
    suffix: str,
    parameters: Mapping[str, Any],
    inputs: Callable[[Any], Iterable[Path | str]],
    code: Sequence[ModuleType | Path | str],
    executor: Executor | None = None,
    description: str,
    keep_going: bool = True,
) -> list[ScanResult]:
    """Compute one result per scan, in any number of processes, and keep the folder complete.

    Worker processes need picklable ``work``, ``inputs`` and items: no lambdas.

    Args:
        work: called as ``work(item, path, **parameters)``; writes the result to ``path`` and
            returns a small record that JSON can hold.
        items: scan_id to item, or a sequence of items that have a ``scan_id``.
        folder: where the results go; created where needed. Results of an earlier run that are not
            among ``items`` are removed; files that no map has made are left alone.
        suffix: of every result, for example ``".b2nd"``; ``""`` when the result is a folder, which
            ``path`` then is, new and empty.
        parameters: keyword arguments of ``work``, plain values that JSON can hold. A path does not
            belong here (bind it with ``functools.partial`` and name the file in ``code``).
        inputs: what the result of an item depends on: files (or folders, for all files in them),
            and texts, for what the item says itself.
        code: what all results depend on: modules (that of ``work`` first), packages with all their
            modules, or files, for their text (a checkpoint may be one of the files), and names of
            installed packages, for their version.
        executor: a process pool, a thread pool, a Dask client's ``get_executor()``, ...; it is not
            shut down. None works in this process.
        description: of the progress bar.
        keep_going: whether an error of one scan is only noted in its `ScanResult`.

    Returns:
        One result per scan, in the order of ``items``, whatever the order of completion.

    Raises:
        ValueError: a scan_id is no safe file name or not unique, or JSON cannot hold a parameter.
        ScanMapError: the disk is full, a worker process died, the executor refused a scan, or, with
            ``keep_going`` off, a scan failed. Complete results are kept.
    """
    named = _by_scan_id(items)
    folder = Path(folder)
    _check_names(named, suffix)
    job = _Job(work, folder, suffix, dict(parameters), inputs, _common_hash(parameters, code))
    (folder / _PARTIAL).mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    _remove_stale(folder, named)
    results = {}
    with closing(_outcomes(job, named, executor)) as outcomes:
        for result in tqdm(
            outcomes, total=len(named), desc=description, unit="scan", mininterval=1
        ):
            results[result.scan_id] = result
            _stop_if_hopeless(result, keep_going, folder)
    with suppress(OSError):  # not empty: workers of a killed run are finishing their last scans
        (folder / _PARTIAL).rmdir()
    return [results[scan_id] for scan_id in named]


@contextmanager
def worker_processes(count: int = 0) -> Iterator[Executor | None]:
    """An executor for `map_scans` with processes of this machine.

    Args:
        count: of processes; 0 takes one per core that this process may use.

    Yields:
        A process pool, or None for a single process: then the work is done in this one, which saves
        the start of another. Processes are spawned, since a fork of a process with threads (a
        notebook's kernel) can hang.
    """
    if count == 0 and hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))  # a container or a batch system may allow fewer
    count = count or os.cpu_count() or 1
    if count == 1:
        yield None
        return
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as executor:
        yield executor


@dataclass(frozen=True)
class _Job:
    """What is the same for every scan of a map; sent to the workers."""

    work: Callable[..., Mapping[str, Any]]
    folder: Path
    suffix: str
    parameters: dict[str, Any]
    inputs: Callable[[Any], Iterable[Path | str]]
    common_hash: str


# ---------------------------------------------------------------------------- before the first scan
def _by_scan_id(items: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    if isinstance(items, Mapping):
        return dict(items)
    named = {item.scan_id: item for item in items}
    if len(named) != len(items):
        raise ValueError("two scans of a map have the same scan_id")
    return named


def _check_names(scan_ids: Iterable[str], suffix: str) -> None:
    """Refuse names that leave the folder, or that would overwrite each other or a sidecar."""
    if not SAFE_NAME.fullmatch(f"x{suffix}"):
        raise ValueError(f"suffix {suffix!r} is not the ending of a safe file name")
    seen = set()
    for scan_id in scan_ids:
        if not SAFE_NAME.fullmatch(scan_id):
            raise ValueError(f"scan_id {scan_id!r} is not a safe file name")
        for name in (scan_id + suffix, scan_id + ".json"):
            if name.lower() in seen:  # some file systems do not tell A from a
                raise ValueError(f"scan_id {scan_id!r} gives {name!r}, which is taken")
            seen.add(name.lower())


def _common_hash(parameters: Mapping[str, Any], code: Sequence[ModuleType | Path | str]) -> str:
    try:
        plain = json.dumps(dict(parameters), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"parameters of a map are plain values of JSON: {error}") from error
    return _hash_of([plain, [_code_hash(part) for part in code]])


def _code_hash(part: ModuleType | Path | str) -> list[list[str]]:
    """Name and content of a source file or of all in a package, or version of an installed one."""
    if isinstance(part, str):
        return [[part, version(part)]]
    path = part if isinstance(part, Path) else Path(part.__file__)
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    return [[file.relative_to(path.parent).as_posix(), _file_hash(file)] for file in files]


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left behind.

    A sidecar that is still in its temporary folder tells of a result that may have been renamed
    already: it does not count and is removed too.
    """
    for leftover in (folder / _PARTIAL).iterdir():
        scan_id = leftover.name.partition(_ID_END)[0]
        if written := _read_sidecar(_sidecar(leftover, scan_id)):
            _remove_recorded(_sidecar(folder, scan_id), written)
        _remove(leftover)


def _remove_stale(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Remove results of scans that are no longer asked for, and nothing that no map has made."""
    for sidecar in sorted(folder.glob("*.json")):
        if sidecar.stem not in wanted and (written := _read_sidecar(sidecar)):
            _remove_recorded(sidecar, written)


# ------------------------------------------------------------------------------ handing scans out
def _outcomes(
    job: _Job, items: Mapping[str, Any], executor: Executor | None
) -> Iterator[ScanResult]:
    """Results in order of completion."""
    if executor is None:
        return (_process(job, scan_id, item) for scan_id, item in items.items())
    return _outcomes_of_executor(job, items, executor)


def _outcomes_of_executor(
    job: _Job, items: Mapping[str, Any], executor: Executor
) -> Iterator[ScanResult]:
    waiting = iter(items.items())
    in_flight: dict[Future, str] = {}
    try:
        while True:
            for scan_id, item in islice(waiting, _IN_FLIGHT - len(in_flight)):
                in_flight[executor.submit(_process, job, scan_id, item)] = scan_id
            if not in_flight:
                return
            done, _ = wait(in_flight, return_when=FIRST_COMPLETED)
            for future in done:
                yield _result_of(future, in_flight.pop(future))
    except BrokenExecutor as error:
        raise ScanMapError(_worker_died(job.folder)) from error
    finally:  # also where the map stops early or is interrupted
        for future in in_flight:
            future.cancel()


def _result_of(future: Future, scan_id: str) -> ScanResult:
    """The result of a scan; `_process` raises nothing, so an exception is the executor's."""
    try:
        return future.result()
    except BrokenExecutor:
        raise
    except Exception as error:
        raise ScanMapError(
            f"the executor could not run scan {scan_id}: {type(error).__name__}: {error}"
        ) from error


def _worker_died(folder: Path) -> str:
    """The scans in hand when a worker died are those whose temporary folders are still there."""
    in_hand = sorted({path.name.partition(_ID_END)[0] for path in (folder / _PARTIAL).iterdir()})
    return (
        "a worker process died (killed, or out of memory) while these scans were in hand: "
        f"{', '.join(in_hand) or 'none'}; run again to go on from the complete ones"
    )


def _stop_if_hopeless(result: ScanResult, keep_going: bool, folder: Path) -> None:
    if result.error is None:
        return
    if result.error.disk_full:
        raise ScanMapError(
            f"the disk that holds {folder} was full at scan {result.scan_id}; "
            "complete results are kept, so free some space and run again"
        )
    if not keep_going:
        stop = ScanMapError(
            f"scan {result.scan_id} failed: {result.error.reason}: {result.error.message}"
        )
        stop.add_note(result.error.traceback)
        raise stop


# ------------------------------------------------------------------------ one scan, in a worker
def _process(job: _Job, scan_id: str, item: Any) -> ScanResult:
    """Bring one scan's result up to date. Never raises an `Exception`: it becomes the result's."""
    path = job.folder / f"{scan_id}{job.suffix}"
    try:
        fingerprint = _hash_of([job.common_hash, scan_id, _contents(job.inputs(item))])
        written = _read_sidecar(_sidecar(job.folder, scan_id))
        if written and _is_current(written, fingerprint, path):
            return ScanResult(scan_id, path, written["record"], skipped=True)
        return ScanResult(scan_id, path, _make(job, scan_id, item, fingerprint))
    except Exception as error:  # whatever is wrong with one scan, the others go on
        with suppress(OSError):
            _remove_older(path, _sidecar(job.folder, scan_id))
        return ScanResult(scan_id, path, error=_failure(error))


def _make(job: _Job, scan_id: str, item: Any, fingerprint: str) -> dict[str, Any]:
    """Work on one scan in a temporary folder, then rename the result and its sidecar."""
    with TemporaryDirectory(prefix=f"{scan_id}{_ID_END}", dir=job.folder / _PARTIAL) as temporary:
        path = Path(temporary) / f"{scan_id}{job.suffix}"
        if not job.suffix:
            path.mkdir()
        record = job.work(item, path, **job.parameters)
        sidecar = _sidecar(Path(temporary), scan_id)
        text = _describe(scan_id, path, record, fingerprint)
        sidecar.write_text(text, encoding="utf-8")
        for file in [*_files(path), sidecar]:
            _flush_to_disk(file)
        _remove_older(job.folder / path.name, job.folder / sidecar.name)
        path.replace(job.folder / path.name)
        sidecar.replace(job.folder / sidecar.name)
    return json.loads(text)["record"]


def _describe(scan_id: str, path: Path, record: Any, fingerprint: str) -> str:
    """The text of a sidecar."""
    if not path.exists():
        raise FileNotFoundError(f"the work on scan {scan_id} wrote no result")
    if not isinstance(record, Mapping):
        raise TypeError(
            f"the work on scan {scan_id} returned {type(record).__name__}, not a record"
        )
    sidecar = {
        "files": _contents([path]),
        "fingerprint": fingerprint,
        "record": dict(record),
        "result": path.name,
    }
    return json.dumps(sidecar, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _is_current(written: Mapping[str, Any], fingerprint: str, path: Path) -> bool:
    return (
        written["fingerprint"] == fingerprint
        and written["result"] == path.name
        and path.exists()
        and written["files"] == _contents([path])
    )


def _failure(error: Exception) -> ScanFailure:
    text = "".join(traceback.format_exception(error))
    if isinstance(error, PermissionError):  # met while hashing the inputs
        error = ScanError("no permission", error.filename or "")
    known = isinstance(error, ScanError)
    return ScanFailure(
        reason=error.reason if known else type(error).__name__,
        message=str(error),
        traceback=text,
        file=error.file if known else None,
        detail=error.detail if known else "",
        disk_full=_is_disk_full(error),
    )


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether the exception, or one that led to it, says that no space is left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


# --------------------------------------------------------------------------------- sidecars
def _sidecar(folder: Path, scan_id: str) -> Path:
    return folder / f"{scan_id}.json"


def _read_sidecar(path: Path) -> dict[str, Any] | None:
    """The content of a sidecar, or None for a missing or damaged one and for any other JSON."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    keys = {"files", "fingerprint", "record", "result"}
    return written if isinstance(written, dict) and written.keys() == keys else None


def _remove_older(path: Path, sidecar: Path) -> None:
    """Remove what earlier runs left of a scan: nothing stale may pass for a new result."""
    if written := _read_sidecar(sidecar):
        _remove_recorded(sidecar, written)
    _remove(path)


def _remove_recorded(sidecar: Path, written: Mapping[str, Any]) -> None:
    """Remove a result, then its sidecar; the other way round, a kill could hide the result."""
    name = str(written["result"])
    if name.startswith(sidecar.stem) and SAFE_NAME.fullmatch(name):
        _remove(sidecar.with_name(name))
    _remove(sidecar)


# ------------------------------------------------------------------------------ files and hashes
def _files(path: Path) -> list[Path]:
    """The file itself, or all files of a folder in the order of their names."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file())


def _contents(parts: Iterable[Path | str]) -> list[list[str]]:
    """Name and SHA-256 of every file, without the folder that it happens to lie in; texts whole."""
    contents = []
    for part in parts:
        if isinstance(part, str):
            contents.append([part])
            continue
        contents += [
            [file.relative_to(part.parent).as_posix(), _file_hash(file)] for file in _files(part)
        ]
    return contents


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
