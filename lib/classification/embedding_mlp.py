"""The second classifier of 3-D CNN with BERT: an MLP over the embeddings of all sets of a scan.

The network judges one set of 32 slices. A longer scan gives several sets; their embeddings are
pooled into one vector per scan, which a small perceptron classifies (Tan and Liu 2021, sections
4.2 and 5.3.2; FACTS 4.9). Embeddings are computed once and stored; nothing here sees a slice.

Not taken over from the public code: it validates an epoch only where the training accuracy is above
0.85, so that what is kept depends on a threshold that the paper does not name, and a network that
stays below it is never kept. Here every epoch is validated.

As published, the best epoch is that of the highest validation accuracy, the first of equals. With
few validation scans that is coarse: on 15, an epoch is kept as soon as no scan is wrong, however
unsure the network still is, so the study's small preset chooses by the loss. The learning rate
follows the validation loss in both, as in the public code.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric, seed_everything
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lib.classification.inputs import BINARY_CLASSES
from lib.classification.task import CHOSEN_BY, Trained, cross_entropy
from lib.data.splits import TRAIN, VALIDATION
from lib.training import fit, schedules
from lib.training import predict as class_probabilities

EMBEDDINGS = "embeddings"  # tensor of a stored scan, shape (sets, width)

# How the embeddings of the sets become one vector: (sets, width) -> (width,) or (2 * width,).
POOLINGS = {
    "max": lambda embeddings: embeddings.amax(0),
    "mean": lambda embeddings: embeddings.mean(0),
    "both": lambda embeddings: torch.cat([embeddings.amax(0), embeddings.mean(0)]),
}

ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}

VARIANTS = {
    "paper": {"hidden": [128, 32], "dropout": 0.5},
    # Deviation from the paper, as in the public code: a wider first layer.
    "code": {"hidden": [256, 32], "dropout": 0.5},
    # Narrower embeddings and few scans. Deviation: half the dropout, since with as few neurons the
    # published share leaves next to nothing of the second layer.
    "small": {"hidden": [32, 16], "dropout": 0.25},
}


class EmbeddingBatch(NamedTuple):
    """Pooled embeddings of several scans.

    Attributes:
        features: float32, shape (scans, width).
        targets: int64, shape (scans,).
        scan_ids: pseudonymous name of each scan.
    """

    features: Tensor
    targets: Tensor
    scan_ids: list[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class PooledScans:
    """One vector per scan, and what is known of the scan.

    Attributes:
        scan_ids: pseudonymous names.
        splits: the part of each scan.
        targets: index of the class of each scan.
        features: float32, shape (scans, width).
    """

    scan_ids: Sequence[str]
    splits: Sequence[str]
    targets: Sequence[int]
    features: Tensor

    def __len__(self) -> int:
        return len(self.scan_ids)

    def items(self, split: str | None = None) -> list[tuple[Tensor, int, str]]:
        """(features, target, scan_id) of the scans of a part, or of all, in their order."""
        rows = zip(self.features, self.targets, self.scan_ids, self.splits, strict=True)
        return [tuple(row) for *row, part in rows if split in (None, part)]

    def digest(self) -> str:
        """SHA-256 over everything that is held."""
        known = [list(values) for values in (self.scan_ids, self.splits, self.targets)]
        digest = hashlib.sha256(repr(known).encode())
        digest.update(self.features.numpy().tobytes())
        return digest.hexdigest()


def read_embeddings(folder: Path, scan_ids: Iterable[str]) -> list[Tensor]:
    """The embeddings of all sets of some scans.

    Args:
        folder: holds ``<scan_id>.safetensors`` of each scan.
        scan_ids: in the order of the result.

    Returns:
        Of each scan float32, shape (sets, width); the width is the same for all.

    Raises:
        FileNotFoundError: if a scan has no file, naming the first.
        ValueError: if a file holds no embeddings, or a scan's width differs from that of the first.
    """
    found = []
    for scan_id in scan_ids:
        embeddings = _embeddings_of(folder / f"{scan_id}.safetensors")
        if found and embeddings.shape[1] != found[0].shape[1]:
            raise ValueError(
                f"{scan_id} has embeddings of width {embeddings.shape[1]}, the scans before it of "
                f"{found[0].shape[1]}: they come from different networks, embed the scans again"
            )
        found.append(embeddings)
    return found


def _embeddings_of(path: Path) -> Tensor:
    """The embeddings in one file, checked."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: embed the scans of the data set first")
    try:
        with safe_open(path, framework="pt") as file:
            embeddings = file.get_tensor(EMBEDDINGS).float()
    except SafetensorError as error:
        raise ValueError(f"{path} holds no tensor {EMBEDDINGS!r}: {error}") from error
    if embeddings.ndim != 2 or not len(embeddings):
        raise ValueError(
            f"{path}: embeddings have the shape (sets, width) with at least one set, got "
            f"{tuple(embeddings.shape)}"
        )
    return embeddings


