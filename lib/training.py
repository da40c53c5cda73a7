"""The training loop of every network of the study.

One loop for classifiers and segmenters alike: it knows epochs, early stopping, checkpoints,
learning curves and restarts; the caller brings the network, the loss of a batch and the validation
score. Device, precision and several devices are Lightning Fabric's.

A run that is killed at any moment and started again ends with the same bytes as one that was not:
all that carries over from one epoch to the next is in one file, replaced in one step
(``last.pt``), and every epoch draws its random numbers from (seed, epoch) alone.

What is reproducible: on a CPU everything, for one number of threads. On a GPU PyTorch's
deterministic algorithms are used wherever they exist and it warns where they do not; matrix
products need the environment variable ``CUBLAS_WORKSPACE_CONFIG=:4096:8`` set before Python starts.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from dvclive import Live
from lightning_fabric import Fabric, seed_everything
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
)
from torch.utils.data import DistributedSampler, Sampler
from tqdm import tqdm

from lib.data.files import whole_file

BEST = "best.safetensors"
LAST = "last.pt"  # only while training: its bytes depend on how often it was resumed
HISTORY = "history.csv"
SUMMARY = "training.json"
CURVES = "curves"

Row = dict[str, float]
Loss = Callable[[nn.Module, Any], Tensor]
Score = Callable[[nn.Module, Iterable[Any]], float | Mapping[str, float]]


@dataclass(kw_only=True)
class _Run:
    """Everything that changes while training, and so must survive a kill."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    schedulers: Sequence[LRScheduler | ReduceLROnPlateau]
    score_name: str
    higher_is_better: bool
    watched: str
    history: list[Row] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def best(self) -> Row:
        """The epoch with the best score, the first of equals."""
        sign = 1 if self.higher_is_better else -1
        return max(self.history, key=lambda row: sign * row[self.score_name])

    def finished(self, epochs: int, patience: int | None) -> bool:
        """Whether all epochs are done, or ``patience`` of them brought no better score."""
        done = len(self.history)
        stale = patience is not None and done > 0 and done - self.best["epoch"] >= patience
        return done >= epochs or stale

    def record(self, row: Row) -> None:
        """Take the result of an epoch: history, best weights, learning rates."""
        self.history.append(row)
        if self.best is row:
            self.best_weights = {
                name: values.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, values in self.model.state_dict().items()
            }
        for scheduler in self.schedulers:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(row[self.watched])
            else:
                scheduler.step()

    def state(self) -> dict[str, Any]:
        """Plain tensors, numbers, lists and dicts."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "history": self.history,
            "best_weights": self.best_weights,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what ``state`` returned."""
        self.model.load_state_dict(state["model"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        for scheduler, values in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(values)
        self.history, self.best_weights = state["history"], state["best_weights"]


def fit(
    model: nn.Module,
    *,
    fabric: Fabric,
    optimizers: Sequence[Optimizer],
    train_batches: Iterable[Any],
    validation_batches: Iterable[Any],
    loss: Loss,
    score: Score,
    epochs: int,
    folder: Path,
    seed: int,
    fingerprint: Mapping[str, Any],
    score_name: str = "validation_score",
    higher_is_better: bool = True,
    patience: int | None = None,
    schedulers: Sequence[LRScheduler | ReduceLROnPlateau] = (),
    watched_loss: str | None = None,
    batches_per_step: int = 1,
) -> list[Row]:
    """Train a network, keep its best epoch, and leave it in ``model``.

    The folder then holds ``best.safetensors`` (weights of the best epoch), ``history.csv``,
    ``training.json`` (what was run, its best epoch) and ``curves/`` (written by DVCLive). A folder
    that is finished with the same fingerprint is not trained again. To the fingerprint are added
    the numbers given here and a hash of this package's source, so that a changed program never
    continues an old run.

    Args:
        model: the network.
        fabric: device and precision, ``"32-true"`` or ``"bf16-mixed"``. With several devices give
            the loader a ``DistributedSampler``; every device scores all validation batches.
        optimizers: all stepped together.
        train_batches: a loader, or anything that can be iterated once per epoch. A loader shuffles
            by PyTorch's random numbers, which are seeded anew for each epoch.
        validation_batches: given to ``score``.
        loss: from network and batch (on the device) to the loss of the batch, a scalar.
        score: from network (evaluation mode, no gradients) and batches to the validation score, or
            to several by their names, which all go into the history.
        epochs: largest number of epochs.
        folder: where results are written.
        seed: of shuffling, dropout and augmentation.
        fingerprint: what else the result depends on, as JSON values: parameters, hashes of data.
        score_name: what the score is, its column in the history, for example ``validation_loss``.
        higher_is_better: False where the score is a loss.
        patience: stop after so many epochs without a better score; None never does.
        schedulers: of the learning rates, stepped once per epoch, with the score where they ask.
        watched_loss: which of several scores, a loss, they get instead.
        batches_per_step: the optimizers step after so many batches, on the mean of their
            gradients, and at the end of an epoch on what is left.

    Returns:
        One row per epoch: epoch (from 1), train_loss (mean over batches), each score under its
        name, learning_rate (of the first optimizer).

    Raises:
        ValueError: if there are no batches, a scheduler watches the wrong direction, or several
            devices would all see the same data.
        FloatingPointError: if a loss or score is not finite, naming the epoch and the scans.
    """
    _check(fabric, train_batches, schedulers, higher_is_better and watched_loss is None)
    numbers = {"seed": seed, "epochs": epochs, "patience": patience, "per_step": batches_per_step}
    numbers |= {"score": score_name, "higher": higher_is_better, "watched": watched_loss}
    identity = {"given": dict(fingerprint), "fit": numbers, "source": source_digest()}
    run = _Run(
        model=model,
        optimizers=optimizers,
        schedulers=schedulers,
        score_name=score_name,
        higher_is_better=higher_is_better,
        watched=watched_loss or score_name,
    )
    one_epoch = partial(
        _epoch,
        *fabric.setup(model, *optimizers),
        fabric=fabric,
        train_batches=train_batches,
        validate=partial(_validate, model, validation_batches, score, score_name),
        loss=loss,
        seed=seed,
        batches_per_step=batches_per_step,
    )
    if _finished_before(folder, identity):
        fabric.print(f"{folder} is already trained")
        model.load_state_dict(safetensors.torch.load_file(folder / BEST))
        return _read_history(folder / HISTORY)
    _resume(run, folder, identity, fabric)
    with _deterministic(), _learning_curves(folder, run.history, fabric) as log:
        while not run.finished(epochs, patience):
            run.record(one_epoch(epoch=len(run.history) + 1))
            if fabric.is_global_zero:
                _save(run, folder, identity)
            log(run.history[-1])
    if fabric.is_global_zero:
        _finish(run, folder, identity)
    fabric.barrier()
    model.load_state_dict(run.best_weights)
    return run.history


def schedules(
    optimizers: Sequence[Optimizer], *, kind: str, higher_is_better: bool = False, **numbers: float
) -> list[LRScheduler | ReduceLROnPlateau]:
    """One learning-rate schedule for several optimizers.

    Args:
        optimizers: what to schedule.
        kind: ``"plateau"`` lowers the rate when the validation score stands still, ``"cosine"``
            lets it fall to zero over ``T_max`` epochs, ``"one-cycle"`` lets it rise to its value
            and fall to zero over ``total_steps`` epochs.
        higher_is_better: direction of the score, for ``"plateau"``.
        numbers: arguments of PyTorch's scheduler (``factor``, ``patience``; ``T_max``;
            ``total_steps``, ``pct_start``).

    Raises:
        ValueError: if the kind is unknown.
    """
    if kind == "plateau":
        numbers["mode"] = "max" if higher_is_better else "min"
        return [ReduceLROnPlateau(optimizer, **numbers) for optimizer in optimizers]
    if kind == "cosine":
        return [CosineAnnealingLR(optimizer, **numbers) for optimizer in optimizers]
    if kind == "one-cycle":
        numbers["cycle_momentum"] = False
        return [
            OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], **numbers)
            for optimizer in optimizers
        ]
    raise ValueError(f"a schedule is 'plateau', 'cosine' or 'one-cycle', got {kind!r}")


