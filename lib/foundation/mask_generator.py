"""Segment everything: the behaviour of ``SamAutomaticMaskGenerator``, exactly or fast.

Source: SAM2CLIP2SAM, section 3.1, equation 1; segment-anything 1.0, whose parameters, helpers and
record format are used as they are.

- ``exact`` gives the same masks in the same order with the same scores. It is faster because the
  decoder does nothing twice (`lib.foundation.prompt_decoder`) and because a mask that its predicted
  IoU will drop is neither upscaled nor brought to the picture's size.
- ``fast`` also leaves out grid points outside the body and sifts the masks twice: first on the
  decoder's own logits (a quarter of SAM's input size) with thresholds that are a little too kind,
  then the few that are left at the picture's size by the thresholds themselves. A mask that the
  first sieve drops, though the second would have kept it, is the only way in which its masks can
  differ from the exact ones by more than rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from segment_anything.modeling import Sam
from segment_anything.utils.amg import (
    batched_mask_to_box,
    box_xyxy_to_xywh,
    build_all_layer_point_grids,
    calculate_stability_score,
    coco_encode_rle,
    generate_crop_boxes,
    is_box_near_crop_edge,
    mask_to_rle_pytorch,
    uncrop_boxes_xyxy,
    uncrop_masks,
)
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_area, nms

from lib.foundation.prompt_decoder import (
    SharedPicture,
    decode,
    prompts_per_chunk,
    share_picture,
    upscale,
)
from lib.inference import in_batches, run_batches

MODES = ("exact", "fast")
OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDER_STABILITY = 0.25  # by which the first sieve of the fast mode asks for less
KINDER_OVERLAP = 0.15  # by which it lets boxes overlap more
MASKS_AT_A_TIME = 16  # brought to the picture's size together; bounds memory
EVERY_NEIGHBOUR = np.ones((3, 3))  # an island or hole is joined over corners too


@dataclass(frozen=True, kw_only=True)
class GeneratorSettings:
    """The parameters of ``SamAutomaticMaskGenerator``, with its names and defaults.

    Attributes:
        points_per_side: of the grid of prompts; None where ``point_grids`` is given.
        points_per_batch: prompts decoded together; bounds memory, changes no result.
        pred_iou_thresh: least predicted IoU.
        stability_score_thresh: least IoU of the mask at a higher and at a lower cut-off.
        stability_score_offset: by which the cut-off of the logits is moved for that.
        box_nms_thresh: of two masks with boxes of a larger IoU the better one is kept.
        crop_n_layers: layers of crops that are worked on besides the whole picture.
        crop_nms_thresh: as ``box_nms_thresh``, between crops; masks of small crops win.
        crop_overlap_ratio: of crops in the first layer, as a share of the picture's shorter side.
        crop_n_points_downscale_factor: the grid of layer n has this factor ** n fewer points.
        point_grids: own grids of points in [0, 1], shape (points, 2) as (x, y), one per layer.
        min_mask_region_area: smaller islands and holes are removed, in pixels.
        output_mode: how records hold the mask: ``"binary_mask"``, ``"uncompressed_rle"``, or
            ``"coco_rle"`` (needs pycocotools).
    """

    points_per_side: int | None = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    point_grids: Sequence[np.ndarray] | None = None
    min_mask_region_area: int = 0
    output_mode: str = "binary_mask"

    def __post_init__(self) -> None:
        if (self.points_per_side is None) == (self.point_grids is None):
            raise ValueError("give either points_per_side or point_grids")
        if self.points_per_side is not None and self.points_per_side < 1:
            raise ValueError(f"points_per_side is at least 1, got {self.points_per_side}")
        for name in ("pred_iou_thresh", "stability_score_thresh", "box_nms_thresh",
                     "crop_nms_thresh"):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} lies between 0 and 1, got {getattr(self, name)}")
        if self.points_per_batch < 1 or self.crop_n_layers < 0 or self.min_mask_region_area < 0:
            raise ValueError("points_per_batch is at least 1, crop layers and areas at least 0")
        if self.output_mode not in OUTPUT_MODES:
            raise ValueError(f"output_mode is one of {OUTPUT_MODES}, got {self.output_mode!r}")

    def grids(self) -> Sequence[np.ndarray]:
        """Points in [0, 1] as (x, y) for each layer of crops."""
        if self.point_grids is not None:
            return self.point_grids
        return build_all_layer_point_grids(
            self.points_per_side, self.crop_n_layers, self.crop_n_points_downscale_factor
        )


@dataclass(frozen=True, eq=False)
class Proposals:
    """The masks of one picture, best first as the generator orders them.

    Attributes:
        masks: bool, shape (masks, height, width).
        boxes: first and last column and row, (x0, y0, x1, y1) in pixels, shape (masks, 4).
        predicted_iou: SAM's own judgement, shape (masks,).
        stability: stability score, shape (masks,).
        points: the prompt of each mask in pixels, (x, y), shape (masks, 2).
        crops: the crop that each mask was found in, (x0, y0, x1, y1), shape (masks, 4).
    """

    masks: np.ndarray
    boxes: np.ndarray
    predicted_iou: np.ndarray
    stability: np.ndarray
    points: np.ndarray
    crops: np.ndarray

    def __len__(self) -> int:
        return len(self.masks)

    def take(self, chosen: np.ndarray) -> "Proposals":
        """Some of the masks, by index or by truth value."""
        return Proposals(*(values[chosen] for values in vars(self).values()))

    def records(self, output_mode: str = "binary_mask") -> list[dict[str, Any]]:
        """The records that ``SamAutomaticMaskGenerator.generate`` returns."""
        return [
            {
                "segmentation": _encoded(self.masks[index], output_mode),
                "area": int(np.count_nonzero(self.masks[index])),
                "bbox": box_xyxy_to_xywh(self.boxes[index]).tolist(),
                "predicted_iou": self.predicted_iou[index].item(),
                "point_coords": [self.points[index].tolist()],
                "stability_score": self.stability[index].item(),
                "crop_box": box_xyxy_to_xywh(self.crops[index]).tolist(),
            }
            for index in range(len(self))
        ]


@dataclass(frozen=True)
class Frame:
    """Where a crop lies in its picture, and how its pixels map to SAM's input.

    Attributes:
        crop: (x0, y0, x1, y1) in pixels of the picture.
        size: height and width of the picture.
        input_side: pixels per side of SAM's input.
    """

    crop: tuple[int, int, int, int]
    size: tuple[int, int]
    input_side: int

    @property
    def crop_size(self) -> tuple[int, int]:
        """Height and width of the crop."""
        x0, y0, x1, y1 = self.crop
        return y1 - y0, x1 - x0

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the crop in SAM's input; the rest of the square is padding."""
        return ResizeLongestSide.get_preprocess_shape(*self.crop_size, self.input_side)

    def values_of_picture(self, logits: Tensor) -> tuple[int, int]:
        """Rows and columns of the decoder's logits that show the crop, not padding."""
        share = [used / self.input_side for used in self.input_size]
        return tuple(ceil(n * part) for n, part in zip(logits.shape[-2:], share, strict=True))

    def pixels_per_value(self, logits: Tensor) -> tuple[float, float]:
        """Columns and rows of the crop for each of the decoder's logits."""
        sides = zip(self.crop_size, self.input_size, logits.shape[-2:], strict=True)
        rows, columns = (pixels * self.input_side / (used * few) for pixels, used, few in sides)
        return columns, rows

    def to_input(self, points: np.ndarray) -> np.ndarray:
        """Points (x, y) of the crop in pixels of SAM's input, float64, any leading axes."""
        return ResizeLongestSide(self.input_side).apply_coords(points, self.crop_size)

    def inside(self, points: np.ndarray, region: np.ndarray) -> np.ndarray:
        """Whether points (x, y) of the crop, shape (points, 2), lie in a region of the picture."""
        columns, rows = (points + self.crop[:2]).astype(int).T
        return region[rows, columns]


