"""The manifest of a prepared data set, as everything after the preparation reads it."""

from pathlib import Path

import pandas as pd

COUNTS = ("slices", "height", "width")  # every other column is text


def read_manifest(prepared: Path) -> pd.DataFrame:
    """The manifest of a prepared data set; text but for counts, empty cells are None.

    Args:
        prepared: its folder, ``data/prepared/<data set>``.

    Raises:
        FileNotFoundError: in one sentence, if the data set was not prepared.
    """
    path = prepared / "manifest.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: run the stage prepare@{prepared.name} first")
    manifest = pd.read_csv(path, dtype=str, keep_default_na=False).astype(object)
    manifest = manifest.where(manifest != "", None)
    return manifest.astype(dict.fromkeys(COUNTS, "int64"))


def read_quarantine(prepared: Path) -> pd.DataFrame:
    """The quarantine list of a prepared data set, text as it was written."""
    return pd.read_csv(prepared / "quarantine.csv", dtype=str, keep_default_na=False)


def scans_with_lungs(manifest: pd.DataFrame, prepared: Path, split: str) -> list[tuple[Path, Path]]:
    """Stored scans of one part with their true lung masks, for training.

    Args:
        manifest: of the data set.
        prepared: its folder.
        split: the part.

    Returns:
        (scan, mask) of every scan that has a mask, in the order of the manifest.
    """
    names = [f"{scan_id}.b2nd" for scan_id in manifest["scan_id"][manifest["split"] == split]]
    pairs = [(prepared / "scans" / name, prepared / "lungs" / name) for name in names]
    return [pair for pair in pairs if pair[1].exists()]
