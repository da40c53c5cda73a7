"""The files of a scan: which they are, what kind they are, and how reports name them."""

import gzip
import hashlib
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from lib.data.readers.findings import faults_of
from lib.data.readers.nifti import GZIP_MAGIC
from lib.data.scan import ScanError

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima", "")
SYSTEM_FILES = ("Thumbs.db", "desktop.ini")
HEADER_BYTES = 348  # of NIfTI-1; the signatures of all formats lie within
PICTURE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

Source = Path | Sequence[Path]


def source_files(source: Source, *, root: Path | None = None) -> list[Path]:
    """The files that make up a scan, in numeric order of their names (2.jpg before 10.jpg).

    For pictures and TIFF slices this order is the order of the slices, taken to run from the head
    to the feet. That is an assumption: nothing in such files tells it.

    Args:
        source: a file, a folder (hidden files, system files and folders in it are ignored) or a
            list of files.
        root: the data folder, if nothing may lie outside it.

    Returns:
        The files; empty for an empty folder.

    Raises:
        ScanError: "no such file", "no permission" or "outside the data folder".
    """
    if not isinstance(source, str | Path):
        files = [Path(file) for file in source]
    elif Path(source).is_dir():
        _check_inside([Path(source)], root)
        files = _folder_files(Path(source))
    else:
        files = [Path(source)]
    _check_inside(files, root)
    return sorted(files, key=_numeric_name)


def source_sha256(source: Source, *, root: Path | None = None) -> str:
    """SHA-256 over the contents of a scan's files, one after the other in `source_files` order.

    Args:
        source: as for `source_files`.
        root: the data folder, if nothing may lie outside it.

    Returns:
        Hexadecimal digest; for a single file the same as that of ``sha256sum``.

    Raises:
        ScanError: if a file is missing or cannot be opened.
    """
    digest = hashlib.sha256()
    for file in source_files(source, root=root):
        with faults_of(file), file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)  # streams into the running digest
    return digest.hexdigest()


def describe_source(path: Path, root: Path) -> str:
    """How reports name a file: relative to the data folder, never by a DICOM file name.

    DICOM file names often hold the patient's name or id, so such a file is named by its place:
    ``"<folder>, file 17 of 37 in name order"``.

    Args:
        path: a file or folder, existing or not.
        root: the data folder.

    Returns:
        One line.
    """
    if path.is_dir() or not _name_may_identify(path):
        return _relative(path, root)
    siblings = sorted(_folder_files(path.parent), key=_numeric_name) if path.parent.is_dir() else []
    if path not in siblings:
        return f"{_relative(path.parent, root)}, a file not listed"
    place = f"file {siblings.index(path) + 1} of {len(siblings)} in name order"
    return f"{_relative(path.parent, root)}, {place}"


def _folder_files(folder: Path) -> list[Path]:
    with faults_of(folder):
        return [
            entry
            for entry in folder.iterdir()
            if not (entry.name.startswith(".") or entry.name in SYSTEM_FILES or entry.is_dir())
        ]


def _numeric_name(file: Path) -> tuple:
    """Sort key under which 2.jpg comes before 10.jpg; the name itself settles ties."""
    parts = re.split("([0-9]+)", file.name)  # text and digits in turn
    return [int(part) if part.isdecimal() else part for part in parts], file.name, str(file)


def _check_inside(paths: Sequence[Path], root: Path | None) -> None:
    if root is None:
        return
    resolved = root.resolve()
    for path in paths:
        with faults_of(path):
            if not path.resolve().is_relative_to(resolved):
                raise ScanError("outside the data folder", path)


def _relative(path: Path, root: Path) -> str:
    try:
        inside = path.absolute().relative_to(root.absolute()).as_posix()
    except ValueError:
        return "outside the data folder"
    return root.absolute().name if inside == "." else inside


def _name_may_identify(file: Path) -> bool:
    """Whether a file is DICOM, or is unreadable and lies next to DICOM."""
    try:
        return kind_of(file) == "dicom"
    except ScanError:
        siblings = _folder_files(file.parent) if file.parent.is_dir() else []
        return file.suffix.lower() in DICOM_SUFFIXES or any(map(_is_dicom, siblings))


def _is_dicom(file: Path) -> bool:
    try:
        return kind_of(file) == "dicom"
    except ScanError:
        return False


def kind_of(file: Path) -> str:
    """The kind of a file, one of `READERS`, by its first bytes."""
    with faults_of(file):
        if not stat.S_ISREG(file.stat().st_mode):
            raise ScanError("unknown format", file, "it is no ordinary file")
        with file.open("rb") as stream:
            start = stream.read(HEADER_BYTES)
            if start.startswith(GZIP_MAGIC):
                stream.seek(0)
                start = gzip.GzipFile(fileobj=stream).read(HEADER_BYTES)
    if not start:
        raise ScanError("empty file", file)
    if start.startswith(PICTURE_MAGIC):
        return "picture"
    if start.startswith(TIFF_MAGIC):
        return "tiff"
    if start[128:132] == b"DICM":
        return "dicom"
    if start[344:348] == b"n+1\0" or start[4:8] == b"n+2\0":
        return "nifti"
    raise ScanError("unknown format", file)