class Candidates(NamedTuple):
    """Masks of one crop on the way to proposals, as long as none is chosen yet.

    Attributes:
        logits: as the decoder gives them, shape (masks, rows, columns).
        quality: predicted IoU, shape (masks,).
        points: the prompts in pixels of the crop, (x, y), shape (masks, 2).
        stability: stability score, shape (masks,); 0 before `MaskGenerator` has judged it.
        boxes: (x0, y0, x1, y1) in pixels of the crop, shape (masks, 4); 0 before.
    """

    logits: Tensor
    quality: Tensor
    points: Tensor
    stability: Tensor
    boxes: Tensor

    def take(self, chosen: Tensor) -> "Candidates":
        """Some of them, by index or by truth value."""
        return Candidates(*(values[chosen] for values in self))


class MaskGenerator:
    """Finds all masks in a picture with one SAM, and answers box prompts on the same embedding.

    Args:
        sam: the network, on its device.
        mode: ``"exact"`` or ``"fast"``.
        precision: of the fast mode, ``"float32"`` or ``"bfloat16"``.
        compiled: whether the fast mode compiles the encoder with ``torch.compile``.
        pictures_per_batch: pictures or crops that the fast mode encodes together; bounds memory.
        settings: fields of `GeneratorSettings`.

    Raises:
        ValueError: for an unknown mode or precision, or a setting out of range.
    """

    def __init__(
        self,
        sam: Sam,
        *,
        mode: str = "exact",
        precision: str = "float32",
        compiled: bool = False,
        pictures_per_batch: int = 8,
        **settings: Any,
    ) -> None:
        if mode not in MODES or precision not in PRECISIONS:
            raise ValueError(
                f"the mode is one of {MODES}, the precision one of {(*PRECISIONS,)}, "
                f"got {mode!r} and {precision!r}"
            )
        if mode == "exact" and (precision != "float32" or compiled):
            raise ValueError("the exact mode runs in float32 and is not compiled")
        self.sam, self.exact = sam, mode == "exact"
        self.pictures_per_batch = 1 if self.exact else pictures_per_batch
        self.precision = PRECISIONS[precision]
        self.settings = GeneratorSettings(**settings)
        self._encode = torch.compile(sam.image_encoder) if compiled else sam.image_encoder

    def generate(self, picture: np.ndarray) -> list[dict[str, Any]]:
        """All masks of one picture, as ``SamAutomaticMaskGenerator.generate`` returns them.

        Args:
            picture: uint8, shape (height, width, 3).

        Returns:
            One record per mask.

        Raises:
            ValueError: for anything but an 8-bit picture of three channels.
        """
        (embedding,) = self.embed([picture])
        return self.propose(picture, embedding).records(self.settings.output_mode)

    @torch.inference_mode()
    def embed(self, pictures: Sequence[np.ndarray]) -> list[Tensor]:
        """Embeddings of whole pictures, for `propose` and `segment_boxes`.

        Args:
            pictures: uint8, shape (height, width, 3) each.

        Returns:
            One embedding of shape (1, channels, rows, columns) per picture, on the device.

        Raises:
            ValueError: for anything but 8-bit pictures of three channels.
        """
        for picture in pictures:
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise ValueError(
                    "a picture for SAM is uint8 of shape (height, width, 3), "
                    f"got {picture.dtype} of shape {picture.shape}"
                )
        with self._autocast():
            return in_batches(self._embed_batch, pictures, batch_size=self.pictures_per_batch)

    @torch.inference_mode()
    def propose(
        self, picture: np.ndarray, embedding: Tensor, *, body: np.ndarray | None = None
    ) -> Proposals:
        """Segment everything in one picture (equation 1).

        Args:
            picture: uint8, shape (height, width, 3).
            embedding: of this picture, from `embed`.
            body: bool, shape (height, width); the fast mode leaves out grid points outside it.

        Returns:
            The masks; none where the network found none that is good enough.

        Raises:
            ValueError: if the body does not fit the picture.
        """
        size = picture.shape[:2]
        if body is not None and body.shape != size:
            raise ValueError(f"the body has shape {body.shape}, the picture {size}")
        boxes, layers = generate_crop_boxes(
            size, self.settings.crop_n_layers, self.settings.crop_overlap_ratio
        )
        cuts = [picture[y0:y1, x0:x1] for x0, y0, x1, y1 in boxes[1:]]
        embeddings = [embedding, *self.embed(cuts)]
        grids = self.settings.grids()
        with self._autocast():
            found = [
                self._propose_in_crop(self._frame(tuple(box), size), grids[layer], one, body)
                for box, layer, one in zip(boxes, layers, embeddings, strict=True)
            ]
        proposals = _joined(found)
        if len(boxes) > 1:
            proposals = proposals.take(_best_of_crops(proposals, self.settings.crop_nms_thresh))
        if self.settings.min_mask_region_area > 0:
            proposals = without_small_regions(proposals, self.settings)
        return proposals

    @torch.inference_mode()
    def segment_boxes(
        self, embedding: Tensor, boxes: np.ndarray, size: tuple[int, int]
    ) -> np.ndarray:
        """Promptable SAM: one mask for each box on a picture (equation 8).

        Args:
            embedding: of the picture, from `embed`.
            boxes: (x0, y0, x1, y1) in pixels, shape (boxes, 4).
            size: height and width of the picture.

        Returns:
            bool, shape (boxes, height, width); small islands and holes are mended here too.
        """
        frame = self._frame((0, 0, size[1], size[0]), size)
        corners = frame.to_input(np.asarray(boxes, float).reshape(-1, 2, 2)).reshape(-1, 4)
        with self._autocast():
            prompts, _ = self.sam.prompt_encoder(
                points=None,
                boxes=torch.as_tensor(corners, dtype=torch.float32, device=embedding.device),
                masks=None,
            )
            shared = share_picture(self.sam, embedding)
            decoded = decode(self.sam, shared, prompts, exact=self.exact)
            logits = upscale(self.sam, decoded, shared.grid)[:, 0]
        masks = (self._enlarged(logits, frame) > self.sam.mask_threshold).cpu().numpy()
        least = self.settings.min_mask_region_area
        return np.stack([_filled(mask, least) for mask in masks]) if least > 0 else masks

    # -------------------------------------------------------------------------------- inside
    def _autocast(self) -> torch.autocast:
        device = self.sam.pixel_mean.device.type
        return torch.autocast(device, self.precision, enabled=self.precision != torch.float32)

    def _frame(self, crop: tuple[int, int, int, int], size: tuple[int, int]) -> Frame:
        return Frame(crop, size, self.sam.image_encoder.img_size)

    def _embed_batch(self, pictures: Sequence[np.ndarray]) -> list[Tensor]:
        """Embeddings of pictures of any sizes, resized as the original does."""
        resize = ResizeLongestSide(self.sam.image_encoder.img_size).apply_image
        device = self.sam.pixel_mean.device
        resized = [torch.as_tensor(resize(picture), device=device) for picture in pictures]
        inputs = [self.sam.preprocess(one.permute(2, 0, 1).contiguous()) for one in resized]
        return list(self._encode(torch.stack(inputs)).float().split(1))

    def _propose_in_crop(
        self, frame: Frame, grid: np.ndarray, embedding: Tensor, body: np.ndarray | None
    ) -> Proposals:
        """All masks of one crop, without duplicates, in the picture's frame."""
        points = grid * np.array(frame.crop_size)[None, ::-1]
        if body is not None and not self.exact:
            points = points[frame.inside(points, body)]
        shared = share_picture(self.sam, embedding)
        parts = run_batches(
            lambda batch: self._sifted(self._candidates(batch, frame, shared), frame),
            points,
            batch_size=self.settings.points_per_batch,
        )
        if not parts:
            return _no_proposals(frame.size)
        found = Candidates(*map(torch.cat, zip(*parts, strict=True)))
        if not self.exact:
            found = self._judged_as_needed(found, frame)
        found = found.take(nms(found.boxes.float(), found.quality, self.settings.box_nms_thresh))
        some = found.logits.split(MASKS_AT_A_TIME)
        masks = torch.cat([self._enlarged(s, frame) > self.sam.mask_threshold for s in some])
        offset = torch.tensor(frame.crop[:2])
        return Proposals(
            masks=uncrop_masks(masks, frame.crop, *frame.size).cpu().numpy(),
            boxes=uncrop_boxes_xyxy(batched_mask_to_box(masks), frame.crop).cpu().numpy(),
            predicted_iou=found.quality.float().cpu().numpy(),
            stability=found.stability.cpu().numpy(),
            points=(found.points.cpu() + offset).numpy(),
            crops=np.tile(np.array(frame.crop), (len(masks), 1)),
        )

    def _candidates(self, points: np.ndarray, frame: Frame, shared: SharedPicture) -> Candidates:
        """Masks of a batch of prompts whose predicted IoU is high enough."""
        device, least = shared.keys.device, self.settings.pred_iou_thresh
        places = torch.as_tensor(frame.to_input(points), device=device)[:, None]
        labels = torch.ones(places.shape[:2], dtype=torch.int, device=device)
        prompts, _ = self.sam.prompt_encoder(points=(places, labels), boxes=None, masks=None)
        of_crop = torch.as_tensor(points, device=device)
        chunk = prompts_per_chunk(shared, len(points))
        found = []
        for part, place in zip(prompts.split(chunk), of_crop.split(chunk), strict=True):
            decoded = decode(self.sam, shared, part, exact=self.exact)
            quality = decoded.quality[:, 1:].float()  # without the mask for unambiguous prompts
            good = quality > least if least > 0 else quality == quality
            some = good.any(dim=1)
            logits = upscale(self.sam, decoded.take(some), shared.grid)[:, 1:]
            prompt, _ = good.nonzero(as_tuple=True)
            found.append((logits[good[some]].float(), quality[good], place[prompt]))
        logits, quality, place = map(torch.cat, zip(*found, strict=True))
        boxes = torch.zeros((len(logits), 4), device=device)
        return Candidates(logits, quality, place, torch.zeros_like(quality), boxes)

    def _sifted(self, candidates: Candidates, frame: Frame) -> Candidates:
        """Masks of a batch worth keeping until all prompts are answered, with their boxes."""
        return self._judged(candidates, frame) if self.exact else self._glanced(candidates, frame)

    def _glanced(self, candidates: Candidates, frame: Frame) -> Candidates:
        """Those that may be stable, judged on the decoder's own logits."""
        rows, columns = frame.values_of_picture(candidates.logits)
        values = candidates.logits[:, :rows, :columns]
        least = max(self.settings.stability_score_thresh - KINDER_STABILITY, 0)
        stability, stable = self._stable(values, least)
        scale = torch.tensor(frame.pixels_per_value(candidates.logits) * 2, device=values.device)
        boxes = batched_mask_to_box(values[stable] > self.sam.mask_threshold) * scale
        return candidates.take(stable)._replace(stability=stability[stable], boxes=boxes)

    def _judged_as_needed(self, candidates: Candidates, frame: Frame) -> Candidates:
        """`_judged`, but only of those that no better one makes a duplicate.

        One that fails no longer hides the duplicates behind it, so they come up in the next turn.
        """
        kinder = min(self.settings.box_nms_thresh + KINDER_OVERLAP, 1)
        judged = _no_candidates(candidates)
        waiting = candidates
        while len(waiting.quality):
            both = Candidates(*map(torch.cat, zip(judged, waiting, strict=True)))
            known = len(judged.quality)
            kept = nms(both.boxes.float(), both.quality, kinder)
            fresh = kept[kept >= known]
            if not len(fresh):
                break
            judged = Candidates(
                *map(torch.cat, zip(judged, self._judged(both.take(fresh), frame), strict=True))
            )
            left = torch.ones(len(both.quality), dtype=torch.bool, device=kept.device)
            left[:known], left[fresh] = False, False
            waiting = both.take(left)
        return judged

    def _judged(self, candidates: Candidates, frame: Frame) -> Candidates:
        """Those that are stable and not cut off by the crop, with their stability and boxes."""
        split = (values.split(MASKS_AT_A_TIME) for values in candidates)
        parts = [self._judged_part(Candidates(*part), frame) for part in zip(*split, strict=True)]
        return Candidates(*map(torch.cat, zip(*parts, strict=True)))

    def _judged_part(self, candidates: Candidates, frame: Frame) -> Candidates:
        """`_judged` for as many masks as may be in memory at the picture's size."""
        values = self._enlarged(candidates.logits, frame)
        stability, stable = self._stable(values, self.settings.stability_score_thresh)
        boxes = batched_mask_to_box(values[stable] > self.sam.mask_threshold)
        judged = candidates.take(stable)._replace(stability=stability[stable], boxes=boxes)
        height, width = frame.size
        return judged.take(~is_box_near_crop_edge(boxes, frame.crop, [0, 0, width, height]))

    def _stable(self, values: Tensor, least: float) -> tuple[Tensor, Tensor]:
        """Stability scores of masks, and which reach a threshold."""
        offset = self.settings.stability_score_offset
        scores = calculate_stability_score(values, self.sam.mask_threshold, offset)
        return scores, _at_least(scores, least)

    def _enlarged(self, logits: Tensor, frame: Frame) -> Tensor:
        """Logits at the crop's size, as the original brings them there or by two products."""
        if not len(logits):
            return logits.new_zeros((0, *frame.crop_size))
        if self.exact:
            return self.sam.postprocess_masks(logits[None], frame.input_size, frame.crop_size)[0]
        sides = zip(logits.shape[1:], frame.input_size, frame.crop_size, strict=True)
        rows, columns = (enlarging_matrix(few, frame.input_side, *rest) for few, *rest in sides)
        return rows.to(logits.device) @ logits.float() @ columns.to(logits.device).T


