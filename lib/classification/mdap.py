"""MDAP: Cov3d, the 3-D ResNet of the Melbourne Data Analytics Platform (Turnbull 2022; FACTS 6.1).

The entry of the ECCV 2022 competition: slices in grey, stretched to a fixed depth by cubic splines
and distorted so that the middle of the chest is enlarged; an R3D-18 with maximum pooling that says
whether there is COVID-19 and, where the training data tell, how severe it is; the mean of a scan
and its mirror image decides.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric, seed_everything
from PIL import Image
from safetensors.torch import load_file
from scipy.interpolate import make_interp_spline
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.video.resnet import Conv3DSimple

from lib.classification.inputs import ScanItem
from lib.classification.task import Card, Task, Trained
from lib.classification.video_resnet import WIDTHS, grey_stem, video_trunk
from lib.classification.volumes import (
    ScanVolumes,
    VolumeBatch,
    fit_volumes,
    predict_volumes,
    slices_and_lungs,
)
from lib.data.scan import to_grey

SEVERITIES = ("mild", "moderate", "severe", "critical")  # of COV19-CT-DB
UNKNOWN = -1
LARGEST_GREY = 255.0

VARIANTS = {
    "paper": {"widths": list(WIDTHS), "hidden_width": 512, "dropout": 0.5},
    # The same layers, a quarter as wide, for the phantom on two CPU cores. Deviation: less dropout,
    # which in four places leaves a narrow network too little in the few steps that it has.
    "small": {"widths": [16, 32, 64, 128], "hidden_width": 64, "dropout": 0.1},
}

CARD = Card(
    name="MDAP",
    source="Turnbull 2022, ECCV AI-MIA; FACTS 6.1",
    published="Cov3d: R3D-18 with Kinetics weights, dropout behind every stage and maximum "
    "pooling; outputs for presence and severity; smoothed labels, one-cycle schedule; mean of scan "
    "and mirror image; ensembles of several such networks",
    ours="one network, no ensemble; the sizes of the submitted volumes are not in the public code, "
    "its default is taken; the learning rate moves once per epoch; a random start unless Kinetics "
    "weights are given",
    parameters=33_412_672,
)


def build(
    *,
    widths: Sequence[int] = WIDTHS,
    hidden_width: int = 512,
    dropout: float = 0.5,
    trunk_weights: str | Path | None = None,
) -> nn.Sequential:
    """Cov3d for volumes of one channel, shape (scans, 1, slices, height, width).

    Its outputs, shape (scans, 5), are the logit of presence and those of the four severities.

    Args:
        widths: channels of the four stages.
        hidden_width: width of the layer before the outputs.
        dropout: probability behind every stage and before the outputs.
        trunk_weights: safetensors file of torchvision's ``r3d_18``, for example of its Kinetics
            weights; None starts at random.

    Raises:
        ValueError: if the weights are not those of an ``r3d_18`` of these widths.
    """
    trunk = video_trunk(4 * [Conv3DSimple], widths=widths, dropout=dropout)
    if trunk_weights is not None:
        _load_colour_weights(trunk, Path(trunk_weights))
    return nn.Sequential(
        OrderedDict(
            trunk=trunk,
            pool=nn.AdaptiveMaxPool3d(1),
            flatten=nn.Flatten(),
            hidden=nn.Linear(widths[-1], hidden_width),
            dropout=nn.Dropout(dropout),
            activation=nn.ReLU(),
            output=nn.Linear(hidden_width, 1 + len(SEVERITIES), bias=False),
        )
    ).to(memory_format=torch.channels_last_3d)  # same numbers, up to twice as fast


def _load_colour_weights(trunk: nn.Sequential, path: Path) -> None:
    """Weights of torchvision's network for colour, its class layer left out."""
    weights = {name: w for name, w in load_file(path).items() if not name.startswith("fc.")}
    if "stem.0.weight" in weights:
        weights["stem.0.weight"] = grey_stem(weights["stem.0.weight"])
    try:
        trunk.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of an r3d_18 of this size") from error


