import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional

from lib.classification import covidnet3d
from lib.classification.covidnet3d import (
    VARIANTS,
    GumbelPaths,
    PairedBatches,
    SearchBatch,
    build,
    predict,
    search_loss,
    train,
)
from lib.classification.inputs import ScanItem
from lib.classification.mobile_cells import OPERATIONS, SearchSpace, parameters
from lib.classification.task import Task
from lib.classification.volumes import VolumeBatch
from lib.data.store import save_volume

SPACE = {
    "stem_width": 4,
    "first_width": 4,
    "widths": (6,),
    "cells": (2,),
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
    "chosen_by": "loss",
}
SETTINGS = {
    **SHARED,
    "loader_processes": 0,
    "cache_volumes": True,
    "epochs": 8,
    "schedule": {"kind": "cosine", "T_max": 8},
    "search": {
        **SHARED,
        "epochs": 3,
        "schedule": {"kind": "cosine", "T_max": 3},
        "architecture_learning_rate": 0.05,
        "temperature": 1.0,
    },
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def scans_with_bright_blocks(folder, number=12):
    """Every second scan holds a bright block in half of its slices."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    scans = []
    for place in range(number):
        voxels = generator.integers(0, 60, (5, 20, 20)).astype(np.uint8)
        if place % 2:
            voxels[:3, 5:15, 5:15] += 150
        path = folder / f"{place}.b2nd"
        if not path.exists():
            save_volume(path, voxels)
            path.with_suffix(".json").write_text(str(place))
        scans.append(ScanItem(str(place), path, None, place % 2))
    return scans


def make_task(folder, settings=SETTINGS):
    return Task(
        scans=scans_with_bright_blocks(folder / "scans"),
        splits=["train"] * 8 + ["validation"] * 4,
        variant={**SPACE, "architecture": ("k3e3", "k3e3")},
        settings=settings,
        fabric=Fabric(accelerator="cpu", devices=1),
        folder=folder / "model",
        seed=0,
    )


def paths(temperature=1.0):
    return GumbelPaths(SearchSpace(**SPACE).supernet(), temperature=temperature)


def batch(scans=3):
    volumes = torch.randn(scans, 1, 4, 16, 16)
    return VolumeBatch(volumes, torch.arange(scans) % 2, [str(i) for i in range(scans)])


# --------------------------------------------------------------------------------------- parameters


def test_the_papers_space_has_21_cells_and_18215778_parameters_if_all_are_k3e3():
    """Our own count; the found architectures, and so their sizes, are not published."""
    with torch.device("meta"):
        model = build(**VARIANTS["paper"])
    assert len(model.cells) == 21
    assert parameters(model) == 18_215_778


# -------------------------------------------------------------------------------------------- paths


def test_a_path_is_drawn_by_the_scores_and_never_what_a_cell_cannot_hold():
    model = paths()
    with torch.no_grad():
        model.scores[0, OPERATIONS.index("zero")] = 100  # not a candidate: the cell narrows
        model.scores[1, OPERATIONS.index("zero")] = 2.0
    seen = []
    model.supernet.forward = lambda volumes, names, gates=None: seen.append(names)
    for _ in range(300):
        model(torch.zeros(1))
    assert "zero" not in {first for first, _ in seen}
    assert {first for first, _ in seen} == set(OPERATIONS) - {"zero"}
    share = np.mean([second == "zero" for _, second in seen])
    expected = model.masked_scores().softmax(1)[1, -1].item()
    assert abs(share - expected) < 0.1
    assert model.strongest() == ["k3e3", "zero"]


def test_evaluation_takes_the_strongest_path():
    model = paths().eval()
    with torch.no_grad():
        model.scores[:, OPERATIONS.index("identity")] = 1
    volumes = batch().volumes
    expected = model.supernet(volumes, ["identity", "identity"])
    torch.testing.assert_close(model(volumes), expected)


def test_weights_learn_from_training_scans_and_scores_from_validation_scans():
    model, pair = paths(), SearchBatch(batch(), batch(4))
    state = torch.get_rng_state()
    search_loss(model, pair, supernet=model.supernet).backward()
    found = {name: weights.grad for name, weights in model.named_parameters()}
    model.zero_grad()
    torch.set_rng_state(state)
    functional.cross_entropy(model(pair.train.volumes), pair.train.targets).backward()
    for name, weights in model.named_parameters():
        if name != "scores":
            assert (found[name] is None) == (weights.grad is None)
            if weights.grad is not None:
                torch.testing.assert_close(found[name], weights.grad)
    assert model.scores.grad is None or not model.scores.grad.any()
    assert found["scores"].abs().sum() > 0
    assert not found["scores"][0, OPERATIONS.index("zero")]
    assert all(weights.requires_grad for weights in model.parameters())


def test_scores_move_to_the_operation_that_lowers_the_validation_loss():
    model = paths()

    def supernet(volumes, names, gates):
        """Only k5e4 in the second cell gives the right class."""
        right = gates[1] * (1.0 if names[1] == "k5e4" else -1.0)
        return torch.stack([-right, right])[None]

    model.supernet.forward = supernet
    optimizer = torch.optim.Adam([model.scores], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        functional.cross_entropy(model(torch.zeros(1), gated=True), torch.tensor([1])).backward()
        optimizer.step()
    assert model.strongest()[1] == "k5e4"


@pytest.mark.parametrize(("train_batches", "expected"), [(2, "ab"), (5, "abcab")])
def test_validation_batches_start_again_where_there_are_fewer(train_batches, expected):
    pairs = PairedBatches(list(range(train_batches)), list("abc"))
    assert len(pairs) == train_batches
    assert [pair.train for pair in pairs] == list(range(train_batches))
    assert "".join(pair.validation for pair in pairs) == expected


# --------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("covidnet3d")
    task = make_task(folder)
    return SimpleNamespace(task=task, result=train(task))


def test_it_learns_a_made_up_task_and_reports_its_architecture(trained):
    model, histories, notes = trained.result
    task = trained.task
    found = predict(model, task.scans, settings=task.settings, fabric=task.fabric)
    assert found.shape == (12, 2)
    assert (found.argmax(1) == [scan.target for scan in task.scans]).mean() > 0.9
    assert list(histories) == ["search", "CovidNet3D"]
    assert [len(history) for history in histories.values()] == [3, 8]
    assert json.loads(json.dumps(dict(notes))) == notes
    assert model.only_architecture() == notes["architecture"]
    assert notes["parameters"] == parameters(model)


def test_what_is_finished_is_not_repeated_but_what_changed_is(trained, monkeypatch):
    fitted = []
    fit = covidnet3d.fit_network

    def noting(task, *args, **kwargs):
        fitted.append(not (task.folder / "training.json").exists())
        return fit(task, *args, **kwargs)

    monkeypatch.setattr(covidnet3d, "fit_network", noting)
    settings = trained.task.settings | {"epochs": 1}
    again = train(replace(trained.task, settings=settings))
    assert fitted == [False]  # the search was there
    assert again.notes["architecture"] == trained.result.notes["architecture"]
    assert again.histories["search"] == trained.result.histories["search"]
    assert len(again.histories["CovidNet3D"]) == 1


def test_the_same_seed_gives_the_same_network(trained, tmp_path):
    settings = {**SETTINGS, "epochs": 1}
    first, second = (
        train(make_task(tmp_path / name, settings) if (tmp_path / name).mkdir() is None else None)
        for name in "ab"
    )
    assert first.notes == second.notes
    assert first.histories == second.histories
    for ours, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert isinstance(first.model, nn.Module)
