"""Tests of lib/reporting/segmentation_figures.py: choices by hand, what is drawn, read back."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.patches import Rectangle

from lib.data.store import save_volume
from lib.reporting.segmentation_figures import (
    CROPS_SHOWN,
    SegmentedSlice,
    choose_cases,
    claim_figure,
    fullest_slice,
    journey_figure,
    masked_comparison,
    outline_comparison,
    stored_slice,
)
from lib.reporting.tables import CLAIM_METRICS

VOXELS = np.full((40, 60), -800, np.int16)
GREY = np.full((40, 60), 90, np.uint8)
LUNGS = np.zeros((40, 60), np.uint8)
LUNGS[10:30, 8:22], LUNGS[10:30, 36:50] = 1, 2
EMPTY = np.zeros_like(LUNGS)


def titles(figure):
    return [axis.get_title().replace("\n", " ") for axis in figure.axes]


def shown(axis):
    return np.asarray(axis.images[0].get_array())


def texts(axis):
    return [text.get_text() for text in axis.texts]


def overlapping_texts(figure):
    """Pairs of titles and labels that are drawn over each other."""
    figure.draw_without_rendering()  # places everything
    written = [axis.title for axis in figure.axes] + [axis.yaxis.label for axis in figure.axes]
    written += [axis.xaxis.label for axis in figure.axes]
    written += [label for axis in figure.axes for label in axis.get_yticklabels()]
    boxes = [(t.get_text(), t.get_window_extent()) for t in written if t.get_text()]
    return [
        (first, second)
        for number, (first, box) in enumerate(boxes)
        for second, other in boxes[:number]
        if box.overlaps(other)
    ]


def test_cases_are_the_extremes_and_the_median():
    dice = pd.Series({"e": 0.9, "a": 0.2, "d": 0.5, "c": 0.7, "b": 0.6, "x": np.nan})
    assert choose_cases(dice) == {"highest": "e", "median": "b", "lowest": "a"}
    assert choose_cases(dice[["e", "a"]]) == {"highest": "e", "median": "a"}
    assert choose_cases(dice[["x"]]) == {}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=3, max_size=9), st.randoms())
def test_cases_do_not_depend_on_the_order_of_the_scans(values, random):
    dice = pd.Series(values, index=[f"scan-{number}" for number in range(len(values))])
    shuffled = dice.sample(frac=1, random_state=random.randint(0, 99))
    cases = choose_cases(dice)
    assert cases == choose_cases(shuffled)
    assert len(set(cases.values())) == 3
    assert dice[cases["lowest"]] == dice.min() and dice[cases["highest"]] == dice.max()
    assert dice[cases["median"]] == dice.quantile(0.5, interpolation="lower")


def test_the_fullest_slice_is_that_of_the_union():
    first = np.stack([LUNGS, np.where(LUNGS == 1, 1, 0), EMPTY])
    second = np.stack([EMPTY, np.ones_like(LUNGS), LUNGS])
    assert fullest_slice(first) == 0
    assert fullest_slice(first, second) == 1
    assert fullest_slice(np.stack([EMPTY, EMPTY])) == 0


def test_the_fullest_slice_is_read_with_the_masks_that_are_stored(tmp_path):
    files = {name: tmp_path / f"{name}.b2nd" for name in ("scan", "truth", "unet", "absent")}
    save_volume(files["scan"], np.stack([VOXELS, VOXELS + 100]))
    save_volume(files["truth"], np.stack([EMPTY, LUNGS]))
    save_volume(files["unet"], np.stack([np.ones_like(LUNGS), EMPTY]))
    masks = {name: files[name] for name in ("unet", "absent")}
    case = stored_slice("best: a", files["scan"], masks, files["truth"])
    assert case.title.split() == ["best:", "a,", "slice", "1"]
    assert (case.voxels == -700).all() and list(case.masks) == ["unet"]
    assert (case.truth == LUNGS).all() and not case.masks["unet"].any()
    case = stored_slice("best: a", files["scan"], masks, files["absent"])
    assert case.title.endswith("0") and case.truth is None
    with pytest.raises(FileNotFoundError, match="no mask of absent is stored"):
        stored_slice("a", files["scan"], {"absent": files["absent"]}, files["absent"])


def test_figure_3_multiplies_the_slice_with_each_mask():
    masks = {"conventional": np.maximum(LUNGS, 1), "sam2clip2sam": LUNGS}
    figure = masked_comparison([SegmentedSlice("worst: scan-1", VOXELS, masks, LUNGS)])
    assert titles(figure) == ["unsegmented", "conventional", "sam2clip2sam", "true outline"]
    whole, everything, lungs, truth = figure.axes
    assert (shown(whole) == shown(everything)).all() and (shown(whole) > 0).all()
    np.testing.assert_array_equal(shown(lungs) > 0, LUNGS > 0)
    assert len(truth.collections) == 2 and not lungs.collections
    assert whole.get_ylabel() == "worst: scan-1"


def test_figure_3_without_truth_has_no_column_for_it_and_says_what_is_missing():
    cases = [
        SegmentedSlice("a", VOXELS, {"morphology": LUNGS}),
        SegmentedSlice("b", VOXELS, {"unet": EMPTY}),
    ]
    figure = masked_comparison(cases)
    assert titles(figure)[:3] == ["unsegmented", "morphology", "unet"]
    assert [texts(axis) for axis in figure.axes[3:]] == [[], ["not known"], ["empty mask"]]
    assert not shown(figure.axes[4]).any()


def test_outlines_are_cut_to_the_lungs_alike_in_a_row():
    masks = {f"method_{number}": LUNGS for number in range(7)}
    case = SegmentedSlice("highest: scan_0001 (covid), slice 7", VOXELS, masks, LUNGS)
    figure = outline_comparison([case, case])
    assert titles(figure)[:2] == ["true outline", "method 0"]
    assert len(figure.axes) == 16
    limits = {(axis.get_xlim(), axis.get_ylim()) for axis in figure.axes}
    ((columns, rows),) = limits
    assert columns[0] < 8 and columns[1] > 49 and columns[0] > 0
    assert rows[0] - rows[1] == pytest.approx(columns[1] - columns[0])  # a square, row 0 above
    assert overlapping_texts(figure) == []


@pytest.mark.parametrize("draw", [masked_comparison, outline_comparison])
def test_comparisons_refuse_masks_of_another_shape_and_nothing(draw):
    with pytest.raises(ValueError, match=r"shape \(8, 8\), the slice \(40, 60\)"):
        draw([SegmentedSlice("", VOXELS, {"unet": np.ones((8, 8), np.uint8)})])
    with pytest.raises(ValueError, match="something to show"):
        draw([])


def make_claim(methods=7):
    table = pd.DataFrame(
        {"method": [f"bcdunet_refined_{k}" for k in range(methods)], "distance_unit": "mm"}
    )
    for name in CLAIM_METRICS:
        table[name] = np.linspace(0.2, 0.8, methods)
        table[f"{name}_low"], table[f"{name}_high"] = table[name] - 0.1, table[name] + 0.05
    return table


def test_claim_shows_every_method_with_its_interval():
    figure = claim_figure(make_claim(), title="phantom")
    leakage, rim = figure.axes[:2]
    assert [label.get_text() for label in leakage.get_yticklabels()] == make_claim()[
        "method"
    ].tolist()
    assert rim.get_xlabel() == "Rim error (mm)"
    assert [len(axis.containers) for axis in figure.axes] == [1, 1, 3]
    dots, _, (whiskers,) = leakage.containers[0]
    np.testing.assert_allclose(dots.get_xdata(), make_claim()["mediastinum_leakage"])
    np.testing.assert_allclose(whiskers.get_segments()[0][:, 0], [0.1, 0.25])
    assert overlapping_texts(figure) == []


def test_claim_marks_what_does_not_exist():
    table = make_claim(2).assign(lesions_kept=np.nan, rim_error_low=np.nan, distance_unit="pixels")
    leakage, rim, kept = claim_figure(table).axes
    assert rim.get_xlabel() == "Rim error (pixels)"
    crosses = [line for line in kept.lines if line.get_marker() == "x"]
    assert [len(line.get_xdata()) for line in crosses] == [2, 0, 0]
    assert [len(line.get_xdata()) for line in leakage.lines if line.get_marker() == "x"] == [0]
    with pytest.raises(ValueError, match="a method with scores"):
        claim_figure(table.iloc[:0])


def journey(count=10, **changes):
    inputs = {
        "grey": GREY,
        "masks": [LUNGS == 1, LUNGS == 2, LUNGS == 0],
        "crops": [np.full((5 + k, 30 - k), 10 * k, np.uint8) for k in range(count)],
        "similarities": [0.3 - 0.01 * k for k in range(count)],
        "chosen": [0, 9],
        "boxes": np.array([[8, 10, 21, 29], [36, 10, 49, 29.0]]),
        "final": LUNGS,
    }
    return journey_figure(**inputs | changes)


def test_journey_shows_every_step():
    figure = journey()
    names = titles(figure)
    assert names[:2] == ["1  slice", "2  segment everything: 3"]
    assert figure.subfigs[0].get_suptitle().endswith(f"sentences: {CROPS_SHOWN} of 10")
    crops = figure.subfigs[0].axes
    similarities = [axis.get_title() for axis in crops]
    assert similarities == [f"{0.3 - 0.01 * k:.3f}" for k in (0, 1, 2, 3, 4, 5, 6, 9)]
    framed = [axis.spines["left"].get_visible() for axis in crops]
    assert framed == [True] + [False] * 6 + [True]
    boxes, final = (axis for axis in figure.axes if axis.get_title()[:1] in ("4", "5"))
    frames = [patch for patch in boxes.patches if isinstance(patch, Rectangle)]
    assert [frame.get_bbox().extents.tolist() for frame in frames] == [
        [7.5, 9.5, 21.5, 29.5],
        [35.5, 9.5, 49.5, 29.5],
    ]
    assert len(final.collections) == 2
    assert overlapping_texts(figure) == []


def test_journey_sorts_crops_and_gives_every_mask_a_colour_of_its_own():
    figure = journey(3, chosen=[1], similarities=[0.1, 0.3, 0.2])
    crops = [axis for axis in figure.subfigs[0].axes if axis.images]
    assert [axis.get_title() for axis in crops] == ["0.300", "0.200", "0.100"]
    assert shown(crops[0]).shape == (6, 29)
    overlay = shown(figure.axes[1])
    assert overlay.shape == (40, 60, 3)
    assert len({tuple(overlay[place].round(3)) for place in ((15, 15), (15, 40), (0, 0))}) == 3


@pytest.mark.parametrize(
    "missing",
    [
        {"masks": []},
        {"crops": [], "similarities": [], "chosen": []},
        {"chosen": [], "boxes": np.zeros((0, 4))},
        {"boxes": [], "final": EMPTY},
        {"masks": [], "crops": [], "similarities": [], "chosen": [], "boxes": [], "final": EMPTY},
    ],
)
def test_journey_of_a_slice_that_ends_early(missing):
    figure = journey(**missing)
    (boxes,) = (axis for axis in figure.axes if axis.get_title().startswith("4"))
    assert texts(boxes) == (["no box"] if not len(missing.get("boxes", [0])) else [])
    last = next(axis.get_title() for axis in figure.axes if axis.get_title().startswith("5"))
    assert last.endswith("empty") == ("final" in missing)
    figure.canvas.draw()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"similarities": [0.1]}, "10 crops have 1 similarities"),
        ({"chosen": [10]}, r"indices of 10 crops, got \[10\]"),
        ({"final": LUNGS[:5]}, r"the mask has shape \(5, 60\), the slice \(40, 60\)"),
        ({"masks": [LUNGS[:5] > 0]}, r"the mask has shape \(5, 60\), the slice \(40, 60\)"),
    ],
)
def test_journey_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        journey(**changes)
