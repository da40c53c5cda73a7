"""What each choice of SAM2CLIP2SAM is worth: the same slices under many settings.

Source: FACTS 9.1 to 9.6: the paper leaves these choices open or prints them otherwise. SAM sees
each slice once for every distinct way of segmenting everything; ways of choosing lungs share it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.data.files import save_csv
from lib.data.store import open_volume
from lib.evaluation.segmentation import overlap
from lib.segmentation.sam2clip2sam import Sight, build_segmenter

Variant = Mapping[str, Mapping[str, Any]]  # changes of "generator" and of "choice"


def ablate_stored(
    files: tuple[Path, Path],
    path: Path,
    *,
    sam_weights: Path,
    clip_weights: Path,
    settings: Mapping[str, Any],
    variants: Mapping[str, Variant],
    slices_per_scan: int,
) -> dict[str, int]:
    """Segment slices of one stored scan under all variants; the work of ``map_scans``.

    Slices are judged by themselves, since they lie apart: ``continued_floor`` has no effect.

    Args:
        files: stored scan and its true lung mask.
        path: the CSV file to write, with the columns variant, slice, dice, iou and empty.
        sam_weights: file of SAM's weights.
        clip_weights: file of CLIP's weights.
        settings: keywords of `build_segmenter`, which the variants change.
        variants: for each name the changed keywords of the generator and of the choice; in the
            choice, ``sentences`` may be a number, for the first so many of the given ones.
        slices_per_scan: at most so many, equally spaced.

    Returns:
        The number of slices.
    """
    volume, truth = (open_volume(file) for file in files)
    count = min(slices_per_scan, len(volume))
    chosen = np.unique(np.linspace(0, len(volume) - 1, count).round().astype(int)).tolist()
    voxels = np.stack([volume[index] for index in chosen])
    seen: dict[str, list[Sight]] = {}
    rows = []
    for name, changes in variants.items():
        changed = changed_settings(settings, changes)
        segmenter = build_segmenter(sam_weights, clip_weights, **changed)
        way = json.dumps(changed["generator"], sort_keys=True)
        if way not in seen:
            seen[way] = segmenter.look(voxels)
        for index, journey in zip(chosen, segmenter.choose(seen[way]), strict=True):
            rows.append({"variant": name, "slice": index} | _score(journey.lungs, truth[index] > 0))
    save_csv(pd.DataFrame(rows), path)
    return {"slices": len(chosen)}


def changed_settings(settings: Mapping[str, Any], changes: Variant) -> dict[str, Any]:
    """Settings of a segmenter with the changes of a variant.

    Args:
        settings: with ``generator`` and ``choice``.
        changes: to one or both of them.

    Raises:
        ValueError: if something else is changed, or more sentences are asked for than there are.
    """
    if not set(changes) <= {"generator", "choice"}:
        raise ValueError(f"a variant changes generator and choice, got {sorted(changes)}")
    generator = {**settings["generator"], **changes.get("generator", {})}
    choice = {**settings["choice"], **changes.get("choice", {})}
    if isinstance(choice["sentences"], int):
        given = settings["choice"]["sentences"]
        if not 1 <= choice["sentences"] <= len(given):
            raise ValueError(f"there are {len(given)} sentences, got {choice['sentences']}")
        choice["sentences"] = given[: choice["sentences"]]
    return {**settings, "generator": generator, "choice": choice}


def _score(lungs: np.ndarray, truth: np.ndarray) -> dict[str, float | bool]:
    """How well both lungs of a slice are found."""
    dice, iou = overlap(lungs, truth)
    return {"dice": dice, "iou": iou, "empty": bool(truth.any() and not lungs.any())}


def read_ablation(paths: Sequence[Path], manifest: pd.DataFrame) -> pd.DataFrame:
    """Mean scores of each scan under each variant, beside what the tables group them by.

    Args:
        paths: files of `ablate_stored`, each named after its scan.
        manifest: columns scan_id, patient_id, split, label.

    Returns:
        One row per scan and variant, variants in their order.
    """
    rows = pd.concat([pd.read_csv(path).assign(scan_id=path.stem) for path in paths])
    means = rows.groupby(["variant", "scan_id"], sort=False)[["dice", "iou", "empty"]].mean()
    known = manifest[["scan_id", "patient_id", "split", "label"]]
    return means.reset_index().merge(known, on="scan_id", validate="many_to_one")
