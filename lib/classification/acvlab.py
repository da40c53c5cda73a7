"""ACVLab: slices to embeddings, embeddings to a scan by an LSTM and by a Swin, all three averaged.

The two-step system of ACVLab (ECCV 2022; FACTS 6.3). Step 0 crops every slice to the body and keeps
the half of the slices with most lung (`slice_range`). Step 1 trains a CNN on single slices that all
bear the label of their scan; the layer before its last one gives each slice an embedding. Step 2
reads the embeddings of a scan in order: as a sequence (step 2a, an LSTM) and as a one-channel
picture of slices x features (step 2b, a Swin V2 CR). The three networks are trained one after the
other, and the mean of their three probabilities decides.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric, seed_everything
from timm.layers import freeze_batch_norm_2d
from timm.loss import BinaryCrossEntropy
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from torch import Tensor, nn
from torch.nn import functional

from lib.classification.acvlab_networks import ACVLab, SequenceNetwork, SliceNetwork, Standardise
from lib.classification.acvlab_slices import chosen_slices, embedding_view, slice_view, whole_view
from lib.classification.imagenet import LITE0, PACKAGED_IMAGENET, efficientnet
from lib.classification.inputs import ScanItem
from lib.classification.task import Card, Task, Trained, fit_network
from lib.classification.volumes import (
    ScanVolumes,
    VolumeBatch,
    plain_batches,
    random_batches,
    volume_logits,
)
from lib.training import Row
from lib.training import predict as class_probabilities

Embeddings = Mapping[str, np.ndarray]

VARIANTS = {
    "paper": {
        "backbone": "efficientnet_b3",  # timm's B3a of then is its B3 of today
        "rescaled": True,
        "embedding_width": 224,
        "recurrent_width": 128,
        "hidden_width": 64,
        "swin": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    },
    # The same architecture for the phantom on two CPU cores. Deviations: EfficientNet-Lite0, whose
    # ImageNet weights install offline and ask for their own normalisation; and a batch norm behind
    # it, because its features, all positive and far from 0, keep the two linear layers from
    # learning within so few steps.
    "small": {
        "backbone": LITE0,
        "backbone_weights": PACKAGED_IMAGENET,
        "frozen_blocks": 3,
        "freeze_batch_norm": True,
        "feature_batch_norm": True,
        "rescaled": False,
        "embedding_width": 64,
        "recurrent_width": 32,
        "hidden_width": 16,
        "swin": {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_ratio": 2},
    },
}

CARD = Card(
    name="ACVLab",
    source="ACVLab, ECCV 2022; FACTS 6.3",
    published="body crop and slice range; EfficientNet-B3 on single slices; 4-layer bidirectional "
    "LSTM on the sequence and Swin V2 CR Base on the picture of the slice embeddings; mean of the "
    "three probabilities, the CNN's over ten draws of 16 slices",
    ours="crop and slice range are found before the lung mask is applied; embeddings are "
    "standardised; filters scale with the slice; colour jitter is left out; one-cycle warm-up; how "
    "the best epoch of LSTM and Swin is chosen is assumed",
    parameters=99_456_092,
)


def build(
    *,
    backbone: str,
    embedding_width: int,
    recurrent_width: int,
    hidden_width: int,
    swin: Mapping[str, Any],
    backbone_weights: str | None = None,
    frozen_blocks: int = 0,
    freeze_batch_norm: bool = False,
    feature_batch_norm: bool = False,
    rescaled: bool = False,
) -> ACVLab:
    """Build the untrained system: ``build(**VARIANTS["paper"])``.

    Args:
        backbone: timm's name of the CNN; the original starts from ImageNet.
        embedding_width: size of an embedding, and number of slices in the picture, a square.
        recurrent_width: LSTM units in each direction.
        hidden_width: units behind the LSTM.
        swin: arguments of timm's ``SwinTransformerV2Cr``.
        backbone_weights: see `imagenet.efficientnet`.
        frozen_blocks: see there; asks for ``freeze_batch_norm`` as well.
        freeze_batch_norm: keep batch normalisation as it starts, statistics and factors.
        feature_batch_norm: standardise the CNN's features before they are embedded.
        rescaled: after ImageNet's normalisation apply 2x - 1 too, as the original does.

    Returns:
        The three networks, in training mode.

    Raises:
        ValueError: if weights do not exist for this backbone, or frozen stages would get moving
            batch-norm statistics.
    """
    if frozen_blocks and not freeze_batch_norm:
        raise ValueError("frozen_blocks needs freeze_batch_norm=True")
    cnn = efficientnet(backbone, weights=backbone_weights, frozen_blocks=frozen_blocks)
    mean, deviation = (torch.tensor(cnn.default_cfg[name]) for name in ("mean", "std"))
    if rescaled:  # 2 (x - m) / d - 1 = (x - (m + d / 2)) / (d / 2)
        mean, deviation = mean + deviation / 2, deviation / 2
    slices = SliceNetwork(
        backbone=freeze_batch_norm_2d(cnn) if freeze_batch_norm else cnn,
        feature_width=cnn.num_features,
        embedding_width=embedding_width,
        mean=mean,
        deviation=deviation,
        batch_norm=feature_batch_norm,
    )
    sequence = SequenceNetwork(
        embedding_width=embedding_width, width=recurrent_width, hidden_width=hidden_width
    )
    size = (embedding_width, embedding_width)
    picture = SwinTransformerV2Cr(img_size=size, in_chans=1, num_classes=2, **swin)
    as_picture = nn.Unflatten(1, (1, embedding_width))  # (scans, 1, slices, features)
    return ACVLab(
        slices=slices,
        sequence=nn.Sequential(Standardise(embedding_width), sequence),
        picture=nn.Sequential(Standardise(embedding_width), as_picture, picture),
        picture_slices=embedding_width,
    ).train()


def log_probabilities(chance: Tensor) -> Tensor:
    """Class scores whose softmax is a given probability.

    Args:
        chance: probability of COVID-19, shape (scans,).

    Returns:
        Shape (scans, 2), finite.
    """
    chance = chance.float().clamp(1e-6, 1 - 1e-6)
    return torch.stack([1 - chance, chance], 1).log()


def slice_logits(model: SliceNetwork, batch: VolumeBatch) -> Tensor:
    """Class scores by step 1: the mean probability of the drawn slices."""
    return log_probabilities(model(batch.volumes).float().sigmoid().mean(1))


def slice_loss(model: SliceNetwork, batch: VolumeBatch) -> Tensor:
    """Binary cross entropy of single slices, each with the label of its scan."""
    logits = model(batch.volumes)
    targets = batch.targets[:, None].expand_as(logits).to(logits.dtype)
    return functional.binary_cross_entropy_with_logits(logits, targets)


def sequence_logits(model: nn.Module, batch: VolumeBatch) -> Tensor:
    """Class scores by step 2a; their cross entropy is the binary one of the LSTM's logit."""
    logit = model(batch.volumes)
    return torch.stack([torch.zeros_like(logit), logit], 1)


