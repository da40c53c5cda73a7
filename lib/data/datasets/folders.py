"""Names in raw folders: walking them, ordering them, reading lists and tables of them.

Only directory entries are read, no file is opened or measured: COV19-CT-DB holds 2.5 million.
"""

import csv
import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from pathlib import Path, PurePosixPath, PureWindowsPath

from lib.data.datasets.source import LABELS, DataSetProblem, ListingProblem, Reason
from lib.data.splits import SPLITS, VALIDATION

PICTURES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")
NIFTI = (".nii.gz", ".nii")
SPLIT_NAMES = {name: name for name in SPLITS} | {"val": VALIDATION, "valid": VALIDATION}

_NOT_DATA = {"__macosx", "thumbs.db", "desktop.ini"}
_DIGITS = re.compile(r"(\d+)", re.ASCII)
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OTHER_DELIMITERS = ",;\t|"


def entries(folder: Path) -> Iterator[os.DirEntry]:
    """Entries of a folder in no order, without dot files (macOS ``._*``) and system litter."""
    with os.scandir(folder) as found:
        yield from (e for e in found if e.name[0] != "." and e.name.lower() not in _NOT_DATA)


def subfolders(folder: Path) -> list[Path]:
    """Visible folders in a folder, in natural order; none where the folder does not exist."""
    if not folder.is_dir():
        return []
    return sorted((folder / e.name for e in entries(folder) if e.is_dir()), key=natural_order)


def files_in(folder: Path, suffixes: Collection[str] = PICTURES) -> list[Path]:
    """Visible files with one of the suffixes, in natural order; none without the folder."""
    if not folder.is_dir():
        return []
    found = (e.name for e in entries(folder) if not e.is_dir())
    return sorted((folder / n for n in found if _ends_with(n, suffixes)), key=natural_order)


def has_slices(folder: Path) -> bool:
    """Whether a folder holds at least one picture; stops at the first."""
    return any(_ends_with(e.name, PICTURES) for e in entries(folder))


def _ends_with(name: str, suffixes: Collection[str]) -> bool:
    return name.lower().endswith(tuple(suffixes))


def stem(file: Path) -> str:
    """File name without its suffix, ``.nii.gz`` counting as one."""
    return file.name[:-7] if file.name.lower().endswith(".nii.gz") else file.stem


def natural_order(path: Path) -> list[str | int]:
    """Sort key that puts ``2.jpg`` before ``10.jpg``."""
    return [int(t) if i % 2 else t for i, t in enumerate(_DIGITS.split(path.name))]


def find_layout(root: Path, wanted: Collection[str], *, depth: int = 1) -> Path:
    """The folder that a data set was unpacked into: the root or one that wraps it.

    Args:
        root: where the user was told to put the data set.
        wanted: lower-case names; the folder holding any of them is meant.
        depth: how many levels below the root are searched.

    Returns:
        The first such folder, nearest to the root, or the root itself where there is none.
    """
    level = [root]
    for _ in range(depth + 1):
        for folder in level:
            if any(e.name.lower() in wanted for e in entries(folder)):
                return folder
        level = [child for folder in level for child in subfolders(folder)]
    return root


def find_file(name: str, *folders: Path) -> Path | None:
    """The first file of this name in one of the folders or its ``splits/``, or None."""
    places = [place / name for folder in folders for place in (folder, folder / "splits")]
    return next((file for file in places if file.is_file()), None)


def safe_id(text: str) -> str:
    """Text with every run of characters unsafe in a file name replaced by one ``-``."""
    return _UNSAFE.sub("-", text).strip("-.")


def is_safe_id(text: str) -> bool:
    """Whether text can serve as an id and as a file name unchanged."""
    return _SAFE_ID.fullmatch(text) is not None


def pseudonym(text: str, length: int = 12) -> str:
    """A stable stand-in for a name: the first hexadecimal digits of its SHA-256.

    Whoever can guess the name can confirm it, so this hides names from readers of a report and
    does not make data anonymous.
    """
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def inside(root: Path, name: str, source: str) -> Path:
    """The path of a name that a table gives, which must stay below the root.

    Args:
        root: the data set's folder.
        name: relative path, either slash.
        source: table and line, for the message.

    Raises:
        DataSetProblem: for an empty or absolute path, one with ``..``, or one that a link takes
            out of the root. The message holds no path, which may be a patient's name.
    """
    parts = PureWindowsPath(name).parts  # knows both kinds of slash, and drive letters
    relative = parts and not PureWindowsPath(name).anchor and not PurePosixPath(name).is_absolute()
    plain = relative and ".." not in parts and "\0" not in name
    path = root.joinpath(*parts) if plain else None
    if path is None or not path.resolve().is_relative_to(root.resolve()):
        raise DataSetProblem(f"{source}: the path must lie inside the data set's folder.")
    return path


