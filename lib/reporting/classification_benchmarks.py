"""Benchmark of training RACNet: packed slices against scans padded to 700 slices.

One step of training is measured: forward, backward, both optimizers. Packed and padded are the same
network on the same scans; the padded one is `lib.classification.padded_racnet`, with one Adam for
all weights, as the paper has it. Slices are random pictures, for their values change no time.

What can be gained is bounded by counting: a step costs what its slices cost, so time and memory can
differ by the ratio of slices, 700 / mean length, and by more only where memory itself costs time
(pages that the system has to hand out, caches). Lengths that spread over 50 to 700
as in COV19-CT-DB with its mean of 379 give 1.85.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from time import perf_counter
from typing import Any

import matplotlib
import numpy as np
import torch
from lightning_fabric import seed_everything
from matplotlib.figure import Figure
from scipy.stats import beta
from scipy.stats.qmc import LatinHypercube
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib.classification.padded_racnet import padded_logits
from lib.classification.racnet import RACNet, build, build_optimizers
from lib.reporting.benchmarks import MEBIBYTE, compare, own_peak_memory
from lib.reporting.cost import counted_flops
from lib.reporting.pictures import STYLE, new_figure

SHORTEST, MEAN, LONGEST = 50, 379, 700  # slices of a scan of COV19-CT-DB
SHAPES = 2.0  # the two numbers of the Beta distribution together; uniform has 1 + 1
LEARNING_RATE = 1e-4
COPIED = 2**28  # bytes

Logits = Callable[[RACNet, Tensor, Sequence[int]], Tensor]


def packed_logits(model: RACNet, slices: Tensor, lengths: Sequence[int]) -> Tensor:
    """Class scores from the real slices only."""
    return model(slices, lengths)


WAYS: dict[str, Logits] = {"padded": padded_logits, "packed": packed_logits}


def length_mixes(mixes: int, scans: int, *, seed: int = 0) -> list[list[int]]:
    """Slice counts drawn like those of COV19-CT-DB: from 50 to 700, 379 in the mean.

    The published range and mean are all that is known; the draw is from the Beta distribution that
    has them and is otherwise as flat as it can be. Each mix is stratified, one scan from each
    ``1 / scans`` of the distribution, so that few scans already have about its mean.

    Args:
        mixes: number of batches.
        scans: of each batch.
        seed: of the draw.

    Returns:
        For each batch the number of slices of each scan.
    """
    share = (MEAN - SHORTEST) / (LONGEST - SHORTEST)
    distribution = beta(
        SHAPES * share, SHAPES * (1 - share), loc=SHORTEST, scale=LONGEST - SHORTEST
    )
    sampler = LatinHypercube(1, rng=np.random.default_rng(seed))
    return [
        np.rint(distribution.ppf(sampler.random(scans)[:, 0])).astype(int).tolist()
        for _ in range(mixes)
    ]


class Step:
    """One step of training, always on the same batch.

    Args:
        way: a key of `WAYS`.
        variant: arguments of RACNet's ``build``.
        lengths: slices of each scan.
        image_size: height and width of a slice in pixels.
        device: where; ``"cuda"`` computes in bfloat16.
    """

    def __init__(
        self,
        way: str,
        variant: Mapping[str, Any],
        lengths: Sequence[int],
        *,
        image_size: int,
        device: str = "cpu",
    ) -> None:
        seed_everything(0, verbose=False)
        self.logits, self.lengths, self.device = WAYS[way], list(lengths), device
        self.model = build(**variant).to(device)
        shape = (sum(lengths), 1, image_size, image_size)
        self.slices = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self.targets = torch.arange(len(lengths), device=device) % 2
        if way == "packed":
            self.optimizers = build_optimizers(self.model, learning_rate=LEARNING_RATE)
        else:
            trained = [weights for weights in self.model.parameters() if weights.requires_grad]
            self.optimizers = [torch.optim.Adam(trained, lr=LEARNING_RATE)]

    def __call__(self) -> float:
        """Take the step; the loss before it."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            scores = self.logits(self.model, self.slices, self.lengths)
            loss = nn.functional.cross_entropy(scores, self.targets)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return loss.item()


def compare_training(
    variant: Mapping[str, Any],
    lengths: Sequence[int],
    *,
    image_size: int,
    repetitions: int,
    device: str = "cpu",
    threads: int = 1,
) -> dict[str, Any]:
    """Time and memory of a step, packed against padded.

    On a CPU, memory is by how much the peak of resident memory of a fresh process rises in its
    first step, over what it held with network and slices built; on a GPU the most that PyTorch held
    allocated during a step, network and slices included.

    Args:
        variant: arguments of RACNet's ``build``; positions is the length after padding.
        lengths: slices of each scan.
        image_size: height and width in pixels.
        repetitions: timed steps of each, in turn.
        device: ``"cpu"`` or ``"cuda"``.
        threads: of PyTorch in the processes whose memory is measured.

    Returns:
        What `lib.reporting.benchmarks.compare` returns, padded being the reference and slices those
        that are real; ``lengths`` and ``mean_length``; ``limit``, by how much fewer slices there
        are; ``flops_ratio``, by how many fewer operations (forward and backward, as counted by
        PyTorch); ``memory_mib`` of each way and ``memory_ratio``, packed to padded.
    """
    make = partial(Step, variant=variant, lengths=lengths, image_size=image_size, device=device)
    steps = {way: make(way) for way in WAYS}
    flops = {way: counted(step) for way, step in steps.items()}
    padded, packed = steps["padded"], steps["packed"]
    result = compare(padded, packed, repetitions=repetitions, slices=sum(lengths))
    if device == "cpu":
        del steps, padded, packed
        memory = {way: _resident(partial(make, way), threads)["rise_mib"] for way in WAYS}
    else:
        memory = {way: _allocated(step) for way, step in steps.items()}
    return result | {
        "reference_slices_per_second": round(sum(lengths) / result["reference_median"], 1),
        "lengths": list(lengths),
        "mean_length": round(float(np.mean(lengths)), 1),
        "limit": round(variant["positions"] / float(np.mean(lengths)), 3),
        "flops_ratio": round(flops["padded"] / flops["packed"], 3),
        "memory_mib": {way: round(value) for way, value in memory.items()},
        "memory_ratio": round(memory["packed"] / memory["padded"], 3),
    }


