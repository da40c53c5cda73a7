"""SAM2CLIP2SAM: SAM finds everything, CLIP tells which masks are lungs, SAM segments them by boxes.

Source: SAM2CLIP2SAM (Kollias et al. 2024), section 3.1; FACTS 1 and 9. Each equation is a function
that names it: 1 is `MaskGenerator.propose`, 2 `passes_area_filter` and `crop_to_mask`, 3
`embed_sentences`, 4 `embed_crops`, 5 `similarity`, 6 `regions_of_interest`, 7 `boxes_around`, 8
`MaskGenerator.segment_boxes` and `union`.

What the paper leaves open is a setting, and the paper's letter is a preset of its own:

- equation 2 keeps masks *larger* than a threshold "to filter out background masks", which are the
  largest; here both a smallest and a largest share of the slice are given;
- equation 6 takes one arg max, which is one lung; here the best ``regions`` masks are taken that do
  not lie within one another (SaLIP, whose equations these are, takes two);
- nothing is said of slices without lungs; here a mask less similar than ``similarity_floor`` is no
  lung, and a slice without any is empty.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from open_clip import CLIP
from segment_anything.modeling import Sam

from lib.data.masks import body_mask, separate_lungs, tissue_threshold
from lib.data.scan import Scan, to_grey
from lib.foundation.clip import (
    build_clip,
    crop_to_mask,
    embed_crops,
    embed_sentences,
    similarity,
)
from lib.foundation.mask_generator import MaskGenerator, Proposals
from lib.foundation.sam import build_sam
from lib.inference import best_device, one_thread

WITHIN = 0.5  # of the smaller of two masks; more in common, and they are the same lung


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How lungs are chosen among the masks of a slice.

    Attributes:
        sentences: that describe lungs in axial CT.
        area: smallest and largest share of the slice that a mask may have (tau of equation 2).
        most_borders: borders of the slice that a mask may touch; the background touches four.
        regions: how many masks are taken; 1 is equation 6 to the letter.
        cut_to_box: whether a crop is cut to the box of its mask; equation 2 only multiplies.
        similarity_floor: least similarity of a lung; None takes the best whatever it is.
        crops_per_batch: crops that CLIP sees together; bounds memory.
    """

    sentences: Sequence[str]
    area: tuple[float, float] = (0.005, 0.3)
    most_borders: int = 1
    regions: int = 2
    cut_to_box: bool = True
    similarity_floor: float | None = None
    crops_per_batch: int = 256

    def __post_init__(self) -> None:
        low, high = self.area
        if not 0 <= low < high <= 1:
            raise ValueError(f"area is a smaller and a larger share of the slice, got {self.area}")
        if self.regions < 1 or not 0 <= self.most_borders <= 4:
            raise ValueError("regions is at least 1, most_borders 0 to 4")
        if self.similarity_floor is not None and not -1 <= self.similarity_floor <= 1:
            raise ValueError(f"similarity_floor lies in [-1, 1], got {self.similarity_floor}")


@dataclass(frozen=True, eq=False)
class Journey:
    """One slice on its way, for pictures.

    Attributes:
        grey: uint8, shape (height, width).
        proposals: all masks (equation 1).
        candidates: those that pass the area filter, numbers of proposals (equation 2).
        crops: of the candidates, uint8.
        similarities: of the candidates to the sentences, shape (candidates,) (equation 5).
        chosen: regions of interest, numbers of candidates (equation 6).
        boxes: around them, (x0, y0, x1, y1), shape (chosen, 4) (equation 7).
        lungs: bool, shape (height, width) (equation 8).
    """

    grey: np.ndarray
    proposals: Proposals
    candidates: np.ndarray
    crops: list[np.ndarray] = field(repr=False)
    similarities: np.ndarray
    chosen: np.ndarray
    boxes: np.ndarray
    lungs: np.ndarray


