import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.classification.resampling import random_positions, slice_sets, symmetrical_positions

lengths, counts = st.integers(1, 200), st.integers(1, 70)


@given(length=lengths, count=counts, seed=st.integers(0, 2**32 - 1))
def test_a_random_choice_is_ordered_and_takes_as_many_different_slices_as_it_can(
    length, count, seed
):
    chosen = random_positions(length, count, np.random.default_rng(seed))
    assert chosen.shape == (count,)
    assert (np.diff(chosen) >= 0).all()
    assert chosen[0] >= 0 and chosen[-1] < length
    assert len(set(chosen.tolist())) == min(length, count)


def test_every_slice_is_as_likely_as_any_other():
    generator = np.random.default_rng(0)
    few = np.concatenate([random_positions(20, 8, generator) for _ in range(3000)])
    many = np.concatenate([random_positions(20, 50, generator) for _ in range(1000)])
    np.testing.assert_allclose(np.bincount(few), 1200, rtol=0.1)
    np.testing.assert_allclose(np.bincount(many), 2500, rtol=0.1)


@given(length=lengths, count=counts)
def test_a_symmetrical_choice_is_ordered_even_and_around_the_middle(length, count):
    chosen = symmetrical_positions(length, count)
    assert chosen.shape == (count,)
    assert (np.diff(chosen) >= 0).all()
    assert chosen[0] >= 0 and chosen[-1] < length
    step = max(length // count, 1)
    if length >= count:
        assert (np.diff(chosen) == step).all()
        assert -1 <= chosen[0] - (length - 1 - chosen[-1]) <= step
    else:
        times = np.bincount(chosen, minlength=length)
        assert times.max() - times.min() <= 1
        rest = (times == times.max()).nonzero()[0]
        spread = length // len(rest)
        assert abs(rest[0] - (length - 1 - rest[-1])) <= spread + 1


def around_the_middle(available, wanted, step, offset):
    """Start at the middle, go right and left in turn by multiples of the step, sort."""
    start = (available // 2 if available % 2 else available // 2 - 1) + offset
    chosen, multiple = [start], 1
    while len(chosen) < wanted:
        chosen.append(start + multiple * step)
        if len(chosen) < wanted:
            chosen.append(start - multiple * step)
        multiple += 1
    return sorted(chosen)


def by_the_published_rule(length, count, offset=0):
    """FACTS 4.5 read literally; written apart from the code under test."""
    if length == count:
        return list(range(length))
    if length > count:
        return around_the_middle(length, count, length // count, offset)
    times = math.ceil((count - length) / length)
    remaining = count - times * length
    extra = around_the_middle(length, remaining, length // remaining, 0)
    return sorted(list(range(length)) * times + extra)


@given(length=st.integers(1, 400), count=counts)
def test_the_symmetrical_choice_is_the_published_rule(length, count):
    assert symmetrical_positions(length, count).tolist() == by_the_published_rule(length, count)


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    [
        (1, 4, [0, 0, 0, 0]),
        (4, 4, [0, 1, 2, 3]),
        (9, 1, [4]),
        (8, 4, [1, 3, 5, 7]),
        (9, 3, [1, 4, 7]),
        (3, 7, [0, 0, 1, 1, 1, 2, 2]),  # each twice, the middle once more
        (4, 6, [0, 1, 1, 2, 3, 3]),  # each once, and two around the middle at an interval of two
    ],
)
def test_symmetrical_examples(length, count, expected):
    assert symmetrical_positions(length, count).tolist() == expected


@given(half=st.integers(1, 35), more=st.integers(0, 200))
def test_shifted_choices_share_no_slice(half, more):
    count, length = 2 * half, 2 * half + more
    choices = [symmetrical_positions(length, count, shift=-k) for k in range(length // count)]
    together = np.concatenate(choices)
    assert len(set(together.tolist())) == len(choices) * count
    assert together.min() >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0, "count": 3}, "must be at least 1, got 0 and 3"),
        ({"length": 3, "count": 0}, "must be at least 1, got 3 and 0"),
        ({"length": 64, "count": 32, "shift": -2}, "32 of 64 slices cannot be shifted by -2"),
        ({"length": 64, "count": 32, "shift": 1}, "32 of 64 slices cannot be shifted by 1"),
    ],
)
def test_impossible_choices_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        symmetrical_positions(**arguments)
    if "shift" not in arguments:
        with pytest.raises(ValueError, match=message):
            random_positions(**arguments, generator=np.random.default_rng(0))


# -------------------------------------------------------------------------------- sets of a scan


@given(length=st.integers(1, 700), count=st.integers(1, 20).map(lambda half: 2 * half))
def test_sets_are_those_of_the_published_rule(length, count):
    sets = slice_sets(length, count)
    number = max(length // count, 1)
    assert sets.dtype == np.int64
    for k in range(number):
        offset = k - number + 1 if length > count else 0
        assert sets[k].tolist() == by_the_published_rule(length, count, offset)
    assert len(sets) == number + (length > count)


@given(length=st.integers(1, 700), count=st.integers(1, 20).map(lambda half: 2 * half))
def test_sets_share_no_slice_and_cover_the_middle_of_the_range(length, count):
    sets = slice_sets(length, count)
    assert (np.diff(sets, axis=1) >= 0).all()
    assert sets.min() >= 0 and sets.max() < length
    number = max(length // count, 1)
    together = np.sort(sets[:number].ravel())
    if length < count:
        assert set(together.tolist()) == set(range(length))
        return
    assert (np.diff(together) == 1).all()  # no slice twice, none left out between them
    left, right = together[0], length - 1 - together[-1]
    assert left + right < count
    assert abs(left - right) <= 1


@given(length=st.integers(33, 700))
def test_the_set_of_the_middle_is_made_of_neighbours(length):
    middle = slice_sets(length, 32)[-1]
    assert (np.diff(middle) == 1).all()
    assert abs(middle[0] - (length - 1 - middle[-1])) <= 1


def test_examples_of_sets():
    assert slice_sets(3, 4).tolist() == [[0, 1, 1, 2]]
    assert slice_sets(4, 4).tolist() == [[0, 1, 2, 3]]
    assert slice_sets(5, 4).tolist() == [[1, 2, 3, 4]] * 2
    assert slice_sets(9, 4).tolist() == [[1, 3, 5, 7], [2, 4, 6, 8], [3, 4, 5, 6]]


def test_published_scans_give_these_numbers_of_sets():
    """Least, median and most kept slices of the published test list (FACTS 4.4)."""
    assert [len(slice_sets(length, 32)) for length in (2, 49, 548)] == [1, 2, 18]


@pytest.mark.parametrize(("length", "count"), [(40, 5), (3, 7)])
def test_sets_of_an_odd_number_are_refused(length, count):
    with pytest.raises(ValueError, match=f"an even number of slices can be made, not of {count}"):
        slice_sets(length, count)