@cache
def enlarging_matrix(values: int, input_side: int, used: int, pixels: int) -> Tensor:
    """The original's way of bringing logits to a picture's size, along one axis, as a matrix.

    Bilinear interpolation to SAM's input, cutting off the padding, and bilinear interpolation to
    the picture are linear and work on rows and columns alike, so ``rows @ logits @ columns.T`` does
    all of it at once.

    Args:
        values: logits along this axis.
        input_side: pixels per side of SAM's input.
        used: pixels of it that show the picture.
        pixels: of the picture.

    Returns:
        Shape (pixels, values).
    """
    linear = partial(functional.interpolate, mode="linear", align_corners=False)
    return linear(linear(torch.eye(values)[None], input_side)[..., :used], pixels)[0].T


def _at_least(values: Tensor, least: float) -> Tensor:
    """Which values reach a threshold; a threshold of 0 is none, also for undefined values."""
    return values >= least if least > 0 else torch.ones_like(values, dtype=torch.bool)


def _no_candidates(like: Candidates) -> Candidates:
    """None, of the types of some."""
    return Candidates(*(values[:0] for values in like))


def _joined(parts: Sequence[Proposals]) -> Proposals:
    """The masks of several crops, one after another."""
    return Proposals(
        *(
            np.concatenate(values)
            for values in zip(*(vars(part).values() for part in parts), strict=True)
        )
    )


