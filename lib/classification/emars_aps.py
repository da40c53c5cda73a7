"""EMARS-APS: evolution of 3-D networks towards Accuracy, Potential and small Size.

A population of architectures of the space of `lib.classification.mobile_cells` shares the weights
of one supernet. After a warm-up on random architectures, each epoch is a generation: training
batches go to the individuals in turn; every individual is judged on the validation part; crossover
and mutation make as many children, judged with the weights that they inherit; of all together
those survive that are not dominated in accuracy, potential (how an individual's accuracy rises over
the generations) and size. The most accurate network of the Pareto front is then trained from the
start (FACTS 6.6).

Our reading, where nothing is published: a child takes each operation from its second parent with
the probability of crossover and draws it anew with that of mutation; survivors are chosen by front
and crowding distance, as NSGA-II does; the kept generation is that of the highest mean accuracy.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric, seed_everything
from torch import Tensor, nn

from lib.classification.mobile_cells import (
    OPERATIONS,
    Architecture,
    CellNetwork,
    SearchSpace,
    adam,
    architecture_parameters,
    build,
    judging_batches,
    learning_batches,
    predict,
    random_architecture,
    retrain,
    search_task,
    shown,
)
from lib.classification.task import Card, Task, Trained, cross_entropy, fit_network
from lib.classification.volumes import VolumeBatch, volume_logits
from lib.training import predict as class_probabilities

__all__ = ["CARD", "VARIANTS", "build", "predict", "shown", "train"]

VARIANTS = {
    # The space of CovidNet3D (FACTS 6.5, 6.6). The architectures found by the authors are not
    # public: the one here only states a size; training replaces it.
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
    name="EMARS-APS",
    source="He et al. 2022; FACTS 6.6",
    published="evolution of a population over CovidNet3D's space by accuracy, potential and size, "
    "then retraining with label smoothing; Adam, cosine schedule",
    ours="the found architecture is not public: ours is searched anew; how children are made, how "
    "survivors and the retrained network are chosen is our reading; volumes as for CovidNet3D",
    approximation=True,
)

MOST_TRIES = 100  # to make a child that is not there yet; a tiny space may hold no other


class Evolution(nn.Module):
    """A supernet and the population in it; the state dict holds all that a killed search needs.

    Args:
        supernet: all candidates.
        individuals: size of the population.
        generations: number that will be recorded.
        warm_up: epochs on random architectures before them.

    Attributes:
        population: index of each cell's operation, int64, shape (individuals, cells).
        accuracies: of each individual in each generation of its life, from its birth on; NaN
            elsewhere. float64, shape (individuals, generations).
        epoch: whole epochs so far.
        step: training batches so far.
    """

    def __init__(
        self, supernet: CellNetwork, *, individuals: int, generations: int, warm_up: int
    ) -> None:
        super().__init__()
        self.supernet, self.warm_up = supernet, warm_up
        drawn = [genes(random_architecture(supernet)) for _ in range(individuals)]
        nothing = torch.full((individuals, generations), torch.nan, dtype=torch.float64)
        self.register_buffer("population", torch.tensor(drawn))
        self.register_buffer("accuracies", nothing)
        self.register_buffer("epoch", torch.tensor(0))
        self.register_buffer("step", torch.tensor(0))

    def forward(self, volumes: Tensor) -> Tensor:
        """Class scores by the individual whose turn it is, in the warm-up by a random one.

        Args:
            volumes: shape (scans, 1, depth, height, width).

        Returns:
            Logits, shape (scans, classes).
        """
        if self.epoch < self.warm_up:
            return self.supernet(volumes, random_architecture(self.supernet))
        turn = int(self.step) % len(self.population)
        self.step += 1
        return self.supernet(volumes, architecture_of(self.population[turn].tolist()))


def genes(architecture: Architecture) -> list[int]:
    """Index of each operation among all."""
    return [OPERATIONS.index(name) for name in architecture]


def architecture_of(individual: Iterable[int]) -> list[str]:
    """Inverse of `genes`."""
    return [OPERATIONS[gene] for gene in individual]


def potential(accuracies: np.ndarray) -> float:
    """Rise of an individual's accuracy per generation: least-squares slope, at least 0.

    Args:
        accuracies: one per generation of its life, in order; NaN entries do not count.

    Returns:
        0 for fewer than two generations.
    """
    recorded = accuracies[~np.isnan(accuracies)]
    if len(recorded) < 2:
        return 0.0
    slope = np.polynomial.Polynomial.fit(np.arange(len(recorded)), recorded, 1).convert().coef
    return max(float(slope[1]) if len(slope) > 1 else 0.0, 0.0)


def pareto_ranks(objectives: np.ndarray) -> np.ndarray:
    """Front of each individual: 0 for those that no other dominates, 1 without these, and so on.

    Args:
        objectives: larger is better, shape (individuals, objectives).

    Returns:
        int64, shape (individuals,).
    """
    as_good = (objectives[:, None] >= objectives[None]).all(2)
    dominates = as_good & (objectives[:, None] > objectives[None]).any(2)  # (one, other)
    ranks = np.full(len(objectives), -1)
    while (ranks < 0).any():
        left = ranks < 0
        ranks[left & ~dominates[left].any(0)] = ranks.max() + 1
    return ranks


def crowding_distances(objectives: np.ndarray) -> np.ndarray:
    """How far the neighbours of each individual are, summed over scaled objectives (NSGA-II).

    Args:
        objectives: of one front, shape (individuals, objectives).

    Returns:
        float64, shape (individuals,); infinite at the ends of an objective.
    """
    distances = np.zeros(len(objectives))
    for values in objectives.T:
        order = np.argsort(values, kind="stable")
        span = values[order[-1]] - values[order[0]]
        distances[order[[0, -1]]] = np.inf
        if span > 0:
            distances[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / span
    return distances


def survivors(objectives: np.ndarray, count: int) -> np.ndarray:
    """The individuals that go on: whole fronts, of the last one the least crowded.

    Args:
        objectives: larger is better, shape (individuals, objectives).
        count: number wanted, at most that of the individuals.

    Returns:
        Ascending indices, shape (count,).
    """
    ranks = pareto_ranks(objectives)
    distances = np.zeros(len(objectives))
    for rank in np.unique(ranks):
        distances[ranks == rank] = crowding_distances(objectives[ranks == rank])
    return np.sort(np.lexsort((-distances, ranks))[:count])


def children(
    population: np.ndarray,
    candidates: Sequence[int],
    *,
    crossover: float,
    mutation: float,
    generator: np.random.Generator,
) -> np.ndarray:
    """As many new individuals as there are.

    Args:
        population: int64, shape (individuals, cells).
        candidates: number of operations that each cell may hold.
        crossover: probability of an operation of the second parent.
        mutation: probability of an operation drawn anew.
        generator: source of all draws.

    Returns:
        Same shape, none of them in the population nor twice, unless `MOST_TRIES` find no other.
    """
    known = {tuple(individual) for individual in population.tolist()}
    made = []
    for _ in population:
        for _ in range(MOST_TRIES):
            first, second = population[generator.integers(len(population), size=2)]
            child = np.where(generator.random(len(first)) < crossover, second, first)
            drawn = generator.integers(candidates)
            child = np.where(generator.random(len(first)) < mutation, drawn, child)
            if tuple(child.tolist()) not in known:
                break
        known.add(tuple(child.tolist()))
        made.append(child)
    return np.stack(made)


def objectives_of(
    supernet: CellNetwork, population: np.ndarray, accuracies: np.ndarray
) -> np.ndarray:
    """Latest accuracy, potential, and size as negative number of parameters.

    Args:
        supernet: of the space.
        population: shape (individuals, cells).
        accuracies: shape (individuals, generations), at least one for each individual.

    Returns:
        Larger is better, shape (individuals, 3).
    """
    return np.array(
        [
            (
                records[~np.isnan(records)][-1],
                potential(records),
                -architecture_parameters(supernet, architecture_of(individual)),
            )
            for individual, records in zip(population, accuracies, strict=True)
        ]
    )


def next_generation(
    evolution: Evolution,
    accuracy: Callable[[Architecture], float],
    *,
    crossover: float,
    mutation: float,
    seed: int,
) -> float:
    """Judge the population, let it have children, judge these, keep the survivors.

    Args:
        evolution: population and records, changed in place.
        accuracy: of an architecture, on the validation part.
        crossover: see `children`.
        mutation: see `children`.
        seed: of this generation's draws.

    Returns:
        Mean accuracy of the survivors.
    """
    population = evolution.population.cpu().numpy()
    old = evolution.accuracies.cpu().numpy().copy()
    lives = (~np.isnan(old)).sum(1)
    old[np.arange(len(old)), lives] = [accuracy(architecture_of(one)) for one in population]
    new_population = children(
        population,
        [len(names) for names in evolution.supernet.candidates],
        crossover=crossover,
        mutation=mutation,
        generator=np.random.default_rng(seed),
    )
    new = np.full_like(old, np.nan)
    new[:, 0] = [accuracy(architecture_of(one)) for one in new_population]
    everyone, records = np.concatenate([population, new_population]), np.concatenate([old, new])
    objectives = objectives_of(evolution.supernet, everyone, records)
    kept = survivors(objectives, len(population))
    evolution.population.copy_(torch.from_numpy(everyone[kept]))
    evolution.accuracies.copy_(torch.from_numpy(records[kept]))
    return float(objectives[kept, 0].mean())


def judge_epoch(
    evolution: Evolution,
    batches: Iterable[VolumeBatch],
    *,
    settings: Mapping[str, Any],
    fabric: Fabric,
    seed: int,
) -> float:
    """End an epoch of the search: one more generation, unless it was an epoch of the warm-up.

    Args:
        evolution: changed in place.
        batches: of the validation part.
        settings: crossover, mutation.
        fabric: device and precision.
        seed: of the search.

    Returns:
        Mean accuracy of the population; 0 in the warm-up, so that none of its epochs is kept.
    """
    evolution.epoch += 1
    epoch = int(evolution.epoch)
    if epoch <= evolution.warm_up:
        return 0.0
    batches = list(batches)  # plain views: the same for every individual
    accuracy = partial(_accuracy, evolution.supernet, batches, fabric)
    probabilities = {name: settings[name] for name in ("crossover", "mutation")}
    own_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    return next_generation(evolution, accuracy, seed=own_seed, **probabilities)


def _accuracy(
    supernet: CellNetwork,
    batches: Sequence[VolumeBatch],
    fabric: Fabric,
    architecture: Architecture,
) -> float:
    """Share of scans that an architecture with the supernet's weights judges rightly."""
    predicted = class_probabilities(
        supernet,
        batches,
        fabric=fabric,
        logits=lambda model, batch: model(batch.volumes, architecture),
    ).argmax(1)
    return float((predicted == np.concatenate([batch.targets for batch in batches])).mean())