class SeededOrder(Sampler[tuple[int, int]]):
    """Indices in random order, each with a seed for what is random about its item.

    All numbers are drawn in the training process, so augmentation depends neither on how many
    processes load nor on who loads what.

    Args:
        length: number of items; each comes once before any comes again.
        count: numbers to draw per epoch; None is every item once.
        weights: of each item, to draw it so much more often; None draws all alike. With weights an
            item may come again before others came.
    """

    def __init__(
        self, length: int, *, count: int | None = None, weights: Sequence[float] | None = None
    ) -> None:
        if weights is not None and len(weights) != length:
            raise ValueError(f"{length} items, but {len(weights)} weights")
        self.length, self.count = length, length if count is None else count
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.count, self.length):
            drawn = min(self.length, self.count - start)
            if self.weights is None:
                order = torch.randperm(self.length)[:drawn].tolist()
            else:
                order = self.weights.multinomial(drawn, replacement=True).tolist()
            yield from zip(order, torch.randint(2**31, (len(order),)).tolist(), strict=True)


def predict(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    fabric: Fabric,
    logits: Callable[[nn.Module, Any], Tensor],
) -> np.ndarray:
    """Class probabilities of everything in some batches, in their order.

    Args:
        model: the network; its mode is as before afterwards.
        batches: loader or other iterable.
        fabric: device and precision.
        logits: from network and batch (on the device) to scores, shape (items, classes).

    Returns:
        float32, shape (items, classes), rows sum to 1.
    """
    was_training = model.training
    fabric.to_device(model).eval()
    with torch.inference_mode(), fabric.autocast():
        scores = [logits(model, fabric.to_device(batch)).float().cpu() for batch in batches]
    model.train(was_training)
    return torch.cat(scores).softmax(1).numpy()