def pool(embeddings: Sequence[Tensor], pooling: str) -> Tensor:
    """One vector per scan, whatever its number of sets (section 4.2).

    Args:
        embeddings: of each scan, shape (sets, width).
        pooling: a key of ``POOLINGS``; ``both`` is the maximum followed by the mean.

    Returns:
        Shape (scans, width), twice as wide for ``both``.

    Raises:
        ValueError: if the pooling is unknown.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"a pooling is {', '.join(POOLINGS)}, got {pooling!r}")
    return torch.stack([POOLINGS[pooling](sets) for sets in embeddings])


def build(
    *, width: int, activation: str, hidden: Sequence[int] = (128, 32), dropout: float = 0.5
) -> nn.Sequential:
    """The perceptron FC1 - FC2 - classes of figure 3.

    Args:
        width: of a pooled vector; 1024 in the paper where both poolings are taken, else 512.
        activation: a key of ``ACTIVATIONS``, behind both hidden layers.
        hidden: neurons of FC1 and FC2.
        dropout: probability behind both.

    Returns:
        From (scans, width) to logits (scans, 2).

    Raises:
        ValueError: if the activation is unknown.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"an activation is {', '.join(ACTIVATIONS)}, got {activation!r}")
    layers = OrderedDict()
    for number, (inputs, outputs) in enumerate(zip((width, *hidden), hidden, strict=False), 1):
        layers[f"fc{number}"] = nn.Linear(inputs, outputs)
        layers[f"activation{number}"] = ACTIVATIONS[activation]()
        layers[f"dropout{number}"] = nn.Dropout(dropout)
    layers["output"] = nn.Linear(hidden[-1], len(BINARY_CLASSES))
    return nn.Sequential(layers)


def train(
    scans: PooledScans,
    *,
    activation: str,
    variant: Mapping[str, Any],
    settings: Mapping[str, Any],
    fabric: Fabric,
    folder: Path,
    seed: int,
) -> Trained:
    """Train the perceptron on pooled embeddings, keep its best epoch.

    Args:
        scans: of all parts; the test part is not touched.
        activation: a key of ``ACTIVATIONS``.
        variant: other arguments of ``build``.
        settings: batch_scans, learning_rate, epochs, patience, chosen_by (a key of ``CHOSEN_BY``),
            plateau (factor, patience; of the validation loss).
        fabric: device and precision.
        folder: where weights and learning curve go.
        seed: of weights, order and dropout.

    Raises:
        ValueError: if the training part lacks a class, or there is no validation part.
    """
    _check_parts(scans)
    seed_everything(seed, verbose=False)
    model = build(width=scans.features.shape[1], activation=activation, **variant)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["learning_rate"])
    score_name, higher_is_better, _ = CHOSEN_BY[settings["chosen_by"]]
    history = fit(
        model,
        fabric=fabric,
        optimizers=[optimizer],
        schedulers=schedules([optimizer], kind="plateau", **settings["plateau"]),
        watched_loss=CHOSEN_BY["loss"][0],
        train_batches=batches(scans.items(TRAIN), settings["batch_scans"], shuffle=True),
        validation_batches=list(batches(scans.items(VALIDATION), settings["batch_scans"])),
        loss=cross_entropy(logits),
        score=partial(validation_scores, chosen_by=settings["chosen_by"], fabric=fabric),
        score_name=score_name,
        higher_is_better=higher_is_better,
        epochs=settings["epochs"],
        patience=settings["patience"],
        folder=folder,
        seed=seed,
        fingerprint={
            "settings": dict(settings),
            "variant": dict(variant),
            "activation": activation,
            "data": scans.digest(),
        },
    )
    return Trained(model, {"MLP": history})


def validation_scores(
    model: nn.Module, batches: Iterable[EmbeddingBatch], *, chosen_by: str, fabric: Fabric
) -> dict[str, float]:
    """Loss and accuracy on some batches, and what an epoch is chosen by, by their columns."""
    scores = torch.cat([logits(model, fabric.to_device(batch)).float().cpu() for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    measured = [CHOSEN_BY[name] for name in dict.fromkeys(["loss", "accuracy", chosen_by])]
    return {name: measure(scores, targets) for name, _, measure in measured}


def _check_parts(scans: PooledScans) -> None:
    """Complain about what nothing can be learned or chosen from."""
    classes = {target for _, target, _ in scans.items(TRAIN)}
    for target, name in enumerate(BINARY_CLASSES):
        if target not in classes:
            raise ValueError(f"the training part has no scan of the class {name!r}")
    if not scans.items(VALIDATION):
        raise ValueError("the validation part is empty, so no epoch can be chosen")


def predict(
    model: nn.Module, scans: PooledScans, *, settings: Mapping[str, Any], fabric: Fabric
) -> np.ndarray:
    """Probabilities of the classes of every scan.

    Args:
        model: of ``train``.
        scans: in the order of the result.
        settings: with batch_scans.
        fabric: device and precision.

    Returns:
        float32, shape (scans, 2).
    """
    ordered = batches(scans.items(), settings["batch_scans"])
    return class_probabilities(model, ordered, fabric=fabric, logits=logits)


def logits(model: nn.Module, batch: EmbeddingBatch) -> Tensor:
    """Class scores of a batch, shape (scans, 2)."""
    return model(batch.features)


def batches(
    items: Sequence[tuple[Tensor, int, str]], batch_size: int, *, shuffle: bool = False
) -> DataLoader:
    """Batches of some scans.

    Args:
        items: of ``PooledScans.items``.
        batch_size: scans per batch.
        shuffle: order drawn anew for each epoch; else as given.
    """
    return DataLoader(items, batch_size=batch_size, shuffle=shuffle, collate_fn=_together)


def _together(items: Sequence[tuple[Tensor, int, str]]) -> EmbeddingBatch:
    """One batch of several scans."""
    features, targets, scan_ids = zip(*items, strict=True)
    return EmbeddingBatch(torch.stack(features), torch.tensor(targets), list(scan_ids))
