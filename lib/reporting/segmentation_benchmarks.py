"""Benchmarks of segment everything and of SAM2CLIP2SAM against their originals."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam

import lib.foundation.mask_generator as ours
import lib.segmentation.plain_sam2clip2sam as plain
import lib.segmentation.sam2clip2sam as sam2clip2sam
from lib.data.scan import Scan, to_grey
from lib.data.store import StoredVolume
from lib.evaluation.segmentation import overlap
from lib.foundation.mask_generator import MaskGenerator
from lib.foundation.sam import build_sam
from lib.inference import best_device
from lib.reporting.benchmarks import compare
from lib.reporting.pictures import STYLE, panels
from lib.reporting.timing import time_parts

LIVELY_HYPERNETWORK, LIVELY_QUALITY = 30, 20  # spread a random network's masks and qualities

# The steps of lung segmentation, each by the function that does it: read plainly, and ours.
PLAIN_PARTS = {
    "segment everything": (SamAutomaticMaskGenerator, "generate"),
    "CLIP": (plain, "embed_crops"),
    "box prompts": (plain.SamPredictor, "predict"),
    "embedding again": (plain.SamPredictor, "set_image"),
}
LUNG_PARTS = {
    "embedding": (MaskGenerator, "embed"),
    "segment everything": (MaskGenerator, "propose"),
    "CLIP": (sam2clip2sam, "embed_crops"),
    "box prompts": (MaskGenerator, "segment_boxes"),
}


def device_name() -> str:
    """The first GPU's name, or ``"cpu"``."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def random_sam(variant: str) -> Sam:
    """A SAM with random weights whose masks are of many sizes and qualities; same every time."""
    torch.manual_seed(0)
    sam = build_sam(variant)
    with torch.no_grad():
        for network in sam.mask_decoder.output_hypernetworks_mlps:
            network.layers[-1].weight *= LIVELY_HYPERNETWORK
        sam.mask_decoder.iou_prediction_head.layers[-1].weight *= LIVELY_QUALITY
        sam.image_encoder.pos_embed.normal_()
    return sam


def quality_quantile(sam: Sam, grey: np.ndarray, *, share: float) -> float:
    """Threshold of predicted IoU that about a share of all masks of a slice passes, 0 to 1.

    Args:
        sam: the network.
        grey: uint8, shape (height, width).
        share: of masks, for example a third.
    """
    generator = MaskGenerator(
        sam, mode="fast", points_per_side=8, pred_iou_thresh=0.0, stability_score_thresh=0.0,
        box_nms_thresh=1.0,
    )  # fmt: skip
    records = generator.generate(_picture(grey))
    qualities = [record["predicted_iou"] for record in records]
    return float(np.clip(np.quantile(qualities, 1 - share), 0, 1))


def compare_generators(
    sam: Sam, *, greys: Sequence[np.ndarray], repetitions: int, mode: str, **settings: Any
) -> dict[str, Any]:
    """Time our generator against the original on the same slices, and compare their masks.

    Args:
        sam: the network of both.
        greys: slices, uint8.
        repetitions: timed calls of each, in turn.
        mode: of ours.
        settings: of both generators.

    Returns:
        What `lib.reporting.benchmarks.compare` returns; ``masks`` of the original and
        ``equal_masks``, how many of them ours has at the same place in the list with the same
        scores to the last bit; seconds of each part, of both.
    """
    pictures = [_picture(grey) for grey in greys]
    original = SamAutomaticMaskGenerator(sam, **settings)
    generator = MaskGenerator(sam, mode=mode, **settings)
    reference, mine = partial(_all, original, pictures), partial(_all, generator, pictures)
    expected, found = reference(), mine()
    pairs = [
        pair
        for theirs, ours_ in zip(expected, found, strict=True)
        for pair in zip(theirs, ours_, strict=False)
    ]
    decoder = sam.mask_decoder
    original_parts = {
        "encoder": (sam.image_encoder, "forward"),
        "decoder": (decoder.transformer, "forward"),
        "upscaling": (decoder.output_upscaling, "forward"),
        "bringing masks to size": (sam, "postprocess_masks"),
    }
    our_parts = {
        "encoder": (sam.image_encoder, "forward"),
        "decoder": (ours, "decode"),
        "upscaling": (ours, "upscale"),
        "bringing masks to size": (MaskGenerator, "_enlarged"),
    }
    parts = partial(_per_slice, len(greys))
    return compare(reference, mine, repetitions=repetitions, slices=len(greys)) | {
        "masks": sum(map(len, expected)),
        "our_masks": sum(map(len, found)),
        "equal_masks": sum(_same(*pair) for pair in pairs),
        "reference_parts": parts(time_parts(reference, original_parts)),
        "our_parts": parts(time_parts(mine, our_parts)),
    }


