"""What is asked of every classifier of the study: learn from a task, judge scans.

A classifier is one module of this package, named as its predictions are. It brings

- ``VARIANTS``: the arguments of ``build`` for the presets ``paper`` and ``small``;
- ``build(**variant) -> nn.Module``: the untrained network, or several in one module;
- ``train(task) -> Trained``: learns from the training part as published, choosing on the validation
  part; the test part is never touched;
- ``predict(model, scans, *, settings, fabric) -> probabilities``: float32 (scans, classes), of
  scans with or without labels, in their order; settings are those of ``train``, fabric says device
  and precision;
- ``shown(scan, settings) -> pictures``: uint8 (slices, height, width), or with three colours as the
  last axis, what the network sees of a scan before any augmentation;
- ``CARD``: what is published of the system, and what of this is ours.

The systems of the third paper judge single slices; to them the same is asked with pictures
(`lib.classification.pictures`) in the place of scans, and with the classes that the task names.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from lib.classification.inputs import BINARY_CLASSES, Item, content_digest
from lib.data.splits import TRAIN, VALIDATION
from lib.inference import file_sha256
from lib.training import Loss, Row, Score, fit, schedules

Logits = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Card:
    """A published system and our build of it, a row of the table of systems.

    Attributes:
        name: as the papers' tables print it.
        source: publication, and section of FACTS.
        published: the published design in one sentence.
        ours: what is not published or done otherwise here, and why.
        parameters: published or computed number of the ``paper`` preset; None where unknown.
        approximation: whether the layers could not be obtained and are our reading.
    """

    name: str
    source: str
    published: str
    ours: str
    parameters: int | None = None
    approximation: bool = False


@dataclass(frozen=True, kw_only=True)
class Task:
    """Scans to learn from, and how.

    Attributes:
        scans: of all parts; or pictures.
        splits: the part of each scan.
        variant: arguments of the classifier's ``build``.
        settings: its preset in params.yaml.
        fabric: device and precision.
        folder: where weights and learning curves go.
        seed: of everything random.
        classes: names; a target is an index of them.
        start: file of trained weights that a classifier goes on from; None where it needs none.
    """

    scans: Sequence[Item]
    splits: Sequence[str]
    variant: Mapping[str, Any]
    settings: Mapping[str, Any]
    fabric: Fabric
    folder: Path
    seed: int
    classes: Sequence[str] = BINARY_CLASSES
    start: Path | None = None

    def __post_init__(self) -> None:
        if len(self.scans) != len(self.splits):
            raise ValueError(f"{len(self.scans)} scans, but {len(self.splits)} splits")
        trained = {scan.target for scan in self.part(TRAIN)}
        for target, name in enumerate(self.classes):
            if target not in trained:
                raise ValueError(f"the training part has no scan of the class {name!r}")
        if not self.part(VALIDATION):
            raise ValueError("the validation part is empty, so no epoch can be chosen")

    def part(self, split: str) -> list[Item]:
        """The scans of one part, in their order."""
        pairs = zip(self.scans, self.splits, strict=True)
        return [scan for scan, part in pairs if part == split]

    @property
    def train(self) -> list[Item]:
        """The training part."""
        return self.part(TRAIN)

    @property
    def validation(self) -> list[Item]:
        """The validation part."""
        return self.part(VALIDATION)


class Trained(NamedTuple):
    """A trained classifier.

    Attributes:
        model: with the weights of the best epoch.
        histories: learning curve of each network that was trained, rows of `lib.training.fit`; the
            last one is that of the network that decides.
        notes: what else was found, as JSON values, for example an architecture.
    """

    model: nn.Module
    histories: Mapping[str, list[Row]]
    notes: Mapping[str, Any] = MappingProxyType({})


def cross_entropy(logits: Logits, **options: Any) -> Loss:
    """Loss of a batch for `lib.training.fit`: cross entropy of its class scores.

    Args:
        logits: from network and batch to scores, shape (scans, classes).
        options: of ``torch.nn.functional.cross_entropy``.
    """

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(logits(model, batch), batch.targets, **options)

    return loss


def fit_network(
    task: Task,
    model: nn.Module,
    *,
    train_batches: Iterable[Any],
    validation_batches: Iterable[Any],
    logits: Logits,
    optimizers: Sequence[Optimizer],
    loss: Loss | None = None,
    score: Score | None = None,
    settings: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> list[Row]:
    """Train one network of a classifier with `lib.training.fit`, keep its best epoch.

    Args:
        task: what is learned; names folder, seed and data.
        model: the network.
        train_batches: with ``targets``, of the training part.
        validation_batches: likewise, of the validation part.
        logits: from network and batch (on the device) to scores, shape (scans, classes).
        optimizers: of the network.
        loss: of a training batch; None is the cross entropy of ``logits``.
        score: of network and validation batches, named as ``chosen_by`` says; None is the measure
            of ``chosen_by`` on the ``logits``.
        settings: epochs, patience, schedule, chosen_by (a key of `CHOSEN_BY`); where they differ
            from 1 and False, batches_per_step and plateau_by_loss (the schedule watches the
            validation loss, whatever chooses the epoch); None takes the task's.
        name: a folder of its own, for a classifier of several networks.

    Returns:
        One row per epoch.
    """
    settings = task.settings if settings is None else settings
    score_name, higher_is_better, _ = CHOSEN_BY[settings["chosen_by"]]
    chosen_by, by_loss = settings["chosen_by"], settings.get("plateau_by_loss", False)
    measured = [CHOSEN_BY[name] for name in dict.fromkeys([chosen_by, *(["loss"] * by_loss)])]
    return fit(
        model,
        fabric=task.fabric,
        optimizers=optimizers,
        schedulers=schedules(
            optimizers, higher_is_better=higher_is_better and not by_loss, **settings["schedule"]
        )
        if settings["schedule"]
        else [],
        watched_loss=CHOSEN_BY["loss"][0] if by_loss else None,
        train_batches=train_batches,
        validation_batches=validation_batches,
        loss=loss or cross_entropy(logits),
        score=score or partial(_scores, measured=measured, logits=logits, fabric=task.fabric),
        score_name=score_name,
        higher_is_better=higher_is_better,
        epochs=settings["epochs"],
        patience=settings["patience"],
        batches_per_step=settings.get("batches_per_step", 1),
        folder=task.folder / name if name else task.folder,
        seed=task.seed,
        fingerprint={
            "settings": dict(task.settings),
            "variant": dict(task.variant),
            "data": content_digest([*task.train, *task.validation]),
        }
        | ({} if task.start is None else {"start": file_sha256(task.start)}),
    )


def _scores(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    measured: Iterable[tuple[str, bool, Callable[[Tensor, Tensor], float]]],
    logits: Logits,
    fabric: Fabric,
) -> dict[str, float]:
    """Measures of the class scores of all scans of some batches, by their names."""
    scores, targets = [], []
    for batch in batches:
        with fabric.autocast():
            scores.append(logits(model, fabric.to_device(batch)).float().cpu())
        targets.append(batch.targets.cpu())
    if not scores:
        raise ValueError("the validation part is empty, so no epoch can be chosen")
    found = torch.cat(scores), torch.cat(targets)
    return {name: measure(*found) for name, _, measure in measured}


def mean_loss(scores: Tensor, targets: Tensor) -> float:
    """Mean cross entropy per scan; defined whatever classes there are."""
    return float(functional.cross_entropy(scores, targets))


def macro_f1(scores: Tensor, targets: Tensor) -> float:
    """Mean F1 of the classes; one that is neither there nor predicted counts 0."""
    labels = range(scores.shape[1])
    return float(
        f1_score(targets, scores.argmax(1), labels=labels, average="macro", zero_division=0)
    )


def accuracy(scores: Tensor, targets: Tensor) -> float:
    """Share of scans whose class has the highest score."""
    return float((scores.argmax(1) == targets).float().mean())


# How the best epoch is chosen: column of the learning curve, whether higher is better, measure.
CHOSEN_BY = {
    "loss": ("validation_loss", False, mean_loss),
    "macro_f1": ("validation_macro_f1", True, macro_f1),
    "accuracy": ("validation_accuracy", True, accuracy),
}
