"""What the classifiers are and what a scan costs them: design, parameters, FLOPs, time, memory.

A cost is that of ``predict`` on one stored scan, from reading it to its probabilities, so with
preparation and test-time augmentation, on untrained weights, which cost what trained ones do. Each
is measured in a process of its own, because the peak memory of a process never falls again.

FLOPs are PyTorch's own count (``torch.utils.flop_counter``) of what really runs: matrix products,
convolutions, attention, recurrent layers, a multiplication and an addition counting as two.
Pointwise operations, pooling and normalisation are not in it.
"""

import hashlib
import json
import math
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any, NamedTuple

import matplotlib
import pandas as pd
import torch
from lightning_fabric import Fabric, seed_everything
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatterMathtext, LogLocator, NullFormatter
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lib.classification import inputs
from lib.classification.inputs import ScanItem
from lib.data.files import whole_file
from lib.data.store import open_volume
from lib.reporting.pictures import LINE_COLOURS, STYLE, legend_beside, new_figure

CLASSIFIERS = "lib.classification"
MEGABYTE, GIGA = 1e6, 1e9
COST_COLUMNS = (
    "system", "preset", "parameters", "giga_flops", "seconds_per_scan", "peak_megabytes",
    "slices", "device",
)  # fmt: skip


class Cost(NamedTuple):
    """What one scan costs one classifier.

    Attributes:
        parameters: numbers that training moves, of all its networks.
        giga_flops: see the head of this module.
        seconds_per_scan: median of the repetitions, after a first run that does not count.
        peak_megabytes: on a GPU the most that PyTorch held allocated there; on a CPU by how much
            the resident memory of the process rose at most, weights included, over its size
            before the network was built.
        device: what ran it.
    """

    parameters: int
    giga_flops: float
    seconds_per_scan: float
    peak_megabytes: float
    device: str


def count_parameters(build: Callable[..., nn.Module], variant: Mapping[str, Any]) -> int:
    """Parameters of a network, counted without giving them memory where its builder allows that.

    Args:
        build: makes the network.
        variant: its arguments.
    """
    try:
        with torch.device("meta"):
            model = build(**variant)
    except (NotImplementedError, RuntimeError, ValueError):  # what reads weights needs real ones
        model = build(**variant)
    return sum(weights.numel() for weights in model.parameters())


def systems_table(systems: Mapping[str, ModuleType]) -> pd.DataFrame:
    """One row per classifier: what is published of it, what of this is ours.

    Args:
        systems: for each printed name the module, as `lib.classification.task` describes it.

    Returns:
        ``system``, ``source``, ``published``, ``ours``, ``parameters`` counted on the ``paper``
        preset, ``parameters_published`` (or computed from the published layers) where known, and
        ``layers``: ``as published`` or ``approximated``.
    """
    rows = [
        {
            "system": name,
            "source": module.CARD.source,
            "published": module.CARD.published,
            "ours": module.CARD.ours,
            "parameters": count_parameters(module.build, module.VARIANTS["paper"]),
            "parameters_published": module.CARD.parameters,
            "layers": "approximated" if module.CARD.approximation else "as published",
        }
        for name, module in systems.items()
    ]
    table = pd.DataFrame(rows)
    return table.astype({"parameters_published": "Int64"}) if rows else table


def inference_cost(
    classifier: str,
    preset: str,
    settings: Mapping[str, Any],
    scan: ScanItem,
    *,
    repetitions: int = 1,
    threads: int | None = None,
) -> Cost:
    """Measure a classifier in a fresh process.

    Args:
        classifier: its module in `lib.classification`.
        preset: a key of its ``VARIANTS``.
        settings: that preset's section of params.yaml.
        scan: what to predict.
        repetitions: timed runs.
        threads: of PyTorch; None uses its default.

    Raises:
        RuntimeError: if the process dies, as it does where memory runs out.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # PyTorch is imported once, by the server
    with ProcessPoolExecutor(1, mp_context=context) as process:
        task = process.submit(
            _measure, classifier, preset, dict(settings), scan, repetitions, threads
        )
        try:
            return task.result()
        except BrokenProcessPool as error:
            message = f"the process that ran {classifier} with preset {preset} died; memory?"
            raise RuntimeError(message) from error


def _measure(
    classifier: str,
    preset: str,
    settings: dict[str, Any],
    scan: ScanItem,
    repetitions: int,
    threads: int | None,
) -> Cost:
    """The measurement itself, where nothing was built before."""
    torch.set_num_threads(threads or torch.get_num_threads())
    system = import_module(f"{CLASSIFIERS}.{classifier}")
    on_gpu = torch.cuda.is_available()
    # Mixed precision is for the GPU; on most CPUs it is emulated.
    fabric = Fabric(devices=1, precision=settings["precision"] if on_gpu else "32-true")
    settings = settings | {"loader_processes": 0}  # whose memory would not be counted
    before = _peak_resident()
    seed_everything(0, verbose=False)
    model = system.build(**system.VARIANTS[preset])
    with counted_flops() as flops:
        system.predict(model, [scan], settings=settings, fabric=fabric)
    seconds = []
    for _ in range(repetitions):
        begin = perf_counter()
        system.predict(model, [scan], settings=settings, fabric=fabric)
        seconds.append(perf_counter() - begin)
    risen = _peak_resident() - before
    return Cost(
        parameters=sum(weights.numel() for weights in model.parameters()),
        giga_flops=flops.get_total_flops() / GIGA,
        seconds_per_scan=sorted(seconds)[len(seconds) // 2],
        peak_megabytes=(torch.cuda.max_memory_allocated() if on_gpu else risen) / MEGABYTE,
        device=_device_name(on_gpu),
    )


def _peak_resident() -> int:
    """Most bytes of memory that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device_name(on_gpu: bool) -> str:
    if on_gpu:
        return torch.cuda.get_device_name()
    count = torch.get_num_threads()
    return f"CPU, {count} thread{'s' if count > 1 else ''}"


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Count floating-point operations, with those that the counter would not see by itself.

    Fused recurrent layers are counted by their shapes on a CPU and taken apart on a GPU; the fused
    path of attention is switched off meanwhile, which changes no result but rounding.

    Yields:
        The counter; ask it for ``get_total_flops()`` afterwards.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    mapping = {torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops}
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.backends.cudnn.flags(enabled=False),
            FlopCounterMode(display=False, custom_mapping=mapping) as counter,
        ):
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _recurrent_flops(
    values: Sequence[int], into: Sequence[int], again: Sequence[int], *_: Any, **__: Any
) -> int:
    """Of one recurrent layer in one direction, from the shapes of input and both weights."""
    return 2 * math.prod(values[:-1]) * (math.prod(into) + math.prod(again))