def picture_loss(model: nn.Module, batch: VolumeBatch, *, smoothing: float) -> Tensor:
    """Binary cross entropy of both class scores with smoothed labels, as timm's recipe has it."""
    return BinaryCrossEntropy(smoothing)(model(batch.volumes), batch.targets)


def train(task: Task) -> Trained:
    """Train the three networks one after the other.

    Args:
        task: settings are image_size, window_share, slices_per_scan, draws, sequence_slices,
            draw_seed, fresh_draws, loader_processes, cache_slices, and the sections slices,
            sequence and picture, each with batch_scans, rounds, learning_rate, weight_decay and
            those of `fit_network`; slices has augmentation (strength) and head_learning_rate too,
            picture momentum and label_smoothing.
    """
    settings = task.settings
    seed_everything(task.seed, verbose=False)
    model = build(**task.variant)
    load = _loader(settings)
    if settings["cache_slices"]:
        load = cache(load)
    histories = {"EfficientNet": _train_slices(task, model.slices, load)}
    embeddings = _embeddings(model, [*task.train, *task.validation], load, task.fabric)
    known = torch.from_numpy(np.concatenate([embeddings[scan.scan_id] for scan in task.train]))
    for network in (model.sequence, model.picture):
        network[0].measure(known)
    histories["LSTM"] = _train_sequence(task, model.sequence, embeddings)
    histories["Swin V2"] = _train_picture(task, model, embeddings)
    return Trained(model, histories)


def _loader(settings: Mapping[str, Any]) -> Callable[[ScanItem], np.ndarray]:
    """Step 0 with the numbers of some settings."""
    return partial(chosen_slices, size=settings["image_size"], share=settings["window_share"])


def _train_slices(
    task: Task, network: SliceNetwork, load: Callable[[ScanItem], np.ndarray]
) -> list[Row]:
    """Step 1."""
    settings, own = task.settings, task.settings["slices"]
    view = partial(
        slice_view,
        number=settings["slices_per_scan"],
        seed=settings["draw_seed"],
        strength=own["augmentation"],
    )
    train, validation = (
        ScanVolumes(scans, load=load, view=view) for scans in (task.train, task.validation)
    )
    return fit_network(
        task,
        network,
        train_batches=_random(train, own, settings["loader_processes"]),
        validation_batches=plain_batches(
            validation, batch_size=own["batch_scans"], processes=settings["loader_processes"]
        ),
        logits=slice_logits,
        loss=slice_loss,
        optimizers=[_adam(network, own)],
        settings=own,
        name="slices",
    )


