"""Where the time goes: seconds spent in named functions while some work is done."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from time import perf_counter
from typing import Any
from unittest.mock import patch

import numpy as np

REST = "everything else"


@contextmanager
def seconds_in(functions: Mapping[str, tuple[Any, str]]) -> Iterator[dict[str, float]]:
    """Add up the seconds that are spent in some functions.

    A function that another of them calls counts for both; name only one of a chain.

    Args:
        functions: for each label a module, class or object and the name of its function.

    Yields:
        Seconds by label, growing while the functions are called.
    """
    seconds = dict.fromkeys(functions, 0.0)
    with ExitStack() as stack:
        for label, (owner, name) in functions.items():
            timed = _timed(getattr(owner, name), seconds, label)
            stack.enter_context(patch.object(owner, name, timed))
        yield seconds


def _timed(function: Callable, seconds: dict[str, float], label: str) -> Callable:
    @wraps(function)
    def timed(*arguments: Any, **keywords: Any) -> Any:
        begin = perf_counter()
        try:
            return function(*arguments, **keywords)
        finally:
            seconds[label] += perf_counter() - begin

    return timed


def time_parts(
    work: Callable[[], object], functions: Mapping[str, tuple[Any, str]], *, repetitions: int
) -> dict[str, float]:
    """Median seconds of the parts of some work, after one call that is not counted.

    Args:
        work: what to do.
        functions: as for `seconds_in`.
        repetitions: counted calls.

    Returns:
        Seconds by label, what is in none of them under `REST`, and the whole under ``"all"``.
    """
    work()
    found = []
    for _ in range(repetitions):
        begin = perf_counter()
        with seconds_in(functions) as seconds:
            work()
        whole = perf_counter() - begin
        found.append({**seconds, REST: whole - sum(seconds.values()), "all": whole})
    return {name: round(float(np.median([one[name] for one in found])), 4) for name in found[0]}
