"""Training data, loss, score and training of the lesion models (Ter-Sarkisov 2022, 2 to 4).

Slices stay in memory as they are stored, in 8 bits: the model brings each to its own size and its
masks back, so that the truth is as fine as it was drawn. A slice of 512 x 512 pixels takes 0.5 MB
with its mask. Lesions are told apart when a slice is drawn, which takes a millisecond or two; all
of their masks at once would need many times the memory.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric, seed_everything
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.models.detection import MaskRCNN
from tqdm import tqdm

from lib.data.pictures import image_names
from lib.data.scan import to_grey
from lib.data.splits import TRAIN, VALIDATION
from lib.data.store import SUFFIX, StoredVolume, open_volume
from lib.evaluation.detection import Lesions, paper_precisions
from lib.inference import in_batches
from lib.segmentation import mask_rcnn
from lib.segmentation.lesion_instances import CLASSES, LesionInstances, lesion_instances
from lib.segmentation.mask_rcnn import Detections, detections, training_losses
from lib.training import Row, fit, schedules

LARGEST_GREY = 255
CHOOSING_IOU = 0.5  # that of the precision which the paper names first

Batch = tuple[list[Tensor], list[LesionInstances]]  # pictures, uint8, each (height, width)


@dataclass(frozen=True, eq=False)
class LesionSlice:
    """One slice with its true lesions.

    Attributes:
        image_id: its name.
        scan_id: pseudonymous name of its scan.
        patient_id: pseudonymous name of its patient.
        picture: in the lung window where the scan has HU, uint8, shape (height, width).
        mask: 0 none, 1 ground-glass opacity, 2 consolidation, same shape.
    """

    image_id: str
    scan_id: str
    patient_id: str
    picture: np.ndarray
    mask: np.ndarray


class LesionSlices(Dataset):
    """Slices, which may differ in size, with their lesions one by one.

    Args:
        slices: with or without lesions.
        mask_type: see `lesion_instances`.
        ignored_area: likewise.
        flip: mirror every other slice at random, right for left.
    """

    def __init__(
        self,
        slices: Sequence[LesionSlice],
        *,
        mask_type: str,
        ignored_area: float,
        flip: bool = False,
    ) -> None:
        self.slices, self.flip = list(slices), flip
        self.mask_type, self.ignored_area = mask_type, ignored_area

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, index: int) -> tuple[Tensor, LesionInstances]:
        """Picture, uint8, (height, width), and lesions of one slice."""
        picture, mask = self.slices[index].picture, self.slices[index].mask
        if self.flip and torch.rand(()) < 0.5:
            picture, mask = (np.ascontiguousarray(one[:, ::-1]) for one in (picture, mask))
        return torch.from_numpy(picture), self._lesions(mask)

    def table(self) -> pd.DataFrame:
        """Names of the slices: image_id, scan_id, patient_id."""
        columns = ["image_id", "scan_id", "patient_id"]
        return pd.DataFrame(
            [[getattr(one, name) for name in columns] for one in self.slices], columns=columns
        )

    def truth(self) -> list[Lesions]:
        """True lesions of every slice, in order, as precisions are computed from them."""
        return [_as_true(self._lesions(one.mask)) for one in self.slices]

    def digest(self) -> str:
        """SHA-256 of all pictures and masks, to tell trainings on different data apart."""
        digest = hashlib.sha256()
        for one in self.slices:
            digest.update(f"{one.image_id} {one.picture.shape}\n".encode())
            digest.update(np.ascontiguousarray(one.picture))
            digest.update(np.ascontiguousarray(one.mask))
        return digest.hexdigest()

    def _lesions(self, mask: np.ndarray) -> LesionInstances:
        return lesion_instances(mask, mask_type=self.mask_type, ignored_area=self.ignored_area)


def load_slices(
    scans: pd.DataFrame,
    prepared: Path,
    *,
    mask_type: str,
    ignored_area: float,
    without_lesions: float = 0,
    most: int | None = None,
    seed: int = 0,
    flip: bool = False,
) -> LesionSlices:
    """Read the slices with lesions of some scans, and some of those without.

    Args:
        scans: rows of the manifest; those without a lesion mask are left out.
        prepared: folder of the prepared data set.
        mask_type: see `lesion_instances`.
        ignored_area: likewise; a slice whose lesions are all that small counts as one without.
        without_lesions: how many slices without lesions to add for each one with them, as far as
            there are any. The paper has none (section 2: those slices "were removed").
        most: keep no more than so many slices with lesions, evenly spread over all; None keeps all.
        seed: of drawing those without.
        flip: see `LesionSlices`.

    Raises:
        ValueError: if none of the scans has a mask, none of the slices a lesion, or a mask does not
            fit its scan or holds an unknown value.
    """
    found, empty = [], []
    pairs = _with_mask(scans, prepared)
    for pair in tqdm(pairs, desc=f"{prepared.name}: lesion masks", unit="scan", mininterval=1):
        for index, count in enumerate(_lesion_counts(pair, mask_type, ignored_area)):
            (found if count else empty).append((pair, index))
    if not found:
        raise ValueError(f"no slice of these scans of {prepared.name} has a lesion")
    if most is not None and most < len(found):
        found = [found[place] for place in np.linspace(0, len(found) - 1, most).round().astype(int)]
    order = np.random.default_rng(seed).permutation(len(empty))
    added = sorted(order[: round(without_lesions * len(found))])
    return LesionSlices(
        [_slice(*place) for place in found + [empty[number] for number in added]],
        mask_type=mask_type,
        ignored_area=ignored_area,
        flip=flip,
    )


class _Pair(NamedTuple):
    """A scan and its lesion mask, opened."""

    scan_id: str
    patient_id: str
    scan: StoredVolume
    mask: StoredVolume


def _with_mask(scans: pd.DataFrame, prepared: Path) -> list[_Pair]:
    """The scans that have a lesion mask."""
    names = {row.scan_id: f"{row.scan_id}{SUFFIX}" for row in scans.itertuples()}
    pairs = [
        _Pair(
            row.scan_id,
            row.patient_id,
            *(open_volume(prepared / kind / names[row.scan_id]) for kind in ("scans", "lesions")),
        )
        for row in scans.itertuples()
        if (prepared / "lesions" / names[row.scan_id]).is_file()
    ]
    if not pairs:
        raise ValueError(f"none of these scans of {prepared.name} has a lesion mask")
    for name, _, scan, mask in pairs:
        if scan.shape != mask.shape:
            raise ValueError(
                f"scan {scan.shape} and lesion mask {mask.shape} of {name} do not match"
            )
    return pairs


def _lesion_counts(pair: _Pair, mask_type: str, ignored_area: float) -> Iterator[int]:
    """Number of lesions of each slice of a scan."""
    for index, mask in enumerate(pair.mask.load()):
        try:
            lesions = lesion_instances(mask, mask_type=mask_type, ignored_area=ignored_area)
        except ValueError as error:
            raise ValueError(f"{pair.scan_id}, slice {index}: {error}") from error
        yield len(lesions.labels)


def _slice(pair: _Pair, index: int) -> LesionSlice:
    name = image_names(pair.scan_id, len(pair.scan))[index]
    picture, mask = to_grey(pair.scan[index]), pair.mask[index]
    return LesionSlice(name, pair.scan_id, pair.patient_id, picture, mask)


def collated(slices: Sequence[tuple[Tensor, LesionInstances]]) -> Batch:
    """A batch for a loader: slices may differ in size, so that nothing is stacked."""
    pictures, lesions = zip(*slices, strict=True)
    return list(pictures), list(lesions)


def total_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Sum of the five losses of Mask R-CNN, a scalar (section 3.1, equation 1)."""
    pictures, lesions = batch
    return training_losses(model, _as_floats(pictures), lesions).total


