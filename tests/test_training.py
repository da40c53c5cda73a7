import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from lib import training
from lib.training import fit, predict, source_digest

MEASURED = ("train_loss", "validation_score", "learning_rate")
FILES = ("best.safetensors", "history.csv", "training.json")


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1, precision="32-true")


def make_data(items=64, seed=0):
    """Points inside and outside a circle."""
    points = torch.from_numpy(np.random.default_rng(seed).normal(size=(items, 2))).float()
    return TensorDataset(points, (points.norm(dim=1) > 1.2).long())


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(2, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 2)
    )


def logits(model, batch):
    return model(batch[0])


def loss(model, batch):
    return nn.functional.cross_entropy(logits(model, batch), batch[1])


def accuracy(fabric):
    def score(model, batches):
        hits = predict(model, batches, fabric=fabric, logits=logits).argmax(1)
        return (hits == make_data(40, seed=1).tensors[1].numpy()).mean()

    return score


def train(folder, fabric, **changes):
    """Train the small network; returns it and its history."""
    model = changes.pop("model", None) or make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=changes.pop("learning_rate", 0.02))
    make_schedulers = changes.pop("make_schedulers", lambda optimizer: ())
    arguments = {
        "fabric": fabric,
        "optimizers": [optimizer],
        "train_batches": DataLoader(make_data(), batch_size=8, shuffle=True),
        "validation_batches": DataLoader(make_data(40, seed=1), batch_size=20),
        "loss": loss,
        "score": accuracy(fabric),
        "epochs": 4,
        "folder": folder,
        "seed": 3,
        "fingerprint": {"learning_rate": 0.02},
        "schedulers": make_schedulers(optimizer),
    }
    return model, fit(model, **{**arguments, **changes})


