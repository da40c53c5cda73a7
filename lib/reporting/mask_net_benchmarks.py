"""Benchmark of training module S of COVID-CT-Mask-Net: boxes kept against computed every epoch.

Where S alone trains, the lesion model below it stays as it is, so that the ranked boxes of a
picture are the same in every epoch. The public code sends every picture through the lesion model in
each of its 50 epochs; here the boxes are computed once and kept: 256 x 5 numbers, 5 kB, a picture.
Both ways forward every picture alone, as published, take the same steps and end in the same
weights, bit by bit on a CPU.

What can be gained is bounded by counting. Let a picture cost D in reading and lesion model, and S
in one step of training: over E epochs the ratio is E (D + S) / (D + E S), which is below E, and
below 1 + D / S however long the training.
"""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from lightning_fabric import Fabric
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer

from lib.classification import pictures, ranked_boxes
from lib.classification.mask_net_head import MaskNet, RankedBoxHead, one_hot_loss
from lib.classification.pictures import PictureItem
from lib.data.phantom import make_phantom, plan_phantoms
from lib.data.pictures import CLASSES
from lib.data.store import save_volume
from lib.reporting.benchmarks import compare
from lib.reporting.cost import counted_flops
from lib.reporting.pictures import LINE_COLOURS, STYLE, new_figure
from lib.reporting.timing import time_parts

STEP = "S: forward, backward, step"
GIGA = 1e9


def draw_pictures(per_class: int, folder: Path, *, size: int) -> list[PictureItem]:
    """Slices of phantoms in the store, one scan for each class, as pictures.

    Args:
        per_class: slices of each scan.
        folder: an existing one.
        size: height and width of the slices in pixels.
    """
    slices = (per_class, per_class)
    items = []
    for number, record in enumerate(
        plan_phantoms(scans_per_class={"test": 1}, seed=0, slices=slices)
    ):
        file = folder / f"scan{number}.b2nd"
        save_volume(file, make_phantom(record, size=size).scan.voxels)
        target = number % len(CLASSES)
        items += [
            PictureItem(f"{file.stem}_{index}", file.stem, file, index, target)
            for index in range(per_class)
        ]
    return items


def ranked_alone(
    model: MaskNet, items: Sequence[PictureItem], *, size: int, fabric: Fabric
) -> Tensor:
    """Ranked boxes of pictures, each read and forwarded by itself, shape (pictures, boxes, 5).

    Args:
        model: on the device.
        items: the pictures.
        size: height and width in pixels that they are brought to.
        fabric: device and precision.
    """
    found = []
    for item in items:
        picture = pictures.colours(pictures.load_picture(item, size=size))
        with torch.no_grad(), fabric.autocast():
            found.append(model.ranked(fabric.to_device(picture[None])))
    return torch.cat(found).float()


def random_order(count: int, batch: int, *, epoch: int) -> Iterator[np.ndarray]:
    """Indices of one epoch, in batches; the same for the same epoch."""
    order = np.random.default_rng(epoch).permutation(count)
    yield from np.split(order, range(batch, count, batch))


def head_step(head: RankedBoxHead, boxes: Tensor, targets: Tensor, optimizer: Optimizer) -> None:
    """One step of training S on a batch of ranked boxes."""
    optimizer.zero_grad()
    one_hot_loss(head(boxes), targets).backward()
    optimizer.step()


def train_head(
    model: MaskNet,
    items: Sequence[PictureItem],
    *,
    epochs: int,
    keep: bool,
    settings: Mapping[str, Any],
    fabric: Fabric,
) -> dict[str, Tensor]:
    """Train a copy of S.

    Args:
        model: on the device; stays as it is.
        items: pictures with their classes.
        epochs: so often is each picture seen.
        keep: compute the boxes once; else for every picture in every epoch, as the public code.
        settings: image_size, batch_scans (pictures), learning_rate, weight_decay.
        fabric: device and precision.

    Returns:
        Weights of the trained S, on the CPU.
    """
    head = copy.deepcopy(model.head).requires_grad_(True)
    optimizer = torch.optim.Adam(
        head.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
    )
    targets = fabric.to_device(torch.tensor([item.target for item in items]))
    ranking = {"size": settings["image_size"], "fabric": fabric}
    kept = ranked_alone(model, items, **ranking) if keep else None
    this = sys.modules[__name__]  # so that the parts can be timed
    for epoch in range(epochs):
        for chosen in random_order(len(items), settings["batch_scans"], epoch=epoch):
            some = [items[place] for place in chosen]
            boxes = ranked_alone(model, some, **ranking) if kept is None else kept[chosen]
            this.head_step(head, boxes, targets[chosen], optimizer)
    return {name: weights.cpu() for name, weights in head.state_dict().items()}