def cost_table(
    classifiers: Mapping[str, str],
    settings: Mapping[str, Mapping[str, Any]],
    scan: ScanItem,
    *,
    presets: Iterable[str],
    folder: Path,
    repetitions: int = 1,
    threads: int | None = None,
) -> pd.DataFrame:
    """What one scan costs every classifier, at every preset.

    What was measured before in the same way is read, not measured again: the same code of the
    classifier and of what all share, settings, scan and device.

    Args:
        classifiers: for each module of `lib.classification` its printed name.
        settings: for each module the presets of params.yaml.
        scan: what to predict.
        presets: for example ``["paper", "small"]``.
        folder: keeps each measurement as ``<classifier>-<preset>.json``.
        repetitions: timed runs.
        threads: of PyTorch; None uses its default.

    Returns:
        One row per classifier and preset, columns ``COST_COLUMNS``.
    """
    slices = len(open_volume(scan.volume))
    rows = []
    for (module, name), preset in product(classifiers.items(), presets):
        chosen, how = settings[module][preset], {"repetitions": repetitions, "threads": threads}
        digest = _digest(module, settings, preset, scan, how)
        path = folder / f"{module}-{preset}.json"
        kept = json.loads(path.read_text()) if path.is_file() else {}
        if kept.get("digest") != digest:
            cost = inference_cost(module, preset, chosen, scan, **how)
            kept = {"digest": digest, "cost": cost._asdict()}
            with whole_file(path) as partial:
                partial.write_text(json.dumps(kept, indent=1) + "\n")
        rows.append({"system": name, "preset": preset, "slices": slices} | kept["cost"])
    return pd.DataFrame(rows, columns=list(COST_COLUMNS))


def _digest(
    classifier: str,
    settings: Mapping[str, Mapping[str, Any]],
    preset: str,
    scan: ScanItem,
    how: Mapping[str, Any],
) -> str:
    """SHA-256 of all that a measurement depends on; other classifiers are not in it."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    choice = [classifier, preset, settings[classifier][preset], how, scan.scan_id, gpu]
    digest = hashlib.sha256(json.dumps(choice, sort_keys=True).encode())
    others = set(settings) - {classifier}
    for path in sorted(Path(inputs.__file__).parent.glob("*.py")):
        if path.stem not in others:
            digest.update(path.read_bytes())
    digest.update(scan.volume.read_bytes())
    return digest.hexdigest()


@matplotlib.rc_context(STYLE)
def cost_figure(costs: pd.DataFrame) -> Figure:
    """What one scan costs, a row per classifier and a colour per preset.

    Args:
        costs: of :func:`cost_table`.

    Returns:
        Panels for parameters, GFLOPs, seconds and memory, with logarithmic axes.
    """
    systems = list(dict.fromkeys(costs["system"]))
    colours = dict(zip(dict.fromkeys(costs["preset"]), LINE_COLOURS, strict=False))
    labels = {
        "parameters": "Parameters",
        "giga_flops": "GFLOPs",
        "seconds_per_scan": "Seconds per scan",
        "peak_megabytes": "Peak memory, MB",
    }
    figure = new_figure((10.0, 1.0 + 0.28 * len(systems)))
    axes = figure.subplots(1, len(labels), sharey=True)
    for axis, (column, label) in zip(axes, labels.items(), strict=True):
        places = costs["system"].map(systems.index)
        axis.scatter(costs[column], places, c=costs["preset"].map(colours), clip_on=False, zorder=3)
        axis.set(xscale="log", xlabel=label)
        low, high = axis.get_xlim()
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 20 * low else (1,)))
        axis.xaxis.set_major_formatter("{x:g}" if high < 20 * low else LogFormatterMathtext())
        axis.xaxis.set_minor_formatter(NullFormatter())  # its labels would overlap
        axis.grid(axis="y", color="0.92")
    axes[0].set_yticks(range(len(systems)), systems)
    axes[0].set_ylim(len(systems) - 0.5, -0.5)
    marks = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=preset)
        for preset, colour in colours.items()
    ]
    legend_beside(figure, marks)
    return figure


def card_modules(classifiers: Mapping[str, str]) -> dict[str, ModuleType]:
    """The modules of classifiers by printed name, for :func:`systems_table`.

    Args:
        classifiers: for each module of `lib.classification` its printed name.
    """
    return {name: import_module(f"{CLASSIFIERS}.{module}") for module, name in classifiers.items()}
