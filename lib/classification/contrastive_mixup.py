"""Contrastive mixup classification, what both entries of FDVTS share (CMC v1 and CMC v2).

Every scan is seen in two random views. Scans are mixed in pairs (mixup, cutmix); one network gives
class scores and embeddings of the mixed views; cross entropy and supervised contrastive loss are
added with learned weights. Source: Hou et al. 2021 (CMC-COV19D), Hou et al. 2022 (CMC v2);
FACTS 6.2. Volumes have the axes (scans, views, depth, height, width).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2 import CutMix, MixUp
from torchvision.transforms.v2.functional import resized_crop
from torchvision.tv_tensors import Video

from lib.classification.inputs import BINARY_CLASSES, ScanItem, resize_slice
from lib.classification.task import Task
from lib.classification.volumes import (
    ScanVolumes,
    View,
    VolumeBatch,
    fit_volumes,
    predict_volumes,
    slices_and_lungs,
)
from lib.data.scan import to_grey
from lib.training import Row

GREY_MEAN, GREY_DEVIATION = 0.3529, 0.2983  # of the published volumes on the scale 0 to 1
LARGEST_GREY = 255.0
CROPPED_AREA, CROPPED_RATIO = (0.7, 1.0), (3 / 4, 4 / 3)
CONTRAST, BRIGHTNESS = (0.8, 1.2), (-0.1, 0.1)  # the latter on 0 to 255, as released
TRAINING_VIEWS = 2
TEST_VIEW_SEED = 0  # every scan is judged on the same random crops
MIXERS = {"mixup": MixUp, "cutmix": CutMix}


class Mixed(NamedTuple):
    """Views of scans, each mixed with those of the scan before it in the batch.

    Attributes:
        volumes: shape (scans, views, depth, height, width).
        targets: class of each scan.
        partners: class of the scan that was mixed into it.
        share: of the scan itself in the mixture, 0 to 1; the partner has the rest.
    """

    volumes: Tensor
    targets: Tensor
    partners: Tensor
    share: float

    def loss(self, of_targets: Callable[[Tensor], Tensor]) -> Tensor:
        """Mean of a loss under the targets and under the partners', weighted by their shares."""
        own, partner = of_targets(self.targets), of_targets(self.partners)
        return self.share * own + (1 - self.share) * partner


def mix(volumes: Tensor, targets: Tensor, *, mixers: Mapping[str, float]) -> Mixed:
    """Mix the scans of a batch in pairs by torchvision's MixUp or CutMix.

    All scans and views share one mixture; cutmix exchanges one rectangle of all slices.

    Args:
        volumes: shape (scans, views, depth, height, width), scans in random order.
        targets: int64, shape (scans,).
        mixers: of `MIXERS`, each with the parameter of its Beta distribution; one is drawn.

    Returns:
        The mixed views.

    Raises:
        ValueError: if a mixer is unknown.
    """
    for name in mixers:
        if name not in MIXERS:
            raise ValueError(f"a mixer is one of {tuple(MIXERS)}, got {name!r}")
    name = list(mixers)[int(torch.randint(len(mixers), ()))]
    # The identity as soft labels comes back as the mixture itself.
    identity = torch.eye(len(volumes), device=volumes.device)
    mixed, mixture = MIXERS[name](alpha=mixers[name])(Video(volumes), identity)
    return Mixed(mixed.as_subclass(Tensor), targets, targets.roll(1), float(mixture[0, 0]))


def supervised_contrastive_loss(
    embeddings: Tensor, targets: Tensor, *, temperature: float = 0.1
) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, equation 2, the sum outside the logarithm).

    Every view is an anchor; its positives are all other views of scans of the same class.

    Args:
        embeddings: of unit length, shape (scans, views, width), at least two views.
        targets: class of each scan, shape (scans,).
        temperature: divides the cosine similarities.

    Returns:
        The mean over all anchors, a scalar.

    Raises:
        ValueError: if there is one view only, so that a scan could be without a positive.
    """
    scans, views, _ = embeddings.shape
    if views < 2:
        raise ValueError(f"the contrastive loss needs two views of each scan, got {views}")
    anchors = embeddings.flatten(0, 1).float()
    classes = targets.repeat_interleave(views)
    itself = torch.eye(scans * views, dtype=torch.bool, device=anchors.device)
    similarity = (anchors @ anchors.T / temperature).masked_fill(itself, -torch.inf)
    log_share = similarity.log_softmax(1).masked_fill(itself, 0)
    positive = (classes[:, None] == classes) & ~itself
    return -((log_share * positive).sum(1) / positive.sum(1)).mean()


class ContrastiveNetwork(nn.Module):
    """Encoder of volumes with a classifier and a projection head.

    Args:
        encoder: from (volumes, depth, height, width) to features (volumes, feature_width).
        feature_width: size of its features.
        projection_width: size of the embeddings; the hidden layer is as wide as the features.
        classes: number of classes.
    """

    def __init__(
        self,
        *,
        encoder: nn.Module,
        feature_width: int,
        projection_width: int = 128,
        classes: int = len(BINARY_CLASSES),
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(feature_width, classes)
        self.projection = nn.Sequential(
            nn.Linear(feature_width, feature_width),
            nn.ReLU(),
            nn.Linear(feature_width, projection_width),
        )
        # s of exp(-s) * loss + s, for the contrastive loss and for the cross entropy
        self.log_weights = nn.Parameter(torch.ones(2))

    def forward(self, volumes: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores and embeddings of views.

        Args:
            volumes: shape (scans, views, depth, height, width).

        Returns:
            Logits (scans, views, classes), and embeddings of unit length (scans, views, width).
        """
        features = self.encoder(volumes.flatten(0, 1))  # (scans * views, feature_width)
        features = features.unflatten(0, volumes.shape[:2])
        embeddings = functional.normalize(self.projection(features), dim=-1)
        return self.classifier(features), embeddings


