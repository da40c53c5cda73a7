"""Tests of lib/reporting/pictures.py: what is drawn, read back from the figure."""

import numpy as np
import pytest

from lib.data.scan import Scan
from lib.reporting.pictures import (
    HOUNSFIELD_EDGES,
    ExampleSlice,
    count_hounsfield,
    example_slices,
    hounsfield_histogram,
    save_figure,
    save_figures,
    scan_overview,
)


def make_lungs(shape=(16, 16)):
    lungs = np.zeros(shape, np.uint8)
    lungs[..., 4:12, 0:5] = 1  # touches the border
    lungs[..., 4:12, 9:14] = 2
    return lungs


VOXELS = np.full((16, 16), -800, np.int16)


def legend_texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def outlines(axis):
    return [tuple(np.round(c.get_edgecolor()[0][:3], 2)) for c in axis.collections]


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (5, 2), (12, 3)])
def test_example_slices_make_a_grid_without_empty_places(count, rows):
    figure = example_slices([ExampleSlice(f"slice {k}", VOXELS) for k in range(count)])
    assert len(figure.axes) == count
    assert [axis.get_title() for axis in figure.axes] == [f"slice {k}" for k in range(count)]
    assert figure.axes[0].get_gridspec().nrows == rows
    assert not figure.legends


def test_example_slices_outline_lungs_and_lesions_in_their_own_colours():
    lesions = np.zeros((16, 16), np.uint8)
    lesions[6:8, 1:3] = 1
    figure = example_slices(
        [
            ExampleSlice("both", VOXELS, make_lungs(), lesions),
            ExampleSlice("lungs", np.zeros((16, 16), np.uint8), make_lungs()),
            ExampleSlice("empty mask", VOXELS, np.zeros((16, 16), np.uint8)),
        ]
    )
    both, lungs, empty = (outlines(axis) for axis in figure.axes)
    assert len(set(both)) == 3
    assert lungs == both[:2]
    assert empty == []
    assert legend_texts(figure) == ["right lung", "left lung", "ground-glass opacity"]


def test_an_outline_is_closed_at_the_border_of_the_picture():
    (axis,) = example_slices([ExampleSlice("", VOXELS, np.ones((16, 16), np.uint8))]).axes
    (path,) = axis.collections[0].get_paths()
    assert (path.vertices[0] == path.vertices[-1]).all()
    assert axis.get_xlim() == (-0.5, 15.5)  # the outline does not widen the picture


@pytest.mark.parametrize("kind", ["lungs", "lesions"])
def test_masks_of_another_shape_are_refused(kind):
    with pytest.raises(ValueError, match=r"shape \(8, 8\), the slice \(16, 16\)"):
        example_slices([ExampleSlice("", VOXELS, **{kind: np.ones((8, 8), np.uint8)})])
    with pytest.raises(ValueError, match="the mask has shape"):
        scan_overview(Scan(VOXELS[None]), **{kind: np.ones((1, 8, 8), np.uint8)})


@pytest.mark.parametrize(
    ("total", "slices", "expected"),
    [(1, 24, [0]), (5, 24, [0, 1, 2, 3, 4]), (41, 5, [0, 10, 20, 30, 40])],
)
def test_overview_shows_evenly_spaced_slices(total, slices, expected):
    scan = Scan(np.repeat(VOXELS[None], total, axis=0))
    lungs = make_lungs((total, 16, 16))
    figure = scan_overview(scan, lungs, title="scan", slices=slices)
    assert [int(axis.texts[0].get_text()) for axis in figure.axes] == expected
    assert legend_texts(figure) == ["right lung", "left lung"]


def test_hounsfield_counts_add_up():
    voxels = np.array([[-1024, -850, 40, 3000]], np.int16)
    counts = count_hounsfield(voxels, np.array([[0, 1, 2, 0]], np.uint8))
    assert counts.sum().to_dict() == {"inside lungs": 2, "outside lungs": 2}
    assert len(counts) == len(HOUNSFIELD_EDGES) - 1
    middle = counts.index[counts["inside lungs"] > 0]
    assert np.abs(middle - np.array([-850, 40])).max() <= 12.5
    assert counts["outside lungs"].iloc[[0, -1]].tolist() == [1, 1]


def test_hounsfield_counts_need_hounsfield_units_and_one_shape():
    with pytest.raises(TypeError, match="int16 Hounsfield units, got uint8"):
        count_hounsfield(np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match="the mask has shape"):
        count_hounsfield(np.zeros((2, 2), np.int16), np.zeros((3, 2), np.uint8))


def test_hounsfield_curves_are_shares():
    counts = count_hounsfield(np.repeat(VOXELS[None], 2, axis=0), make_lungs((2, 16, 16)))
    nothing = counts * 0  # a group without lungs
    figure = hounsfield_histogram({"COVID-19": counts, "none": nothing})
    sums = [[line.get_ydata().sum() for line in axis.lines] for axis in figure.axes]
    assert sums == [[100, 0], [100, 0]]
    assert legend_texts(figure) == ["COVID-19", "none"]


@pytest.mark.parametrize("name", ["../figure", "a/b"])
def test_a_figure_stays_in_its_folder(tmp_path, name):
    figure = example_slices([ExampleSlice("", VOXELS)])
    with pytest.raises(ValueError, match="no path"):
        save_figure(figure, tmp_path / "figures", name)


def test_no_slices_are_refused():
    with pytest.raises(ValueError, match="something to show"):
        example_slices([])


def test_figures_are_saved_under_their_names_and_given_back(tmp_path):
    figures = {name: example_slices([ExampleSlice(name, VOXELS)]) for name in ("b", "a")}
    assert save_figures(figures, tmp_path) == list(figures.values())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a.pdf", "a.png", "b.pdf", "b.png"]