def contents(folder):
    """Every file of a folder with its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_learns_a_circle(tmp_path, fabric):
    model, history = train(tmp_path, fabric, epochs=25)
    assert max(row["validation_score"] for row in history) > 0.9
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    probabilities = predict(
        model, DataLoader(make_data(40, seed=1), batch_size=7), fabric=fabric, logits=logits
    )
    assert probabilities.shape == (40, 2)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    hits = probabilities.argmax(1) == make_data(40, seed=1).tensors[1].numpy()
    assert hits.mean() == max(
        row["validation_score"] for row in history
    )  # the best weights are loaded


def test_writes_best_weights_history_summary_and_curves(tmp_path, fabric):
    model, history = train(tmp_path, fabric)
    assert set(contents(tmp_path)) == {
        *FILES,
        "curves/metrics.json",
        *(
            f"curves/plots/metrics/{name}.tsv"
            for name in ("train_loss", "validation_score", "learning_rate")
        ),
    }
    for name, values in load_file(tmp_path / "best.safetensors").items():
        torch.testing.assert_close(values, model.state_dict()[name], rtol=0, atol=0)
    table = pd.read_csv(tmp_path / "history.csv")
    pd.testing.assert_frame_equal(table, pd.DataFrame(history))
    summary = json.loads((tmp_path / "training.json").read_text())
    assert summary["best"] == max(history, key=lambda row: row["validation_score"])
    assert summary["identity"]["given"] == {"learning_rate": 0.02}
    curve = pd.read_csv(tmp_path / "curves/plots/metrics/train_loss.tsv", sep="\t")
    assert curve["step"].tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(curve["train_loss"], table["train_loss"])


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path, fabric):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.rand(seed)  # what happened before must not matter
        train(tmp_path / name, fabric, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_a_plateau_may_watch_a_loss_while_another_score_chooses(tmp_path, fabric):
    scores = iter([(0.9, 1.0), (0.8, 0.5), (0.7, 0.4), (0.6, 0.9), (0.5, 0.9)])

    def score(model, batches):
        return dict(zip(("validation_accuracy", "validation_loss"), next(scores), strict=True))

    _, history = train(
        tmp_path,
        fabric,
        score=score,
        score_name="validation_accuracy",
        watched_loss="validation_loss",
        make_schedulers=lambda o: [ReduceLROnPlateau(o, factor=0.1, patience=0)],
        epochs=5,
    )
    assert [row["validation_loss"] for row in history] == [1.0, 0.5, 0.4, 0.9, 0.9]
    assert [row["learning_rate"] for row in history] == pytest.approx(4 * [0.02] + [0.002])
    assert json.loads((tmp_path / "training.json").read_text())["best"]["epoch"] == 1
    with pytest.raises(ValueError, match="mode='min'"):
        train(
            tmp_path / "b",
            fabric,
            watched_loss="validation_loss",
            make_schedulers=lambda o: [ReduceLROnPlateau(o, mode="max")],
        )


def test_several_batches_per_step_equal_one_large_batch(tmp_path, fabric):
    weights = []
    for per_step, batch_size in ((3, 8), (1, 24)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 2))
        train(
            tmp_path / f"{per_step}",
            fabric,
            model=model,
            optimizers=[torch.optim.SGD(model.parameters(), lr=0.5)],
            train_batches=DataLoader(make_data(40), batch_size=batch_size),  # the last step: 16
            batches_per_step=per_step,
        )
        weights.append(model[0].weight)
    torch.testing.assert_close(*weights)


def test_a_loader_with_its_own_generator_is_seeded_per_epoch(tmp_path, fabric):
    def loader(used):
        generator = torch.Generator().manual_seed(used)
        return DataLoader(make_data(), batch_size=8, shuffle=True, generator=generator)

    _, first = train(tmp_path / "a", fabric, train_batches=loader(1))
    _, second = train(tmp_path / "b", fabric, train_batches=loader(2))
    assert first == second


def scripted(values):
    """A score that follows a script."""
    script = iter(values)
    return lambda model, batches: next(script)


@pytest.mark.parametrize(
    ("values", "higher", "patience", "epochs", "best"),
    [
        ([1, 3, 2, 2, 9], True, 2, 4, 2),
        ([3, 1, 2, 2, 0], False, 2, 4, 2),
        ([1, 1, 1, 1, 1], True, 2, 3, 1),  # equal is not better
        ([1, 3, 2, 2, 9], True, None, 5, 5),
        ([1, 2, 1, 3, 1], True, 2, 5, 4),
    ],
)
def test_early_stopping(tmp_path, fabric, values, higher, patience, epochs, best):
    _, history = train(
        tmp_path,
        fabric,
        score=scripted(values),
        higher_is_better=higher,
        patience=patience,
        epochs=5,
    )
    assert len(history) == epochs
    summary = json.loads((tmp_path / "training.json").read_text())
    assert summary["best"]["epoch"] == best


def test_plateau_lowers_the_learning_rate(tmp_path, fabric):
    _, history = train(
        tmp_path,
        fabric,
        score=scripted([1, 0, 0, 0, 0]),
        epochs=5,
        make_schedulers=lambda optimizer: [
            ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=1)
        ],
    )
    assert [row["learning_rate"] for row in history] == [0.02, 0.02, 0.02, 0.01, 0.01]


def test_plateau_in_the_wrong_direction_is_refused(tmp_path, fabric):
    with pytest.raises(ValueError, match="mode='max'"):
        train(tmp_path, fabric, make_schedulers=lambda optimizer: [ReduceLROnPlateau(optimizer)])


def test_no_batches_are_refused(tmp_path, fabric):
    with pytest.raises(ValueError, match="no training batches"):
        train(tmp_path, fabric, train_batches=[])


def test_several_devices_need_distributed_data(tmp_path):
    with pytest.raises(ValueError, match="DistributedSampler"):
        training._check(SimpleNamespace(world_size=2), DataLoader(make_data()), (), True)


def test_a_loss_that_is_not_finite_names_epoch_and_scans(tmp_path, fabric):
    def broken(model, batch):
        return model(batch.points).sum() * math.nan

    batch = SimpleNamespace(points=torch.zeros(2, 2), scan_ids=["a-7", "b-3"])
    with pytest.raises(FloatingPointError, match=r"loss is nan in epoch 1, scans \['a-7', 'b-3'\]"):
        train(tmp_path, fabric, train_batches=[batch], loss=broken)


def test_a_score_that_is_not_finite_is_an_error(tmp_path, fabric):
    with pytest.raises(FloatingPointError, match="score is nan after epoch 1"):
        train(tmp_path, fabric, score=lambda model, batches: math.nan)


def test_predict_leaves_the_mode(fabric):
    batches = [make_data(6).tensors]
    for mode in (True, False):
        model = make_model().train(mode)
        predict(model, batches, fabric=fabric, logits=logits)
        assert model.training == mode


def test_mixed_precision(tmp_path):
    mixed = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model, history = train(tmp_path, mixed, epochs=15)
    assert max(row["validation_score"] for row in history) > 0.85
    assert next(model.parameters()).dtype == torch.float32


# -------------------------------------------------------------------------------------- restarting


class KilledError(Exception):
    """Stands for a kill in tests within one process."""


def kill_at(monkeypatch, name, call):
    """Let the ``call``-th use of a function of the module fail before it does anything."""
    original, calls = getattr(training, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise KilledError
        return original(*args, **kwargs)

    monkeypatch.setattr(training, name, failing)


def both_schedulers(optimizer):
    return [
        CosineAnnealingLR(optimizer, T_max=4),
        ReduceLROnPlateau(optimizer, mode="max", factor=0.3, patience=0),
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Contents of the folder of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder, Fabric(accelerator="cpu", devices=1), make_schedulers=both_schedulers)
    return contents(folder)


@pytest.mark.parametrize("call", [1, 2, 3, 4, 8, 9, 10, 12, 13, 14, 15])
def test_a_kill_at_any_write_changes_nothing(tmp_path, fabric, monkeypatch, undisturbed, call):
    """Each of four epochs replaces three files, the end two more and the summary."""
    with monkeypatch.context() as patch:
        kill_at(patch, "_replace", call)
        with pytest.raises(KilledError):
            train(tmp_path, fabric, make_schedulers=both_schedulers)
    train(tmp_path, fabric, make_schedulers=both_schedulers)
    assert contents(tmp_path) == undisturbed


def test_an_interrupted_run_continues_where_it_was(tmp_path, fabric, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, "_step", 8 * 2 + 3)  # in the third epoch
        with pytest.raises(KilledError):
            train(tmp_path, fabric)
    steps = []
    original = training._loss_of
    monkeypatch.setattr(training, "_loss_of", lambda *a: (steps.append(a[-1]), original(*a))[1])
    train(tmp_path, fabric)
    assert sorted(set(steps)) == [3, 4]


def test_another_run_starts_afresh(tmp_path, fabric, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        kill_at(patch, "_step", 8 * 2 + 3)
        with pytest.raises(KilledError):
            train(tmp_path / "a", fabric)
    train(tmp_path / "a", fabric, fingerprint={"learning_rate": 0.5})
    assert "starting afresh" in capsys.readouterr().out
    train(tmp_path / "b", fabric, fingerprint={"learning_rate": 0.5})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def no_training(*arguments, **options):
    raise KilledError


def test_a_finished_run_is_not_repeated(tmp_path, fabric, monkeypatch):
    model, history = train(tmp_path, fabric)
    before = contents(tmp_path)
    monkeypatch.setattr(training, "_step", no_training)
    again, same_history = train(tmp_path, fabric, model=make_model(seed=9))
    assert same_history == history
    assert contents(tmp_path) == before
    for name, values in again.state_dict().items():
        torch.testing.assert_close(values, model.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("damage", ["fingerprint", "seed", "weights", "source"])
def test_a_finished_run_is_repeated_when_anything_changed(tmp_path, fabric, monkeypatch, damage):
    train(tmp_path, fabric)
    changes = {"fingerprint": {"fingerprint": {"x": 1}}, "seed": {"seed": 4}}.get(damage, {})
    if damage == "weights":
        (tmp_path / "best.safetensors").write_bytes(b"damaged")
    if damage == "source":
        monkeypatch.setattr(training, "source_digest", lambda: "edited")
    monkeypatch.setattr(training, "_step", no_training)
    with pytest.raises(KilledError):
        train(tmp_path, fabric, **changes)


def test_source_digest_covers_the_whole_package():
    assert len(source_digest()) == 64
    assert source_digest() == source_digest()


SUPERVISOR = """
    import os, signal, sys, time
    from pathlib import Path
    sys.path[:0] = sys.argv[1:3]
    import torch
    import test_training as tests
    from lib import training
    from lightning_fabric import Fabric

    torch.set_num_threads(1)
    training.source_digest = lambda: "constant, while others may be editing"

    def slow(model, batch):
        time.sleep(0.005)
        return tests.loss(model, batch)

    for line in sys.stdin:
        folder, epochs = Path(line.split()[0]), int(line.split()[1])
        process = os.fork()
        if process == 0:
            tests.train(folder, Fabric(accelerator="cpu", devices=1), loss=slow, epochs=8)
            os._exit(0)
        tests.wait_for_epochs(folder, epochs)
        if epochs < 8:
            os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        print(folder.name, epochs, os.waitstatus_to_exitcode(status), flush=True)
