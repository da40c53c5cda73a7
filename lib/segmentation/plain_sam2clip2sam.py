"""SAM2CLIP2SAM read plainly: what `lib.segmentation.sam2clip2sam` is checked and timed against.

One slice at a time, the original mask generator, CLIP one crop at a time, and SAM's embedding
computed again for the box prompts. Nothing in the study's stages uses it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from open_clip import CLIP
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import Sam
from segment_anything.utils.amg import remove_small_regions

from lib.foundation.clip import crop_to_mask, embed_crops, embed_sentences, similarity
from lib.segmentation.sam2clip2sam import (
    Choice,
    boxes_around,
    pieces_in_boxes,
    regions_of_interest,
)


def plain_lungs(
    grey: np.ndarray, sam: Sam, clip: CLIP, choice: Choice, settings: Mapping[str, Any]
) -> np.ndarray:
    """Both lungs of one slice.

    Args:
        grey: uint8, shape (height, width).
        sam: with weights.
        clip: with weights.
        choice: how lungs are chosen.
        settings: keywords of ``SamAutomaticMaskGenerator``.

    Returns:
        bool, same shape.
    """
    picture = np.repeat(grey[..., None], 3, axis=2)
    records = SamAutomaticMaskGenerator(sam, **settings).generate(picture)
    masks = [record["segmentation"] for record in records if _may_be_lung(record, choice)]
    if not masks:
        return np.zeros(grey.shape, bool)

    text = embed_sentences(clip, choice.sentences)
    crops = [crop_to_mask(grey, mask, choice.cut_to_box) for mask in masks]
    similarities = torch.cat(
        [similarity(embed_crops(clip, [crop], batch_size=1), text) for crop in crops]
    ).numpy()
    chosen = regions_of_interest(
        similarities,
        np.stack(masks),
        regions=choice.regions,
        floor=choice.similarity_floor,
    )

    predictor = SamPredictor(sam)
    predictor.set_image(picture)
    lungs = np.zeros(grey.shape, bool)
    for box in boxes_around(np.stack(masks)[chosen], largest_piece=choice.largest_piece):
        mask = _mended(predictor.predict(box=box, multimask_output=False)[0][0], settings)
        lungs |= pieces_in_boxes(mask[None], box[None])[0] if choice.pieces_in_box else mask
    return lungs


def _mended(mask: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """A mask without small holes and islands, as the generator mends its own."""
    least = settings.get("min_mask_region_area", 0)
    for mode in ("holes", "islands") if least else ():
        mask, _ = remove_small_regions(mask, least, mode=mode)
    return mask


def _may_be_lung(record: Mapping[str, Any], choice: Choice) -> bool:
    """The area filter for a record of the original generator."""
    mask = record["segmentation"]
    low, high = choice.area
    borders = sum(edge.any() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))
    return low < mask.mean() < high and borders <= choice.most_borders
