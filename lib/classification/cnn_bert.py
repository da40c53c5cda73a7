"""3-D CNN with BERT (Tan and Liu 2021, sections 3.4 to 4.1; FACTS 4.5 to 4.8).

A scan, cut to the slices with open lungs, is seen as 32 slices of three channels put together from
the slice (R), its lung mask (M) and the slice inside the mask (L). An R(2+1)D-34 pre-trained on
videos makes four time steps of them, which a BERT layer pools with a class token. The embedding of
that token feeds the MLP of `lib.classification.embedding_mlp`, over all sets of 32 slices that a
scan has.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric, seed_everything
from safetensors.torch import save_file
from torch import Tensor, nn

from lib.classification.bert_head import BertHead
from lib.classification.clips import (
    ChannelStatistics,
    ComposedScan,
    channel_statistics,
    composition,
    judged_clip,
    load_composed,
    middle,
    training_clip,
)
from lib.classification.inputs import ScanItem
from lib.classification.r2plus1d import TEMPORAL_STRIDE, r2plus1d_trunk
from lib.classification.resampling import slice_sets, symmetrical_positions
from lib.classification.resnext3d import resnext3d_trunk
from lib.classification.task import Card, Task, Trained
from lib.classification.video_resnet import time_steps
from lib.classification.volumes import ScanVolumes, fit_volumes, predict_volumes

# What classifies: the paper's network; the same trunk averaged over time, without BERT (section
# 5.3.1, third panel of table 1); another trunk, averaged (same section).
BERT, AVERAGE, RESNEXT3D = "bert", "average", "resnext3d"

VARIANTS = {
    "paper": {
        "slices": 32,
        "trunk": {"widths": [64, 128, 256, 512], "blocks": [3, 4, 6, 3]},
        "head": {"heads": 8, "feed_forward": 2048, "dropout": 0.1, "kept": 0.8},
        "dropout": 0.8,
        "resnext": {"widths": [256, 512, 1024, 2048], "blocks": [3, 4, 23, 3], "cardinality": 32},
    },
    # The same layers for the phantom on two CPU cores: an eighth as wide, one block per stage.
    # Deviation: without pre-training, in some hundred steps on 64 channels, BERT learns nothing
    # under the published dropout, so there is little of it.
    "small": {
        "slices": 32,
        "trunk": {"widths": [8, 16, 32, 64], "blocks": [1, 1, 1, 1]},
        "head": {"heads": 4, "feed_forward": 256, "dropout": 0.0, "kept": 0.9},
        "dropout": 0.1,
        "resnext": {"widths": [16, 32, 64, 128], "blocks": [1, 1, 1, 1], "cardinality": 4},
    },
}

CARD = Card(
    name="3D-CNN-BERT",
    source="Tan and Liu 2021, MIA-COV19D (ICCV workshop); FACTS 4",
    published="R(2+1)D-34 with IG-65M weights and a BERT layer over its four time steps, on 32 "
    "slices of 224 x 224 composed of slice, lung mask and masked slice; slices with open lungs "
    "only; multi-scale crops, affine transforms; Adam 1e-5 on 64 scans, best validation accuracy",
    ours="a random start unless the IG-65M weights are given; the published code's normalisation "
    "statistics, which would forget nine tenths at every batch, are kept as Caffe2 meant them; "
    "crops are drawn from all of the picture",
    parameters=66_648_457,
)


class Embedded(NamedTuple):
    """What the network makes of clips.

    Attributes:
        embedding: what the output layer and the MLP see, shape (clips, width).
        logits: class scores, shape (clips, 2).
        attention: of the class token, shape (clips, heads, steps + 1); without BERT no heads.
    """

    embedding: Tensor
    logits: Tensor
    attention: Tensor


class CnnBert(nn.Module):
    """3-D CNN, pooled over time by a BERT layer or, without one, by its mean.

    Args:
        trunk: clips, shape (clips, 3, slices, height, width), to features, shape (clips, width,
            steps, rows, columns).
        head: features of the time steps, shape (clips, steps, width), to embedding and attention;
            None takes their mean.
        width: channels of the features.
        dropout: probability before the output.
        classes: number of outputs.
    """

    def __init__(
        self,
        *,
        trunk: nn.Module,
        head: BertHead | None,
        width: int,
        dropout: float,
        classes: int = 2,
    ) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, classes)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def embed(self, clips: Tensor) -> Embedded:
        """Embedding, class scores and attention of clips.

        Args:
            clips: normalised, shape (clips, 3, slices, height, width).
        """
        features = self.trunk(clips)
        steps = features.mean((3, 4)).transpose(1, 2)  # (clips, steps, width)
        if self.head is None:
            embedding, attention = steps.mean(1), steps.new_zeros(len(steps), 0, steps.shape[1] + 1)
        else:
            embedding, attention = self.head(steps)
        return Embedded(embedding, self.output(self.dropout(embedding)), attention)

    def forward(self, clips: Tensor) -> Tensor:
        """Class scores, shape (clips, classes)."""
        return self.embed(clips).logits


def build(
    *,
    slices: int,
    trunk: Mapping[str, Any],
    head: Mapping[str, Any],
    dropout: float,
    resnext: Mapping[str, Any],
    network: str = BERT,
    trunk_weights: str | Path | None = None,
) -> CnnBert:
    """The network for clips of three channels.

    Args:
        slices: of a clip.
        trunk: arguments of `r2plus1d_trunk`.
        head: arguments of `BertHead`, but for width and steps.
        dropout: probability before the output.
        resnext: arguments of `resnext3d_trunk`.
        network: ``BERT``, ``AVERAGE`` or ``RESNEXT3D``.
        trunk_weights: file of the IG-65M weights of R(2+1)D-34; None starts at random.

    Raises:
        ValueError: if there is no such network, or there are weights for another trunk.
        CheckpointError: if the file is absent, damaged or of another network.
    """
    if network not in (BERT, AVERAGE, RESNEXT3D):
        raise ValueError(f"the network is {BERT!r}, {AVERAGE!r} or {RESNEXT3D!r}, got {network!r}")
    if network == RESNEXT3D and trunk_weights is not None:
        raise ValueError(f"{trunk_weights} holds weights of R(2+1)D-34, not of {network}")
    chosen = resnext if network == RESNEXT3D else trunk
    width = chosen["widths"][-1]
    return CnnBert(
        trunk=resnext3d_trunk(**resnext)
        if network == RESNEXT3D
        else r2plus1d_trunk(**trunk, weights=trunk_weights),
        head=BertHead(width=width, steps=time_steps(slices, stride=TEMPORAL_STRIDE), **head)
        if network == BERT
        else None,
        width=width,
        dropout=dropout,
    ).to(memory_format=torch.channels_last_3d)


def train(task: Task) -> Trained:
    """Train the network on one random clip per scan and epoch (section 5.2; FACTS 4.8).

    Args:
        task: settings are slices, image_size, resized_size, channels, cropped, multi_scale_crop,
            affine, affine_ranges (of ``draw_affine``), channel_statistics, network, trunk_weights,
            learning_rate, weight_decay, cache_volumes, and those of ``fit_volumes``.
    """
    settings = task.settings
    seed_everything(task.seed, verbose=False)
    own = {name: settings[name] for name in ("network", "trunk_weights")}
    model = build(**task.variant, **own)
    # Without weight decay this is the paper's Adam; with it, the public code's (FACTS 4.8).
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
    )
    clips = partial(_clips, settings=settings, cache=settings["cache_volumes"])
    history = fit_volumes(task, model, clips, optimizer=optimizer)
    return Trained(model, {CARD.name: history})


def predict(
    model: nn.Module, scans: Sequence[ScanItem], *, settings: Mapping[str, Any], fabric: Fabric
) -> np.ndarray:
    """Probabilities of each scan (see `task`), from one symmetrically chosen set of its slices."""
    return predict_volumes(model, _clips(scans, settings), settings=settings, fabric=fabric)


def embed_scan(
    model: CnnBert, scan: ScanItem, *, settings: Mapping[str, Any], fabric: Fabric
) -> dict[str, Tensor]:
    """What the network makes of all sets of a scan (section 4.2); each slice is decoded once.

    Args:
        model: the network, on the device.
        scan: the scan.
        settings: as for ``train``.
        fabric: device and precision.

    Returns:
        ``embeddings`` (sets, width), ``logits`` (sets, 2), ``attention`` (sets, heads, steps + 1),
        float32, and ``positions`` (sets, slices), int64, counted from the first selected slice.
    """
    composed = load_composed(scan, **composition(settings))
    every = slice_sets(len(composed), settings["slices"])
    sets, which = np.unique(every, axis=0, return_inverse=True)  # two may be the same
    view = partial(
        judged_clip, composed, size=settings["image_size"], statistics=_statistics(settings)
    )
    was_training = model.training
    model.eval()
    found = []
    with torch.inference_mode(), fabric.autocast():
        for start in range(0, len(sets), settings["batch_scans"]):
            clips = torch.stack(
                [view(one) for one in sets[start : start + settings["batch_scans"]]]
            )
            found.append(model.embed(fabric.to_device(clips)))
    model.train(was_training)
    together = (torch.cat(parts).float().cpu()[which] for parts in zip(*found, strict=True))
    embeddings, logits, attention = together
    return {
        "embeddings": embeddings,
        "logits": logits,
        "attention": attention,
        "positions": torch.from_numpy(every),
    }


def embed_stored(
    scan: ScanItem, path: Path, *, model: CnnBert, fabric: Fabric, **settings: Any
) -> dict[str, int]:
    """Embed one scan and store the result of `embed_scan`; the work of ``map_scans``.

    Args:
        scan: the scan.
        path: safetensors file to write.
        model: the network, on the device.
        fabric: device and precision.
        settings: as for ``train``.

    Returns:
        Numbers of slices looked at and of sets.
    """
    found = embed_scan(model, scan, settings=settings, fabric=fabric)
    save_file({name: values.contiguous() for name, values in found.items()}, path)
    return {"slices": len(found["positions"].unique()), "sets": len(found["positions"])}


def shown(scan: ScanItem, settings: Mapping[str, Any]) -> np.ndarray:
    """What the network sees of a scan, before normalisation, its three channels as colours.

    Args:
        scan: the scan.
        settings: with slices, image_size, resized_size, channels and cropped.

    Returns:
        uint8, shape (slices, image_size, image_size, 3).
    """
    composed = load_composed(scan, **composition(settings))
    chosen = composed[symmetrical_positions(len(composed), settings["slices"])]
    return middle(chosen, settings["image_size"]).transpose(0, 2, 3, 1)


def _statistics(settings: Mapping[str, Any]) -> ChannelStatistics:
    """What clips are normalised by under some settings."""
    return channel_statistics(settings["channels"], settings["channel_statistics"])


def _clip(
    composed: np.ndarray | ComposedScan,
    generator: np.random.Generator | None,
    *,
    settings: Mapping[str, Any],
) -> Tensor:
    """A clip of a loaded scan: random for training, symmetrical otherwise."""
    slices, size, statistics = settings["slices"], settings["image_size"], _statistics(settings)
    if generator is None:
        positions = symmetrical_positions(len(composed), slices)
        return judged_clip(composed, positions, size=size, statistics=statistics)
    return training_clip(
        composed,
        generator,
        slices=slices,
        size=size,
        affine=settings["affine_ranges"] if settings["affine"] else None,
        multi_scale_crop=settings["multi_scale_crop"],
        statistics=statistics,
    )


def _clips(
    scans: Sequence[ScanItem], settings: Mapping[str, Any], *, cache: bool = False
) -> ScanVolumes:
    """Scans as this module prepares them; what is not kept in memory is read a clip at a time."""
    load = partial(load_composed if cache else ComposedScan, **composition(settings))
    return ScanVolumes(scans, load=load, view=partial(_clip, settings=settings), cache=cache)
