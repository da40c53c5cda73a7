"""Training of the small SAM: points and boxes on everything that a slice shows.

As SAM was trained (focal and Dice loss 20 : 1, best of three masks for an ambiguous point, squared
error of the predicted quality), with these differences, all because the network is small and the
targets are few:

- prompts are single points and jittered boxes, without rounds of corrections, since segment
  everything and equation 8 use nothing else;
- a box trains the mask for unambiguous prompts, a point the three others;
- the quality of a mask is its IoU with the region that it fits best, whichever was meant, so that
  all masks of a prompt learn their quality and not only the best one;
- the matrices of the transformers learn by Muon instead of AdamW (`build_optimizers`);
- losses are taken at the size of the network's input, where outlines are finer than the decoder's
  pixels; only which of a point's three masks is best is judged at the decoder's size.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric, seed_everything
from PIL import Image
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Muon, Optimizer
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import masks_to_boxes, sigmoid_focal_loss

from lib.data.scan import LEFT_LUNG, RIGHT_LUNG, to_grey
from lib.data.splits import TRAIN, VALIDATION
from lib.data.store import open_volume
from lib.foundation.mask_generator import MaskGenerator
from lib.foundation.prompt_decoder import Decoded, upscale
from lib.foundation.regions import BONE, BOTH_LUNGS, FAT, LUNG_PIECE, SOFT_TISSUE, slice_regions
from lib.foundation.sam import SMALL, build_sam, grey_to_picture
from lib.inference import file_sha256, one_thread
from lib.training import Row, SeededOrder, fit, schedules

# Both lungs as one, and pieces of a lung, are left out: the network shall part the lungs and keep a
# lung together. Scraps of tissue are too many and too small for a small network.
LEFT_OUT = (BOTH_LUNGS, LUNG_PIECE, BONE, FAT, SOFT_TISSUE)
SMALLEST_LUNG = 0.005  # of the slice, in `found_lungs`; tips of lungs are not judged
FOCAL_WEIGHT = 20.0
NO_BALANCE = -1  # a weight of 0.25 on the inside makes an unsure network's masks small
LUNG_SHARE = 0.75  # of the prompts, where a slice shows lungs
BOX_SHARE = 0.5  # of the prompts; the others are points
BOX_JITTER = 0.05  # of the box's sides
SMALLEST_SHARE = 0.003  # of the slice; the network's pixels are too large for smaller regions
SMALLEST_VISIBLE = 0.0007  # of the picture, after augmentation
LARGEST_TURN = 3.0  # degrees
SCALES = (0.9, 1.1)
LARGEST_SHIFT = 0.03  # of the picture's side
GAINS = (0.8, 1.2)
LARGEST_OFFSET = 20.0  # grey values


@dataclass(frozen=True, eq=False)
class LabelledSlice:
    """One slice at the network's size, and what it shows.

    Attributes:
        grey: uint8, shape (side, side); a slice that is not square is padded at its end.
        regions: bool, shape (regions, side, side).
        is_lung: whether a region is the right or the left lung, shape (regions,).
    """

    grey: np.ndarray
    regions: np.ndarray
    is_lung: np.ndarray


class PromptBatch(NamedTuple):
    """Slices with prompts, all tensors on one device.

    Attributes:
        pictures: grey, float32, shape (slices, side, side).
        targets: what is meant by each prompt, bool, shape (slices, prompts, side, side).
        regions: everything a slice shows, bool, one tensor (regions, side, side) per slice.
        points: (x, y) in pixels, shape (slices, prompts, 2).
        boxes: (x0, y0, x1, y1) in pixels, shape (slices, prompts, 4).
        by_box: whether a prompt is its box, else its point, shape (slices, prompts).
    """

    pictures: Tensor
    targets: Tensor
    regions: list[Tensor]
    points: Tensor
    boxes: Tensor
    by_box: Tensor


def read_slices(
    scans: Iterable[tuple[Path, Path]], *, side: int, slices_per_scan: int
) -> list[LabelledSlice]:
    """Slices of stored scans as the small SAM learns from them.

    Args:
        scans: each a stored scan and its stored lung mask.
        side: pixels per side of the network's input.
        slices_per_scan: at most so many of each scan, equally spaced.

    Returns:
        One per slice, with all of its regions but those of `LEFT_OUT`.
    """
    return [_labelled(voxels, lungs, side) for voxels, lungs in _slices_of(scans, slices_per_scan)]


def _slices_of(
    scans: Iterable[tuple[Path, Path]], slices_per_scan: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Equally spaced slices of stored scans with their lung masks."""
    for volume, mask in scans:
        voxels, lungs = open_volume(volume), open_volume(mask)
        for index in evenly_spaced(range(len(voxels)), slices_per_scan):
            yield voxels[index], lungs[index]