def largest_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Of two sets of weights, absolute; 0 where all bits are the same."""
    if all(torch.equal(weights, other[name]) for name, weights in one.items()):
        return 0.0
    return max(float((weights - other[name]).abs().max()) for name, weights in one.items())


def compare_training(
    model: MaskNet,
    items: Sequence[PictureItem],
    *,
    epochs: int,
    repetitions: int,
    settings: Mapping[str, Any],
    fabric: Fabric,
) -> dict[str, Any]:
    """Time of training S, boxes kept against computed every epoch, reading included in both.

    Args:
        model: on the device.
        items: the pictures.
        epochs: of one training.
        repetitions: timed trainings of each way, in turn.
        settings: as for `train_head`.
        fabric: device and precision.

    Returns:
        What `lib.reporting.benchmarks.compare` returns, computing every epoch being the reference;
        ``pictures``, ``epochs``, ``pictures_per_second`` and ``reference_pictures_per_second`` by
        the medians, a picture counting once an epoch; ``largest_difference`` of the weights that
        both ways end in.
    """
    given = {"epochs": epochs, "settings": settings, "fabric": fabric}
    ended: dict[bool, dict[str, Tensor]] = {}

    def work(keep: bool) -> None:
        ended[keep] = train_head(model, items, keep=keep, **given)

    seen = len(items) * epochs
    result = compare(lambda: work(False), lambda: work(True), repetitions=repetitions, slices=seen)
    return result | {
        "pictures": len(items),
        "epochs": epochs,
        "pictures_per_second": round(seen / result["our_median"], 2),
        "reference_pictures_per_second": round(seen / result["reference_median"], 2),
        "largest_difference": largest_difference(ended[False], ended[True]),
    }


# ---------------------------------------------------------------------------------- what to expect


def part_times(
    model: MaskNet,
    items: Sequence[PictureItem],
    *,
    settings: Mapping[str, Any],
    fabric: Fabric,
    epochs: int = 5,
) -> dict[str, float]:
    """Where the time goes when boxes are computed every epoch, in seconds a picture and epoch.

    On a GPU work is only ordered, not done, when a function returns: measure this on a CPU.

    Args:
        model: on the device.
        items: the pictures.
        settings: as for `train_head`.
        fabric: device and precision.
        epochs: of the training that is timed.
    """
    detector = model.detector
    functions = {
        "read and resize": (pictures, "load_picture"),
        "normalise": (detector.transform, "forward"),
        "backbone": (detector.backbone, "forward"),
        "RPN": (detector.rpn, "forward"),
        "RoIAlign": (detector.roi_heads.box_roi_pool, "forward"),
        "RoI: box head": (detector.roi_heads.box_head, "forward"),
        "ranking": (ranked_boxes, "ranked_boxes"),
        STEP: (sys.modules[__name__], "head_step"),
    }
    given = {"epochs": epochs, "keep": False, "settings": settings, "fabric": fabric}
    times = time_parts(lambda: train_head(model, items, **given), functions)
    return {name: round(seconds / len(items) / epochs, 6) for name, seconds in times.items()}


def gigaflops(
    model: MaskNet, item: PictureItem, *, settings: Mapping[str, Any], fabric: Fabric
) -> dict[str, float]:
    """Floating-point operations for one picture: of the lesion model, and of one step of S.

    Convolutions and matrix products, a multiplication and an addition counting as two.

    Args:
        model: on the device.
        item: a picture.
        settings: as for `train_head`.
        fabric: device and precision.
    """
    with counted_flops() as below:
        boxes = ranked_alone(model, [item], size=settings["image_size"], fabric=fabric)
    head = copy.deepcopy(model.head).requires_grad_(True)
    with counted_flops() as above:
        one_hot_loss(head(boxes), fabric.to_device(torch.tensor([item.target]))).backward()
    return {
        "lesion_model": round(below.get_total_flops() / GIGA, 4),
        "step_of_S": round(above.get_total_flops() / GIGA, 6),
    }


def expected_ratio(lesion_model: float, step: float, epochs: int) -> float:
    """What keeping the boxes gains, by the costs of a picture (see the module's text).

    Args:
        lesion_model: cost of a picture in reading and lesion model.
        step: of a picture in a step of S, in the same unit.
        epochs: of the training.
    """
    return epochs * (lesion_model + step) / (lesion_model + epochs * step)


@matplotlib.rc_context(STYLE)
def ratio_figure(
    results: Sequence[Mapping[str, Any]], parts: Mapping[str, float], *, wanted: float
) -> Figure:
    """By how much keeping the boxes is faster, for each number of epochs, beside what to expect.

    Args:
        results: of `compare_training`.
        parts: of `part_times`.
        wanted: the ratio asked for.
    """
    figure = new_figure((4.6, 3.4))
    axis = figure.subplots()
    epochs = [result["epochs"] for result in results]
    grid = np.geomspace(1, 2 * max(epochs), 50)
    costs = parts["all"] - parts[STEP], parts[STEP]
    axis.plot(grid, grid, ":", color="0.6", label="limit: number of epochs")
    expected = [expected_ratio(*costs, number) for number in grid]
    axis.plot(grid, expected, color=LINE_COLOURS[0], label="from the times of the parts")
    ratios = np.array([result["ratio"] for result in results])
    low, high = np.array([result["ratio_interval"] for result in results]).T
    errors = np.clip([ratios - low, high - ratios], 0, None)
    axis.errorbar(epochs, ratios, errors, fmt="o", color="black", capsize=3, label="measured, 95 %")
    axis.axhline(wanted, color="black", linestyle="--", label=f"asked for: {wanted:g}")
    axis.set(
        xscale="log", yscale="log", xlabel="Epochs", ylabel="Pictures per second, kept / again"
    )
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter("{x:g}")
    axis.legend(loc="upper left")
    return figure