def parse_label(text: str, source: str) -> str | None:
    """One of the study's labels from a user's spelling of it; None for an empty one.

    Raises:
        DataSetProblem: for an unknown label.
    """
    label = text.strip().lower().replace("_", "-")
    if label and label not in LABELS:
        raise DataSetProblem(f"{source}: unknown label {text!r}, expected {', '.join(LABELS)}.")
    return label or None


def parse_split(text: str, source: str) -> str | None:
    """One of the study's splits (``val`` and ``valid`` are validation); None for an empty one.

    Raises:
        DataSetProblem: for an unknown split.
    """
    split = text.strip().lower()
    if split and split not in SPLIT_NAMES:
        raise DataSetProblem(f"{source}: unknown split {text!r}, expected {', '.join(SPLITS)}.")
    return SPLIT_NAMES.get(split)


def read_text(file: Path) -> str:
    """Text of a list or table in UTF-8, with or without byte order mark.

    Raises:
        DataSetProblem: for any other encoding.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataSetProblem(f"{file} is not UTF-8 text.") from error


def read_name_list(file: Path) -> list[str]:
    """File names of a published list, one a line, empty lines skipped.

    Raises:
        DataSetProblem: for a line that holds a path instead of a file name.
    """
    names = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        name = line.strip()
        if "/" in name or "\\" in name or name == "..":
            raise DataSetProblem(f"{file}, line {number}: a file name without folders is expected.")
        if name:
            names.append(name)
    return names


def read_split_lists(
    files: Mapping[str, str], *folders: Path, key: Callable[[str], str]
) -> dict[str, str]:
    """The published split of every listed name.

    Args:
        files: split -> name of its list.
        *folders: where the lists are looked for, each also in its ``splits/``.
        key: makes the returned key of a listed name.

    Returns:
        Key of the name -> split; empty where no list is found.

    Raises:
        DataSetProblem: for a name listed twice, or where only some of the lists are present.
    """
    found = {split: find_file(name, *folders) for split, name in files.items()}
    if not any(found.values()):
        return {}
    missing = [files[split] for split, file in found.items() if file is None]
    if missing:
        raise DataSetProblem(f"the published split in {folders[0]} lacks {', '.join(missing)}.")
    listed = [(key(name), split) for split, file in found.items() for name in read_name_list(file)]
    splits = dict(listed)
    if len(splits) < len(listed):
        raise DataSetProblem(f"the lists {', '.join(files.values())} name a slice twice.")
    return splits


def unlisted(splits: Mapping[str, str], found: Set[str], root: Path) -> Iterator[ListingProblem]:
    """Problems where a published split and the files disagree; none without a published split.

    Args:
        splits: scan id -> split.
        found: ids of the scans on disk.
        root: the folder at fault.
    """
    if splits:
        for scan_id in sorted(splits.keys() - found):
            yield ListingProblem(Reason.FILE_MISSING, root, scan_id)
        for scan_id in sorted(found - splits.keys()):
            yield ListingProblem(Reason.SCAN_WITHOUT_SPLIT, root, scan_id)


def read_table(
    file: Path, required: Collection[str], *, delimiter: str = ","
) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a delimited table, each with a text such as ``scans.csv, line 3`` for messages.

    Raises:
        DataSetProblem: for a wrong delimiter, a missing column, or a row of another length.
    """
    reader = csv.DictReader(read_text(file).splitlines(), delimiter=delimiter)
    reader.fieldnames = header = [name.strip() for name in reader.fieldnames or []]
    missing = [name for name in required if name not in header]
    if missing:
        raise DataSetProblem(_header_fault(file, header, missing, delimiter))
    for row in reader:
        source = f"{file.name}, line {reader.line_num}"
        if None in row or None in row.values():
            raise DataSetProblem(f"{source}: {len(header)} values expected, as in the header.")
        yield source, {name: value.strip() for name, value in row.items()}


def _header_fault(file: Path, header: list[str], missing: list[str], delimiter: str) -> str:
    """What is wrong with a header that lacks columns, in one sentence."""
    single = header[0] if len(header) == 1 else ""
    if any(other in single for other in _OTHER_DELIMITERS if other != delimiter):
        return f"{file} must be separated by {delimiter!r}; its header reads {single!r}."
    return f"{file} lacks the column {', '.join(missing)}; it has {', '.join(header) or 'none'}."