def _labelled(voxels: np.ndarray, lungs: np.ndarray, side: int) -> LabelledSlice:
    regions = [
        region
        for region in slice_regions(voxels, lungs, smallest_share=SMALLEST_SHARE)
        if region.name not in LEFT_OUT
    ]
    return LabelledSlice(
        grey=_fit(to_grey(voxels), side, Image.Resampling.BILINEAR),
        regions=np.stack(
            [
                _fit(255 * region.mask.astype(np.uint8), side, Image.Resampling.BOX) > 127
                for region in regions
            ]
        ),
        is_lung=np.array([region.is_lung for region in regions]),
    )


def _fit(picture: np.ndarray, side: int, filter_: Image.Resampling) -> np.ndarray:
    """Resize the longer side and pad the shorter one at its end, as SAM does."""
    height, width = ResizeLongestSide.get_preprocess_shape(*picture.shape, side)
    resized = np.asarray(Image.fromarray(picture).resize((width, height), filter_))
    return np.pad(resized, ((0, side - height), (0, side - width)))


class PromptedSlices(Dataset):
    """Slices with random prompts and augmentation, both from the seed that comes with an index.

    Args:
        slices: what to prompt on.
        prompts: for each slice.
        augment: whether to turn, scale, shift, mirror and shade the slices.
    """

    def __init__(
        self, slices: Sequence[LabelledSlice], *, prompts: int, augment: bool = True
    ) -> None:
        self.slices, self.prompts, self.augment = slices, prompts, augment

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(
        self, asked: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Picture, targets, regions, points, boxes and kinds of prompt of one slice.

        Args:
            asked: index and seed, of `lib.training.SeededOrder`.
        """
        index, seed = asked
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._prompted(self.slices[index])

    def _prompted(
        self, one: LabelledSlice
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`__getitem__`, from PyTorch's random numbers."""
        grey = torch.from_numpy(one.grey).float()
        regions, is_lung = torch.from_numpy(one.regions), torch.from_numpy(one.is_lung)
        if self.augment:
            grey, regions = augmented(grey, regions)
        visible = regions.float().mean((1, 2)) >= SMALLEST_VISIBLE
        if not visible.any():  # moved out of sight: prompt for the whole picture
            regions, is_lung = torch.ones((1, *grey.shape), dtype=torch.bool), torch.tensor([False])
        else:
            regions, is_lung = regions[visible], is_lung[visible]
        meant = _draw_regions(is_lung, self.prompts)
        targets = regions[meant]
        by_box = torch.rand(self.prompts) < BOX_SHARE
        return grey, targets, regions, _points_inside(targets), _jittered_boxes(targets), by_box


def collate(items: Sequence[tuple]) -> PromptBatch:
    """Stack slices; their numbers of regions differ, so those stay a list."""
    pictures, targets, regions, points, boxes, by_box = zip(*items, strict=True)
    return PromptBatch(
        *map(torch.stack, (pictures, targets)),
        list(regions),
        *map(torch.stack, (points, boxes, by_box)),
    )


def augmented(grey: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
    """Turn, scale, shift, mirror and shade a slice with its regions, at random.

    Args:
        grey: float32, shape (side, side).
        regions: bool, shape (regions, side, side).

    Returns:
        Both, of the same shapes; black comes in from outside.
    """
    turn = torch.deg2rad(_uniform(-LARGEST_TURN, LARGEST_TURN))
    zoom = torch.exp(_uniform(*np.log(SCALES)))
    mirror = 1.0 if torch.rand(()) < 0.5 else -1.0
    shift = torch.stack([_uniform(-LARGEST_SHIFT, LARGEST_SHIFT) for _ in range(2)]) * 2
    turned = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()]).view(2, 2) / zoom
    affine = torch.cat([turned * torch.tensor([mirror, 1.0]), shift[:, None]], dim=1)
    grid = functional.affine_grid(affine[None], [1, 1, *grey.shape], align_corners=False)
    both = torch.cat([grey[None], regions.float()])[None]
    moved = functional.grid_sample(both, grid, align_corners=False)[0]
    shaded = moved[0] * _uniform(*GAINS) + _uniform(-LARGEST_OFFSET, LARGEST_OFFSET)
    return shaded.clamp(0, 255), moved[1:] > 0.5