def compare_modes(
    sam: Sam, *, greys: Sequence[np.ndarray], repetitions: int, **settings: Any
) -> dict[str, dict[str, Any]]:
    """`compare_generators` for both modes, and for the exact one with a layer of crops.

    Args:
        sam: the small network.
        greys: slices, uint8; crops, which take long, are timed once on the first.
        repetitions: timed calls of each, in turn.
        settings: of both generators.
    """
    compared = partial(compare_generators, sam, **settings)
    return {
        "small, exact": compared(greys=greys, repetitions=repetitions, mode="exact"),
        "small, fast": compared(greys=greys, repetitions=repetitions, mode="fast"),
        "small, exact, 1 layer of crops": compared(
            greys=greys[:1], repetitions=1, mode="exact", crop_n_layers=1
        ),
    }


def compare_random(variant: str, grey: np.ndarray, *, repetitions: int) -> dict[str, Any]:
    """`compare_generators` for the exact mode of a large SAM of which a third of the masks pass.

    Args:
        variant: of `random_sam`.
        grey: a slice, uint8.
        repetitions: timed calls of each, in turn.
    """
    sam = random_sam(variant).to(best_device())
    return compare_generators(
        sam,
        greys=[grey],
        repetitions=repetitions,
        mode="exact",
        pred_iou_thresh=quality_quantile(sam, grey, share=1 / 3),
        stability_score_thresh=0.0,
    )


def spread_slices(volumes: Iterable[StoredVolume | np.ndarray], count: int) -> list[np.ndarray]:
    """Equidistant slices of each of some volumes, the first and the last included."""
    return [
        volume[index]
        for volume in volumes
        for index in np.linspace(0, len(volume) - 1, count, dtype=int)
    ]


def compare_lungs(
    weights: tuple[Path, Path],
    settings: Mapping[str, Any],
    *,
    greys: Sequence[np.ndarray],
    slices: Sequence[np.ndarray],
    repetitions: int,
) -> dict[str, dict[str, Any]]:
    """Time SAM2CLIP2SAM against its plain reading, and compare the lungs of both modes.

    Args:
        weights: files of SAM and CLIP.
        settings: of `lib.segmentation.sam2clip2sam.build_segmenter`.
        greys: slices for the times, uint8.
        slices: slices for the agreement, int16 HU or uint8.
        repetitions: timed calls of each, in turn.

    Returns:
        For ``exact`` and ``fast`` what `lib.reporting.benchmarks.compare` returns, seconds of each
        part, and ``agreement_mean`` and ``agreement_least``, IoUs with the exact mode's lungs.
    """
    # Slices are judged by themselves, as the plain reading does, though they come as one scan.
    settings = {**settings, "choice": {**settings["choice"], "continued_floor": None}}
    segmenters = {
        mode: sam2clip2sam.build_segmenter(
            *weights,
            **{**settings, "generator": {**settings["generator"], "mode": mode}},
        )
        for mode in ours.MODES
    }
    of_original = {
        name: value
        for name, value in settings["generator"].items()
        if name not in ("mode", "pictures_per_batch", "precision", "compiled")
    }
    exact = segmenters["exact"]
    sam, clip, choice = exact.generator.sam, exact.clip, exact.choice

    def reference() -> list[np.ndarray]:
        return [plain.plain_lungs(grey, sam, clip, choice, of_original) for grey in greys]

    expected = [exact(Scan(one[None]))[0] > 0 for one in slices]
    scan = Scan(np.stack(greys))
    parts = partial(_per_slice, len(greys))
    results = {}
    for mode, segmenter in segmenters.items():
        agreement = [
            overlap(segmenter(Scan(one[None]))[0] > 0, theirs)[1]
            for one, theirs in zip(slices, expected, strict=True)
        ]
        mine = partial(segmenter, scan)
        results[f"lungs, {mode}"] = compare(
            reference, mine, repetitions=repetitions, slices=len(greys)
        ) | {
            "agreement_mean": round(float(np.mean(agreement)), 5),
            "agreement_least": round(float(np.min(agreement)), 5),
            "reference_parts": parts(time_parts(reference, PLAIN_PARTS)),
            "our_parts": parts(time_parts(mine, LUNG_PARTS)),
        }
    return results


@matplotlib.rc_context(STYLE)
def parts_figure(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Seconds per slice in each part of the reference and of ours.

    Args:
        results: of `compare_generators` and `compare_lungs`.

    Returns:
        One panel of two stacked bars per comparison, each panel with its own scale.
    """
    figure, axes = panels(len(results), size=(3.2, 3.4))
    for axis, (name, result) in zip(axes, results.items(), strict=True):
        bars = {"reference": result["reference_parts"], "ours": result["our_parts"]}
        table = pd.DataFrame(bars).T.drop(columns="all").fillna(0.0)
        table.plot.bar(stacked=True, ax=axis, rot=0, legend=True, width=0.6)
        axis.set(ylabel="Seconds per slice")
        axis.set_title(f"{name}\n{result['ratio']:.1f} times as fast")
        axis.legend(loc="upper right", fontsize=7)
    return figure


def _picture(grey: np.ndarray) -> np.ndarray:
    return np.repeat(to_grey(grey)[..., None], 3, axis=2)


def _all(generator: Any, pictures: Sequence[np.ndarray]) -> list[list[dict]]:
    return [generator.generate(picture) for picture in pictures]


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records are equal to the last bit."""
    return all(np.array_equal(one[key], other[key]) for key in one)


def _per_slice(slices: int, seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value / slices, 4) for name, value in seconds.items()}