def mean_precision(
    model: MaskRCNN, batches: Iterable[Batch], *, to_device: Callable[[Batch], Batch]
) -> float:
    """Mean average precision at an IoU of 0.5 by the paper's rule, which chooses the epoch.

    The paper does not say how its epoch was chosen, so this is ours.

    Args:
        model: in evaluation mode.
        batches: of `LesionSlices`.
        to_device: brings a batch to the model's device.

    Returns:
        0 to 1.
    """
    found, true = [], []
    for batch in batches:
        pictures, lesions = to_device(batch)
        found += [_as_predicted(one) for one in detections(model, _as_floats(pictures))]
        true += [_as_true(one) for one in lesions]
    return float(paper_precisions(found, true, [CHOOSING_IOU]).mean())


def train_lesion_model(
    train: LesionSlices,
    validation: LesionSlices,
    *,
    settings: Mapping[str, Any],
    fabric: Fabric,
    folder: Path,
    seed: int,
) -> tuple[MaskRCNN, list[Row]]:
    """Train a lesion model; the best epoch by average precision on validation slices is kept.

    Args:
        train: what it learns from.
        validation: what chooses the epoch.
        settings: a preset of ``train_lesions`` in params.yaml with one of its configurations.
        fabric: device and precision.
        folder: where weights and learning curve go.
        seed: of everything random.

    Returns:
        The network with the weights of its best epoch, and its learning curve.
    """
    seed_everything(seed, verbose=False)
    model = mask_rcnn.build(
        classes=len(CLASSES[settings["mask_type"]]),
        weights=settings["imagenet_weights"],
        **mask_rcnn.VARIANTS[settings["variant"]],
    )
    mask_rcnn.choose_trained(model, settings["part"], frozen=settings["frozen"])
    optimizer = Adam(
        [values for values in model.parameters() if values.requires_grad],
        lr=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
    )
    schedule = settings["schedule"]
    drawn = RandomSampler(train, num_samples=settings["slices_per_epoch"])
    load = partial(DataLoader, batch_size=settings["batch_slices"], collate_fn=collated)
    history = fit(
        model,
        fabric=fabric,
        optimizers=[optimizer],
        schedulers=schedules([optimizer], **schedule) if schedule else (),
        train_batches=load(train, sampler=drawn),
        validation_batches=load(validation),
        loss=total_loss,
        score=partial(mean_precision, to_device=fabric.to_device),
        score_name="validation_precision",
        epochs=settings["epochs"],
        patience=settings["patience"],
        folder=folder,
        seed=seed,
        fingerprint={**settings, TRAIN: train.digest(), VALIDATION: validation.digest()},
    )
    return model, history


