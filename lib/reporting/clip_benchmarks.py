"""Benchmark of 3-D CNN with BERT: clips from the store against a plain loop over picture files.

The plain loop is the public code's way of reading (FACTS 4.5 to 4.7), written anew: for every clip,
in every epoch and for every set of slices, each slice and its mask are opened as JPEG files with
Pillow, composed, resized, and in training transformed one after another by torchvision. Both ways
make the same draws and end in the same network; their clips agree but for interpolation and
rounding.

What can be gained is bounded by the network, which costs the same in both: preparation is compared
alone, and with the network.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import matplotlib
import numpy as np
import torch
from lightning_fabric import Fabric
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import lognorm
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from lib.classification.clip_augmentation import draw_affine, draw_crop, middle_crop
from lib.classification.clips import (
    ComposedScan,
    channel_statistics,
    composition,
    load_composed,
    training_clip,
)
from lib.classification.cnn_bert import CnnBert, embed_scan
from lib.classification.inputs import ScanItem
from lib.classification.resampling import random_positions, slice_sets
from lib.data.phantom import make_phantom, plan_phantoms
from lib.data.scan import to_grey
from lib.data.store import save_volume
from lib.reporting.benchmarks import JPEG_QUALITY, compare
from lib.reporting.pictures import STYLE, new_figure

SHORTEST, MEDIAN, LONGEST = 2, 49, 548  # kept slices of a scan of the published test list
SPREAD = 0.64  # deviation of their logarithm: 875 of 3,455 have fewer than 32
MULTIPLIED = 8192  # rows and columns of the matrices that tell a GPU's peak

Clip = Callable[["FiledScan", int], Tensor]


@dataclass(frozen=True)
class FiledScan:
    """A scan both ways: in the store, and as picture files.

    Attributes:
        item: in the store.
        pictures: JPEG file of each slice.
        masks: JPEG file of each slice's lung mask, black and white.
    """

    item: ScanItem
    pictures: list[Path]
    masks: list[Path]

    @property
    def length(self) -> int:
        """Number of slices."""
        return len(self.pictures)


def scan_lengths(scans: int) -> list[int]:
    """Numbers of kept slices like those of the published test list (FACTS 4.4).

    Equidistant quantiles of a log-normal distribution with the published median and share of scans
    below 32, cut to the published range.

    Args:
        scans: how many.
    """
    quantiles = (np.arange(scans) + 0.5) / scans
    drawn = lognorm(SPREAD, scale=MEDIAN).ppf(quantiles)
    return np.clip(np.rint(drawn), SHORTEST, LONGEST).astype(int).tolist()


def draw_scans(lengths: Sequence[int], folder: Path, *, drawn: int, size: int) -> list[FiledScan]:
    """Phantoms of some lengths, written both ways; the slices of one are repeated to each length.

    Slices are 8-bit pictures, as in the paper's data set.

    Args:
        lengths: slices of each scan.
        folder: for a folder per scan.
        drawn: slices of the phantom that is drawn.
        size: height and width of its slices in pixels.
    """
    record, *_ = plan_phantoms(scans_per_class={"test": 1}, seed=0, slices=(drawn, drawn))
    made = make_phantom(record, size=size, hounsfield=False)
    return [
        save_scan(made.scan.voxels, made.lungs, length, folder / f"scan{number}")
        for number, length in enumerate(lengths)
    ]


def save_scan(voxels: np.ndarray, lungs: np.ndarray, length: int, folder: Path) -> FiledScan:
    """Write a scan of some length both ways, its slices those of another, over and over.

    Args:
        voxels: int16 HU or uint8, shape (slices, height, width).
        lungs: above 0 where there is lung, same shape.
        length: slices of the written scan.
        folder: made; must not exist.
    """
    folder.mkdir(parents=True)
    chosen = np.arange(length) % len(voxels)
    save_volume(folder / "scan.b2nd", voxels[chosen])
    save_volume(folder / "lungs.b2nd", lungs[chosen])
    files = {"slice": to_grey(voxels), "mask": np.where(lungs > 0, np.uint8(255), np.uint8(0))}
    for name, slices in files.items():
        for number, index in enumerate(chosen):
            picture = Image.fromarray(slices[index])
            picture.save(folder / f"{name}{number}.jpg", quality=JPEG_QUALITY)
    return FiledScan(
        ScanItem(folder.name, folder / "scan.b2nd", folder / "lungs.b2nd", 0),
        *([folder / f"{name}{number}.jpg" for number in range(length)] for name in files),
    )


# ----------------------------------------------------------------------------- the plain loop


def plain_picture(scan: FiledScan, position: int, settings: Mapping[str, Any]) -> Image.Image:
    """One slice, opened, composed and resized; lung is brighter than half, for JPEG is lossy."""
    grey = np.asarray(Image.open(scan.pictures[position]))
    lungs = np.asarray(Image.open(scan.masks[position]))
    planes = {"R": grey, "M": lungs, "L": np.where(lungs > 127, grey, np.uint8(0))}
    picture = Image.fromarray(np.stack([planes[name] for name in settings["channels"]], axis=-1))
    return picture.resize(2 * [settings["resized_size"]], Image.Resampling.BILINEAR)


def plain_clip(pictures: Sequence[Image.Image], settings: Mapping[str, Any]) -> Tensor:
    """Pictures of slices as a clip, float32, shape (3, slices, height, width)."""
    tensors = [functional.to_dtype(functional.pil_to_tensor(one), scale=True) for one in pictures]
    statistics = channel_statistics(settings["channels"], settings["channel_statistics"])
    normal = [functional.normalize(one, *statistics) for one in tensors]
    return torch.stack(normal, dim=1)


def plain_training_clip(scan: FiledScan, seed: int, *, settings: Mapping[str, Any]) -> Tensor:
    """A random clip; draws as in ``training_clip``, affine transform and multi-scale crop both."""
    generator, length = np.random.default_rng(seed), settings["resized_size"]
    positions = random_positions(scan.length, settings["slices"], generator)
    change = draw_affine(generator, length, settings["affine_ranges"])
    crop, flip = draw_crop(generator, length), generator.random() < 0.5
    pictures = []
    for position in positions:
        picture = functional.affine(
            plain_picture(scan, position, settings),
            angle=change.angle,
            translate=[change.across, change.down],
            scale=change.scale,
            shear=[change.shear, 0],
            interpolation=InterpolationMode.BILINEAR,
        )
        picture = functional.resized_crop(picture, *crop, 2 * [settings["image_size"]])
        picture = functional.hflip(picture) if flip else picture
        picture = functional.adjust_brightness(picture, change.brightness)
        pictures.append(functional.adjust_contrast(picture, change.contrast))
    return plain_clip(pictures, settings)


def plain_judged_clip(
    scan: FiledScan, positions: np.ndarray, *, settings: Mapping[str, Any]
) -> Tensor:
    """A clip for judging: the middle of each slice, every slice opened again."""
    crop = middle_crop(settings["resized_size"], settings["image_size"])
    pictures = [plain_picture(scan, position, settings) for position in positions]
    return plain_clip([functional.crop(picture, *crop) for picture in pictures], settings)


def plain_embeddings(
    model: CnnBert, scan: FiledScan, *, settings: Mapping[str, Any], fabric: Fabric
) -> Tensor:
    """Embeddings of all sets of a scan, one after another, shape (sets, width)."""
    model.eval()
    found = []
    with torch.inference_mode(), fabric.autocast():
        for positions in slice_sets(scan.length, settings["slices"]):
            clip = plain_judged_clip(scan, positions, settings=settings)
            found.append(model.embed(fabric.to_device(clip[None])).embedding)
    return torch.cat(found)


# ----------------------------------------------------------------------------------- both ways


def stored_clips(
    scans: Sequence[FiledScan], *, settings: Mapping[str, Any], in_memory: bool
) -> Clip:
    """Our way to random clips of some scans.

    Args:
        scans: all that will be asked for.
        settings: of the classifier.
        in_memory: composed and resized once, then kept; otherwise read for every clip.
    """
    load = load_composed if in_memory else ComposedScan
    statistics = channel_statistics(settings["channels"], settings["channel_statistics"])
    opened = {one.item.scan_id: load(one.item, **composition(settings)) for one in scans}

    def clip(scan: FiledScan, seed: int) -> Tensor:
        return training_clip(
            opened[scan.item.scan_id],
            np.random.default_rng(seed),
            slices=settings["slices"],
            size=settings["image_size"],
            affine=settings["affine_ranges"],
            multi_scale_crop=True,
            statistics=statistics,
        )

    return clip


def batches(
    clip: Clip, scans: Sequence[FiledScan], *, settings: Mapping[str, Any]
) -> Iterator[Tensor]:
    """One clip of each scan, in batches of shape (scans, 3, slices, height, width)."""
    for start in range(0, len(scans), settings["batch_scans"]):
        some = enumerate(scans[start : start + settings["batch_scans"]], start)
        yield torch.stack([clip(scan, seed) for seed, scan in some])


def take_steps(model: nn.Module, clips: Iterator[Tensor], *, fabric: Fabric) -> float:
    """Train a network on batches of clips, one step each; the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.train()
    for batch in clips:
        optimizer.zero_grad()
        with fabric.autocast():
            scores = model(fabric.to_device(batch))
            targets = torch.arange(len(batch), device=scores.device) % 2
            loss = nn.functional.cross_entropy(scores, targets)
        fabric.backward(loss)
        optimizer.step()
    return loss.item()