def _no_proposals(size: tuple[int, int]) -> Proposals:
    """Where there was no prompt."""
    return Proposals(
        masks=np.zeros((0, *size), bool),
        boxes=np.zeros((0, 4), np.int64),
        predicted_iou=np.zeros(0, np.float32),
        stability=np.zeros(0, np.float32),
        points=np.zeros((0, 2)),
        crops=np.zeros((0, 4), np.int64),
    )


def _best_of_crops(proposals: Proposals, iou_threshold: float) -> np.ndarray:
    """Indices without duplicates between crops; masks of small crops win."""
    areas = box_area(torch.as_tensor(proposals.crops))
    boxes = torch.as_tensor(proposals.boxes).float()
    return nms(boxes, 1 / areas, iou_threshold).numpy()


def without_small_regions(proposals: Proposals, settings: GeneratorSettings) -> Proposals:
    """Remove small islands and fill small holes, then remove the duplicates that this makes.

    Args:
        proposals: the masks of a picture.
        settings: ``min_mask_region_area`` and the thresholds of duplicates.

    Returns:
        Unchanged masks first, as the original orders them.
    """
    if not len(proposals):
        return proposals
    least = settings.min_mask_region_area
    masks = np.stack([_filled(one, least) for one in proposals.masks])
    unchanged = (masks == proposals.masks).all(axis=(1, 2))
    boxes = batched_mask_to_box(torch.as_tensor(masks))
    scores = torch.as_tensor(unchanged).float()
    threshold = max(settings.box_nms_thresh, settings.crop_nms_thresh)
    chosen = nms(boxes.float(), scores, threshold).numpy()
    boxes = np.where(unchanged[:, None], proposals.boxes, boxes.numpy())
    return replace(proposals, masks=masks, boxes=boxes).take(chosen)


def _filled(mask: np.ndarray, least: int) -> np.ndarray:
    """A mask without holes and then without islands of fewer pixels; its largest island stays."""
    holes, sizes = _regions(~mask)
    mask = mask | (sizes < least)[holes] & (holes > 0)
    islands, sizes = _regions(mask)
    kept = sizes >= least
    if len(sizes) > 1 and not kept[1:].any():
        kept[1 + np.argmax(sizes[1:])] = True
    return mask & kept[islands]


def _regions(region: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbered regions of a mask, and the pixels of each; number 0 is what is not in the mask."""
    numbers, _ = ndimage.label(region, EVERY_NEIGHBOUR)
    return numbers, np.bincount(numbers.ravel())


def _encoded(mask: np.ndarray, output_mode: str) -> np.ndarray | dict[str, Any]:
    """A mask as a record holds it."""
    if output_mode == "binary_mask":
        return mask
    (runs,) = mask_to_rle_pytorch(torch.as_tensor(mask)[None])
    return coco_encode_rle(runs) if output_mode == "coco_rle" else runs