def joint_loss(
    model: nn.Module, batch: VolumeBatch, *, mixers: Mapping[str, float], temperature: float
) -> Tensor:
    """Contrastive loss and cross entropy of mixed views, under their learned weights.

    Two deviations from the released program (FACTS 6.2). Its cross entropy takes probabilities for
    scores, a second softmax that flattens the gradient: not done here. Its mixup file has lost the
    line of the contrastive loss; here both losses are linear in the targets of a mixture, as mixup
    is.

    Args:
        model: a `ContrastiveNetwork`.
        batch: volumes of shape (scans, 2, depth, height, width).
        mixers: see `mix`.
        temperature: of the contrastive loss.
    """
    mixed = mix(batch.volumes, batch.targets, mixers=mixers)
    scores, embeddings = model(mixed.volumes)
    views = scores.shape[1]
    contrast = mixed.loss(
        lambda targets: supervised_contrastive_loss(embeddings, targets, temperature=temperature)
    )
    entropy = mixed.loss(
        lambda targets: functional.cross_entropy(
            scores.flatten(0, 1), targets.repeat_interleave(views)
        )
    )
    weights = model.log_weights
    return (torch.exp(-weights) * torch.stack([contrast, entropy]) + weights).sum()


def view_logits(model: nn.Module, batch: VolumeBatch) -> Tensor:
    """Scores of scans whose softmax is the mean of the probabilities of their views.

    Args:
        model: a `ContrastiveNetwork`.
        batch: volumes of shape (scans, views, depth, height, width).

    Returns:
        Shape (scans, classes).
    """
    scores, _ = model(batch.volumes)
    return scores.float().log_softmax(-1).logsumexp(1)


def load_volume(scan: ScanItem, *, depth: int, size: int) -> np.ndarray:
    """A scan as a volume of fixed size: lung window, black outside the lungs, cut to their box.

    The published volumes are of masked lungs; the program that made them was not released. Cutting
    them to the box of all lungs is ours, for small volumes keep more of a lesion then.

    Args:
        scan: what to read; without a mask, or where it is empty, nothing is cut.
        depth: number of slices of the result, see `resample_depth`.
        size: height and width of the result in pixels.

    Returns:
        uint8, shape (depth, size, size).
    """
    slices, lungs = map(np.stack, zip(*slices_and_lungs(scan), strict=True))
    box = bounding_box(lungs)
    grey = to_grey(slices[box]) * lungs[box]
    return resample_depth(np.stack([resize_slice(part, size) for part in grey]), depth)


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds all of a mask; the whole of an empty one.

    Args:
        mask: bool, any number of axes.

    Returns:
        One slice per axis.
    """
    places = [
        np.flatnonzero(mask.any(axis=tuple({*range(mask.ndim)} - {axis})))
        for axis in range(mask.ndim)
    ]
    if not len(places[0]):
        return (slice(None),) * mask.ndim
    return tuple(slice(int(found[0]), int(found[-1]) + 1) for found in places)


def resample_depth(slices: np.ndarray, depth: int) -> np.ndarray:
    """Change the number of slices: means where there are more, linear in between where fewer.

    The published volumes were prepared by a program that was not released; this is ours.

    Args:
        slices: uint8, shape (slices, height, width).
        depth: number of slices of the result.

    Returns:
        uint8, shape (depth, height, width).
    """
    if len(slices) == depth:
        return slices
    columns = torch.from_numpy(slices).flatten(1).T[:, None].float()  # (pixels, 1, slices)
    if len(slices) > depth:
        columns = functional.adaptive_avg_pool1d(columns, depth)
    else:
        columns = functional.interpolate(columns, depth, mode="linear", align_corners=True)
    return columns[:, 0].T.reshape(depth, *slices.shape[1:]).round().byte().numpy()


def random_crop(
    height: int, width: int, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Rectangle of random area, ratio and place within a slice.

    Args:
        height: of the slice.
        width: of the slice.
        generator: of the random numbers.

    Returns:
        Top, left, height, width; within the slice.
    """
    area = generator.uniform(*CROPPED_AREA) * height * width
    ratio = np.exp(generator.uniform(*np.log(CROPPED_RATIO)))  # of width to height
    rows = min(max(round(float(np.sqrt(area / ratio))), 1), height)
    columns = min(max(round(float(np.sqrt(area * ratio))), 1), width)
    top = int(generator.integers(height - rows + 1))
    left = int(generator.integers(width - columns + 1))
    return top, left, rows, columns