def compare_preparation(
    scans: Sequence[FiledScan], *, settings: Mapping[str, Any], in_memory: bool, repetitions: int
) -> dict[str, Any]:
    """Time of one random clip of each scan, without any network.

    Args:
        scans: one clip of each per repetition.
        settings: of the classifier, as in `lib.classification.cnn_bert`.
        in_memory: as for ``stored_clips``.
        repetitions: timed rounds of each way, in turn.

    Returns:
        What `lib.reporting.benchmarks.compare` returns, the plain loop being the reference;
        ``clips``, and ``clips_per_second`` and ``reference_clips_per_second`` by the medians.
    """
    ways = (
        partial(plain_training_clip, settings=settings),
        stored_clips(scans, settings=settings, in_memory=in_memory),
    )
    work = [lambda way=way: [way(scan, seed) for seed, scan in enumerate(scans)] for way in ways]
    return _compare_clips(*work, clips=len(scans), settings=settings, repetitions=repetitions)


def compare_training(
    model: nn.Module,
    scans: Sequence[FiledScan],
    *,
    settings: Mapping[str, Any],
    in_memory: bool,
    repetitions: int,
    fabric: Fabric,
) -> dict[str, Any]:
    """Time of training steps on one random clip of each scan, preparation and network together.

    Args:
        model: the network, on the device.
        scans: one clip of each per repetition.
        settings: of the classifier.
        in_memory: as for ``stored_clips``.
        repetitions: timed rounds of each way, in turn.
        fabric: device and precision.

    Returns:
        As ``compare_preparation``.
    """
    ways = (
        partial(plain_training_clip, settings=settings),
        stored_clips(scans, settings=settings, in_memory=in_memory),
    )
    work = [
        lambda way=way: take_steps(model, batches(way, scans, settings=settings), fabric=fabric)
        for way in ways
    ]
    return _compare_clips(*work, clips=len(scans), settings=settings, repetitions=repetitions)


