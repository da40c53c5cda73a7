"""Training of the small SAM: points and boxes on everything that a slice shows.

As SAM was trained (focal and Dice loss 20 : 1, best of three masks for an ambiguous point, squared
error of the predicted quality), with these differences, all because the network is small and the
targets are few:

- prompts are single points and jittered boxes, without rounds of corrections, since segment
  everything and equation 8 use nothing else;
- a box trains the mask for unambiguous prompts, a point the three others;
- the quality of a mask is its IoU with the region that it fits best, whichever was meant, so that
  all masks of a prompt learn their quality and not only the best one;
- losses are taken at the decoder's size, against the share of each of its pixels that is covered.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from PIL import Image
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset
from torchvision.ops import masks_to_boxes, sigmoid_focal_loss

from lib.data.scan import to_grey
from lib.foundation.regions import BOTH_LUNGS, LUNG_PIECE, slice_regions
from lib.foundation.sam import grey_to_picture

FOCAL_WEIGHT = 20.0
LUNG_SHARE = 0.6  # of the prompts, where a slice shows lungs
BOX_SHARE = 0.4  # of the prompts; the others are points
BOX_JITTER = 0.05  # of the box's sides
SMALLEST_SHARE = 0.004  # of the slice; the network's pixels are too large for smaller regions
SMALLEST_REGION = 12  # pixels of the network's input, after augmentation
LARGEST_TURN = 5.0  # degrees
SCALES = (0.9, 1.25)
LARGEST_SHIFT = 0.05  # of the picture's side
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


def labelled_slices(voxels: np.ndarray, lungs: np.ndarray, *, side: int) -> list[LabelledSlice]:
    """Slices of a scan as the small SAM learns from them.

    Args:
        voxels: shape (slices, height, width), int16 HU or uint8.
        lungs: lung mask of the same shape.
        side: pixels per side of the network's input.

    Returns:
        One per slice. Both lungs as one and pieces of a lung are left out: the network shall learn
        to part the lungs, and to keep a lung together.
    """
    return [_labelled(one, mask, side) for one, mask in zip(voxels, lungs, strict=True)]


def _labelled(voxels: np.ndarray, lungs: np.ndarray, side: int) -> LabelledSlice:
    regions = [
        region
        for region in slice_regions(voxels, lungs, smallest_share=SMALLEST_SHARE)
        if region.name not in (BOTH_LUNGS, LUNG_PIECE)
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
    """Slices with random prompts and augmentation, drawn from PyTorch's random numbers.

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

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Picture, targets, regions, points, boxes and kinds of prompt of one slice."""
        one = self.slices[index]
        grey = torch.from_numpy(one.grey).float()
        regions, is_lung = torch.from_numpy(one.regions), torch.from_numpy(one.is_lung)
        if self.augment:
            grey, regions = augmented(grey, regions)
        visible = regions.sum((1, 2)) >= SMALLEST_REGION
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
    normalised = (grey_to_picture(batch.pictures) - sam.pixel_mean) / sam.pixel_std
    embeddings = sam.image_encoder(normalised)
    encode = sam.prompt_encoder
    results = []
    for index, embedding in enumerate(embeddings.split(1)):
        labels = torch.ones_like(batch.points[index, :, :1], dtype=torch.int)
        by_point, no_mask = encode((batch.points[index][:, None], labels), None, None)
        by_box, _ = encode(None, batch.boxes[index], None)
        prompts = torch.where(batch.by_box[index][:, None, None], by_box, by_point)
        results.append(
            sam.mask_decoder.predict_masks(embedding, encode.get_dense_pe(), prompts, no_mask)
        )
    logits, quality = zip(*results, strict=True)
    return torch.stack(logits), torch.stack(quality)


def prompt_loss(sam: Sam, batch: PromptBatch) -> Tensor:
    """Focal, Dice and quality loss of a batch, mean over its prompts.

    Args:
        sam: the network.
        batch: on its device.

    Returns:
        Scalar.
    """
    logits, quality = predict_masks(sam, batch)
    coarse = partial(functional.adaptive_avg_pool2d, output_size=logits.shape[-2:])
    flat = logits.flatten(0, 1)  # (slices * prompts, 4, rows, columns)
    targets = coarse(batch.targets.flatten(0, 1)[:, None].float()).expand_as(flat)
    focal = sigmoid_focal_loss(flat, targets).mean((2, 3))
    losses = FOCAL_WEIGHT * focal + dice_loss(flat, targets)  # (slices * prompts, 4)
    of_mask = torch.where(batch.by_box.flatten(), losses[:, 0], losses[:, 1:].amin(1))
    with torch.no_grad():
        regions = [coarse(one[None].float())[0] > 0.5 for one in batch.regions]
        fits = torch.stack([best_overlap(*pair) for pair in zip(logits, regions, strict=True)])
    return of_mask.mean() + functional.mse_loss(quality, fits)


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
    """Mean IoU of the masks that the network itself would choose, as a validation score.

    A box is answered by the mask for unambiguous prompts, a point by the best of three by predicted
    quality; both are compared with the region that was meant.

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
            logits, quality = predict_masks(sam, batch)
        side = batch.pictures.shape[-1]
        flat = functional.interpolate(logits.flatten(0, 1), (side, side), mode="bilinear")
        best = torch.where(batch.by_box.flatten(), 0, 1 + quality.flatten(0, 1)[:, 1:].argmax(1))
        chosen = flat[torch.arange(len(flat)), best]
        targets = batch.targets.flatten(0, 1)
        overlaps.append(_paired_overlap(chosen > 0, targets))
    if not overlaps:
        raise ValueError("the validation part is empty, so no epoch can be chosen")
    return float(torch.cat(overlaps).mean())


def _paired_overlap(ours: Tensor, theirs: Tensor) -> Tensor:
    """IoU of masks in pairs, shape (masks,)."""
    common, union = (ours & theirs).sum((1, 2)), (ours | theirs).sum((1, 2))
    return common / union.clamp(min=1)
