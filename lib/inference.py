"""Running trained networks: device, threads, weights, batches that fit into memory.

Segmentation is parallel over scans (`lib.data.scan_map`), so on a CPU every network runs on one
thread: results then do not depend on how many processes share the work.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from torch import nn

Item, Result = TypeVar("Item"), TypeVar("Result")


def best_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch's CPU operations on one thread, for results that do not depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Trained weights by their names, of a safetensors file.

    Raises:
        FileNotFoundError: in one sentence, where nothing was trained.
        safetensors.SafetensorError: where the file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: run the stage that trains it first")
    return safetensors.torch.load_file(path)


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load a safetensors file into a network and set it to evaluation mode.

    Args:
        model: with exactly the tensors of the file.
        path: for example ``best.safetensors`` of `lib.training.fit`.

    Returns:
        The same network, frozen.

    Raises:
        FileNotFoundError: in one sentence, where nothing was trained.
        ValueError: where the file is damaged or belongs to another network.
    """
    try:
        model.load_state_dict(load_tensors(path))
    except (safetensors.SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} does not fit the network it is meant for: {reason}") from error
    return model.eval().requires_grad_(False)


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_batches(
    run: Callable[[Sequence[Item]], Result], items: Sequence[Item], *, batch_size: int
) -> list[Result]:
    """Run a network over items in batches; where memory runs out, halve the batch and go on.

    Args:
        run: from a batch of items to its result.
        items: anything that can be sliced.
        batch_size: largest batch, at least 1; it bounds the memory.

    Returns:
        The results of the batches, in order.

    Raises:
        ValueError: for a batch size below 1.
        torch.OutOfMemoryError: if a single item does not fit.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size is at least 1, got {batch_size}")
    results: list[Result] = []
    done = 0
    while done < len(items):
        try:
            results.append(run(items[done : done + batch_size]))
            done += batch_size
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
            torch.cuda.empty_cache()
            warnings.warn(f"out of memory, going on in batches of {batch_size}", stacklevel=2)
    return results


def in_batches(
    run: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item], *, batch_size: int
) -> list[Result]:
    """`run_batches` for a network that gives one result per item.

    Args:
        run: from a batch of items to one result per item, in their order.
        items: anything that can be sliced.
        batch_size: largest batch, at least 1.

    Returns:
        One result per item.
    """
    batches = run_batches(run, items, batch_size=batch_size)
    return [result for batch in batches for result in batch]
