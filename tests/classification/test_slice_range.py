import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from lib.classification.slice_range import (
    body_box,
    draw,
    enclosed_area,
    largest_window,
    longest_run,
    solid_tissue,
)


def thorax(size=128, lung=40, shift=0):
    """A bright body with two dark lungs, a thin couch below it and a bright speck beside it."""
    grey = np.zeros((size, size), np.uint8)
    grey[20:90, 10 + shift : 110 + shift] = 230
    grey[30:80, 20 + shift : 20 + lung + shift] = 60
    grey[30:80, 65 + shift : 65 + lung + shift] = 60
    grey[110, :] = 200  # the couch, one pixel thin
    grey[4, 120] = 255
    return grey


@given(st.lists(st.booleans(), max_size=60))
def test_longest_run_is_the_longest_word_of_its_text(flags):
    words = "".join("x" if flag else " " for flag in flags).split(" ")
    start, stop = longest_run(flags)
    assert stop - start == max(map(len, words))
    assert all(flags[start:stop])
    assert stop == start or start == "".join("x" if f else " " for f in flags).index(
        "x" * (stop - start)
    )


def test_the_box_holds_the_body_and_neither_couch_nor_speck():
    rows, columns = body_box(thorax())
    # the minimum filter (2 or 3 pixels at this width) takes a pixel or two off each side
    assert 20 <= rows.start <= 22 and 88 <= rows.stop <= 90
    assert 10 <= columns.start <= 12 and 108 <= columns.stop <= 110


def test_the_box_follows_the_body():
    _, here = body_box(thorax())
    rows, there = body_box(thorax(shift=7))
    assert (there.start - here.start, there.stop - here.stop) == (7, 7)
    assert rows == body_box(thorax())[0]


@pytest.mark.parametrize("grey", [0, 99])
def test_a_slice_without_tissue_stays_whole(grey):
    assert body_box(np.full((6, 9), grey, np.uint8)) == (slice(0, 6), slice(0, 9))


def test_the_same_patient_at_half_the_size_has_the_same_box():
    grey = np.kron(thorax(), np.ones((4, 4), np.uint8))  # 512 pixels wide
    for large, small in zip(body_box(grey), body_box(grey[::2, ::2]), strict=True):
        assert abs(large.start - 2 * small.start) <= 2
        assert abs(large.stop - 2 * small.stop) <= 2


def test_the_area_is_that_of_the_lungs():
    assert enclosed_area(thorax()) == pytest.approx(2 * 50 * 40 / 128**2, rel=0.02)
    assert enclosed_area(thorax(lung=20)) == pytest.approx(2 * 50 * 20 / 128**2, rel=0.02)


@pytest.mark.parametrize("grey", [0, 255])
def test_a_flat_slice_has_no_lung(grey):
    assert enclosed_area(np.full((32, 32), grey, np.uint8)) == 0


@given(seed=st.integers(0, 99))
def test_the_area_equals_the_dark_components_that_do_not_touch_the_border(seed):
    noise = ndimage.uniform_filter(np.random.default_rng(seed).normal(size=(48, 48)), 5)
    grey = np.clip(110 + 60 * noise + 10 * (seed % 4), 0, 255).astype(np.uint8)
    dark, number = ndimage.label(~solid_tissue(grey, 5))
    outside = np.unique(np.concatenate([dark[0], dark[-1], dark[:, 0], dark[:, -1]]))
    inside = np.setdiff1d(np.arange(1, number + 1), outside)
    assert enclosed_area(grey) == pytest.approx(np.isin(dark, inside).mean())


@given(
    areas=st.lists(st.integers(0, 1000), min_size=1, max_size=40),
    share=st.sampled_from([0.2, 0.5, 1.0]),
)
def test_no_other_window_holds_more(areas, share):
    start, stop = largest_window(np.array(areas), share)
    length = stop - start
    assert length == int(np.ceil(len(areas) * share))
    assert start >= 0
    assert stop <= len(areas)
    sums = [sum(areas[i : i + length]) for i in range(len(areas) - length + 1)]
    assert sum(areas[start:stop]) == max(sums)


@pytest.mark.parametrize(("slices", "window"), [(1, (0, 1)), (2, (0, 1)), (8, (2, 6)), (9, (2, 7))])
def test_without_lungs_the_middle_is_kept(slices, window):
    assert largest_window(np.zeros(slices), 0.5) == window


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        largest_window(np.ones(4), share)


@given(length=st.integers(1, 50), number=st.integers(1, 50), seed=st.integers(0, 9))
def test_draws_are_ordered_and_repeat_only_where_they_must(length, number, seed):
    drawn = draw(length, number, np.random.default_rng(seed))
    assert drawn.shape == (number,)
    assert drawn.min() >= 0 and drawn.max() < length
    assert (np.diff(drawn) >= 0).all()
    if number <= length:
        assert len(set(drawn)) == number
    np.testing.assert_array_equal(drawn, draw(length, number, np.random.default_rng(seed)))
