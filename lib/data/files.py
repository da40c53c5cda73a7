"""Files that are whole or not there: the one way in which the study writes a file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name; it takes its place when complete and on the disk.

    A kill at any moment leaves the old file or the new one, never a part. The old one is replaced,
    never written to, so it may be a link into a read-only cache. One writer per file at a time.

    Args:
        path: the file; its folder is made if absent.

    Yields:
        The path to write to, in the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # what a killed try left must not pass for this one's
    try:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV, whole or not at all; the same table gives the same bytes."""
    with whole_file(path) as partial:
        table.to_csv(partial, index=False, lineterminator="\n")
