"""Tests of lib/reporting/figures.py: what is drawn, read back from the figure."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lib.data.scan import Scan
from lib.reporting.figures import (
    HOUNSFIELD_EDGES,
    ExampleSlice,
    confusion_matrices,
    count_hounsfield,
    example_slices,
    hounsfield_histogram,
    learning_curves,
    roc_curves,
    save_figure,
    scan_overview,
)

LONG_NAMES = [f"EMARS-APS number {number} with conventional segmentation" for number in range(8)]


def make_predictions(rows=24, seed=0):
    generator = np.random.default_rng(seed)
    is_covid = np.arange(rows) % 2 == 0
    covid = np.clip(generator.normal(0.4 + 0.2 * is_covid, 0.2), 0, 1)
    return pd.DataFrame(
        {
            "scan_id": [f"scan-{number}" for number in range(rows)],
            "patient_id": np.arange(rows) // 2,
            "split": "test",
            "label": np.where(is_covid, "covid", "non_covid"),
            "probability_covid": covid,
            "probability_non_covid": 1 - covid,
        }
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


def test_learning_curves_have_a_panel_per_quantity():
    history = pd.DataFrame(
        {
            "epoch": [1, 2],
            "train_loss": [0.7, 0.5],
            "validation_loss": [0.8, 0.6],
            "validation_macro_f1": [0.5, 0.9],
        }
    )
    figure = learning_curves({"RACNet": history, "MDAP": history.drop(columns="train_loss")})
    assert [axis.get_ylabel() for axis in figure.axes] == ["Loss", "Macro F1"]
    assert [len(axis.lines) for axis in figure.axes] == [3, 2]
    assert figure.axes[1].lines[0].get_ydata().tolist() == [0.5, 0.9]
    assert legend_texts(figure) == ["RACNet", "MDAP", "training (faint)"]


@pytest.mark.parametrize("names", [["RACNet"], LONG_NAMES], ids=["one", "eight long"])
def test_roc_curves_tell_systems_apart_and_name_their_areas(names):
    figure = roc_curves(
        {name: make_predictions(seed=k) for k, name in enumerate(names)}, positive="covid", seed=0
    )
    texts = legend_texts(figure)
    assert len(texts) == len(names)
    assert all("\nAUC 0." in text and "[" in text for text in texts)
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    looks = {(line.get_color(), line.get_linestyle()) for line in curves}
    assert len(looks) == len(names)


def test_a_roc_curve_needs_both_classes():
    only_covid = make_predictions().query("label == 'covid'")
    figure = roc_curves({"RACNet": only_covid}, positive="covid", seed=0)
    assert legend_texts(figure) == ["RACNet\nAUC undefined: one class absent"]
    assert len(figure.axes[0].lines) == 1  # the diagonal


def test_confusion_matrices_write_counts_and_shares():
    predictions = make_predictions(4).assign(
        probability_covid=[0.9, 0.2, 0.3, 0.1], probability_non_covid=[0.1, 0.8, 0.7, 0.9]
    )
    figure = confusion_matrices({name: predictions for name in LONG_NAMES}, positive="covid")
    assert len(figure.axes) == 8
    cells = [text.get_text() for text in figure.axes[0].texts]
    assert cells == ["1\n50 %", "1\n50 %", "0\n0 %", "2\n100 %"]
    assert figure.axes[0].get_title().replace("\n", " ") == LONG_NAMES[0]


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


@pytest.mark.parametrize(
    "draw",
    [
        lambda: example_slices([]),
        lambda: learning_curves({}),
        lambda: confusion_matrices({}, positive="covid"),
    ],
)
def test_a_figure_of_nothing_is_refused(draw):
    with pytest.raises(ValueError, match="something to show"):
        draw()


def test_figures_are_saved_with_the_same_bytes_and_nothing_stays_open(tmp_path):
    before = dict(plt.rcParams)
    contents = []
    for folder in ("a", "b"):
        figure = roc_curves({"RACNet": make_predictions()}, positive="covid", seed=0)
        files = save_figure(figure, tmp_path / folder, "sam2clip2sam_figure1")
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == ["sam2clip2sam_figure1.pdf", "sam2clip2sam_figure1.png"]
    assert Image.open(tmp_path / "a" / "sam2clip2sam_figure1.png").text == {}
    assert b"CreationDate" not in contents[0][1]
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before


@pytest.mark.parametrize("draw", ["roc", "matrices"])
def test_no_text_overlaps_and_legends_stay_off_the_data(draw):
    predictions = {name: make_predictions(seed=k) for k, name in enumerate(LONG_NAMES)}
    if draw == "roc":
        figure = roc_curves(predictions, positive="covid", seed=0)
    else:
        figure = confusion_matrices(predictions, positive="covid")
    figure.draw_without_rendering()  # places everything
    boxes = [axis.get_tightbbox() for axis in figure.axes]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    overlapping = [
        (one, two) for k, one in enumerate(boxes) for two in boxes[k + 1 :] if one.overlaps(two)
    ]
    assert not overlapping


@pytest.mark.parametrize("name", ["../figure", "a/b"])
def test_a_figure_stays_in_its_folder(tmp_path, name):
    figure = example_slices([ExampleSlice("", VOXELS)])
    with pytest.raises(ValueError, match="no path"):
        save_figure(figure, tmp_path / "figures", name)
