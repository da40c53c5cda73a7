"""Single slices as input of classifiers: the pictures of COVID-CT-Mask-Net (Ter-Sarkisov 2022, 2).

A picture is one axial slice, judged by itself. The list of them, `lib.data.pictures`, says which
slices have a class of their own; every other slice of a scan can be judged all the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric, seed_everything
from torch import Tensor, nn
from torch.optim import Optimizer

from lib.classification.inputs import resize_slice
from lib.classification.picture_augmentation import Augmentation, augmented
from lib.classification.task import Task, Trained
from lib.classification.volumes import ScanVolumes, View, fit_volumes, predict_volumes
from lib.data.scan import LUNG_WINDOW, Window, to_grey
from lib.data.store import open_volume
from lib.inference import load_tensors

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


def load_picture(item: PictureItem, *, size: int, window: Window = LUNG_WINDOW) -> np.ndarray:
    """A picture in grey values, of Hounsfield units through an intensity window.

    Published pictures are already 8-bit; they stay as they are. Resized to a square as published,
    by averaging where it shrinks (published: bilinear).

    Args:
        item: the picture; only its slice is decoded.
        size: height and width in pixels.
        window: for Hounsfield units only.

    Returns:
        uint8, shape (size, size).

    Raises:
        IndexError: if the scan has no such slice.
    """
    return resize_slice(to_grey(open_volume(item.volume)[item.index], window), size)


def colours(grey: np.ndarray, generator: np.random.Generator | None = None) -> Tensor:
    """A grey picture three times over, 0 to 1: a view of `ScanVolumes`, the same at every time.

    Args:
        grey: uint8, shape (height, width).
        generator: not used.

    Returns:
        float32, shape (3, height, width).
    """
    return torch.tensor(grey).expand(COLOURS, *grey.shape) / LARGEST_GREY


def varied_colours(
    grey: np.ndarray, generator: np.random.Generator | None, *, ranges: Augmentation
) -> Tensor:
    """A grey picture three times over, in training changed at random: a view of `ScanVolumes`.

    Args:
        grey: uint8, shape (size, size).
        generator: of the random view; None for the plain one.
        ranges: of the random view.

    Returns:
        float32, 0 to 1, shape (3, size, size).
    """
    return colours(grey if generator is None else augmented(grey[None], generator, ranges)[0])


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


def train_pictures(
    task: Task,
    build: Callable[..., nn.Module],
    *,
    name: str,
    optimizer: Callable[..., Optimizer] = torch.optim.Adam,
) -> Trained:
    """Train a network on single pictures by cross entropy.

    Args:
        task: of pictures; its ``start`` is None or a training of the same network. Settings are
            image_size, batch_scans (pictures), rounds, learning_rate, weight_decay, augmentation
            (of `Augmentation`), class_balanced, cache_pictures, loader_processes, and those of
            ``fit_network``.
        build: makes the network from the task's variant.
        name: of the learning curve.
        optimizer: from weights, ``lr`` and ``weight_decay``.

    Raises:
        ValueError: if a picture to learn from has no class.
    """
    settings = task.settings
    seed_everything(task.seed, verbose=False)
    model = prepared(task, build)
    view = partial(varied_colours, ranges=Augmentation(**settings["augmentation"]))
    history = fit_volumes(
        task,
        model,
        partial(
            picture_views,
            size=settings["image_size"],
            view=view,
            cache=settings["cache_pictures"],
        ),
        optimizer=optimizer(
            model.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
        ),
    )
    return Trained(model, {name: history})


def prepared(task: Task, build: Callable[..., nn.Module]) -> nn.Module:
    """The network of a task of pictures before its training, from its ``start`` where it has one.

    Args:
        task: of pictures.
        build: makes the network from the task's variant; its class layer is named ``output``.

    Raises:
        ValueError: if a picture to learn from has no class, or the start is another network's.
    """
    for item in (*task.train, *task.validation):
        if item.target == UNKNOWN:
            raise ValueError(f"{item.image_id} has no class, so nothing is learned from it")
    model = build(**task.variant, classes=len(task.classes))
    if task.start is not None:
        start_from(model, load_tensors(task.start))
    return model


def start_from(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Take over the weights of a training; a class layer for other classes stays as drawn.

    Args:
        model: takes the weights; its class layer is named ``output``.
        weights: by their names.

    Raises:
        ValueError: if they belong to other layers.
    """
    own = model.state_dict()
    same = own["output.bias"].shape == weights.get("output.bias", own["output.bias"]).shape
    given = {n: w for n, w in weights.items() if same or not n.startswith("output.")}
    kept = own.keys() - given.keys()
    fits = all(n in own and own[n].shape == w.shape for n, w in given.items())
    if not fits or kept - {"output.weight", "output.bias"}:
        raise ValueError("the weights to start from are of another network")
    model.load_state_dict(own | given)


def predict(
    model: nn.Module, scans: Sequence[PictureItem], *, settings: Mapping[str, Any], fabric: Fabric
) -> np.ndarray:
    """Probabilities of each picture (see `task`), from its plain view.

    Args:
        model: of `train_pictures`.
        scans: the pictures.
        settings: image_size, batch_scans, loader_processes.
        fabric: device and precision.
    """
    views = picture_views(scans, size=settings["image_size"])
    return predict_volumes(model, views, settings=settings, fabric=fabric)


def shown(scan: PictureItem, settings: Mapping[str, Any]) -> np.ndarray:
    """What a network sees of a picture.

    Args:
        scan: the picture.
        settings: with image_size.

    Returns:
        uint8, shape (1, image_size, image_size).
    """
    return load_picture(scan, size=settings["image_size"])[None]