def source_digest() -> str:
    """SHA-256 over the source files of this package, names included."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _epoch(
    model: nn.Module,
    *optimizers: Optimizer,
    fabric: Fabric,
    train_batches: Iterable[Any],
    validate: Callable[[int], Row],
    loss: Loss,
    seed: int,
    batches_per_step: int,
    epoch: int,
) -> Row:
    """Train and validate one epoch, behind one progress bar."""
    _seed_epoch(seed, epoch, train_batches, fabric.global_rank)
    rate = optimizers[0].param_groups[0]["lr"]
    losses = []
    for optimizer in optimizers:
        optimizer.zero_grad()
    with _progress_bar(train_batches, epoch, fabric) as bar:
        model.train()
        for batch in train_batches:
            value = _loss_of(model, fabric.to_device(batch), loss, epoch)
            losses.append(value.item())
            fabric.backward(value)
            if len(losses) % batches_per_step == 0:
                _step(optimizers, batches_per_step)
            bar.update()
        if len(losses) % batches_per_step:
            _step(optimizers, len(losses) % batches_per_step)
        if not losses:
            raise ValueError("there are no training batches")
        found = {"train_loss": sum(losses) / len(losses), **validate(epoch)}
        bar.set_postfix({name: f"{value:.4f}" for name, value in found.items()})
    return {"epoch": epoch, **found, "learning_rate": rate}


def _progress_bar(batches: Iterable[Any], epoch: int, fabric: Fabric) -> tqdm:
    """Progress of an epoch in batches, shown by the first device only."""
    total = len(batches) if isinstance(batches, Sized) else None
    return tqdm(total=total, desc=f"epoch {epoch}", unit="batch", disable=not fabric.is_global_zero)


def _loss_of(model: nn.Module, batch: Any, loss: Loss, epoch: int) -> Tensor:
    """The loss of a batch, which must be a number."""
    value = loss(model, batch)
    if not torch.isfinite(value):
        names = getattr(batch, "scan_ids", "without names")
        raise FloatingPointError(f"the loss is {value.item()} in epoch {epoch}, scans {names}")
    return value


def _step(optimizers: Sequence[Optimizer], batches: int) -> None:
    """One update of all weights on the mean gradient of some batches; gradients start anew."""
    for optimizer in optimizers:
        if batches > 1:
            groups = [group["params"] for group in optimizer.param_groups]
            for weights in (weights for group in groups for weights in group):
                if weights.grad is not None:
                    weights.grad /= batches
        optimizer.step()
        optimizer.zero_grad()


def _validate(
    model: nn.Module, batches: Iterable[Any], score: Score, score_name: str, epoch: int
) -> Row:
    """Validation scores of the network as it is, by their names."""
    model.eval()
    with torch.no_grad():
        found = score(model, batches)
    named = found if isinstance(found, Mapping) else {score_name: found}
    for value in named.values():
        if not math.isfinite(value):
            raise FloatingPointError(f"the validation score is {value} after epoch {epoch}")
    return {name: float(value) for name, value in named.items()}


def _check(
    fabric: Fabric,
    train_batches: Iterable[Any],
    schedulers: Sequence[LRScheduler | ReduceLROnPlateau],
    higher_is_better: bool,
) -> None:
    """Complain about what would train silently wrong."""
    mode = "max" if higher_is_better else "min"
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode != mode:
            raise ValueError(f"ReduceLROnPlateau needs mode={mode!r} for this score")
    sampler = getattr(train_batches, "sampler", None)
    if fabric.world_size > 1 and not isinstance(sampler, DistributedSampler):
        raise ValueError("several devices need a loader with a DistributedSampler")


def _seed_epoch(seed: int, epoch: int, batches: Iterable[Any], rank: int) -> None:
    """Seed everything random in an epoch from (seed, epoch), so that nothing else carries over."""
    value = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    seed_everything((value + rank) % 2**32, verbose=False)  # each device drops out by itself
    if getattr(batches, "generator", None) is not None:
        batches.generator.manual_seed(value)
    if isinstance(getattr(batches, "sampler", None), DistributedSampler):
        batches.sampler.set_epoch(epoch)


@contextmanager
def _deterministic() -> Iterator[None]:
    """PyTorch's deterministic algorithms where they exist, a warning where they do not.

    It then also fills new memory, for programs that read what they have not written; no operation
    here does, and it costs the small networks of this study some percent.
    """
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextmanager
def _learning_curves(
    folder: Path, history: Sequence[Row], fabric: Fabric
) -> Iterator[Callable[[Row], None]]:
    """Open DVCLive on the first device, write past epochs again, and give a function for more."""
    if not fabric.is_global_zero:
        yield lambda row: None
        return
    with Live(str(folder / CURVES), save_dvc_exp=False, dvcyaml=None) as live:
        for row in history:
            _log(live, row)
        yield partial(_log, live)


def _log(live: Live, row: Row) -> None:
    """One epoch in the learning curves."""
    live.step = row["epoch"]
    for name in row.keys() - {"epoch"}:
        live.log_metric(name, row[name])
    live.make_summary()


def _save(run: _Run, folder: Path, identity: Mapping[str, Any]) -> None:
    """Write the state of the run after an epoch; a kill between the files does no harm.

    The state comes first and holds all that the others are made from.
    """
    buffer = io.BytesIO()
    torch.save({"identity": _json(identity), **run.state()}, buffer)
    _replace(folder / LAST, buffer.getvalue())
    _export(run, folder)


def _export(run: _Run, folder: Path) -> None:
    """Write best weights and history."""
    _replace(folder / BEST, safetensors.torch.save(run.best_weights))
    table = pd.DataFrame(run.history).to_csv(index=False, lineterminator="\n")
    _replace(folder / HISTORY, table.encode())


def _read_history(path: Path) -> list[Row]:
    """Rows of history.csv, to the last bit (pandas' default parser may round)."""
    with path.open(newline="") as file:
        rows = [{name: float(text) for name, text in row.items()} for row in csv.DictReader(file)]
    return [{**row, "epoch": int(row["epoch"])} for row in rows]


def _finish(run: _Run, folder: Path, identity: Mapping[str, Any]) -> None:
    """Write the results and the summary that declares them complete; drop the state."""
    _export(run, folder)
    digest = hashlib.sha256((folder / BEST).read_bytes()).hexdigest()
    summary = {"best": run.best, "epochs": len(run.history), "best_sha256": digest}
    _replace(folder / SUMMARY, _json({**summary, "identity": identity}).encode())
    for name in (LAST, f".{LAST}.partial"):
        (folder / name).unlink(missing_ok=True)


def _finished_before(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the folder holds the complete and undamaged result of this very run."""
    if not all((folder / name).is_file() for name in (SUMMARY, BEST, HISTORY)):
        return False
    summary = json.loads((folder / SUMMARY).read_text())
    digest = hashlib.sha256((folder / BEST).read_bytes()).hexdigest()
    return _json(summary["identity"]) == _json(identity) and summary["best_sha256"] == digest


def _resume(run: _Run, folder: Path, identity: Mapping[str, Any], fabric: Fabric) -> None:
    """Continue the same run if it was interrupted; else empty the folder of old results."""
    state = None
    if (folder / LAST).is_file():
        state = torch.load(folder / LAST, map_location="cpu", weights_only=True)
    fabric.barrier()  # nobody changes the folder before everybody has read it
    if state is not None and state["identity"] == _json(identity):
        run.restore(state)
        fabric.print(f"continuing {folder} after epoch {len(run.history)}")
        return
    if state is not None:
        fabric.print(f"starting afresh: {folder} holds another, unfinished run")
    if fabric.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (SUMMARY, LAST, BEST, HISTORY):
            (folder / name).unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that at any moment it is either the old or the new one, never a part."""
    with whole_file(path) as partial_path:
        partial_path.write_bytes(content)


def _json(values: Mapping[str, Any]) -> str:
    """One text for one content."""
    return json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"
