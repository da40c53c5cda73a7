"""Which slices of a scan show open lungs, and where the body lies: lists of selections as text.

One line per scan, as the lists published with 3-D CNN with BERT (section 3.3; FACTS 4.4) have it:
``dir label first last xmin ymin xmax ymax``. Here ``dir`` is the ``scan_id``, slices count from 0
at the head, and pixels are those of the stored slices.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lib.data.files import whole_file

FIELDS = ("dir", "label", "first", "last", "xmin", "ymin", "xmax", "ymax")
COVID, NON_COVID = "covid", "non-covid"  # the published lists' words
UNKNOWN = "unknown"  # ours, for scans without a label; the published test lists say "covid" there


@dataclass(frozen=True)
class Selection:
    """The kept slices of one scan and the box around the body in them.

    Attributes:
        scan_id: pseudonymous name of the scan.
        label: one word, in the lists of the study ``COVID``, ``NON_COVID`` or ``UNKNOWN``.
        first: first kept slice, counted from 0.
        last: last kept slice, itself kept.
        box: (xmin, ymin, xmax, ymax) in pixels, x along columns; the maxima lie just outside.

    Raises:
        ValueError: a name that is not one word, or a range or box that is empty or negative.
    """

    scan_id: str
    label: str
    first: int
    last: int
    box: tuple[int, int, int, int]

    def __post_init__(self) -> None:
        for name in (self.scan_id, self.label):
            if len(name.split()) != 1 or name != name.strip():
                raise ValueError(f"a list of selections holds names of one word, got {name!r}")
        if not 0 <= self.first <= self.last:
            raise ValueError(f"slices {self.first} to {self.last} are no range")
        xmin, ymin, xmax, ymax = self.box
        if not (0 <= xmin < xmax and 0 <= ymin < ymax):
            raise ValueError(f"x {xmin} to {xmax} and y {ymin} to {ymax} are no box")

    def __len__(self) -> int:
        """Number of kept slices."""
        return self.last - self.first + 1


def write_selections(selections: Iterable[Selection], path: Path) -> None:
    """Write selections as a list in the published format, whole or not at all.

    Args:
        selections: one per scan, in the order of the lines.
        path: the file.

    Raises:
        ValueError: two selections of one scan.
    """
    lines, seen = [], set()
    for one in selections:
        if one.scan_id in seen:
            raise ValueError(f"{path}: scan {one.scan_id} is to be listed twice")
        seen.add(one.scan_id)
        lines.append(f"{one.scan_id} {one.label} {one.first} {one.last} {_words(one.box)}\n")
    with whole_file(path) as partial:
        partial.write_text("".join(lines), encoding="utf-8", newline="\n")


def read_selections(*paths: Path) -> dict[str, Selection]:
    """Read lists in the published format.

    Args:
        paths: written by `write_selections`, or published lists.

    Returns:
        For each ``scan_id`` (in a published list the folder) its selection, in the order of lines.

    Raises:
        FileNotFoundError: in one sentence, if there is no list.
        ValueError: in one sentence with file and line, for a line of another format or a scan that
            is listed twice.
    """
    selections: dict[str, Selection] = {}
    for path, number, line in _lines(paths):
        try:
            one = _parsed(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if one.scan_id in selections:
            raise ValueError(f"{path}, line {number}: scan {one.scan_id} is listed twice")
        selections[one.scan_id] = one
    return selections


def _lines(paths: Iterable[Path]) -> Iterator[tuple[Path, int, str]]:
    """Lines that are not empty, with their file and number."""
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: run the stage select_slices first")
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if line.strip():
                yield path, number, line


def _parsed(line: str) -> Selection:
    """The selection of one line."""
    words = line.split()
    if len(words) != len(FIELDS):
        raise ValueError(
            f"a line holds {len(FIELDS)} words ({' '.join(FIELDS)}), this one {len(words)}"
        )
    numbers = words[2:]
    if not all(word.isascii() and word.isdigit() for word in numbers):
        raise ValueError(f"{' '.join(FIELDS[2:])} are whole numbers, got {' '.join(numbers)}")
    first, last, *box = map(int, numbers)
    return Selection(words[0], words[1], first, last, tuple(box))


def _words(numbers: Iterable[int]) -> str:
    return " ".join(str(int(number)) for number in numbers)