def _uniform(low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(())


def _draw_regions(is_lung: Tensor, count: int) -> Tensor:
    """Indices of regions, lungs with a share of their own."""
    weights = torch.where(
        is_lung,
        LUNG_SHARE / is_lung.sum().clamp(min=1),
        (1 - LUNG_SHARE) / (~is_lung).sum().clamp(min=1),
    )
    return torch.multinomial(weights, count, replacement=True)


def _points_inside(targets: Tensor) -> Tensor:
    """A random pixel (x, y) of each mask, shape (masks, 2)."""
    chosen = torch.multinomial(targets.flatten(1).float(), 1)[:, 0]
    side = targets.shape[-1]
    return torch.stack([chosen % side, chosen // side], dim=1).float()


def _jittered_boxes(targets: Tensor) -> Tensor:
    """The box of each mask, its sides moved at random, shape (masks, 4)."""
    boxes = masks_to_boxes(targets)
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    moved = boxes + (2 * torch.rand(boxes.shape) - 1) * BOX_JITTER * sides
    return moved.clamp(0, targets.shape[-1] - 1)


def predict_masks(sam: Sam, batch: PromptBatch) -> tuple[Tensor, Tensor]:
    """Masks of all prompts of a batch.

    Args:
        sam: the network.
        batch: on its device.

    Returns:
        Logits at the decoder's size, shape (slices, prompts, 4, rows, columns), and predicted IoUs,
        shape (slices, prompts, 4).
    """
    slices, prompts = batch.by_box.shape
    normalised = (grey_to_picture(batch.pictures) - sam.pixel_mean) / sam.pixel_std
    embeddings = sam.image_encoder(normalised)
    labels = torch.ones((slices * prompts, 1), dtype=torch.int, device=embeddings.device)
    encode = sam.prompt_encoder
    by_point, no_mask = encode((batch.points.flatten(0, 1)[:, None], labels), None, None)
    by_box, _ = encode(None, batch.boxes.flatten(0, 1), None)
    asked = torch.where(batch.by_box.flatten()[:, None, None], by_box, by_point)

    # The decoder as in the original, but for the prompts of all slices together.
    decoder = sam.mask_decoder
    given = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([given.expand(len(asked), -1, -1), asked], dim=1)
    pictures = embeddings.repeat_interleave(prompts, dim=0) + no_mask
    positions = encode.get_dense_pe().expand(len(asked), -1, -1, -1)
    seen, keys = decoder.transformer(pictures, positions, tokens)
    quality = decoder.iou_prediction_head(seen[:, 0])
    decoded = Decoded(quality, seen[:, 1 : 1 + decoder.num_mask_tokens], keys)
    logits = upscale(sam, decoded, tuple(embeddings.shape[-2:]))
    return logits.unflatten(0, (slices, prompts)), quality.unflatten(0, (slices, prompts))


def prompt_loss(sam: Sam, batch: PromptBatch) -> Tensor:
    """Focal, Dice and quality loss of a batch, mean over its prompts.

    Args:
        sam: the network.
        batch: on its device.

    Returns:
        Scalar.
    """
    logits, quality = predict_masks(sam, batch)
    flat, targets = logits.flatten(0, 1), batch.targets.flatten(0, 1).float()
    coarse = partial(functional.adaptive_avg_pool2d, output_size=logits.shape[-2:])
    with torch.no_grad():
        of_point = mask_loss(flat[:, 1:], coarse(targets[:, None]).expand_as(flat[:, 1:]))
        trained = torch.where(batch.by_box.flatten(), 0, 1 + of_point.argmin(1))
        regions = [coarse(one[None].float())[0] > 0.5 for one in batch.regions]
        fits = torch.stack([best_overlap(*pair) for pair in zip(logits, regions, strict=True)])
    masks = flat[torch.arange(len(flat), device=flat.device), trained]
    (enlarged,) = functional.interpolate(masks[None], targets.shape[-2:], mode="bilinear")
    return mask_loss(enlarged, targets).mean() + functional.mse_loss(quality, fits)


def mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Focal and Dice loss of masks, 20 : 1.

    Args:
        logits: shape (..., rows, columns).
        targets: 0 to 1, same shape.

    Returns:
        Shape (...).
    """
    focal = sigmoid_focal_loss(logits, targets, alpha=NO_BALANCE).mean((-2, -1))
    return FOCAL_WEIGHT * focal + dice_loss(logits, targets)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """One minus the soft Dice coefficient.

    Args:
        logits: shape (..., rows, columns).
        targets: 0 to 1, same shape.

    Returns:
        Shape (...).
    """
    shares = logits.sigmoid()
    common = (shares * targets).sum((-2, -1))
    total = shares.sum((-2, -1)) + targets.sum((-2, -1))
    return 1 - (2 * common + 1) / (total + 1)


def best_overlap(logits: Tensor, regions: Tensor) -> Tensor:
    """Largest IoU of each mask with any region of the slice.

    Args:
        logits: shape (prompts, masks, rows, columns).
        regions: bool, shape (regions, rows, columns).

    Returns:
        Shape (prompts, masks).
    """
    ours, theirs = (logits > 0).flatten(2).float(), regions.flatten(1).float()
    common = ours @ theirs.T
    union = ours.sum(-1, keepdim=True) + theirs.sum(-1) - common
    return (common / union.clamp(min=1)).amax(-1)


def mean_overlap(sam: Sam, batches: Iterable[PromptBatch], *, fabric: Fabric) -> float:
    """Mean IoU of masks with the regions that were meant, as a validation score.

    A box is answered by the mask for unambiguous prompts, a point by the best of the three others.

    Args:
        sam: the network.
        batches: of the validation part.
        fabric: device and precision.

    Raises:
        ValueError: if there is no batch.
    """
    overlaps = []
    for batch in batches:
        batch = fabric.to_device(batch)
        with fabric.autocast():
            logits, _ = predict_masks(sam, batch)
        side = batch.pictures.shape[-1]
        masks = functional.interpolate(logits.flatten(0, 1), (side, side), mode="bilinear") > 0
        targets = batch.targets.flatten(0, 1)[:, None]
        common, union = ((one.sum((2, 3))) for one in (masks & targets, masks | targets))
        fits = common / union.clamp(min=1)  # (slices * prompts, 4)
        overlaps.append(torch.where(batch.by_box.flatten(), fits[:, 0], fits[:, 1:].amax(1)))
    if not overlaps:
        raise ValueError("the validation part is empty, so no epoch can be chosen")
    return float(torch.cat(overlaps).mean())


def train_small_sam(
    scans: Mapping[str, Sequence[tuple[Path, Path]]],
    *,
    settings: Mapping[str, Any],
    folder: Path,
    seed: int,
) -> tuple[Sam, list[Row]]:
    """Train the small SAM on scans with lung masks; the best epoch by IoU on validation slices.

    Args:
        scans: (scan, mask) of the parts, of `lib.data.manifest.scans_with_lungs`.
        settings: the section ``train_sam`` of params.yaml.
        folder: where weights and learning curve go.
        seed: of everything random.

    Returns:
        The network, in evaluation mode, and its learning curve.
    """
    read = partial(read_slices, side=SMALL.image_size)
    learned_from = read(scans[TRAIN], slices_per_scan=settings["slices_per_scan"])
    validated = read(scans[VALIDATION], slices_per_scan=settings["validation_slices_per_scan"])
    prompted = partial(PromptedSlices, prompts=settings["prompts"])
    seed_everything(seed, verbose=False)
    validation_batches = list(  # drawn once, so that epochs differ by the network alone
        DataLoader(
            prompted(validated, augment=False),
            batch_size=16,
            sampler=SeededOrder(len(validated)),
            collate_fn=collate,
        )
    )
    fabric = Fabric(precision=settings["precision"])
    seed_everything(seed, verbose=False)
    model = build_sam("small").requires_grad_(True)
    numbers = ("learning_rate", "betas", "weight_decay")
    optimizers = build_optimizers(model, **{name: settings[name] for name in numbers})
    data = [file_sha256(f) for part in (TRAIN, VALIDATION) for pair in scans[part] for f in pair]
    with one_thread():  # its operations are too small to be shared between cores
        history = fit(
            model,
            fabric=fabric,
            optimizers=optimizers,
            schedulers=schedules(optimizers, **settings["schedule"]),
            train_batches=steps_loader(
                prompted(learned_from),
                batch_size=settings["batch_slices"],
                steps=settings["steps_per_epoch"],
                processes=settings["loader_processes"],
            ),
            validation_batches=validation_batches,
            loss=prompt_loss,
            score=partial(mean_overlap, fabric=fabric),
            score_name="validation_iou",
            epochs=settings["epochs"],
            folder=folder,
            seed=seed,
            fingerprint={**settings, "data": data},
        )
    return model.eval(), history


def build_optimizers(
    sam: Sam, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> list[Optimizer]:
    """Muon for the matrices of both transformers, encoder and decoder; AdamW for all else.

    SAM was trained by AdamW alone. Muon (Jordan et al. 2024) moves a matrix by the same amount in
    all directions. On the phantom as many steps leave a quarter less of the lungs' Dice to be
    gained than AdamW's, for an eighth more time each. Its steps are as long as AdamW's, so both
    share the learning rate.

    Args:
        sam: the network.
        learning_rate: of both.
        betas: of AdamW.
        weight_decay: of both.
    """
    layers = (*sam.image_encoder.blocks, sam.mask_decoder.transformer)
    matrices = {
        linear.weight
        for layer in layers
        for linear in layer.modules()
        if isinstance(linear, nn.Linear)
    }
    others = [values for values in sam.parameters() if values not in matrices]
    inner = [values for values in sam.parameters() if values in matrices]  # in a fixed order
    return [
        AdamW(others, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True),
        Muon(inner, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
    ]


def evenly_spaced(items: Sequence, count: int) -> list:
    """At most ``count`` of some items at equal distances, first and last included."""
    chosen = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[index] for index in chosen]


def steps_loader(slices: Dataset, *, batch_size: int, steps: int, processes: int = 0) -> DataLoader:
    """Random batches, a fixed number per epoch, whatever the number of slices.

    Args:
        slices: of `PromptedSlices`.
        batch_size: slices per batch.
        steps: batches per epoch.
        processes: that load beside the training.
    """
    sampler = SeededOrder(len(slices), count=batch_size * steps)
    return DataLoader(
        slices, batch_size=batch_size, sampler=sampler, collate_fn=collate, num_workers=processes
    )


def found_lungs(
    generator: MaskGenerator, scans: Iterable[tuple[Path, Path]], *, slices_per_scan: int
) -> pd.DataFrame:
    """How well a trained SAM finds lungs, before anything picks them among its masks.

    Args:
        generator: segment everything with this SAM.
        scans: each a stored scan and its stored lung mask.
        slices_per_scan: at most so many of each scan, equally spaced.

    Returns:
        One row per slice and lung of at least `SMALLEST_LUNG` of the slice: ``best_mask``, the
        largest IoU of any mask with it, and ``by_box``, the IoU of the mask that the lung's true
        box prompts for.
    """
    rows = []
    for voxels, lungs in _slices_of(scans, slices_per_scan):
        sides = [
            side
            for side in (lungs == RIGHT_LUNG, lungs == LEFT_LUNG)
            if side.mean() > SMALLEST_LUNG
        ]
        if sides:
            rows += _found_in_slice(generator, to_grey(voxels), np.stack(sides))
    return pd.DataFrame(rows, columns=["best_mask", "by_box"])


def _found_in_slice(
    generator: MaskGenerator, grey: np.ndarray, sides: np.ndarray
) -> list[dict[str, float]]:
    """Rows of `found_lungs` for the lungs of one slice."""
    picture = np.repeat(grey[..., None], 3, axis=2)
    (embedding,) = generator.embed([picture])
    masks = generator.propose(picture, embedding).masks
    boxes = masks_to_boxes(torch.from_numpy(sides)).numpy()
    prompted = generator.segment_boxes(embedding, boxes, grey.shape)
    return [
        {
            "best_mask": max((_iou(side, one) for one in masks), default=0.0),
            "by_box": _iou(side, box),
        }
        for side, box in zip(sides, prompted, strict=True)
    ]


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.count_nonzero(one & other) / np.count_nonzero(one | other))