def compare_embedding(
    model: CnnBert,
    scans: Sequence[FiledScan],
    *,
    settings: Mapping[str, Any],
    repetitions: int,
    fabric: Fabric,
) -> dict[str, Any]:
    """Time of embedding all sets of slices of each scan, reading included.

    Args:
        model: the network, on the device.
        scans: to be embedded.
        settings: of the classifier.
        repetitions: timed rounds of each way, in turn.
        fabric: device and precision.

    Returns:
        As ``compare_preparation``, a set counting as a clip; and ``lengths`` of the scans.
    """
    arguments = {"settings": settings, "fabric": fabric}
    lengths = [scan.length for scan in scans]
    result = _compare_clips(
        lambda: [plain_embeddings(model, scan, **arguments) for scan in scans],
        lambda: [embed_scan(model, scan.item, **arguments) for scan in scans],
        clips=sum(len(slice_sets(length, settings["slices"])) for length in lengths),
        settings=settings,
        repetitions=repetitions,
    )
    return result | {"lengths": lengths}


def _compare_clips(
    plain: Callable[[], object],
    ours: Callable[[], object],
    *,
    clips: int,
    settings: Mapping[str, Any],
    repetitions: int,
) -> dict[str, Any]:
    """Two ways in turn, with clips per second."""
    result = compare(plain, ours, repetitions=repetitions, slices=clips * settings["slices"])
    return result | {
        "clips": clips,
        "clips_per_second": round(clips / result["our_median"], 2),
        "reference_clips_per_second": round(clips / result["reference_median"], 2),
    }


