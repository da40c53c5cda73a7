import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric import Fabric
from scipy.stats import linregress

from lib.classification import emars_aps
from lib.classification.emars_aps import (
    VARIANTS,
    Evolution,
    architecture_of,
    build,
    children,
    crowding_distances,
    genes,
    judge_epoch,
    next_generation,
    objectives_of,
    pareto_front,
    pareto_ranks,
    potential,
    predict,
    search,
    survivors,
    train,
)
from lib.classification.inputs import ScanItem
from lib.classification.mobile_cells import (
    OPERATIONS,
    SearchSpace,
    architecture_parameters,
    parameters,
    random_architecture,
    search_task,
)
from lib.classification.task import Task
from lib.data.store import save_volume

SPACE = {
    "stem_width": 4,
    "first_width": 4,
    "widths": (6,),
    "cells": (3,),
    "strides": (2,),
    "head_width": 8,
    "dropout": 0.0,
}
SHARED = {
    "slices": 4,
    "image_size": 16,
    "batch_scans": 3,
    "rounds": 2,
    "learning_rate": 0.02,
    "weight_decay": 0.0,
    "patience": None,
}
SETTINGS = {
    **SHARED,
    "loader_processes": 0,
    "cache_volumes": True,
    "label_smoothing": 0.1,
    "epochs": 8,
    "chosen_by": "loss",
    "schedule": {"kind": "cosine", "T_max": 8},
    "search": {
        **SHARED,
        "epochs": 4,
        "chosen_by": "accuracy",
        "schedule": {"kind": "cosine", "T_max": 4},
        "individuals": 4,
        "warm_up": 1,
        "crossover": 0.3,
        "mutation": 0.2,
    },
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def evolution(**changes):
    numbers = {"individuals": 5, "generations": 4, "warm_up": 0, **changes}
    return Evolution(SearchSpace(**SPACE).supernet(), **numbers)


def make_task(folder, settings=SETTINGS):
    """Every second scan holds a bright block."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    scans = []
    for place in range(12):
        voxels = generator.integers(0, 60, (5, 20, 20)).astype(np.uint8)
        if place % 2:
            voxels[:3, 5:15, 5:15] += 150
        path = folder / f"{place}.b2nd"
        save_volume(path, voxels)
        path.with_suffix(".json").write_text(str(place))
        scans.append(ScanItem(str(place), path, None, place % 2))
    return Task(
        scans=scans,
        splits=["train"] * 8 + ["validation"] * 4,
        variant={**SPACE, "architecture": ("k3e3",) * 3},
        settings=settings,
        fabric=Fabric(accelerator="cpu", devices=1),
        folder=folder / "model",
        seed=0,
    )


def test_the_papers_space_has_21_cells_and_18215778_parameters_if_all_are_k3e3():
    """Our own count; the found architectures, and so their sizes, are not published."""
    with torch.device("meta"):
        model = build(**VARIANTS["paper"])
    assert len(model.cells) == 21
    assert parameters(model) == 18_215_778


# --------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([np.nan, np.nan], 0.0),
        ([0.7, np.nan], 0.0),
        ([0.5, 0.6, 0.7, np.nan], 0.1),
        ([0.7, 0.6], 0.0),  # falling: no potential
        ([0.6, 0.6, 0.6], 0.0),
    ],
)
def test_potential(accuracies, expected):
    assert potential(np.array(accuracies)) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_potential_is_the_slope_of_least_squares(accuracies):
    expected = max(linregress(range(len(accuracies)), accuracies).slope, 0)
    assert potential(np.array(accuracies)) == pytest.approx(expected, abs=1e-9)


def test_objectives_are_latest_accuracy_potential_and_small_size():
    model = evolution(individuals=2)
    records = np.array([[0.5, 0.7, np.nan], [0.6, np.nan, np.nan]])
    population = model.population.numpy()
    found = objectives_of(model.supernet, population, records)
    sizes = [architecture_parameters(model.supernet, architecture_of(one)) for one in population]
    np.testing.assert_allclose(found, [[0.7, 0.2, -sizes[0]], [0.6, 0.0, -sizes[1]]])


# ---------------------------------------------------------------------------------------- selection

tables = st.integers(1, 9).flatmap(
    lambda rows: st.lists(
        st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=rows, max_size=rows
    )
)


def dominates(one, other):
    return all(a >= b for a, b in zip(one, other, strict=True)) and list(one) != list(other)


@given(tables)
def test_a_front_is_what_no_individual_outside_better_fronts_dominates(rows):
    ranks = pareto_ranks(np.array(rows, float))
    for row, rank in zip(rows, ranks, strict=True):
        above = {r for other, r in zip(rows, ranks, strict=True) if dominates(other, row)}
        assert rank == (max(above) + 1 if above else 0)


def test_crowding_distances_of_a_known_front():
    front = np.array([[0.0, 4.0], [1.0, 3.0], [3.0, 1.0], [4.0, 0.0]])
    assert crowding_distances(front).tolist() == [np.inf, 1.5, 1.5, np.inf]
    assert crowding_distances(np.ones((1, 2))).tolist() == [np.inf]


@given(tables, st.data())
def test_survivors_fill_whole_fronts_first(rows, data):
    objectives = np.array(rows, float)
    count = data.draw(st.integers(1, len(rows)))
    kept = survivors(objectives, count)
    ranks = pareto_ranks(objectives)
    left = np.setdiff1d(np.arange(len(rows)), kept)
    assert len(kept) == count
    assert (np.diff(kept) > 0).all()
    assert not len(left) or ranks[kept].max() <= ranks[left].min()


def test_the_ends_of_a_crowded_front_survive():
    objectives = np.array([[0.0, 5.0], [2.0, 3.0], [2.1, 2.9], [5.0, 0.0]])
    assert {0, 3} <= set(survivors(objectives, 3).tolist())


# ----------------------------------------------------------------------------------------- children


@given(seed=st.integers(0, 99), crossover=st.floats(0, 1), mutation=st.floats(0, 1))
def test_children_are_new_and_hold_only_candidates(seed, crossover, mutation):
    generator = np.random.default_rng(seed)
    candidates = [8, 9, 9]
    population = np.unique(generator.integers(candidates, size=(6, 3)), axis=0)
    made = children(
        population, candidates, crossover=crossover, mutation=mutation, generator=generator
    )
    assert made.shape == population.shape
    assert (made < candidates).all()
    if mutation > 0.2:
        everyone = np.concatenate([population, made]).tolist()
        assert len({tuple(one) for one in everyone}) == len(everyone)


def test_without_mutation_every_operation_is_a_parents():
    population = np.array([[0, 1, 2, 3], [4, 5, 6, 7]])
    made = children(
        population, [9] * 4, crossover=0.5, mutation=0.0, generator=np.random.default_rng(0)
    )
    assert ((made == population[0]) | (made == population[1])).all()


def test_genes_are_an_architecture():
    names = random_architecture(SearchSpace(**SPACE).supernet())
    assert architecture_of(genes(names)) == names


# -------------------------------------------------------------------------------------- generations


def test_individuals_train_in_turn_after_random_ones_in_the_warm_up():
    model = evolution(individuals=3, warm_up=1)
    seen = []
    model.supernet.forward = lambda volumes, names: seen.append(names)
    for _ in range(30):
        model(torch.zeros(1))
    assert len({tuple(names) for names in seen}) > 5
    model.epoch += 1
    seen.clear()
    for _ in range(5):
        model(torch.zeros(1))
    population = [architecture_of(one) for one in model.population.tolist()]
    assert seen == [*population, *population[:2]]


def test_evolution_finds_what_is_rewarded():
    """Accuracy is the share of cells with k3e3; fronts keep small networks beside it."""
    model = evolution(individuals=8, generations=30)

    def accuracy(names):
        return np.mean([name == "k3e3" for name in names])

    for seed in range(30):
        mean = next_generation(model, accuracy, crossover=0.3, mutation=0.3, seed=seed)
    front = pareto_front(model)
    assert front[0]["architecture"] == ["k3e3"] * 3
    assert front[0]["accuracy"] == 1
    assert front[0]["parameters"] == parameters(SearchSpace(**SPACE).network(["k3e3"] * 3))
    assert min(one["parameters"] for one in front) < front[0]["parameters"]
    records = model.accuracies.numpy()
    latest = [row[~np.isnan(row)][-1] for row in records]
    assert mean == pytest.approx(np.mean(latest))
    assert json.loads(json.dumps(front)) == front


def test_survivors_take_their_records_along():
    model = evolution(individuals=4, generations=3)
    accuracies = iter(np.linspace(0.1, 0.9, 100))
    for seed in range(3):
        next_generation(model, lambda _: next(accuracies), crossover=0.3, mutation=0.3, seed=seed)
    lives = (~torch.isnan(model.accuracies)).sum(1)
    assert lives.min() >= 1
    for row, life in zip(model.accuracies, lives, strict=True):
        assert (row[:life].diff() > 0).all()
        assert torch.isnan(row[life:]).all()


def test_an_epoch_of_the_warm_up_leaves_the_population():
    model = evolution(warm_up=2)
    before = model.population.clone()
    fabric = Fabric(accelerator="cpu")
    settings = {"crossover": 0.3, "mutation": 0.2}
    assert judge_epoch(model, None, settings=settings, fabric=fabric, seed=0) == 0
    assert torch.equal(model.population, before)
    assert model.epoch == 1


def test_a_search_without_generations_is_refused(tmp_path):
    settings = {**SETTINGS, "search": {**SETTINGS["search"], "warm_up": 4}}
    task = make_task(tmp_path / "scans", settings)
    with pytest.raises(ValueError, match="4 epochs of search leave no generation after a warm-up"):
        search(search_task(task))


# --------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    task = make_task(tmp_path_factory.mktemp("emars") / "scans")
    return SimpleNamespace(task=task, result=train(task))


def test_it_learns_a_made_up_task_and_reports_the_front(trained):
    model, histories, notes = trained.result
    task = trained.task
    found = predict(model, task.scans, settings=task.settings, fabric=task.fabric)
    assert found.shape == (12, 2)
    assert (found.argmax(1) == [scan.target for scan in task.scans]).mean() > 0.9
    assert list(histories) == ["search", "EMARS-APS"]
    assert [row["validation_accuracy"] > 0 for row in histories["search"]] == [
        False,
        True,
        True,
        True,
    ]
    assert model.only_architecture() == notes["architecture"] == notes["front"][0]["architecture"]
    assert notes["parameters"] == parameters(model)
    assert all(set(one["architecture"]) <= set(OPERATIONS) for one in notes["front"])


def test_a_killed_search_goes_on_and_ends_the_same(trained, tmp_path, monkeypatch):
    task = make_task(tmp_path / "scans")
    judged = emars_aps.judge_epoch

    def killed(evolution, *args, **kwargs):
        if evolution.epoch == 2:
            raise KeyboardInterrupt
        return judged(evolution, *args, **kwargs)

    monkeypatch.setattr(emars_aps, "judge_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        search(search_task(task))
    monkeypatch.setattr(emars_aps, "judge_epoch", judged)
    evolved, history = search(search_task(task))
    assert history == trained.result.histories["search"]
    assert pareto_front(evolved) == trained.result.notes["front"]