def coordinates(count: int, *, distorted: bool) -> np.ndarray:
    """Places of an axis, from 0 (first) to 1 (last), at which a volume is looked at.

    Distorted, equidistant x in [-1, 1] go to (x^3 + x) / 2, which enlarges the middle twofold.

    Args:
        count: number of places, at least 2.
        distorted: False leaves them equidistant.

    Returns:
        Strictly increasing, shape (count,).
    """
    places = np.linspace(-1.0, 1.0, count)
    if distorted:
        places = (places**3 + places) / 2
    return (places + 1) / 2


def spline_weights(length: int, places: np.ndarray) -> np.ndarray:
    """Cubic spline interpolation as a matrix from samples to values in between.

    Args:
        length: number of equidistant samples from 0 to 1. Three or two samples are joined by a
            parabola or a line, a single one is repeated.
        places: where the values are wanted, in [0, 1].

    Returns:
        float32, shape (places, length).
    """
    if length == 1:
        return np.ones((len(places), 1), np.float32)
    spline = make_interp_spline(np.linspace(0, 1, length), np.eye(length), k=min(3, length - 1))
    return spline(places).astype(np.float32)


def load_distorted(scan: ScanItem, *, depth: int, size: int, distorted: bool) -> np.ndarray:
    """A scan in grey as the network takes it, before normalisation; black outside the lung mask.

    Slices are resized by bicubic interpolation, then splines give the depth and the distortion.

    Args:
        scan: the scan.
        depth: slices of the result.
        size: height and width of the result.
        distorted: whether to enlarge the middle along all three axes.

    Returns:
        float32, about 0 to 1 (splines overshoot a little), shape (depth, size, size).
    """
    grey = np.stack(
        [
            Image.fromarray(to_grey(voxels) * lungs).resize((size, size), Image.Resampling.BICUBIC)
            for voxels, lungs in slices_and_lungs(scan)
        ]
    )
    along = spline_weights(len(grey), coordinates(depth, distorted=distorted))
    volume = np.tensordot(along, grey / np.float32(LARGEST_GREY), axes=1)
    if distorted:
        across = spline_weights(size, coordinates(size, distorted=True))
        volume = across @ volume @ across.T  # rows, then columns
    return volume


def normalised_view(
    volume: np.ndarray,
    generator: np.random.Generator | None,
    *,
    mean: float,
    deviation: float,
    mirrored: bool,
) -> Tensor:
    """What the network sees of a loaded scan.

    Args:
        volume: of `load_distorted`.
        generator: of the random view; None for the plain one.
        mean: of the grey values of the training data.
        deviation: likewise.
        mirrored: whether a random view is mirrored, left for right, half of the time.

    Returns:
        float32, shape (1, depth, size, size).
    """
    view = torch.from_numpy((volume - np.float32(mean)) / np.float32(deviation))[None]
    if mirrored and generator is not None and generator.random() < 0.5:
        return view.flip(-1)
    return view


def presence_and_severity_loss(
    outputs: Tensor,
    presence: Tensor,
    severity: Tensor,
    *,
    positive_weight: float,
    label_smoothing: float,
    severity_share: float,
) -> Tensor:
    """Loss of a batch: (1 - f) * presence + f * severity, the latter where it is known.

    Args:
        outputs: logits, shape (scans, 5).
        presence: 1 with COVID-19, else 0, shape (scans,).
        severity: index of ``SEVERITIES`` or ``UNKNOWN``, shape (scans,).
        positive_weight: weight of a scan with COVID-19, negatives over positives.
        label_smoothing: taken from 1 and added to 0.
        severity_share: f.

    Returns:
        A scalar; without a known severity the second term is 0.
    """
    smoothed = label_smoothing + (1 - 2 * label_smoothing) * presence.float()
    there = functional.binary_cross_entropy_with_logits(
        outputs[:, 0], smoothed, pos_weight=outputs.new_tensor(positive_weight)
    )
    severe = functional.cross_entropy(
        outputs[:, 1:], severity, ignore_index=UNKNOWN, reduction="sum"
    )
    known = (severity != UNKNOWN).sum().clamp(min=1)
    return (1 - severity_share) * there + severity_share * severe / known


