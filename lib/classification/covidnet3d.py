"""CovidNet3D: differentiable search for a 3-D network, then training of what it found.

Every cell of the space of `lib.classification.mobile_cells` has a score per candidate operation.
A training step draws one operation per cell by the Gumbel-softmax of the scores and runs that
single path through the supernet. The weights learn from the training part; the scores learn from
the validation part, through the draw (its one-hot forward, its softmax backward). The network of
the best-scored operations is then trained from the start (FACTS 6.5).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning_fabric import seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lib.classification.mobile_cells import (
    OPERATIONS,
    CellNetwork,
    SearchSpace,
    adam,
    build,
    judging_batches,
    learning_batches,
    parameters,
    predict,
    retrain,
    search_task,
    shown,
)
from lib.classification.task import Card, Task, Trained, fit_network
from lib.classification.volumes import VolumeBatch, volume_logits

__all__ = ["CARD", "VARIANTS", "build", "predict", "shown", "train"]

VARIANTS = {
    # The space of FACTS 6.5 (the configuration of CT volumes). The architectures found by the
    # authors are not public: the one here only states a size; training replaces it.
    "paper": {
        "stem_width": 32,
        "first_width": 16,
        "widths": (32, 64, 128, 256, 512, 1024),
        "cells": (4, 4, 4, 4, 4, 1),
        "strides": (2, 2, 2, 1, 2, 1),
        "head_width": 1280,
        "dropout": 0.5,
        "architecture": ("k3e3",) * 21,
    },
    # The same kind of space, narrow and short, for the phantom on two CPU cores.
    "small": {
        "stem_width": 16,
        "first_width": 12,
        "widths": (16, 24, 48),
        "cells": (2, 2, 2),
        "strides": (2, 2, 1),
        "head_width": 64,
        "dropout": 0.0,
        "architecture": ("k3e3",) * 6,
    },
}

CARD = Card(
    name="CovidNet3D",
    source="He et al. 2021; FACTS 6.5",
    published="differentiable single-path search by Gumbel-softmax over 3-D mobile cells with nine "
    "operations, then retraining; Adam, cosine schedule",
    ours="the found architecture is not public: ours is searched anew; the scores learn from the "
    "validation part in the same step as the weights; lung window, a true centre crop, lungs "
    "standardised without the black around them, flips of all axes",
    approximation=True,
)


class SearchBatch(NamedTuple):
    """What one step of the search learns from.

    Attributes:
        train: for the weights.
        validation: for the scores of the operations.
    """

    train: VolumeBatch
    validation: VolumeBatch

    @property
    def scan_ids(self) -> list[str]:
        """Pseudonymous names of all scans."""
        return self.train.scan_ids + self.validation.scan_ids


class PairedBatches:
    """Every batch of the training part beside one of the validation part, which starts again.

    Args:
        train: batches of the training part.
        validation: batches of the validation part.
    """

    def __init__(self, train: DataLoader, validation: DataLoader) -> None:
        self.train, self.validation = train, validation

    def __len__(self) -> int:
        return len(self.train)

    def __iter__(self) -> Iterator[SearchBatch]:
        partners = iter(self.validation)
        for batch in self.train:
            partner = next(partners, None)
            if partner is None:
                partners = iter(self.validation)
                partner = next(partners)
            yield SearchBatch(batch, partner)


class GumbelPaths(nn.Module):
    """A supernet and a score for every candidate of every cell.

    Args:
        supernet: all candidates.
        temperature: of the Gumbel-softmax.
    """

    def __init__(self, supernet: CellNetwork, *, temperature: float) -> None:
        super().__init__()
        self.supernet, self.temperature = supernet, temperature
        allowed = [[name in names for name in OPERATIONS] for names in supernet.candidates]
        self.register_buffer("allowed", torch.tensor(allowed), persistent=False)
        self.scores = nn.Parameter(torch.zeros(len(allowed), len(OPERATIONS)))

    def forward(self, volumes: Tensor, *, gated: bool = False) -> Tensor:
        """Class scores of each scan: of a random path in training, else of the best-scored one.

        Args:
            volumes: shape (scans, 1, depth, height, width).
            gated: let gradients reach the scores.

        Returns:
            Logits, shape (scans, classes).
        """
        if not self.training:
            return self.supernet(volumes, self.strongest())
        draw = functional.gumbel_softmax(self.masked_scores(), self.temperature, hard=True)
        picked = draw.argmax(1)
        gates = draw.gather(1, picked[:, None])[:, 0] if gated else None  # all one, with gradients
        return self.supernet(volumes, [OPERATIONS[place] for place in picked.tolist()], gates)

    def masked_scores(self) -> Tensor:
        """Scores, shape (cells, operations); minus infinity for what a cell cannot hold."""
        return self.scores.masked_fill(~self.allowed, -torch.inf)

    def strongest(self) -> list[str]:
        """The best-scored operation of each cell, the first of equals."""
        return [OPERATIONS[place] for place in self.masked_scores().argmax(1).tolist()]


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within it, what is computed sends no gradients to a module's parameters.

    Args:
        module: the module; all its parameters are trained otherwise.
    """
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def search_loss(model: nn.Module, batch: SearchBatch, *, supernet: nn.Module) -> Tensor:
    """Sum of two losses that share no gradients: of the weights, and of the scores.

    Both optimizers step on it together (ours; how the steps alternate is not known to us).

    Args:
        model: `GumbelPaths`, perhaps wrapped.
        batch: training and validation scans.
        supernet: that of the model.
    """
    loss = functional.cross_entropy(model(batch.train.volumes), batch.train.targets)
    with frozen(supernet):
        logits = model(batch.validation.volumes, gated=True)
    return loss + functional.cross_entropy(logits, batch.validation.targets)


def search(task: Task) -> tuple[GumbelPaths, list[dict[str, float]]]:
    """Search the space; a finished search with the same settings is not repeated.

    The epoch whose best-scored path judges the validation part best is kept.

    Args:
        task: of the search, see `search_task`.

    Returns:
        Supernet and scores of the best epoch, and the learning curve.
    """
    settings = task.settings
    seed_everything(task.seed, verbose=False)
    supernet = SearchSpace(**task.variant).supernet()
    paths = GumbelPaths(supernet, temperature=settings["temperature"])
    scores = torch.optim.Adam([paths.scores], lr=settings["architecture_learning_rate"])
    batches = partial(learning_batches, settings=settings)
    history = fit_network(
        task,
        paths,
        train_batches=PairedBatches(batches(task.train), batches(task.validation)),
        validation_batches=judging_batches(
            task.validation, settings, cache=settings["cache_volumes"]
        ),
        logits=volume_logits,
        optimizers=[adam(supernet, settings), scores],
        loss=partial(search_loss, supernet=supernet),
    )
    return paths, history


def train(task: Task) -> Trained:
    """Search, then train the found network.

    Args:
        task: settings are slices, image_size, batch_scans, rounds, learning_rate, weight_decay,
            loader_processes, cache_volumes, those of `fit_network`, and under ``search`` the same
            (but for the loaders') with architecture_learning_rate and temperature.

    Returns:
        The trained network; the notes hold its architecture.
    """
    paths, search_history = search(search_task(task))
    architecture = paths.strongest()
    model, history = retrain(task, architecture)
    notes: dict[str, Any] = {
        "architecture": architecture,
        "probabilities": paths.masked_scores().softmax(1).amax(1).tolist(),
        "parameters": parameters(model),
    }
    return Trained(model, {"search": search_history, CARD.name: history}, notes)
