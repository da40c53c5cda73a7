"""RACNet: CNN, GRU, routing with a mask layer, dense layer (Kollias et al. 2024, 3.2 and 4.3).

Every slice goes through a CNN, the slice features of a scan in order through one GRU; the GRU
outputs are routed to ``positions`` places (700 in the paper, the longest scan), the Mask Layer
zeroes all other places, and a dense layer reads the whole of it (FACTS 2).

Everything here is *packed*: the slices of a batch lie one after another and nothing is padded.
This gives what padding to ``positions`` slices would give, for two reasons: the GRU runs one way,
so its outputs for the real slices cannot depend on padding behind them, and a place that the mask
zeroes adds nothing to the dense layer. One thing cannot be equal: in training, batch normalisation
takes its statistics over the slices it sees; padded, black slices would be counted among them,
packed they do not exist. In evaluation packed and padded are equal, and so they are in training
when all batch normalisation is frozen; ``padded_racnet`` holds the padded computation, for the
tests and the benchmark.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric, seed_everything
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Sampler

from lib.classification.imagenet import LITE0, PACKAGED_IMAGENET, SplitBackbone, efficientnet
from lib.classification.inputs import (
    ScanItem,
    ScanSlices,
    ScanViews,
    load_slices,
    pack,
    scan_logits,
    subsample_indices,
)
from lib.classification.task import Card, Task, Trained, fit_network
from lib.data.store import open_volume
from lib.training import SeededOrder
from lib.training import predict as class_probabilities

ROUTINGS = ("alignment", "first")
LARGEST_GREY = 255.0

VARIANTS = {
    # 4.3: "EfficientNetB0 ... global average pooling ... batch normalization ... dropout (keep
    # probability 0.8)", "GRU ... 128 units", "128 hidden units", "input length 't' was 700".
    "paper": {
        "backbone": "efficientnet_b0",
        "positions": 700,
        "recurrent_width": 128,
        "hidden_width": 128,
    },
    # The same architecture for the phantom on two CPU cores. Deviation: EfficientNet-Lite0, that is
    # B0 with ReLU6 and without squeeze-and-excitation, because its ImageNet weights install
    # offline, and because it is cheaper on a CPU.
    "small": {
        "backbone": LITE0,
        "backbone_weights": PACKAGED_IMAGENET,
        "positions": 32,
        "recurrent_width": 64,
        "hidden_width": 64,
        "freeze_batch_norm": True,
        "frozen_blocks": 5,
    },
}

CARD = Card(
    name="RACNet",
    source="Kollias et al. 2024, sections 3.2 and 4.3; FACTS 2",
    published="EfficientNet-B0 per slice, GRU over the slices, routing to 700 places with a mask "
    "layer, dense layer; cross entropy, Adam, batches of 5 scans",
    ours="no code is public: ImageNet start, ReLU, epochs, patience and schedule are assumed; "
    "weights of places not selected stand still, their moments included",
    parameters=16_020_734,
)


def routing_positions(length: int, positions: int, routing: str = "alignment") -> np.ndarray:
    """Places that the GRU outputs of one scan take in the input of the dense layer.

    ``"first"`` selects the first ``length`` places. ``"alignment"`` spreads them at equidistant
    intervals over [0, positions - 1], ends included; the paper gives no formula (FACTS 2).

    Args:
        length: number of slices of the scan.
        positions: number of places.
        routing: ``"alignment"`` or ``"first"``.

    Returns:
        Strictly increasing int64 places, shape (length,).

    Raises:
        ValueError: if the routing is unknown or the scan has more slices than there are places
            (choose among them with ``subsample_indices`` when loading).
    """
    if routing not in ROUTINGS:
        raise ValueError(f"routing is one of {ROUTINGS}, got {routing!r}")
    if not 1 <= length <= positions:
        raise ValueError(f"a scan needs 1 to {positions} slices here, got {length}")
    if routing == "first":
        return np.arange(length, dtype=np.int64)
    return subsample_indices(positions, length)


class RoutedDense(nn.Module):
    """Mask Layer and dense layer in one: a dense layer that sees only the selected places.

    The features are written to their places among ``positions`` rows of zeros, which are flattened
    for what would be ``nn.Linear(positions * width, hidden_width)``. For 5 scans this is a tenth of
    the work on a single slice, so nothing is gained by leaving out the zeros, while gathering the
    weights of each slice would take 64 KiB for each. The weights are kept as a table with one row
    per place, because a place that is not selected has gradient exactly 0: ``build_optimizers``
    gives the table to `SelectedRowsAdam`, which leaves weights and moments of places not selected
    as they are: "only the weights corresponding to the selected RNN outputs are
    updated, while the others remain constant until they are selected for another scan input" (3.2).
    Ordinary Adam would break this, since its moments keep moving a weight after its last gradient.

    Args:
        positions: number of places.
        width: size of the feature vector at one place.
        hidden_width: size of the output.
    """

    def __init__(self, *, positions: int, width: int, hidden_width: int) -> None:
        super().__init__()
        self.positions, self.width, self.hidden_width = positions, width, hidden_width
        self.table = nn.Parameter(torch.empty(positions, width * hidden_width))
        self.bias = nn.Parameter(torch.empty(hidden_width))
        bound = (positions * width) ** -0.5  # as nn.Linear(positions * width, hidden_width) draws
        nn.init.uniform_(self.table, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, features: Tensor, places: Tensor, lengths: Sequence[int]) -> Tensor:
        """Apply the layer.

        Args:
            features: of all scans, one after another, shape (total, width).
            places: int64 place of each feature vector, shape (total,).
            lengths: number of feature vectors of each scan.

        Returns:
            Shape (scans, hidden_width).
        """
        scan_of_slice = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
        routed = features.new_zeros(len(lengths), self.positions, self.width)
        routed[scan_of_slice.to(places.device), places] = features
        weights = self.table.view(self.positions * self.width, self.hidden_width)
        return routed.flatten(1) @ weights + self.bias


class RACNet(nn.Module):
    """Slices of several scans in, class scores per scan out.

    Args:
        backbone: CNN from (slices, 3, height, width) to pooled features (slices, feature_width).
        feature_width: size of the backbone's features.
        positions: number of places of the routing, the largest number of slices of a scan.
        recurrent_width: GRU units.
        hidden_width: units of the dense layer. Its activation is ReLU (assumed, FACTS 9.8).
        classes: number of classes.
        dropout: probability of dropping a slice feature.
        routing: see ``routing_positions``.
        mean: of each colour channel on the scale 0 to 1, subtracted inside.
        deviation: of each colour channel on that scale, divided by inside.
        slices_per_chunk: send at most so many slices at a time, in chunks of nearly equal size,
            through the backbone and recompute them in the backward pass, which bounds memory: of
            EfficientNet-B0 110 MiB per slice of 256 x 256 in single precision, so 375 GiB for 5
            scans of 700 slices at once and 7 GiB in chunks of 64. None sends all at once. While it
            trains, batch normalisation then takes its statistics per chunk.
        freeze_batch_norm: keep the backbone's batch normalisation at its stored statistics in
            training as well: right for pre-trained weights and few scans, and faster.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        feature_width: int,
        positions: int = 700,
        recurrent_width: int = 128,
        hidden_width: int = 128,
        classes: int = 2,
        dropout: float = 0.2,
        routing: str = "alignment",
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        deviation: Sequence[float] = IMAGENET_DEFAULT_STD,
        slices_per_chunk: int | None = None,
        freeze_batch_norm: bool = False,
    ) -> None:
        super().__init__()
        routing_positions(1, positions, routing)  # complain now about what cannot work
        self.positions, self.routing = positions, routing
        self.slices_per_chunk, self.freeze_batch_norm = slices_per_chunk, freeze_batch_norm
        self.backbone = backbone
        self.normalisation = nn.BatchNorm1d(feature_width)
        self.dropout = nn.Dropout(dropout)
        self.recurrent = nn.GRU(feature_width, recurrent_width)
        self.dense = RoutedDense(
            positions=positions, width=recurrent_width, hidden_width=hidden_width
        )
        self.output = nn.Linear(hidden_width, classes)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer(
            "deviation", torch.tensor(deviation).view(1, 3, 1, 1), persistent=False
        )

    def train(self, mode: bool = True) -> "RACNet":
        """Set training or evaluation mode, the backbone's statistics staying frozen if asked."""
        super().train(mode)
        if self.freeze_batch_norm:
            for layer in _batch_norms(self.backbone):
                layer.eval()
        return self

    def forward(self, slices: Tensor, lengths: Sequence[int]) -> Tensor:
        """Class scores of each scan.

        Args:
            slices: uint8, scans one after another, shape (total slices, 1 or 3, height, width), or
                their features behind the frozen stages (``frozen_features``).
            lengths: number of slices of each scan, each 1 to ``positions``; sums to total slices.

        Returns:
            Logits, shape (scans, classes); their softmax is the paper's output.

        Raises:
            ValueError: if slices and lengths disagree or a scan is too long.
        """
        lengths = [int(length) for length in lengths]
        if sum(lengths) != len(slices):
            raise ValueError(f"{len(slices)} slices, but the lengths sum to {sum(lengths)}")
        places = np.concatenate(
            [routing_positions(length, self.positions, self.routing) for length in lengths]
        )
        # 3-D analysis: each slice alone, then the slices of each scan in order.
        features = self.dropout(self._normalised(self.slice_features(slices)))
        outputs = run_packed(self.recurrent, features, lengths)  # (total, recurrent)
        # Routing and mask: only the selected places exist. Then the classification.
        hidden = self.dense(outputs, torch.from_numpy(places).to(slices.device), lengths)
        return self.output(torch.relu(hidden))  # (scans, classes)

    def slice_features(self, slices: Tensor) -> Tensor:
        """Pooled backbone features of each slice.

        Args:
            slices: uint8, shape (slices, 1 or 3, height, width), or ``frozen_features`` of them.

        Returns:
            Shape (slices, feature_width).
        """
        if self.slices_per_chunk is None:
            return self._chunk_features(slices)
        run = self._chunk_features
        if torch.is_grad_enabled():
            run = partial(
                checkpoint, run, use_reentrant=False, context_fn=self._checkpoint_contexts
            )
        chunks = math.ceil(len(slices) / self.slices_per_chunk)  # no short one at the end
        return torch.cat([run(chunk) for chunk in slices.tensor_split(chunks)])

    def _normalised(self, features: Tensor) -> Tensor:
        """Normalised features; one slice alone has no statistics but the running ones."""
        layer = self.normalisation
        if layer.training and len(features) > 1:
            return layer(features)
        return nn.functional.batch_norm(
            features,
            layer.running_mean,
            layer.running_var,
            layer.weight,
            layer.bias,
            eps=layer.eps,
        )

    def _chunk_features(self, slices: Tensor) -> Tensor:
        """Pooled features of slices that go through the backbone together."""
        if slices.is_floating_point():
            return self.backbone.rest(slices)
        return self.backbone(self._colour(slices))

    def _colour(self, slices: Tensor) -> Tensor:
        """Grey slices as the backbone takes them."""
        colour = slices.expand(-1, 3, -1, -1).float() / LARGEST_GREY
        return (colour - self.mean) / self.deviation

    @torch.no_grad()
    def frozen_features(self, slices: np.ndarray) -> np.ndarray:
        """What the frozen stages make of the slices of a scan: the same in every epoch.

        Args:
            slices: uint8, shape (slices, height, width).

        Returns:
            float32, shape (slices, channels, rows, columns).
        """
        pictures = torch.from_numpy(slices[:, None]).to(self.mean.device)
        return self.backbone.front(self._colour(pictures)).float().cpu().contiguous().numpy()

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Contexts of the first run and of the recomputation of a chunk."""
        return nullcontext(), unchanged_statistics(self.backbone)


def run_packed(recurrent: nn.GRU, features: Tensor, lengths: Sequence[int]) -> Tensor:
    """Outputs of a GRU at every step of several sequences, from zero initial states.

    Args:
        recurrent: the GRU.
        features: sequences one after another, shape (total, input size).
        lengths: length of each sequence.

    Returns:
        Shape (total, hidden size), same order.
    """
    outputs, _ = recurrent(pack_sequence(features.split(list(lengths)), enforce_sorted=False))
    return torch.cat(unpack_sequence(outputs))


@contextmanager
def unchanged_statistics(module: nn.Module) -> Iterator[None]:
    """Within it, batch normalisation in training mode does not move its running statistics.

    A recomputed forward pass sees the same slices again and must not count them twice.

    Args:
        module: the module whose batch-norm layers are held.
    """
    layers = _batch_norms(module)
    kept = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer in layers:
        layer.momentum, layer.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for layer, (momentum, batches) in zip(layers, kept, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, batches


def _batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """All batch-norm layers of a module."""
    kind = nn.modules.batchnorm._BatchNorm
    return [layer for layer in module.modules() if isinstance(layer, kind)]


def build(
    *,
    backbone: str = "efficientnet_b0",
    backbone_weights: str | Path | None = None,
    frozen_blocks: int = 0,
    **numbers: object,
) -> RACNet:
    """Build a RACNet on a network of timm: ``build(**VARIANTS["paper"])``.

    Args:
        backbone: timm's name of the CNN.
        backbone_weights: see ``imagenet.efficientnet`` (the paper says nothing of pre-training).
        frozen_blocks: see there; asks for ``freeze_batch_norm`` as well.
        numbers: other arguments of ``RACNet``.

    Returns:
        The network, in training mode.

    Raises:
        ValueError: if the weights do not exist for this backbone, or frozen stages would get moving
            batch-norm statistics.
    """
    if frozen_blocks and not numbers.get("freeze_batch_norm"):
        raise ValueError("frozen_blocks needs freeze_batch_norm=True")
    network = efficientnet(backbone, weights=backbone_weights, frozen_blocks=frozen_blocks)
    split = SplitBackbone(network, frozen_blocks=frozen_blocks) if frozen_blocks else network
    return RACNet(
        backbone=split,
        feature_width=network.num_features,
        mean=network.default_cfg["mean"],
        deviation=network.default_cfg["std"],
        **numbers,
    ).train()


class SelectedRowsAdam(torch.optim.Adam):
    """Adam that leaves rows without gradient as they are, and their moments, to the last bit.

    ``torch.optim.SparseAdam`` takes the same steps, but for one on the table of the published size
    it needs 2.6 s and 1.5 GiB on a CPU.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step; rows of a weight are its first axis.

        Args:
            closure: see ``torch.optim.Adam``; gradients must be there before it is called.
        """
        kept = [
            (values, rest, values[rest])
            for group in self.param_groups
            for weights in group["params"]
            if weights.grad is not None
            for rest in [~weights.grad.flatten(1).any(dim=1)]
            for values in (weights, *self._moments(weights))
        ]
        result = super().step(closure)
        for values, rest, before in kept:
            values[rest] = before
        return result

    def _moments(self, weights: Tensor) -> list[Tensor]:
        """Both moments of a weight; none before the first step, where they are 0 anyway."""
        state = self.state.get(weights, {})
        return [state[name] for name in ("exp_avg", "exp_avg_sq") if name in state]


def build_optimizers(
    model: RACNet, *, learning_rate: float, head_learning_rate: float | None = None
) -> list[torch.optim.Optimizer]:
    """Adam for all weights but the table of the dense layer, `SelectedRowsAdam` for that table.

    No weight decay: it would move weights of places that are not selected. Adam corrects its
    moments by the number of all steps, not of a row's own, so the first steps of a row that is
    selected late are up to about three times longer.

    Args:
        model: the network.
        learning_rate: 1e-4 in the paper.
        head_learning_rate: of everything behind the backbone; None uses ``learning_rate``.

    Returns:
        The two optimizers; step both after each backward pass.
    """
    rate = head_learning_rate or learning_rate
    table = model.dense.table
    backbone = [weight for weight in model.backbone.parameters() if weight.requires_grad]
    theirs = {id(weight) for weight in (*model.backbone.parameters(), table)}
    head = [weight for weight in model.parameters() if id(weight) not in theirs]
    groups = [{"params": backbone, "lr": learning_rate}, {"params": head, "lr": rate}]
    return [torch.optim.Adam(groups), SelectedRowsAdam([table], lr=rate)]


def train(task: Task) -> Trained:
    """Train RACNet on a task (4.3: cross entropy, Adam, batches of 5 scans).

    Deviation, in ``small`` only: random views (mirrored, a fifth of the slices left out). No
    augmentation is published, but 40 scans are learned by heart without it.

    Args:
        task: settings are image_size, batch_scans, learning_rate, head_learning_rate, mirrored,
            left_out, slices_per_chunk, loader_processes, cache_slices, and those of
            ``fit_network``.
    """
    settings = task.settings
    seed_everything(task.seed, verbose=False)
    model = build(**task.variant, slices_per_chunk=settings["slices_per_chunk"])
    rates = {name: settings[name] for name in ("learning_rate", "head_learning_rate")}
    views = {name: settings[name] for name in ("mirrored", "left_out")}
    prepare = model.frozen_features if task.variant.get("frozen_blocks") else None
    learned_from = ScanViews(_slices(task.train, model, settings), prepare=prepare, **views)
    judged = ScanViews(_slices(task.validation, model, settings), prepare=prepare)
    history = fit_network(
        task,
        model,
        train_batches=_batches(learned_from, settings, sampler=SeededOrder(len(learned_from))),
        validation_batches=_batches(judged, settings),
        logits=scan_logits,
        optimizers=build_optimizers(model, **rates),
    )
    return Trained(model, {CARD.name: history})


def predict(
    model: RACNet, scans: Sequence[ScanItem], *, settings: Mapping[str, Any], fabric: Fabric
) -> np.ndarray:
    """Probabilities of each scan (see `task`)."""
    batches = _batches(_slices(scans, model, settings), settings)
    return class_probabilities(model, batches, fabric=fabric, logits=scan_logits)


def shown(scan: ScanItem, settings: Mapping[str, Any]) -> np.ndarray:
    """What the network sees of a scan: slices in the lung window, masked and resized.

    Args:
        scan: the scan.
        settings: with image_size.

    Returns:
        uint8, shape (slices, image_size, image_size).
    """
    mask = None if scan.mask is None else open_volume(scan.mask)
    return load_slices(open_volume(scan.volume), mask, size=settings["image_size"])


def _slices(scans: Sequence[ScanItem], model: RACNet, settings: Mapping[str, Any]) -> ScanSlices:
    """Slices of scans; those with more slices than there are places are thinned."""
    return ScanSlices(
        scans,
        size=settings["image_size"],
        limit=model.positions,
        cache=settings["cache_slices"],
    )


def _batches(
    scans: ScanSlices | ScanViews, settings: Mapping[str, Any], *, sampler: Sampler | None = None
) -> DataLoader:
    """Packed batches of scans."""
    return DataLoader(
        scans,
        batch_size=settings["batch_scans"],
        sampler=sampler,
        collate_fn=pack,
        num_workers=settings["loader_processes"],
    )