def mirrored_logits(model: nn.Module, batch: VolumeBatch) -> Tensor:
    """Class scores of a batch: mean logit of presence of each scan and its mirror image.

    Args:
        model: of `build`.
        batch: on its device.

    Returns:
        Shape (scans, 2): 0, and that mean; so its sigmoid is the second softmax.
    """
    both = model(batch.volumes)[:, 0] + model(batch.volumes.flip(-1))[:, 0]
    return torch.stack([torch.zeros_like(both), both / 2], dim=1)


def train(task: Task) -> Trained:
    """Train Cov3d on a task (fastai's Adam and one cycle, FACTS 6.1).

    Args:
        task: settings are depth, image_size, distorted, mean, deviation, mirrored, batch_scans,
            rounds, learning_rate, weight_decay, label_smoothing, severity_share,
            loader_processes, cache_volumes, and those of ``fit_network``.
    """
    settings = task.settings
    seed_everything(task.seed, verbose=False)
    model = build(**task.variant)
    # fastai's Adam: decoupled weight decay and these moments and epsilon.
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings["learning_rate"],
        betas=(0.9, 0.99),
        eps=1e-5,
        weight_decay=settings["weight_decay"],
    )
    history = fit_volumes(
        task,
        model,
        partial(_volumes, settings=settings, cache=settings["cache_volumes"]),
        optimizer=optimizer,
        logits=mirrored_logits,
        loss=training_loss(task.train, settings),
    )
    return Trained(model, {CARD.name: history})


def training_loss(
    scans: Sequence[ScanItem], settings: Mapping[str, Any]
) -> Callable[[nn.Module, VolumeBatch], Tensor]:
    """The loss of batches of some scans, for `lib.training.fit`.

    Args:
        scans: the training part, with both classes.
        settings: with label_smoothing and severity_share.
    """
    positives = sum(scan.target for scan in scans)
    severities = {scan.scan_id: severity_index(scan.severity) for scan in scans}
    measure = partial(
        presence_and_severity_loss,
        positive_weight=(len(scans) - positives) / positives,
        label_smoothing=settings["label_smoothing"],
        severity_share=settings["severity_share"],
    )

    def loss(model: nn.Module, batch: VolumeBatch) -> Tensor:
        severity = [severities[scan_id] for scan_id in batch.scan_ids]
        outputs = model(batch.volumes)
        return measure(outputs, batch.targets, torch.tensor(severity, device=outputs.device))

    return loss


def severity_index(severity: str | None) -> int:
    """Index of ``SEVERITIES``; ``UNKNOWN`` for anything else, as other data sets' own scales."""
    return SEVERITIES.index(severity) if severity in SEVERITIES else UNKNOWN


def predict(
    model: nn.Module, scans: Sequence[ScanItem], *, settings: Mapping[str, Any], fabric: Fabric
) -> np.ndarray:
    """Probabilities of each scan (see `task`), mean of it and its mirror image."""
    volumes = _volumes(scans, settings)
    return predict_volumes(model, volumes, settings=settings, fabric=fabric, logits=mirrored_logits)


def shown(scan: ScanItem, settings: Mapping[str, Any]) -> np.ndarray:
    """What the network sees of a scan, before normalisation.

    Args:
        scan: the scan.
        settings: with depth, image_size and distorted.

    Returns:
        uint8, shape (depth, image_size, image_size).
    """
    grey = _load(settings)(scan) * LARGEST_GREY
    return np.rint(np.clip(grey, 0, LARGEST_GREY)).astype(np.uint8)


def _load(settings: Mapping[str, Any]) -> Callable[[ScanItem], np.ndarray]:
    """How a scan is loaded under some settings."""
    return partial(
        load_distorted,
        depth=settings["depth"],
        size=settings["image_size"],
        distorted=settings["distorted"],
    )


def _volumes(
    scans: Sequence[ScanItem], settings: Mapping[str, Any], *, cache: bool = False
) -> ScanVolumes:
    """Scans as this module prepares them."""
    view = {name: settings[name] for name in ("mean", "deviation", "mirrored")}
    return ScanVolumes(
        scans, load=_load(settings), view=partial(normalised_view, **view), cache=cache
    )