def passes_area_filter(
    proposals: Proposals, *, area: tuple[float, float], most_borders: int
) -> np.ndarray:
    """Which masks may be lungs by their size and place (equation 2).

    Args:
        proposals: of one slice.
        area: smallest and largest share of the slice, both excluded.
        most_borders: borders of the slice that a mask may touch.

    Returns:
        bool, shape (masks,).
    """
    height, width = proposals.masks.shape[1:]
    shares = proposals.masks.mean(axis=(1, 2))
    edges = np.array([0, 0, width - 1, height - 1])
    borders = (proposals.boxes == edges).sum(axis=1)
    return (shares > area[0]) & (shares < area[1]) & (borders <= most_borders)


def regions_of_interest(
    similarities: np.ndarray, masks: np.ndarray, *, regions: int, floor: float | None
) -> np.ndarray:
    """The masks most similar to the sentences (equation 6).

    Args:
        similarities: shape (masks,).
        masks: bool, shape (masks, height, width).
        regions: how many to take at most. One is the equation's arg max; further ones have at most
            half of the smaller mask in common with each that was taken before.
        floor: least similarity, or None.

    Returns:
        Numbers of masks, best first; none where no mask reaches the floor.
    """
    taken: list[int] = []
    for number in np.argsort(-similarities, kind="stable"):
        if len(taken) == regions or (floor is not None and similarities[number] < floor):
            break
        if not any(_within_one_another(masks[number], masks[other]) for other in taken):
            taken.append(int(number))
    return np.array(taken, int)


