"""The search space of CovidNet3D and EMARS: 3-D mobile cells, each with a choice of operations.

A network is a stem, a sequence of cells and a head. A cell brings its input to its width and stride
by a 1x1x1 *calibration* convolution and applies one of nine candidate operations; cells that keep
width and stride add their input to the result (FACTS 6.5, read there from public code). An
*architecture* is a list of operation names, one per cell. `CellNetwork` holds, for each cell, any
set of candidates: one each is a network of a given architecture, all of them is the supernet whose
weights every architecture of the space shares during a search.

Our reading, where nothing is published: the residual goes around calibration and operation; the
operation ``zero`` then makes the cell hand on its input unchanged, and is no candidate in cells
without a residual, which it would cut through.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lib.classification.inputs import ScanItem, load_slices
from lib.classification.resampled_volumes import resampled, standardised
from lib.classification.task import Task, fit_network
from lib.classification.volumes import (
    ScanVolumes,
    plain_batches,
    random_batches,
    volume_logits,
)
from lib.data.store import open_volume
from lib.training import Loss, Row
from lib.training import predict as class_probabilities

MBCONVS = {  # kernel size and expansion of the inverted residual blocks
    "k3e3": (3, 3),
    "k3e4": (3, 4),
    "k3e6": (3, 6),
    "k5e3": (5, 3),
    "k5e4": (5, 4),
    "k7e3": (7, 3),
    "k7e4": (7, 4),
}
IDENTITY, ZERO = "identity", "zero"
OPERATIONS = (*MBCONVS, IDENTITY, ZERO)

Architecture = Sequence[str]


class CellShape(NamedTuple):
    """Widths and stride of one cell.

    Attributes:
        in_width: channels of its input.
        width: channels of its result.
        stride: along all three axes.
    """

    in_width: int
    width: int
    stride: int

    @property
    def residual(self) -> bool:
        """Whether the cell adds its input to its result."""
        return self.in_width == self.width and self.stride == 1

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of the operations that the cell may hold."""
        return OPERATIONS if self.residual else OPERATIONS[: OPERATIONS.index(ZERO)]


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """The numbers that all networks of a space share.

    Attributes:
        stem_width: channels of the stem's convolution.
        first_width: channels that the stem gives to the first cell.
        widths: channels of each stage.
        cells: number of cells of each stage.
        strides: of each stage; width and stride change in its first cell.
        head_width: channels of the last convolution.
        dropout: probability of dropping a pooled feature.
        classes: number of classes.
    """

    stem_width: int
    first_width: int
    widths: Sequence[int]
    cells: Sequence[int]
    strides: Sequence[int]
    head_width: int
    dropout: float
    classes: int = 2

    @property
    def shapes(self) -> list[CellShape]:
        """The cells of all stages, in order."""
        shapes = []
        stages = zip(
            pairwise((self.first_width, *self.widths)), self.cells, self.strides, strict=True
        )
        for (in_width, width), number, stride in stages:
            shapes.append(CellShape(in_width, width, stride))
            shapes += [CellShape(width, width, 1)] * (number - 1)
        return shapes

    def network(self, architecture: Architecture) -> "CellNetwork":
        """A network of one architecture, with random weights.

        Raises:
            ValueError: if the architecture does not fit the cells.
        """
        return CellNetwork(self, [(name,) for name in architecture])

    def supernet(self) -> "CellNetwork":
        """The network that holds every candidate of every cell, with random weights."""
        candidates = [shape.candidates for shape in self.shapes]
        return CellNetwork(self, candidates, batch_statistics=True)


def normalisation(width: int, *, batch_statistics: bool) -> nn.BatchNorm3d:
    """Batch normalisation with the published numbers (FACTS 6.5).

    Args:
        width: channels.
        batch_statistics: always take the statistics of the batch, in evaluation as well, and keep
            none. In a supernet a layer meets the outputs of ever other cells, so that no running
            average fits any one architecture.
    """
    return nn.BatchNorm3d(width, eps=1e-3, momentum=0.1, track_running_stats=not batch_statistics)


