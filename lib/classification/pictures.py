"""Single slices as input of classifiers: the pictures of COVID-CT-Mask-Net (Ter-Sarkisov 2022, 2).

A picture is one axial slice, judged by itself. The list of them, `lib.data.pictures`, says which
slices have a class of their own; every other slice of a scan can be judged all the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lib.classification.inputs import resize_slice
from lib.classification.volumes import ScanVolumes, View
from lib.data.scan import to_grey
from lib.data.store import open_volume

LARGEST_GREY = 255.0
COLOURS = 3
UNKNOWN = -1  # target of a picture without a class of its own


@dataclass(frozen=True)
class PictureItem:
    """One picture to be classified.

    Attributes:
        image_id: name of the picture.
        scan_id: pseudonymous name of its scan.
        volume: file of the scan in the store.
        index: of the slice in it.
        target: index of the class; `UNKNOWN` where the slice has none of its own.
    """

    image_id: str
    scan_id: str
    volume: Path
    index: int
    target: int

    def content(self) -> Iterator[bytes]:
        """All that a classifier may see of it, for ``content_digest``."""
        yield f"{self.image_id} {self.index} {self.target}\n".encode()
        yield self.volume.with_suffix(".json").read_bytes()


def picture_items(
    pictures: pd.DataFrame, *, scans: Path, classes: Sequence[str]
) -> list[PictureItem]:
    """The pictures of a list as classifiers take them.

    Args:
        pictures: rows of `lib.data.pictures`, with image_id, scan_id, slice and label; an empty
            label is that of a slice without a class of its own.
        scans: folder of the stored scans.
        classes: names; a target is an index of them.

    Returns:
        One item per row.

    Raises:
        ValueError: if a label is none of the classes, naming the first.
        FileNotFoundError: if a scan is not stored, naming the first.
    """
    targets = {"": UNKNOWN, **{name: target for target, name in enumerate(classes)}}
    unknown = pictures.loc[~pictures["label"].isin(list(targets))]
    if len(unknown):
        row = unknown.iloc[0]
        raise ValueError(f"{row.image_id} is {row.label!r}, the classes are {', '.join(classes)}")
    for scan_id in pictures["scan_id"].unique():
        if not (scans / f"{scan_id}.b2nd").is_file():
            raise FileNotFoundError(f"{scans / scan_id}.b2nd is not there: prepare the data set")
    return [
        PictureItem(
            image_id=row.image_id,
            scan_id=row.scan_id,
            volume=scans / f"{row.scan_id}.b2nd",
            index=int(row.slice),
            target=targets[row.label],
        )
        for row in pictures.itertuples()
    ]


def load_picture(item: PictureItem, *, size: int) -> np.ndarray:
    """A picture in grey values, of Hounsfield units through the lung window.

    Published pictures are already 8-bit; they stay as they are. Resized to a square as published,
    by averaging where it shrinks (published: bilinear).

    Args:
        item: the picture; only its slice is decoded.
        size: height and width in pixels.

    Returns:
        uint8, shape (size, size).

    Raises:
        IndexError: if the scan has no such slice.
    """
    return resize_slice(to_grey(open_volume(item.volume)[item.index]), size)


def colours(grey: np.ndarray, generator: np.random.Generator | None = None) -> Tensor:
    """A grey picture three times over, 0 to 1: a view of `ScanVolumes`, the same at every time.

    Args:
        grey: uint8, shape (height, width).
        generator: not used.

    Returns:
        float32, shape (3, height, width).
    """
    return torch.from_numpy(grey).expand(COLOURS, *grey.shape) / LARGEST_GREY


def picture_views(
    items: Sequence[PictureItem], *, size: int, view: View = colours, cache: bool = False
) -> ScanVolumes:
    """Pictures for `fit_volumes` and `predict_volumes`, for which each is a scan of one slice.

    Args:
        items: the pictures.
        size: height and width in pixels.
        view: from the loaded picture to what the network sees, see `ScanVolumes`.
        cache: keep the loaded pictures in memory.
    """
    return ScanVolumes(items, load=partial(load_picture, size=size), view=view, cache=cache)