def random_view(volume: Tensor, generator: np.random.Generator) -> Tensor:
    """Crop and stretch all slices alike, change contrast and brightness.

    Args:
        volume: grey values 0 to 255, shape (depth, height, width).
        generator: of the random numbers.

    Returns:
        Same shape, 0 to 255.
    """
    top, left, rows, columns = random_crop(*volume.shape[1:], generator)
    view = resized_crop(volume, top, left, rows, columns, list(volume.shape[1:]), antialias=True)
    contrast, brightness = generator.uniform(*CONTRAST), generator.uniform(*BRIGHTNESS)
    return (view * contrast + brightness).clamp(0, LARGEST_GREY)


def one_slice_per_segment(
    volume: Tensor, depth: int, generator: np.random.Generator | None
) -> Tensor:
    """Divide a volume into segments of slices and take one slice of each.

    Args:
        volume: shape (k * depth, height, width).
        depth: number of segments.
        generator: draws the slice of each segment; None takes the middle ones.

    Returns:
        Shape (depth, height, width).
    """
    length = len(volume) // depth
    if length == 1:
        return volume
    places = (
        np.full(depth, length // 2) if generator is None else generator.integers(length, size=depth)
    )
    return volume[torch.from_numpy(np.arange(depth) * length + places)]


def views(
    volume: np.ndarray, generator: np.random.Generator | None, *, depth: int, count: int
) -> Tensor:
    """Random views of a volume, or its plain view.

    Args:
        volume: uint8, shape (k * depth, height, width); where k is above 1, a random view also
            draws its slices, see `one_slice_per_segment`.
        generator: of the random numbers; None gives the plain view alone.
        depth: number of slices of a view.
        count: number of random views.

    Returns:
        Standardised as published, shape (count or 1, depth, height, width).
    """
    grey = torch.from_numpy(volume).float()
    if generator is None:
        seen = [one_slice_per_segment(grey, depth, None)]
    else:
        seen = [
            random_view(one_slice_per_segment(grey, depth, generator), generator)
            for _ in range(count)
        ]
    return (torch.stack(seen) / LARGEST_GREY - GREY_MEAN) / GREY_DEVIATION


def judged_views(
    volume: np.ndarray, _: np.random.Generator | None, *, depth: int, count: int
) -> Tensor:
    """The random views on which a scan is judged, the same at every call (see `views`)."""
    return views(volume, np.random.default_rng(TEST_VIEW_SEED), depth=depth, count=count)


def scan_volumes(
    scans: Sequence[ScanItem], settings: Mapping[str, Any], *, view: View, cache: bool = False
) -> ScanVolumes:
    """Scans as volumes of the size that the settings name (depth, slices_per_segment, size)."""
    depth = settings["depth"] * settings["slices_per_segment"]
    load = partial(load_volume, depth=depth, size=settings["image_size"])
    return ScanVolumes(scans, load=load, view=view, cache=cache)


def fit_contrastive(task: Task, model: ContrastiveNetwork) -> list[Row]:
    """Train a network on two random views of each scan, Adam at a constant rate or a schedule.

    Args:
        task: settings are depth, slices_per_segment, image_size, batch_scans, rounds,
            learning_rate, weight_decay, temperature, mixers, loader_processes, cache_volumes, and
            those of ``fit_network``.
        model: the network.

    Returns:
        One row per epoch.
    """
    settings = task.settings
    view = partial(views, depth=settings["depth"], count=TRAINING_VIEWS)
    return fit_volumes(
        task,
        model,
        partial(scan_volumes, settings=settings, view=view, cache=settings["cache_volumes"]),
        optimizer=torch.optim.Adam(
            model.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
        ),
        logits=view_logits,
        loss=partial(joint_loss, mixers=settings["mixers"], temperature=settings["temperature"]),
    )


def predict(
    model: ContrastiveNetwork,
    scans: Sequence[ScanItem],
    *,
    settings: Mapping[str, Any],
    fabric: Fabric,
) -> np.ndarray:
    """Probabilities of each scan (see `task`), mean over ``test_views`` random views."""
    view = partial(judged_views, depth=settings["depth"], count=settings["test_views"])
    volumes = scan_volumes(scans, settings, view=view)
    return predict_volumes(model, volumes, settings=settings, fabric=fabric, logits=view_logits)


def shown(scan: ScanItem, settings: Mapping[str, Any]) -> np.ndarray:
    """What the network sees of a scan before any augmentation.

    Args:
        scan: the scan.
        settings: with depth, slices_per_segment, image_size.

    Returns:
        uint8, shape (depth, image_size, image_size).
    """
    depth, segment = settings["depth"], settings["slices_per_segment"]
    volume = load_volume(scan, depth=depth * segment, size=settings["image_size"])
    return one_slice_per_segment(torch.from_numpy(volume), depth, None).numpy()