def mbconv(
    in_width: int, width: int, *, kernel: int, expansion: int, batch_statistics: bool = False
) -> nn.Sequential:
    """Inverted residual block without its residual: widen, convolve each channel, narrow.

    Args:
        in_width: channels of the input.
        width: channels of the result.
        kernel: size of the depthwise convolution along all three axes, odd.
        expansion: factor of the widening; 1 leaves that step out.
        batch_statistics: see `normalisation`.
    """
    norm = partial(normalisation, batch_statistics=batch_statistics)
    inner = in_width * expansion
    layers = []
    if expansion > 1:
        layers += [nn.Conv3d(in_width, inner, 1, bias=False), norm(inner), nn.ReLU6()]
    depthwise = nn.Conv3d(inner, inner, kernel, padding=kernel // 2, groups=inner, bias=False)
    layers += [depthwise, norm(inner), nn.ReLU6()]
    return nn.Sequential(*layers, nn.Conv3d(inner, width, 1, bias=False), norm(width))


class Cell(nn.Module):
    """Calibration convolution, then one of several candidate operations.

    Args:
        shape: widths and stride.
        candidates: names of the operations that it holds.
        batch_statistics: see `normalisation`.

    Raises:
        ValueError: if the cell cannot hold one of them.
    """

    def __init__(
        self, shape: CellShape, candidates: Sequence[str], *, batch_statistics: bool = False
    ) -> None:
        super().__init__()
        self.residual = shape.residual
        for name in candidates:
            if name not in shape.candidates:
                raise ValueError(
                    f"a cell from {shape.in_width} to {shape.width} channels with stride "
                    f"{shape.stride} holds one of {', '.join(shape.candidates)}, got {name!r}"
                )
        self.operations = nn.ModuleDict()
        for name in candidates:
            if name in MBCONVS:
                kernel, expansion = MBCONVS[name]
                self.operations[name] = mbconv(
                    shape.width,
                    shape.width,
                    kernel=kernel,
                    expansion=expansion,
                    batch_statistics=batch_statistics,
                )
            elif name == IDENTITY:
                self.operations[name] = nn.Identity()
        # "Calibration": plain, with bias. A cell that can only be zero has no use for it.
        if self.operations:
            self.calibration = nn.Conv3d(shape.in_width, shape.width, 1, stride=shape.stride)

    def forward(self, features: Tensor, name: str, gate: Tensor | None = None) -> Tensor:
        """Apply the operation of that name.

        Args:
            features: shape (scans, in_width, depth, height, width).
            name: one of the candidates.
            gate: scalar factor of the operation's result, through which a search learns.
        """
        if name == ZERO:
            return features
        result = self.operations[name](self.calibration(features))
        if gate is not None:
            result = result * gate
        return features + result if self.residual else result


class CellNetwork(nn.Module):
    """Stem, cells, head.

    Args:
        space: numbers of the parts.
        candidates: names of the operations that each cell holds.
        batch_statistics: see `normalisation`.

    Raises:
        ValueError: if there is not one set of candidates per cell, or one does not fit.
    """

    def __init__(
        self,
        space: SearchSpace,
        candidates: Sequence[Sequence[str]],
        *,
        batch_statistics: bool = False,
    ) -> None:
        super().__init__()
        shapes = space.shapes
        if len(candidates) != len(shapes):
            raise ValueError(
                f"an architecture names one operation for each of the {len(shapes)} cells, "
                f"got {len(candidates)}"
            )
        self.candidates = tuple(tuple(names) for names in candidates)
        norm = partial(normalisation, batch_statistics=batch_statistics)
        self.stem = nn.Sequential(
            nn.Conv3d(1, space.stem_width, 3, stride=2, padding=1, bias=False),
            norm(space.stem_width),
            nn.ReLU6(),
            *mbconv(
                space.stem_width,
                space.first_width,
                kernel=3,
                expansion=1,
                batch_statistics=batch_statistics,
            ),
        )
        self.cells = nn.ModuleList(
            Cell(shape, names, batch_statistics=batch_statistics)
            for shape, names in zip(shapes, candidates, strict=True)
        )
        self.head = nn.Sequential(
            nn.Conv3d(space.widths[-1], space.head_width, 1, bias=False),
            norm(space.head_width),
            nn.ReLU6(),
        )
        self.dropout = nn.Dropout(space.dropout)
        self.output = nn.Linear(space.head_width, space.classes)

    def forward(
        self,
        volumes: Tensor,
        architecture: Architecture | None = None,
        gates: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Class scores of each scan.

        Args:
            volumes: float, shape (scans, 1, depth, height, width).
            architecture: the operation of each cell; None where each cell holds only one.
            gates: see `Cell.forward`, one per cell.

        Returns:
            Logits, shape (scans, classes).

        Raises:
            ValueError: if the network leaves a choice and no architecture is given.
        """
        if architecture is None:
            architecture = self.only_architecture()
        features = self.stem(volumes)
        for place, (cell, name) in enumerate(zip(self.cells, architecture, strict=True)):
            features = cell(features, name, None if gates is None else gates[place])
        pooled = self.head(features).mean((2, 3, 4))  # (scans, head_width)
        return self.output(self.dropout(pooled))

    def only_architecture(self) -> list[str]:
        """The architecture of a network without choices.

        Raises:
            ValueError: if there is a choice.
        """
        if any(len(names) != 1 for names in self.candidates):
            raise ValueError("a supernet needs an architecture: its cells hold several operations")
        return [name for (name,) in self.candidates]


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(weights.numel() for weights in module.parameters())


def architecture_parameters(supernet: CellNetwork, architecture: Architecture) -> int:
    """Number of parameters that a network of an architecture has, without building it.

    Args:
        supernet: of the space.
        architecture: name of each cell's operation.
    """
    total = parameters(supernet) - parameters(supernet.cells)
    for cell, name in zip(supernet.cells, architecture, strict=True):
        if name != ZERO:
            total += parameters(cell.calibration) + parameters(cell.operations[name])
    return total


def random_architecture(supernet: CellNetwork) -> list[str]:
    """An architecture of the space, each cell's operation drawn evenly by PyTorch's generator."""
    return [names[int(torch.randint(len(names), ()))] for names in supernet.candidates]


# ------------------------------------------------------------------- scans as input, and retraining


def build(*, architecture: Architecture, **numbers: Any) -> CellNetwork:
    """A network of one architecture: ``build(**VARIANTS["paper"])``.

    Args:
        architecture: name of each cell's operation.
        numbers: of `SearchSpace`.
    """
    return SearchSpace(**numbers).network(architecture)


def load_centre(scan: ScanItem, *, size: int) -> np.ndarray:
    """All slices of a scan in the lung window, resized to 5/4 of a size and cut to their centre.

    The public code of CovidNet3D means this but cuts the lower right quarter instead of the centre,
    and clips no Hounsfield units (FACTS 6.5); neither is followed.

    Args:
        scan: the scan.
        size: height and width of the result in pixels.

    Returns:
        uint8, shape (slices, size, size); black outside the lung mask.
    """
    mask = None if scan.mask is None else open_volume(scan.mask)
    slices = load_slices(open_volume(scan.volume), mask, size=size * 5 // 4)
    start = (slices.shape[1] - size) // 2
    return np.ascontiguousarray(slices[:, start : start + size, start : start + size])


def standardised_foreground(volume: np.ndarray) -> np.ndarray:
    """Volume whose voxels that are not black have mean 0 and deviation 1; black becomes 0.

    Neither paper states a normalisation. Over the whole volume, as HKBU's baselines do it (FACTS
    6.4), the edge between lung and black outweighs what is inside the lungs: on the phantom the
    same network then needs several times as many epochs.

    Args:
        volume: uint8, any shape.

    Returns:
        float32, same shape.
    """
    seen = volume > 0
    found = np.zeros(volume.shape, np.float32)
    if seen.any():
        found[seen] = standardised(volume[seen])
    return found


def volume_view(
    volume: np.ndarray, generator: np.random.Generator | None, *, slices: int
) -> Tensor:
    """What the network sees of a loaded scan: a fixed number of slices, standardised.

    Args:
        volume: shape (slices there are, size, size).
        generator: for a random choice of slices and random flips of all axes; None for the plain
            view.
        slices: number wanted.

    Returns:
        float32, shape (1, slices, size, size).
    """
    chosen = resampled(volume, generator, slices=slices)
    return torch.from_numpy(standardised_foreground(chosen)[None])


def scan_volumes(
    scans: Sequence[ScanItem], settings: Mapping[str, Any], *, cache: bool = False
) -> ScanVolumes:
    """Scans as volumes of fixed size; random views choose slices and flip axes.

    Args:
        scans: what to read.
        settings: slices, image_size.
        cache: see `ScanVolumes`.
    """
    return ScanVolumes(
        scans,
        load=partial(load_centre, size=settings["image_size"]),
        view=partial(volume_view, slices=settings["slices"]),
        cache=cache,
    )


def learning_batches(scans: Sequence[ScanItem], settings: Mapping[str, Any]) -> DataLoader:
    """Random views in random order.

    Args:
        scans: to learn from.
        settings: slices, image_size, batch_scans, rounds, cache_volumes, loader_processes.
    """
    return random_batches(
        scan_volumes(scans, settings, cache=settings["cache_volumes"]),
        batch_size=settings["batch_scans"],
        rounds=settings["rounds"],
        processes=settings["loader_processes"],
    )


def judging_batches(
    scans: Sequence[ScanItem], settings: Mapping[str, Any], *, cache: bool = False
) -> DataLoader:
    """Plain views in the given order, in batches of nearly equal size.

    A supernet normalises by the statistics of a batch, so no scan should be left by itself.

    Args:
        scans: to be judged.
        settings: as for `learning_batches`.
        cache: keep the scans in memory.
    """
    batches = max(1, -(-len(scans) // settings["batch_scans"]))
    return plain_batches(
        scan_volumes(scans, settings, cache=cache),
        batch_size=max(1, -(-len(scans) // batches)),
        processes=settings["loader_processes"],
    )


def search_task(task: Task) -> Task:
    """The search as a task of its own, so that it is repeated only where it itself changes.

    Args:
        task: of the classifier; its settings hold those of the search under ``search``.

    Returns:
        The same scans with the search's settings, without an architecture, in a folder of its own.
    """
    shared = {name: task.settings[name] for name in ("loader_processes", "cache_volumes")}
    return replace(
        task,
        settings=shared | dict(task.settings["search"]),
        variant={name: value for name, value in task.variant.items() if name != "architecture"},
        folder=task.folder / "search",
    )


def adam(module: nn.Module, settings: Mapping[str, Any]) -> torch.optim.Adam:
    """Adam with the published weight decay (FACTS 6.5, 6.6).

    Args:
        module: its parameters are optimised.
        settings: learning_rate, weight_decay.
    """
    return torch.optim.Adam(
        module.parameters(),
        lr=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        fused=True,  # the same update, faster for many small tensors
    )


def retrain(
    task: Task, architecture: Architecture, *, loss: Loss | None = None
) -> tuple[CellNetwork, list[Row]]:
    """Train the network of a found architecture from the start.

    Args:
        task: of the classifier.
        architecture: what its search found.
        loss: see `fit_network`.

    Returns:
        The network with the weights of its best epoch, and the learning curve.
    """
    settings = {name: value for name, value in task.settings.items() if name != "search"}
    variant = {**task.variant, "architecture": list(architecture)}
    task = replace(task, settings=settings, variant=variant, folder=task.folder / "retraining")
    seed_everything(task.seed, verbose=False)  # the same start whether or not the search ran now
    model = build(**variant)
    history = fit_network(
        task,
        model,
        train_batches=learning_batches(task.train, settings),
        validation_batches=judging_batches(
            task.validation, settings, cache=settings["cache_volumes"]
        ),
        logits=volume_logits,
        optimizers=[adam(model, settings)],
        loss=loss,
    )
    return model, history


def predict(
    model: CellNetwork, scans: Sequence[ScanItem], *, settings: Mapping[str, Any], fabric: Fabric
) -> np.ndarray:
    """Probabilities of each scan (see `task`) by a network without choices."""
    batches = judging_batches(scans, settings)
    return class_probabilities(model, batches, fabric=fabric, logits=volume_logits)


def shown(scan: ScanItem, settings: Mapping[str, Any]) -> np.ndarray:
    """What the network sees of a scan, before its volume is standardised.

    Args:
        scan: the scan.
        settings: slices, image_size.

    Returns:
        uint8, shape (slices, image_size, image_size).
    """
    volume = load_centre(scan, size=settings["image_size"])
    return resampled(volume, None, slices=settings["slices"])
