"""COVID-CT-Mask-Net (Ter-Sarkisov 2022, sections 3.2 and 4; FACTS 5.2): lesions first.

A Mask R-CNN that learned to find ground-glass opacity and consolidation looks at a slice; its best
boxes, ranked by score, are all that the classifier S sees of it. The detector is
`lib.segmentation.mask_rcnn`, ranking is `ranked_boxes`, S is `mask_net_head`.

Where S alone is trained, a picture has the same boxes in every epoch: they are computed once.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import safetensors.torch
import torch
from lightning_fabric import Fabric, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lib.classification import mask_net_head
from lib.classification.mask_net_head import MaskNet, RankedBoxHead, one_hot_loss
from lib.classification.picture_augmentation import Augmentation
from lib.classification.pictures import PictureItem, picture_views, shown, varied_colours
from lib.classification.task import Card, Task, Trained, fit_network
from lib.classification.volumes import (
    VolumeBatch,
    plain_batches,
    predict_volumes,
    random_batches,
    stack,
    volume_logits,
)
from lib.data.files import whole_file
from lib.inference import load_tensors
from lib.segmentation import mask_rcnn
from lib.training import Row

__all__ = ["CARD", "VARIANTS", "build", "predict", "shown", "start_from", "train"]

HEAD = "head"  # of mask_net_head.TRAINED, what is trained on boxes that are computed once
S_ALONE = "S alone"  # learning curve of S while nothing else is trained
WEIGHTS = "model.safetensors"  # of detector and S together, in the folder of a training
LESIONS = 2  # ground-glass opacity and consolidation
_S, _OUTPUT = "head.", "head.5."  # names of the weights of S, and of its last layer

VARIANTS = {
    "paper": {
        "detector": mask_rcnn.VARIANTS["head2023"],
        "head": mask_net_head.VARIANTS["paper"],
        "padding": "spread",
    },
    # The code that the paper's numbers come from; it fails where fewer than 256 boxes are left.
    "paper2020": {
        "detector": mask_rcnn.VARIANTS["paper2020"],
        "head": mask_net_head.VARIANTS["paper"],
        "padding": "none",
    },
    # The NMS of the boxes is that of the small detector, as the paper too has the same in both. Of
    # one lesion model S tells 81 % of the phantom's test pictures right under 0.75, 85 % under 0.3.
    "small": {
        "detector": mask_rcnn.VARIANTS["small"],
        "head": mask_net_head.VARIANTS["small"],
        "padding": "spread",
        "nms_threshold": mask_rcnn.VARIANTS["small"]["settings"]["box_nms_thresh"],
    },
}

CARD = Card(
    name="COVID-CT-Mask-Net",
    source="Ter-Sarkisov 2022, Applied Intelligence; FACTS 5.2",
    published="Mask R-CNN with ResNet-50 and FPN trained on lesions, without its mask branch; its "
    "256 best encoded boxes with their scores, ranked, go through S (1280-1024-1024-3); binary "
    "cross-entropy of one-hot classes, Adam 1e-5, weight decay 1e-3, 50 epochs, 8 images a batch, "
    "no augmentation",
    ours="where fewer boxes are left, they are repeated evenly instead of at random; the epoch of "
    "lowest validation loss is kept (not published); all norms of the backbone are trained, where "
    "the public code leaves out those of four shortcuts",
    parameters=31_469_672,
)


def build(
    *,
    detector: Mapping[str, Any],
    head: Mapping[str, Any],
    padding: str,
    lesions: int = LESIONS,
    classes: int = 3,
    rpn_nms_threshold: float = 0.75,
    nms_threshold: float = 0.75,
) -> MaskNet:
    """The classifier, untrained: pictures (pictures, 3, height, width), 0 to 1, to logits.

    Args:
        detector: arguments of ``mask_rcnn.build``.
        head: arguments of ``RankedBoxHead``.
        padding: see ``ranked_boxes``.
        lesions: kinds of lesions of the detector.
        classes: number of outputs.
        rpn_nms_threshold: largest IoU of two proposals (table 3).
        nms_threshold: largest IoU of two boxes of a lesion class (table 3, section 3.2.3).
    """
    return MaskNet(
        mask_rcnn.build(classes=lesions, **detector),
        RankedBoxHead(classes=classes, **head),
        padding=padding,
        rpn_nms_threshold=rpn_nms_threshold,
        nms_threshold=nms_threshold,
    )


def start_from(model: MaskNet, weights: Mapping[str, Tensor]) -> None:
    """Take over trained weights: of a lesion model, or of this classifier trained elsewhere.

    A lesion model leaves S as it was drawn (section 3.2). A classifier brings its S along, but for
    the last layer where it told other classes apart (fine-tuning on iCTCF, section 5).

    Args:
        model: takes the weights.
        weights: by their names in a Mask R-CNN, or in a `MaskNet`.

    Raises:
        ValueError: if they belong to other layers.
    """
    if not any(name.startswith(_S) for name in weights):
        mask_net_head.copy_weights(model, weights)
        return
    own = model.state_dict()
    same = own[f"{_OUTPUT}bias"].shape == weights[f"{_OUTPUT}bias"].shape
    given = {name: w for name, w in weights.items() if same or not name.startswith(_OUTPUT)}
    try:
        model.load_state_dict(own | given)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"the weights are of another classifier: {reason}") from error


def train(task: Task) -> Trained:
    """Train S, or S and more, on pictures (section 4).

    Args:
        task: of pictures, starting from a lesion model or a classifier. Settings are image_size,
            trained (a key of ``mask_net_head.TRAINED``), learning_rate of S, detector_learning_rate
            of the rest, weight_decay, batch_scans (pictures), augmentation (of pictures, where more
            than S is trained), head_first (settings of S that differ while it learns alone, before
            more is trained; None begins with all, as published), cache_pictures, loader_processes,
            and those of ``fit_network``.

    Raises:
        ValueError: if there is nothing to start from: boxes drawn at random say nothing.
    """
    if task.start is None:
        raise ValueError("COVID-CT-Mask-Net starts from a lesion model: train the lesions first")
    settings = task.settings
    seed_everything(task.seed, verbose=False)
    model = build(**task.variant, classes=len(task.classes))
    start_from(model, load_tensors(task.start))
    alone, first = settings["trained"] == HEAD, settings["head_first"]
    histories = {}
    if alone or first:
        histories[S_ALONE] = _fit_head(task, model, settings | (first or {}), "" if alone else "S")
    if not alone:
        histories[CARD.name] = _fit_all(task, model)
    with whole_file(task.folder / WEIGHTS) as path:
        safetensors.torch.save_file(model.state_dict(), path)
    return Trained(model, histories)


def _fit_head(task: Task, model: MaskNet, settings: Mapping[str, Any], name: str) -> list[Row]:
    """Train S alone, on boxes that are computed once."""
    size, asked = settings["batch_scans"], {"settings": settings, "fabric": task.fabric}
    train, validation = (
        [
            (boxes, item.target, item.image_id)
            for item, boxes in zip(items, rank_pictures(model, items, **asked), strict=True)
        ]
        for items in (task.train, task.validation)
    )
    load = partial(DataLoader, batch_size=size, collate_fn=stack)
    return fit_network(
        task,
        model.head,
        train_batches=load(train, shuffle=True),
        validation_batches=list(load(validation)),
        logits=volume_logits,
        optimizers=[_optimizer(model, mask_net_head.trainable(model, HEAD), settings)],
        loss=picture_loss,
        settings=settings,
        name=name,
    )


def _fit_all(task: Task, model: MaskNet) -> list[Row]:
    """Train S and more, on pictures."""
    settings = task.settings
    sizes = {"batch_size": settings["batch_scans"], "processes": settings["loader_processes"]}
    views = partial(picture_views, size=settings["image_size"], cache=settings["cache_pictures"])
    varied = partial(varied_colours, ranges=Augmentation(**settings["augmentation"]))
    chosen = mask_net_head.trainable(model, settings["trained"])
    return fit_network(
        task,
        model,
        train_batches=random_batches(views(task.train, view=varied), **sizes),
        validation_batches=plain_batches(views(task.validation), **sizes),
        logits=volume_logits,
        optimizers=[_optimizer(model, chosen, settings)],
        loss=picture_loss,
    )


def _optimizer(
    model: MaskNet, chosen: Sequence[nn.Parameter], settings: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Adam with a rate for S and one for what else is trained."""
    of_head = list(model.head.parameters())
    known = set(map(id, of_head))
    rest = [weights for weights in chosen if id(weights) not in known]
    groups = [{"params": of_head, "lr": settings["learning_rate"]}]
    if rest:
        groups.append({"params": rest, "lr": settings["detector_learning_rate"]})
    return torch.optim.Adam(groups, weight_decay=settings["weight_decay"])