def _adam(network: SliceNetwork, own: Mapping[str, Any]) -> torch.optim.Adam:
    """Adam with one rate for the backbone and one for the layers behind it."""
    backbone = [weights for weights in network.backbone.parameters() if weights.requires_grad]
    head = [*network.embedding.parameters(), *network.output.parameters()]
    groups = [
        {"params": backbone, "lr": own["learning_rate"]},
        {"params": head, "lr": own["head_learning_rate"]},
    ]
    return torch.optim.Adam(groups, weight_decay=own["weight_decay"])


def _train_sequence(task: Task, network: nn.Module, embeddings: Embeddings) -> list[Row]:
    """Step 2a."""
    own = task.settings["sequence"]
    train, validation = _drawn(task, embeddings, task.settings["sequence_slices"])
    return fit_network(
        task,
        network,
        train_batches=_random(train, own),
        validation_batches=plain_batches(validation, batch_size=own["batch_scans"]),
        logits=sequence_logits,
        optimizers=[
            torch.optim.AdamW(
                network.parameters(), own["learning_rate"], weight_decay=own["weight_decay"]
            )
        ],
        settings=own,
        name="sequence",
    )


def _train_picture(task: Task, model: ACVLab, embeddings: Embeddings) -> list[Row]:
    """Step 2b."""
    own = task.settings["picture"]
    train, validation = _drawn(task, embeddings, model.picture_slices)
    return fit_network(
        task,
        model.picture,
        train_batches=_random(train, own),
        validation_batches=plain_batches(validation, batch_size=own["batch_scans"]),
        logits=volume_logits,
        loss=partial(picture_loss, smoothing=own["label_smoothing"]),
        optimizers=[
            torch.optim.SGD(
                model.picture.parameters(),
                own["learning_rate"],
                momentum=own["momentum"],
                weight_decay=own["weight_decay"],
            )
        ],
        settings=own,
        name="picture",
    )


def _random(scans: ScanVolumes, own: Mapping[str, Any], processes: int = 0) -> Any:
    """Training batches as one section of the settings asks for them."""
    return random_batches(
        scans, batch_size=own["batch_scans"], rounds=own["rounds"], processes=processes
    )


def _drawn(task: Task, embeddings: Embeddings, number: int) -> list[ScanVolumes]:
    """Training and validation part as drawn embeddings."""
    view = partial(
        embedding_view,
        number=number,
        seed=task.settings["draw_seed"],
        fresh=task.settings["fresh_draws"],
    )
    return [
        ScanVolumes(scans, load=lambda scan: embeddings[scan.scan_id], view=view)
        for scans in (task.train, task.validation)
    ]


def _whole_scans(
    scans: Sequence[ScanItem], load: Callable[[ScanItem], np.ndarray], processes: int = 0
) -> Any:
    """All chosen slices, one scan per batch, because scans differ in length."""
    volumes = ScanVolumes(scans, load=load, view=whole_view)
    return plain_batches(volumes, batch_size=1, processes=processes)


def _embeddings(
    model: ACVLab,
    scans: Sequence[ScanItem],
    load: Callable[[ScanItem], np.ndarray],
    fabric: Fabric,
) -> dict[str, np.ndarray]:
    """Embeddings of all chosen slices of each scan, by name, float32 (slices, embedding_width)."""
    fabric.to_device(model).eval()
    with torch.inference_mode(), fabric.autocast():
        found = {
            batch.scan_ids[0]: model.embed(fabric.to_device(batch.volumes[0])).float().cpu().numpy()
            for batch in _whole_scans(scans, load)
        }
    model.train()
    return found


def ensemble_logits(model: ACVLab, batch: VolumeBatch, **numbers: int) -> Tensor:
    """Class scores of one scan: the mean of the three probabilities, positive above 0.5."""
    chances = torch.stack(list(model(batch.volumes[0], **numbers).values()))
    return log_probabilities(chances.mean()[None])


def predict(
    model: ACVLab, scans: Sequence[ScanItem], *, settings: Mapping[str, Any], fabric: Fabric
) -> np.ndarray:
    """Probabilities of each scan (see `task`), each judged alone."""
    numbers = {name: settings[name] for name in ("draws", "slices_per_scan", "sequence_slices")}
    return class_probabilities(
        model,
        _whole_scans(scans, _loader(settings), settings["loader_processes"]),
        fabric=fabric,
        logits=partial(ensemble_logits, seed=settings["draw_seed"], **numbers),
    )


def shown(scan: ScanItem, settings: Mapping[str, Any]) -> np.ndarray:
    """What the first network sees of a scan: the chosen slices, cropped, masked and resized.

    Args:
        scan: the scan.
        settings: with image_size and window_share.

    Returns:
        uint8, shape (slices, image_size, image_size).
    """
    return _loader(settings)(scan)