"""


def wait_for_epochs(folder, epochs):
    """Until the history has so many rows."""
    deadline = time.monotonic() + 60
    history = folder / "history.csv"
    while not (history.is_file() and len(history.read_text().splitlines()) > epochs):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {epochs} epochs in {folder}")
        time.sleep(0.002)


def test_a_process_killed_again_and_again_ends_with_the_same_bytes(tmp_path, repository):
    """A supervisor, which pays for the imports once, forks each training and kills it."""
    orders = [("killed", 1), ("killed", 3), ("killed", 6), ("killed", 8), ("undisturbed", 8)]
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SUPERVISOR), repository, Path(__file__).parent],
        input="".join(f"{tmp_path / name} {epochs}\n" for name, epochs in orders),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = finished.stdout.splitlines()
    reported = [tuple(line.split()) for line in lines if not line.startswith("continuing")]
    assert reported == [
        *[("killed", str(epochs), str(-signal.SIGKILL)) for epochs in (1, 3, 6)],
        ("killed", "8", "0"),
        ("undisturbed", "8", "0"),
    ]
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def test_one_cycle_rises_to_the_rate_and_falls_to_nothing():
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 1).parameters(), lr=0.5)
    (schedule,) = training.schedules([optimizer], kind="one-cycle", total_steps=10, pct_start=0.3)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < 10:
            schedule.step()
    assert max(rates) == pytest.approx(0.5) and rates.index(max(rates)) == 2
    assert rates[0] < 0.05 and rates[-1] < 1e-4


@pytest.mark.parametrize("count", [5, 3, 12])
def test_a_seeded_order_holds_every_index_before_any_comes_again(count):
    order = training.SeededOrder(5, count=count)
    torch.manual_seed(1)
    first, second = list(order), list(order)
    torch.manual_seed(1)
    assert list(order) == first != second
    assert len(first) == len(order) == count
    indices = [index for index, _ in first]
    for start in range(0, count, 5):
        part = indices[start : start + 5]
        assert len(set(part)) == len(part) and set(part) <= set(range(5))
    assert len({seed for _, seed in first}) == count


def test_weights_say_how_often_an_index_comes_in_a_seeded_order():
    order = training.SeededOrder(3, count=4000, weights=[3.0, 1.0, 0.0])
    torch.manual_seed(0)
    indices = [index for index, _ in order]
    assert len(indices) == len(order) == 4000
    assert set(indices) == {0, 1}
    assert 0.72 < indices.count(0) / 4000 < 0.78
    with pytest.raises(ValueError, match="3 items, but 2 weights"):
        training.SeededOrder(3, weights=[1.0, 1.0])


def test_a_seeded_order_holds_every_index_once_by_itself():
    assert sorted(index for index, _ in training.SeededOrder(7)) == list(range(7))