def _within_one_another(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two masks share more than half of the smaller one."""
    smaller = min(np.count_nonzero(one), np.count_nonzero(other))
    return np.count_nonzero(one & other) > WITHIN * smaller


def boxes_around(masks: np.ndarray) -> np.ndarray:
    """The tight box of each mask (equation 7): least and greatest x and y.

    Args:
        masks: bool, shape (masks, height, width), none empty.

    Returns:
        (x0, y0, x1, y1) in pixels, shape (masks, 4).
    """
    boxes = [
        (columns[0], rows[0], columns[-1], rows[-1])
        for mask in masks
        for rows, columns in [(np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0)))]
    ]
    return np.array(boxes, float).reshape(-1, 4)


def union(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """All masks of a slice as one (equation 8).

    Args:
        masks: bool, shape (masks, height, width).
        size: height and width, for no mask at all.

    Returns:
        bool, shape (height, width).
    """
    return masks.any(axis=0) if len(masks) else np.zeros(size, bool)


class Sam2Clip2SamSegmenter:
    """Lungs of a scan, slice by slice, by SAM and CLIP.

    Args:
        generator: segment everything and box prompts with one SAM.
        clip: from `lib.foundation.clip.build_clip`, with weights.
        choice: how lungs are chosen.

    Raises:
        ValueError: without sentences.
    """

    def __init__(self, generator: MaskGenerator, clip: CLIP, choice: Choice) -> None:
        self.generator, self.clip, self.choice = generator, clip, choice
        self.text = embed_sentences(clip, choice.sentences)

    def __call__(self, scan: Scan) -> np.ndarray:
        """Segment the lungs.

        Args:
            scan: whole scan or single slice, Hounsfield units or 8-bit.

        Returns:
            uint8, shape of the scan: 0 background, 1 right lung, 2 left lung.
        """
        lungs = np.zeros(scan.voxels.shape, bool)
        bodies = self._bodies(scan)
        size = self.generator.pictures_per_batch
        for start in range(0, len(lungs), size):
            part = slice(start, start + size)
            lungs[part] = [
                journey.lungs for journey in self.journeys(scan.voxels[part], bodies[part])
            ]
        return separate_lungs(lungs)

    def journeys(self, voxels: np.ndarray, bodies: np.ndarray | None = None) -> list[Journey]:
        """Segment some slices and keep every step.

        Args:
            voxels: shape (slices, height, width), int16 HU or uint8.
            bodies: where the fast mode looks for lungs, bool, same shape; None looks everywhere.

        Returns:
            One journey per slice.
        """
        greys = to_grey(voxels)
        bodies = [None] * len(greys) if bodies is None else bodies
        with one_thread():
            pictures = [np.repeat(grey[..., None], 3, axis=2) for grey in greys]
            embeddings = self.generator.embed(pictures)
            steps = zip(pictures, embeddings, bodies, strict=True)
            proposals = [self.generator.propose(p, e, body=body) for p, e, body in steps]
            candidates = [self._candidates(one) for one in proposals]
            crops = [
                [crop_to_mask(grey, mask, self.choice.cut_to_box) for mask in one.masks[numbers]]
                for grey, one, numbers in zip(greys, proposals, candidates, strict=True)
            ]
            similarities = self._similarities(crops)
            return [
                self._finished(*step)
                for step in zip(
                    greys, proposals, candidates, crops, similarities, embeddings, strict=True
                )
            ]

    def _bodies(self, scan: Scan) -> np.ndarray:
        """Where a grid point is worth asking: inside the patient's outline."""
        return body_mask(scan.voxels > tissue_threshold(scan.voxels))

    def _candidates(self, proposals: Proposals) -> np.ndarray:
        passed = passes_area_filter(
            proposals, area=self.choice.area, most_borders=self.choice.most_borders
        )
        return np.flatnonzero(passed)

    def _similarities(self, crops: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Similarity of all crops of several slices, seen together."""
        together = [crop for of_slice in crops for crop in of_slice]
        embeddings = embed_crops(self.clip, together, self.choice.crops_per_batch)
        values = similarity(embeddings, self.text).numpy()
        return np.split(values, np.cumsum([len(of_slice) for of_slice in crops])[:-1])

    def _finished(
        self,
        grey: np.ndarray,
        proposals: Proposals,
        candidates: np.ndarray,
        crops: list[np.ndarray],
        similarities: np.ndarray,
        embedding: torch.Tensor,
    ) -> Journey:
        """Equations 6 to 8 of one slice."""
        masks = proposals.masks[candidates]
        chosen = regions_of_interest(
            similarities,
            masks,
            regions=self.choice.regions,
            floor=self.choice.similarity_floor,
        )
        boxes = boxes_around(masks[chosen])
        final = np.zeros((0, *grey.shape), bool)
        if len(boxes):
            final = self.generator.segment_boxes(embedding, boxes, grey.shape)
        lungs = union(final, grey.shape)
        return Journey(grey, proposals, candidates, crops, similarities, chosen, boxes, lungs)


@lru_cache(maxsize=1)
def load_models(sam: str, clip: str, sam_weights: Path, clip_weights: Path) -> tuple[Sam, CLIP]:
    """Both networks on the best device, once per process.

    Args:
        sam: variant of SAM.
        clip: variant of CLIP.
        sam_weights: file of its weights.
        clip_weights: file of its weights.

    Raises:
        FileNotFoundError: where a file is not there.
        ValueError: where a file is damaged or of another network.
    """
    device = best_device()
    return build_sam(sam, sam_weights).to(device), build_clip(clip, clip_weights).to(device)


def build_segmenter(
    sam_weights: Path,
    clip_weights: Path,
    *,
    sam: str,
    clip: str,
    generator: dict,
    choice: dict,
) -> Sam2Clip2SamSegmenter:
    """The segmenter from plain settings, for ``map_scans``.

    Args:
        sam_weights: file of SAM's weights.
        clip_weights: file of CLIP's weights.
        sam: variant of SAM.
        clip: variant of CLIP.
        generator: keywords of `MaskGenerator`.
        choice: fields of `Choice`.
    """
    networks = load_models(sam, clip, sam_weights, clip_weights)
    return Sam2Clip2SamSegmenter(
        MaskGenerator(networks[0], **generator), networks[1], Choice(**choice)
    )
