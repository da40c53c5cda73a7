from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric import Fabric
from sklearn.metrics import accuracy_score, f1_score, log_loss
from torch import nn

from lib.classification.inputs import ScanItem
from lib.classification.task import Task, accuracy, cross_entropy, fit_network, macro_f1, mean_loss
from lib.data.store import save_volume

SETTINGS = {
    "epochs": 12,
    "patience": None,
    "chosen_by": "loss",
    "schedule": {"kind": "cosine", "T_max": 12},
}


def make_task(
    folder, *, targets=(0, 1, 0, 1), splits=("train", "train", "validation", "validation")
):
    scans = []
    for number, target in enumerate(targets):
        path = folder / f"{number}.b2nd"
        if not path.exists():
            save_volume(path, np.full((1, 4, 4), number, np.int16))
            path.with_suffix(".json").write_text(str(number))
        scans.append(ScanItem(scan_id=str(number), volume=path, mask=None, target=target))
    return Task(
        scans=scans,
        splits=splits,
        variant={},
        settings=SETTINGS,
        fabric=Fabric(accelerator="cpu", devices=1),
        folder=folder / "model",
        seed=0,
    )


def logits_of(model, batch):
    return model(batch.values)


def batches(*pairs):
    return [
        SimpleNamespace(values=torch.tensor(values), targets=torch.tensor(targets))
        for values, targets in pairs
    ]


def test_parts_keep_their_order(tmp_path):
    task = make_task(
        tmp_path, splits=("train", "validation", "test", "train"), targets=(0, 1, 0, 1)
    )
    assert [scan.scan_id for scan in task.train] == ["0", "3"]
    assert [scan.scan_id for scan in task.validation] == ["1"]


def test_bad_parts_are_one_sentence_each(tmp_path):
    with pytest.raises(ValueError, match="training part has no scan of the class 'covid'"):
        make_task(tmp_path, targets=(0, 0, 0, 1))
    with pytest.raises(ValueError, match="training part has no scan of the class 'non_covid'"):
        make_task(tmp_path, targets=(1, 1, 0, 1))
    with pytest.raises(ValueError, match="validation part is empty"):
        make_task(tmp_path, splits=("train",) * 4)
    with pytest.raises(ValueError, match="4 scans, but 1 splits"):
        make_task(tmp_path, splits=("train",))


def test_a_validation_part_of_one_class_still_chooses_an_epoch(tmp_path):
    task = make_task(tmp_path, targets=(0, 1, 0, 0))
    assert {scan.target for scan in task.validation} == {0}
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert np.isfinite(mean_loss(scores, torch.zeros(2, dtype=torch.int64)))
    assert macro_f1(scores, torch.zeros(2, dtype=torch.int64)) == pytest.approx(1 / 3)


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 1)), min_size=1, max_size=9))
def test_measures_are_those_of_scikit_learn(cases):
    scores = torch.tensor([[0.0, score] for score, _ in cases])
    targets = torch.tensor([target for _, target in cases])
    expected = log_loss(targets, scores.double().softmax(1), labels=[0, 1])
    assert mean_loss(scores, targets) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    predicted = scores.argmax(1)
    expected = f1_score(targets, predicted, labels=[0, 1], average="macro", zero_division=0)
    assert macro_f1(scores, targets) == pytest.approx(expected)
    assert accuracy(scores, targets) == pytest.approx(accuracy_score(targets, predicted))


def test_the_loss_is_the_cross_entropy_of_the_logits():
    (batch,) = batches(([[1.0, 0.0], [0.0, 3.0]], [0, 0]))
    expected = -batch.values.softmax(1)[:, 0].log().mean()
    torch.testing.assert_close(cross_entropy(logits_of)(nn.Identity(), batch), expected)


@pytest.mark.parametrize("chosen_by", ["loss", "macro_f1"])
def test_a_network_learns_and_keeps_its_best_epoch(tmp_path, chosen_by):
    torch.manual_seed(0)
    task = make_task(tmp_path)
    data = batches(([[1.0, 2.0], [2.0, 1.0]], [1, 0]), ([[0.0, 3.0], [1.0, 0.5]], [1, 0]))
    model = nn.Linear(2, 2)
    history = fit_network(
        task,
        model,
        train_batches=data,
        validation_batches=data,
        logits=logits_of,
        optimizers=[torch.optim.Adam(model.parameters(), lr=0.1)],
        settings=SETTINGS | {"chosen_by": chosen_by},
        name="part",
    )
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    scores = torch.cat([logits_of(model, batch) for batch in data]).detach()
    targets = torch.cat([batch.targets for batch in data])
    best = {"loss": min, "macro_f1": max}[chosen_by]
    measure = {"loss": mean_loss, "macro_f1": macro_f1}[chosen_by]
    column = f"validation_{chosen_by}"
    assert measure(scores, targets) == pytest.approx(best(row[column] for row in history))
    assert (tmp_path / "model/part/best.safetensors").is_file()
