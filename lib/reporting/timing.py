"""Where the time goes: seconds spent in named functions while some work is done."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from time import perf_counter
from typing import Any
from unittest.mock import patch

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
    work: Callable[[], object], functions: Mapping[str, tuple[Any, str]]
) -> dict[str, float]:
    """Seconds of the parts of some work that has been done before.

    Args:
        work: what to do, once.
        functions: as for `seconds_in`.

    Returns:
        Seconds by label, what is in none of them under `REST`, and the whole under ``"all"``.
    """
    begin = perf_counter()
    with seconds_in(functions) as seconds:
        work()
    whole = perf_counter() - begin
    parts = {**seconds, REST: whole - sum(seconds.values()), "all": whole}
    return {name: round(value, 4) for name, value in parts.items()}