def counted(step: Step) -> int:
    """Floating-point operations of a step; the backward pass of the GRU, a thousandth, is not in.

    Args:
        step: what is done once.
    """
    with counted_flops() as flops:
        step()
    return flops.get_total_flops()


def whole_scans(
    variant: Mapping[str, Any],
    *,
    scans: int,
    image_size: int,
    device: str = "cpu",
    threads: int = 1,
) -> dict[str, Any]:
    """Memory and time of a first step on scans of as many slices as the network has positions.

    Args:
        variant: arguments of RACNet's ``build``.
        scans: of the batch.
        image_size: height and width in pixels.
        device: ``"cpu"`` or ``"cuda"``.
        threads: of PyTorch on a CPU.

    Returns:
        ``slices``; ``image_size``; ``memory_mib``, on a CPU the peak of a process that does nothing
        else (Python, PyTorch, network and slices included), on a GPU the most that PyTorch held
        allocated; ``seconds`` of the step.
    """
    lengths = scans * [variant["positions"]]
    make = partial(Step, "packed", variant, lengths, image_size=image_size, device=device)
    if device == "cpu":
        found = _resident(make, threads)
        memory, seconds = found["whole_mib"], found["seconds"]
    else:
        step, start = make(), perf_counter()
        memory = _allocated(step)
        seconds = perf_counter() - start
    return {
        "slices": sum(lengths),
        "image_size": image_size,
        "memory_mib": round(memory),
        "seconds": round(seconds, 3),
    }


def _resident(make: Callable[[], Step], threads: int) -> dict[str, float]:
    """What a first step takes in a fresh process, see `_measured_step`."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # PyTorch is imported once, by the server
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(_measured_step, make, threads).result()


def _measured_step(make: Callable[[], Step], threads: int) -> dict[str, float]:
    """Peak of resident memory, by how much the step raised it, and the step's seconds."""
    torch.set_num_threads(threads)
    step = make()
    before, start = own_peak_memory(), perf_counter()
    step()
    seconds = perf_counter() - start
    whole = own_peak_memory()
    return {"whole_mib": whole, "rise_mib": whole - before, "seconds": seconds}


def _allocated(step: Step) -> float:
    """Most memory in MiB that PyTorch held allocated on the GPU during a step."""
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / MEBIBYTE


class MovedBytes(TorchDispatchMode):
    """Count the bytes that operations read and write, each operation by itself.

    ``total`` is an upper bound: views are left out, but what stays in a cache between two
    operations, or is fused with the next, counts as if it went to memory and back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run the operation and add what it moves."""
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = tree_leaves((args, kwargs, result))
            self.total += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        return result


def bandwidth(device: str, *, repetitions: int = 5) -> float:
    """Bytes per second that a copy within a device reads and writes, the best of some.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        repetitions: copies.
    """
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), np.inf
    for _ in range(repetitions):
        begin = perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, perf_counter() - begin)
    return 2 * COPIED / best


def bandwidth_estimate(step: Step) -> dict[str, float]:
    """Seconds of a step if memory were all that it waits for, and what it really takes.

    Args:
        step: to be taken three times.

    Returns:
        ``gigabytes_moved`` as `MovedBytes` counts them, ``gigabytes_per_second`` of a copy,
        ``seconds_expected`` from both, ``seconds``.
    """
    with MovedBytes() as moved:
        step()
    per_second = bandwidth(step.device)
    step()
    begin = perf_counter()
    step()
    return {
        "gigabytes_moved": round(moved.total / 1e9, 2),
        "gigabytes_per_second": round(per_second / 1e9, 1),
        "seconds_expected": round(moved.total / per_second, 4),
        "seconds": round(perf_counter() - begin, 4),
    }


@matplotlib.rc_context(STYLE)
def training_figure(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Speed and memory of packed training as multiples of padded training, with their limit.

    Args:
        results: by case, of `compare_training`.
    """
    figure = new_figure((9.0, 3.2))
    speed, memory = figure.subplots(1, 2)
    cases, places = list(results), np.arange(len(results))
    limits = np.array([result["limit"] for result in results.values()])
    speed.bar(places, [result["ratio"] for result in results.values()], width=0.5)
    memory.bar(places, [result["memory_ratio"] for result in results.values()], width=0.5)
    for axis, values in ((speed, limits), (memory, 1 / limits)):
        axis.scatter(places, values, marker="_", s=400, color="black", label="by slices alone")
        axis.set_xticks(places, cases)
        axis.legend(loc="lower right")
    speed.set(ylabel="Speed, packed / padded")
    memory.set(ylabel="Memory, packed / padded")
    return figure