# --------------------------------------------------------------------------------------- a GPU


def random_batch(settings: Mapping[str, Any], *, fabric: Fabric) -> Tensor:
    """A batch of noise on the device, shape (scans, 3, slices, height, width)."""
    size = settings["image_size"]
    shape = (settings["batch_scans"], 3, settings["slices"], size, size)
    return torch.randn(shape, device=fabric.device)


def arithmetic(
    model: nn.Module, clips: Tensor, *, fabric: Fabric, repetitions: int = 10
) -> dict[str, float]:
    """Speed of training steps on clips that are already there, and the share of peak arithmetic.

    Args:
        model: the network, on the device.
        clips: one batch, on the device.
        fabric: device and precision.
        repetitions: timed steps, after one to warm up.

    Returns:
        ``clips_per_second`` of the network alone; ``teraflops_per_second``, forward and backward as
        PyTorch counts them; ``peak_teraflops_per_second``, of a large product of matrices in the
        same precision on the same device; ``share_of_peak``.
    """
    with FlopCounterMode(display=False) as counter:
        take_steps(model, iter([clips]), fabric=fabric)
    seconds = _seconds(lambda: take_steps(model, iter(repetitions * [clips]), fabric=fabric))
    speed = counter.get_total_flops() * repetitions / seconds / 1e12
    peak = peak_arithmetic(fabric) / 1e12
    return {
        "clips_per_second": round(len(clips) * repetitions / seconds, 2),
        "teraflops_per_second": round(speed, 4),
        "peak_teraflops_per_second": round(peak, 4),
        "share_of_peak": round(speed / peak, 4),
    }


def peak_arithmetic(fabric: Fabric, *, size: int | None = None, repetitions: int = 5) -> float:
    """Floating-point operations per second of a product of two square matrices, the best of some.

    Args:
        fabric: device and precision.
        size: rows of the matrices; None takes ``MULTIPLIED`` on a GPU, an eighth elsewhere.
        repetitions: products.
    """
    size = size or (MULTIPLIED if fabric.device.type == "cuda" else MULTIPLIED // 8)
    matrix = torch.randn(size, size, device=fabric.device)
    with torch.no_grad(), fabric.autocast():
        half = matrix.bfloat16() if torch.is_autocast_enabled(fabric.device.type) else matrix
        best = min(_seconds(lambda: half @ half) for _ in range(repetitions + 1))
    return 2 * size**3 / best


def _seconds(work: Callable[[], object]) -> float:
    """Of one call, with all that it leaves to a GPU."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    begin = perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return perf_counter() - begin


@matplotlib.rc_context(STYLE)
def clips_figure(results: Mapping[str, Mapping[str, Any]], *, wanted: float) -> Figure:
    """By how much each case is faster than the plain loop, with its interval.

    Args:
        results: by case, of the comparisons.
        wanted: the ratio asked for.
    """
    compared = {name: result for name, result in results.items() if "ratio" in result}
    figure = new_figure((7.0, 0.8 + 0.36 * len(compared)))
    axis = figure.subplots()
    places = range(len(compared))
    ends = np.array([result["ratio_interval"] for result in compared.values()])
    axis.hlines(places, *ends.T, linewidth=3)
    axis.plot([result["ratio"] for result in compared.values()], places, "o", color="black")
    axis.axvline(wanted, color="black", linestyle="--", label=f"asked for: {wanted:g}")
    axis.set_xscale("log")
    axis.set_xticks([1, 2, 3, 5, 10, 20, 50], ["1", "2", "3", "5", "10", "20", "50"])
    axis.minorticks_off()
    axis.set_yticks(places, list(compared))
    axis.invert_yaxis()
    axis.set_xlabel("Clips per second, ours / plain loop")
    axis.legend(loc="lower right")
    return figure
