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
- equation 7 takes the box of the whole mask, which one stray island stretches over both lungs; here
  it is the box of the mask's largest piece;
- equation 8 takes all that SAM answers to a box; here pieces wholly outside the box go, which are
  bowel gas or the table;
- nothing is said of slices without lungs; here a mask less similar than ``similarity_floor`` is no
  lung, and a slice without any is empty;
- slices are judged by themselves; here a mask that continues a lung of the next slice needs only
  ``continued_floor``, since the crescents above the diaphragm look less like lungs than bowel gas
  does.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip import CLIP
from scipy import ndimage
from torch import nn

from lib.data.masks import body_mask, largest_regions, separate_lungs, tissue_threshold
from lib.data.scan import Scan, to_grey
from lib.foundation.checkpoints import (
    expected_checkpoint,
    load_checkpoint,
    require_checkpoint,
)
from lib.foundation.clip import (
    build_clip,
    crop_to_mask,
    embed_crops,
    embed_sentences,
    similarity,
)
from lib.foundation.mask_generator import MaskGenerator, Proposals
from lib.foundation.sam import build_sam
from lib.inference import best_device, load_weights, one_thread

WITHIN = 0.5  # of the smaller of two masks, or of one; more in common, and they are one lung


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How lungs are chosen among the masks of a slice.

    Attributes:
        sentences: that describe lungs in axial CT.
        area: smallest and largest share of the slice that a mask may have (tau of equation 2).
        most_borders: borders of the slice that a mask may touch; the background touches four.
        regions: how many masks are taken; 1 is equation 6 to the letter.
        cut_to_box: whether a crop is cut to the box of its mask; equation 2 only multiplies.
        largest_piece: whether a box is drawn around the largest connected piece of a mask only.
        pieces_in_box: whether pieces of the final masks that lie wholly outside their box go.
        similarity_floor: least similarity of a lung; None takes the best whatever it is.
        continued_floor: least similarity of a mask that lies for its greater part where the next
            slice has lung; None makes no difference, nor does it without ``similarity_floor``.
        crops_per_batch: crops that CLIP sees together; bounds memory.
    """

    sentences: Sequence[str]
    area: tuple[float, float] = (0.005, 0.3)
    most_borders: int = 1
    regions: int = 2
    cut_to_box: bool = True
    largest_piece: bool = True
    pieces_in_box: bool = True
    similarity_floor: float | None = None
    continued_floor: float | None = None
    crops_per_batch: int = 256

    def __post_init__(self) -> None:
        low, high = self.area
        if not 0 <= low < high <= 1:
            raise ValueError(f"area is a smaller and a larger share of the slice, got {self.area}")
        if self.regions < 1 or not 0 <= self.most_borders <= 4:
            raise ValueError("regions is at least 1, most_borders 0 to 4")
        for name in ("similarity_floor", "continued_floor"):
            floor = getattr(self, name)
            if floor is not None and not -1 <= floor <= 1:
                raise ValueError(f"{name} lies in [-1, 1], got {floor}")


@dataclass(frozen=True, eq=False)
class Sight:
    """One slice after SAM has looked at it for the first time.

    Attributes:
        grey: uint8, shape (height, width).
        embedding: of the slice, kept for the box prompts.
        proposals: all masks (equation 1).
    """

    grey: np.ndarray
    embedding: torch.Tensor
    proposals: Proposals


@dataclass(frozen=True, eq=False)
class Journey:
    """One slice on its whole way, for masks and for pictures.

    Attributes:
        sight: the slice and all its masks (equation 1).
        candidates: those that pass the area filter, numbers of proposals (equation 2).
        crops: of the candidates, uint8.
        similarities: of the candidates to the sentences, shape (candidates,) (equation 5).
        chosen: regions of interest, numbers of candidates (equation 6).
        boxes: around them, (x0, y0, x1, y1), shape (chosen, 4) (equation 7).
        lungs: bool, shape (height, width) (equation 8).
    """

    sight: Sight
    candidates: np.ndarray
    crops: list[np.ndarray]
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
    similarities: np.ndarray, masks: np.ndarray, *, regions: int, floor: float | np.ndarray | None
) -> np.ndarray:
    """The masks most similar to the sentences (equation 6).

    Args:
        similarities: shape (masks,).
        masks: bool, shape (masks, height, width).
        regions: how many to take at most. One is the equation's arg max; further ones have at most
            half of the smaller mask in common with each that was taken before.
        floor: least similarity, of all masks or of each, or None.

    Returns:
        Numbers of masks, best first; none where no mask reaches its floor.
    """
    reaches = np.full(len(masks), True) if floor is None else similarities >= floor
    taken: list[int] = []
    for number in np.argsort(-similarities, kind="stable"):
        if len(taken) == regions:
            break
        overlaps = (_within_one_another(masks[number], masks[other]) for other in taken)
        if reaches[number] and not any(overlaps):
            taken.append(int(number))
    return np.array(taken, int)


def _within_one_another(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two masks share more than half of the smaller one."""
    smaller = min(np.count_nonzero(one), np.count_nonzero(other))
    return np.count_nonzero(one & other) > WITHIN * smaller