def predict_lesions(
    model: MaskRCNN,
    pictures: Sequence[np.ndarray],
    *,
    device: torch.device,
    batch_size: int = 4,
) -> list[Lesions]:
    """Lesions that a model finds in slices, best first.

    Args:
        model: on the device.
        pictures: uint8, (height, width) each, of any sizes.
        device: where the model is.
        batch_size: slices at a time; fewer where memory runs out.
    """

    def found(some: Sequence[np.ndarray]) -> list[Lesions]:
        tensors = [torch.from_numpy(picture).to(device) for picture in some]
        return [_as_predicted(one) for one in detections(model, _as_floats(tensors))]

    return in_batches(found, pictures, batch_size=batch_size)


def _as_floats(pictures: Iterable[Tensor]) -> list[Tensor]:
    """Grey values of 0 to 1."""
    return [picture.float() / LARGEST_GREY for picture in pictures]


def _as_true(lesions: LesionInstances) -> Lesions:
    return Lesions(lesions.masks.cpu().numpy().astype(bool), lesions.labels.cpu().numpy())


def _as_predicted(lesions: Detections) -> Lesions:
    masks, labels, scores = (
        values.cpu().numpy() for values in (lesions.masks, lesions.labels, lesions.scores)
    )
    return Lesions(masks, labels, scores)
