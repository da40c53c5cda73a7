"""A fixed number of slices out of a scan of any length, as 3-D CNN with BERT takes them.

Source: Tan and Liu 2021 (3-D CNN with BERT), section 3.4; FACTS 4.5. Random ones in training, so
that every epoch shows others; symmetrical ones in judging; and, for one verdict on a whole scan,
as many symmetrical sets as the scan fills.
"""

import numpy as np


def random_positions(length: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """A random choice of a fixed number of slices, in their order (FACTS 4.5, training).

    Too many: slices are left out at random. Too few: every slice is taken, and slices drawn at
    random, the same one perhaps several times, are repeated in their place.

    Args:
        length: number of slices there are, at least 1.
        count: number wanted, at least 1.
        generator: source of the choice.

    Returns:
        Ascending int64 positions, shape (count,).

    Raises:
        ValueError: if ``length`` or ``count`` is below 1.
    """
    _check(length, count)
    if length >= count:
        return np.sort(generator.choice(length, count, replace=False))
    repeated = generator.integers(length, size=count - length)
    return np.sort(np.concatenate([np.arange(length), repeated]))


def symmetrical_positions(length: int, count: int, *, shift: int = 0) -> np.ndarray:
    """A fixed choice of a fixed number of slices around the middle (FACTS 4.5, judging).

    Too many: from the middle one on, slices right and left of it in turn at a whole step of
    ``length // count``. Too few: all slices are taken equally often as long as that is possible,
    and the rest is chosen in the same way.

    Args:
        length: number of slices there are, at least 1.
        count: number wanted, at least 1.
        shift: moves the choice by so many slices; an even ``count`` can be moved by 0 down to
            ``1 - length // count``, which gives ``length // count`` choices that share no slice.

    Returns:
        Ascending int64 positions, shape (count,).

    Raises:
        ValueError: if ``length`` or ``count`` is below 1, or the shift leads out of the scan.
    """
    _check(length, count)
    whole = (count - 1) // length
    rest = count - whole * length
    chosen = _around_middle(length, rest, length // rest) + shift
    if chosen[0] < 0 or chosen[-1] >= length:
        raise ValueError(f"a choice of {count} of {length} slices cannot be shifted by {shift}")
    return np.sort(np.concatenate([np.repeat(np.arange(length), whole), chosen]))


def slice_sets(length: int, count: int) -> np.ndarray:
    """All sets of slices by which a whole scan is judged (section 3.4, tables 2 and 3; FACTS 4.5).

    Set k of ``length // count`` is the symmetrical choice moved by ``k + 1 - length // count``, so
    that the sets share no slice. The last one is the plain choice. Behind them comes, where there
    are more slices than wanted, one more set: ``count`` neighbouring slices at the middle. (Below
    twice as many slices as wanted it equals the only other one, as published.)

    Args:
        length: number of slices there are, at least 1.
        count: number of slices of a set, an even number.

    Returns:
        Ascending int64 positions in each row, shape (sets, count).

    Raises:
        ValueError: if ``length`` is below 1, or ``count`` is no even number above 0.
    """
    _check(length, count)
    if count % 2:  # the choice leaves too little room on the left to be moved
        raise ValueError(f"sets of an even number of slices can be made, not of {count}")
    number = max(length // count, 1)
    sets = [symmetrical_positions(length, count, shift=k + 1 - number) for k in range(number)]
    if length > count:
        sets.append(_around_middle(length, count, 1))
    return np.stack(sets)


def _around_middle(length: int, count: int, step: int) -> np.ndarray:
    """The middle slice, and right and left of it in turn others at one step, put in order."""
    return (length - 1) // 2 + step * (np.arange(count) - (count - 1) // 2)


def _check(length: int, count: int) -> None:
    """Complain about what cannot be resampled."""
    if length < 1 or count < 1:
        raise ValueError(f"length and count must be at least 1, got {length} and {count}")