def boxes_around(masks: np.ndarray, *, largest_piece: bool = False) -> np.ndarray:
    """The tight box of each mask (equation 7): least and greatest x and y.

    Args:
        masks: bool, shape (masks, height, width), none empty.
        largest_piece: whether only the largest connected piece of a mask counts.

    Returns:
        (x0, y0, x1, y1) in pixels, shape (masks, 4).
    """
    pieces = [largest_regions(mask, 1) for mask in masks] if largest_piece else masks
    boxes = [
        (columns[0], rows[0], columns[-1], rows[-1])
        for mask in pieces
        for rows, columns in [(np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0)))]
    ]
    return np.array(boxes, float).reshape(-1, 4)


def pieces_in_boxes(masks: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Masks without the connected pieces that lie wholly outside of their boxes.

    Args:
        masks: bool, shape (masks, height, width).
        boxes: (x0, y0, x1, y1) in pixels, shape (masks, 4).

    Returns:
        bool, shape (masks, height, width).
    """
    kept = np.zeros_like(masks)
    for mask, box, result in zip(masks, boxes.astype(int), kept, strict=True):
        pieces = ndimage.label(mask, np.ones((3, 3)))[0]
        x0, y0, x1, y1 = box
        inside = np.unique(pieces[y0 : y1 + 1, x0 : x1 + 1])
        result[:] = np.isin(pieces, inside[inside > 0])
    return kept


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
            uint8, shape of the scan: 0 background, 1 right lung, 2 left lung. A slice without a
            mask that is similar enough to the sentences is empty.
        """
        lungs = np.zeros(scan.voxels.shape, bool)
        unclear = np.zeros(len(lungs), bool)
        bodies = body_mask(scan.voxels > tissue_threshold(scan.voxels))
        size, masks = self.generator.pictures_per_batch, 0
        for start in range(0, len(lungs), size):
            part = slice(start, start + size)
            journeys = self.choose(self.look(scan.voxels[part], bodies[part]))
            lungs[part] = [journey.lungs for journey in journeys]
            unclear[part] = [self._is_unclear(journey) for journey in journeys]
            masks += sum(len(journey.sight.proposals) for journey in journeys)
        self._continue(scan.voxels, bodies, lungs, unclear)
        if not masks:
            warnings.warn(
                "SAM returned no mask for any slice of a scan: are its weights trained, and the "
                "thresholds of predicted IoU and stability not too high?",
                stacklevel=2,
            )
        return separate_lungs(lungs)

    def _is_unclear(self, journey: Journey) -> bool:
        """Whether a slice could have further lungs if the next slice had them there."""
        floor, continued = self.choice.similarity_floor, self.choice.continued_floor
        if floor is None or continued is None or len(journey.chosen) == self.choice.regions:
            return False
        return bool(((journey.similarities >= continued) & (journey.similarities < floor)).any())

    def _continue(
        self, voxels: np.ndarray, bodies: np.ndarray, lungs: np.ndarray, unclear: np.ndarray
    ) -> None:
        """Follow lungs into unclear slices, from the first to the last and back, in place.

        These few slices are looked at once more, which is cheaper than to keep all masks of a scan.
        """
        for step in (1, -1):
            for here in range(len(lungs))[::step]:
                beside = here - step
                if not unclear[here] or not 0 <= beside < len(lungs) or not lungs[beside].any():
                    continue
                alone = slice(here, here + 1)
                (journey,) = self.choose(self.look(voxels[alone], bodies[alone]), [lungs[beside]])
                lungs[here] |= journey.lungs
                unclear[here] = self._is_unclear(journey)

    def look(self, voxels: np.ndarray, bodies: np.ndarray | None = None) -> list[Sight]:
        """Segment everything in some slices (equation 1).

        Args:
            voxels: shape (slices, height, width), int16 HU or uint8.
            bodies: where the fast mode looks for lungs, bool, same shape; None looks everywhere.

        Returns:
            One sight per slice, for `choose`.
        """
        greys = to_grey(voxels)
        bodies = [None] * len(greys) if bodies is None else bodies
        pictures = [np.repeat(grey[..., None], 3, axis=2) for grey in greys]
        with one_thread():
            embeddings = self.generator.embed(pictures)
            return [
                Sight(grey, embedding, self.generator.propose(picture, embedding, body=body))
                for grey, picture, embedding, body in zip(
                    greys, pictures, embeddings, bodies, strict=True
                )
            ]

    def choose(
        self, sights: Sequence[Sight], beside: Sequence[np.ndarray] | None = None
    ) -> list[Journey]:
        """Find the lungs among the masks of some slices and segment them (equations 2 to 8).

        Args:
            sights: of `look`; their slices are shown to CLIP together.
            beside: lungs of a slice next to each, where masks need only ``continued_floor``; None
                judges each slice by itself.

        Returns:
            One journey per slice.
        """
        candidates = [self._candidates(sight.proposals) for sight in sights]
        crops = [
            [crop_to_mask(sight.grey, mask, self.choice.cut_to_box) for mask in masks]
            for sight, numbers in zip(sights, candidates, strict=True)
            for masks in [sight.proposals.masks[numbers]]
        ]
        with one_thread():
            similarities = self._similarities(crops)
            floors = [
                self._floor(sight.proposals.masks[numbers], lungs)
                for sight, numbers, lungs in zip(
                    sights, candidates, beside or [None] * len(sights), strict=True
                )
            ]
            steps = zip(sights, candidates, crops, similarities, floors, strict=True)
            return [self._finished(*step) for step in steps]

    def _candidates(self, proposals: Proposals) -> np.ndarray:
        passed = passes_area_filter(
            proposals, area=self.choice.area, most_borders=self.choice.most_borders
        )
        return np.flatnonzero(passed)

    def _floor(self, masks: np.ndarray, lungs: np.ndarray | None) -> float | np.ndarray | None:
        """Least similarity of each mask, by the lungs of the next slice if they are given."""
        floor, continued = self.choice.similarity_floor, self.choice.continued_floor
        if lungs is None or floor is None or continued is None:
            return floor
        continues = (masks & lungs).sum(axis=(1, 2)) > WITHIN * masks.sum(axis=(1, 2))
        return np.where(continues, continued, floor)

    def _similarities(self, crops: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Similarities of the crops of each slice, computed for all slices together."""
        together = [crop for of_slice in crops for crop in of_slice]
        embeddings = embed_crops(self.clip, together, self.choice.crops_per_batch)
        values = similarity(embeddings, self.text).numpy()
        return np.split(values, np.cumsum([len(of_slice) for of_slice in crops])[:-1])

    def _finished(
        self,
        sight: Sight,
        candidates: np.ndarray,
        crops: list[np.ndarray],
        similarities: np.ndarray,
        floor: float | np.ndarray | None,
    ) -> Journey:
        """Equations 6 to 8 of one slice."""
        masks, size = sight.proposals.masks[candidates], sight.grey.shape
        chosen = regions_of_interest(
            similarities,
            masks,
            regions=self.choice.regions,
            floor=floor,
        )
        boxes = boxes_around(masks[chosen], largest_piece=self.choice.largest_piece)
        final = np.zeros((0, *size), bool)
        if len(boxes):
            final = self.generator.segment_boxes(sight.embedding, boxes, size)
            if self.choice.pieces_in_box:
                final = pieces_in_boxes(final, boxes)
        lungs = union(final, size)
        return Journey(sight, candidates, crops, similarities, chosen, boxes, lungs)


def preset(
    section: Mapping[str, Any], size: str, reading: str, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Settings of `build_segmenter` from their parts.

    Args:
        section: ``sentences`` and ``hashes`` for all; under ``readings`` the fields of `Choice`
            that a reading of the paper fixes; under ``small`` and ``paper`` the variants ``sam``
            and ``clip`` with their ``generator`` and ``choice``.
        size: ``"small"`` or ``"paper"``.
        reading: for example ``"top-2"`` or ``"literal"``.
        overrides: of the result, one level deep.

    Raises:
        ValueError: for an unknown reading.
    """
    if reading not in section["readings"]:
        raise ValueError(f"reading is one of {sorted(section['readings'])}, got {reading!r}")
    settings = {**section[size], "hashes": section["hashes"]}
    choice = {**settings["choice"], **section["readings"][reading]}
    settings["choice"] = {"sentences": section["sentences"], **choice}
    nested = {
        name: {**settings[name], **changed} if isinstance(changed, Mapping) else changed
        for name, changed in overrides.items()
    }
    return settings | nested


def weight_files(models: Path, settings: Mapping[str, Any], trained_on: str) -> tuple[Path, Path]:
    """Where the weights of both networks lie.

    Args:
        models: folder of all models, ``data/models``.
        settings: with the variants ``sam`` and ``clip`` and the ``hashes`` of a user's own files.
        trained_on: data set that the small networks were trained on.

    Returns:
        SAM's file and CLIP's.

    Raises:
        FileNotFoundError: naming the checkpoint with its address and SHA-256.
        ValueError: where a checkpoint is damaged.
    """
    return tuple(
        models / "lungs" / kind / trained_on / "best.safetensors"
        if settings[kind] == "small"
        else require_checkpoint(models, settings[kind], settings["hashes"])
        for kind in ("sam", "clip")
    )


def build_segmenter(
    sam_weights: Path,
    clip_weights: Path,
    *,
    sam: str,
    clip: str,
    hashes: Mapping[str, str],
    generator: Mapping[str, Any],
    choice: Mapping[str, Any],
) -> Sam2Clip2SamSegmenter:
    """The segmenter from plain settings, for ``map_scans``; weights are read once per process.

    Args:
        sam_weights: file of SAM's weights.
        clip_weights: file of CLIP's weights.
        sam: variant of SAM.
        clip: variant of CLIP.
        hashes: SHA-256 of a user's own files in place of the published ones, by variant.
        generator: keywords of `MaskGenerator`.
        choice: fields of `Choice`.

    Raises:
        FileNotFoundError: where a file is not there.
        ValueError: where a file is damaged or of another network, or a setting is out of range.
    """
    network_sam, network_clip = (
        _network(build, variant, file, hashes.get(variant), _changed(file))
        for build, variant, file in (
            (build_sam, sam, sam_weights),
            (build_clip, clip, clip_weights),
        )
    )
    return Sam2Clip2SamSegmenter(
        MaskGenerator(network_sam, **generator), network_clip, Choice(**choice)
    )


@lru_cache(maxsize=4)
def _network(
    build: Callable[[str], nn.Module], variant: str, file: Path, sha256: str | None, changed: int
) -> nn.Module:
    """A network with its weights on the best device; ``changed`` tells new files from old ones."""
    model = build(variant)
    if variant == "small":
        return load_weights(model, file).to(best_device())
    sha256 = sha256 or expected_checkpoint(variant).sha256
    model.load_state_dict(load_checkpoint(file, sha256))
    return model.requires_grad_(False).to(best_device())


def _changed(file: Path) -> int:
    """When a file was changed; 0 where it is not there."""
    return file.stat().st_mtime_ns if file.is_file() else 0
