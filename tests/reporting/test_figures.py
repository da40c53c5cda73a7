"""Tests of lib/reporting/figures.py: what is drawn, read back from the figure."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lib.reporting.figures import (
    confusion_matrices,
    learning_curves,
    probabilities_by_part,
    read_learning_curves,
    roc_curves,
)
from lib.reporting.pictures import save_figure

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


def legend_texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


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


def test_learning_curves_of_systems_that_measure_other_quantities():
    figure = learning_curves(
        {
            "U-Net": pd.DataFrame({"epoch": [1, 2], "validation_dice": [0.5, 0.9], "rate": [1, 1]}),
            "SAM": pd.DataFrame({"train_loss": [0.4, 0.3, 0.2]}),
            "CLIP": pd.DataFrame({"step": [1], "accuracy": [0.5]}),
        }
    )
    assert {axis.get_ylabel() for axis in figure.axes} == {"Dice", "Loss"}
    (loss,) = next(axis for axis in figure.axes if axis.get_ylabel() == "Loss").lines
    assert loss.get_xdata().tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="something to show"):
        learning_curves({"CLIP": pd.DataFrame({"step": [1]})})


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


def test_probabilities_stand_by_part_and_class():
    predictions = pd.concat([make_predictions(), make_predictions(seed=1).assign(split="train")])
    (axis,) = probabilities_by_part(predictions, "covid").axes
    rows = [label.get_text() for label in axis.get_yticklabels()]
    groups = predictions["split"] + ", " + predictions["label"]
    assert rows == sorted(groups.unique())
    drawn = np.concatenate([points.get_offsets()[:, 0] for points in axis.collections])
    np.testing.assert_allclose(np.sort(drawn), np.sort(predictions["probability_covid"]))
    assert axis.lines[-1].get_xdata() == [0.5, 0.5]


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


@pytest.mark.parametrize(
    "draw",
    [
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


def test_histories_are_grouped_as_they_are_drawn(tmp_path):
    """Lungs together; each classifier by itself, its networks and segmentations side by side."""
    one = pd.DataFrame({"epoch": [1, 2], "train_loss": [0.7, 0.5]})
    two = pd.concat([one.assign(network="LSTM"), one.assign(network="Swin")])
    written = {
        "lungs/unet-phantom": one,
        "lungs/sam-phantom": one,
        "phantom/racnet-none": one,
        "phantom/racnet-sam2clip2sam": one,
        "phantom/acvlab-none": two,
        "phantom/mask_net_head_seed0": one.assign(network="COVID-CT-Mask-Net"),
        "lesions/both-phantom": one,
    }
    for name, table in written.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    groups = read_learning_curves(tmp_path)
    assert {name: list(histories) for name, histories in groups.items()} == {
        "lesions": ["both, phantom"],
        "lungs": ["sam, phantom", "unet, phantom"],
        "phantom_acvlab": ["LSTM, none", "Swin, none"],
        "phantom_mask_net_head_seed0": ["COVID-CT-Mask-Net"],
        "phantom_racnet": ["racnet, none", "racnet, sam2clip2sam"],
    }
    pd.testing.assert_frame_equal(groups["lungs"]["sam, phantom"], one)
    assert learning_curves(groups["phantom_acvlab"]).axes[0].get_xlabel() == "Epoch"