def pareto_front(evolution: Evolution) -> list[dict[str, Any]]:
    """The individuals that no other dominates, as JSON values, the chosen one first.

    The most accurate is chosen, of equals that of the higher potential, then the smaller.

    Args:
        evolution: after at least one generation.
    """
    population, accuracies = evolution.population.cpu().numpy(), evolution.accuracies.cpu().numpy()
    objectives = objectives_of(evolution.supernet, population, accuracies)
    front = np.flatnonzero(pareto_ranks(objectives) == 0)
    return [
        {
            "architecture": architecture_of(population[place]),
            "accuracy": float(objectives[place, 0]),
            "potential": float(objectives[place, 1]),
            "parameters": int(-objectives[place, 2]),
        }
        for place in front[np.lexsort(-objectives[front, ::-1].T)]
    ]


def search(task: Task) -> tuple[Evolution, list[dict[str, float]]]:
    """Let a population evolve; a finished search with the same settings is not repeated.

    Args:
        task: of the search, see `search_task`.

    Returns:
        Supernet and population of the best generation, and the learning curve.

    Raises:
        ValueError: if the warm-up leaves no generation.
    """
    settings = task.settings
    generations = settings["epochs"] - settings["warm_up"]
    if generations < 1:
        raise ValueError(
            f"{settings['epochs']} epochs of search leave no generation after a warm-up of "
            f"{settings['warm_up']}"
        )
    seed_everything(task.seed, verbose=False)
    evolution = Evolution(
        SearchSpace(**task.variant).supernet(),
        individuals=settings["individuals"],
        generations=generations,
        warm_up=settings["warm_up"],
    )
    history = fit_network(
        task,
        evolution,
        train_batches=learning_batches(task.train, settings),
        validation_batches=judging_batches(
            task.validation, settings, cache=settings["cache_volumes"]
        ),
        logits=volume_logits,
        optimizers=[adam(evolution.supernet, settings)],
        score=partial(judge_epoch, settings=settings, fabric=task.fabric, seed=task.seed),
    )
    return evolution, history


def train(task: Task) -> Trained:
    """Search, then train the chosen network of the Pareto front.

    Args:
        task: settings are slices, image_size, batch_scans, rounds, learning_rate, weight_decay,
            label_smoothing, loader_processes, cache_volumes, those of `fit_network`, and under
            ``search`` the same (but for the loaders' and label_smoothing) with individuals,
            warm_up, crossover and mutation; ``chosen_by`` there is ``accuracy``.

    Returns:
        The trained network; the notes hold its architecture and the Pareto front.
    """
    evolution, search_history = search(search_task(task))
    front = pareto_front(evolution)
    loss = cross_entropy(volume_logits, label_smoothing=task.settings["label_smoothing"])
    model, history = retrain(task, front[0]["architecture"], loss=loss)
    notes = {**{name: front[0][name] for name in ("architecture", "parameters")}, "front": front}
    return Trained(model, {"search": search_history, CARD.name: history}, notes)