def picture_loss(model: nn.Module, batch: VolumeBatch) -> Tensor:
    """Loss of a batch of pictures, or of their ranked boxes where the model is S, a scalar."""
    return one_hot_loss(volume_logits(model, batch), batch.targets)


@torch.inference_mode()
def rank_pictures(
    model: MaskNet, items: Sequence[PictureItem], *, settings: Mapping[str, Any], fabric: Fabric
) -> Tensor:
    """Ranked boxes of pictures, behind a progress bar.

    Args:
        model: its detector is asked; its mode stays.
        items: the pictures, each loaded once.
        settings: image_size, batch_scans, loader_processes.
        fabric: device and precision.

    Returns:
        float32, on the CPU, shape (pictures, boxes, 5).
    """
    fabric.to_device(model)
    batches = plain_batches(
        picture_views(items, size=settings["image_size"]),
        batch_size=settings["batch_scans"],
        processes=settings["loader_processes"],
    )
    found = []
    for batch in tqdm(batches, desc="ranked boxes", unit="batch", mininterval=1):
        with fabric.autocast():
            found.append(model.ranked(fabric.to_device(batch).volumes).float().cpu())
    return torch.cat(found).clone()  # outside of inference mode it may be trained on


def predict(
    model: nn.Module, scans: Sequence[PictureItem], *, settings: Mapping[str, Any], fabric: Fabric
) -> np.ndarray:
    """Probabilities of each picture (see `task`): softmax of what S gives, as the largest decides.

    Args:
        model: of ``train``.
        scans: the pictures.
        settings: image_size, batch_scans, loader_processes.
        fabric: device and precision.
    """
    views = picture_views(scans, size=settings["image_size"])
    return predict_volumes(model, views, settings=settings, fabric=fabric)
