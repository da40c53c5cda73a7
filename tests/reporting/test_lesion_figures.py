from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from lib.data.store import save_volume
from lib.reporting import lesion_figures
from lib.reporting.lesion_figures import (
    COLOURS,
    Found,
    LesionPicture,
    chosen_pictures,
    example_figure,
    lesion_table,
    mask_colours,
    precision_pictures,
    predicted_picture,
    prediction_figure,
    slice_table,
    statistics_figure,
    stored_picture,
    true_lesions,
)
from lib.segmentation.lesion_training import LesionSlice

GLASS, CONSOLIDATION = "ground-glass opacity", "consolidation"


def row(patient, index, label, pixels, split="test", scan=None):
    scan = scan or f"scan_{patient}"
    return (f"{scan}_{index:04d}", scan, index, patient, split, label, pixels)


@pytest.fixture
def pictures():
    rows = [row(f"p{n}", index, "covid", 10 * n + index) for n in (1, 2, 3, 4) for index in (1, 2)]
    rows += [row("p5", index, "control", 0) for index in range(5)]
    rows += [row("p5", index, "control", 0, scan="zweit") for index in range(9)]
    rows += [row("p6", 0, "pneumonia", 7), row("p7", 0, "pneumonia", 9, split="train")]
    rows += [row("p8", 0, "", 99, split="")]
    columns = ["image_id", "scan_id", "slice", "patient_id", "split", "label", "lesion_pixels"]
    return pd.DataFrame(rows, columns=columns).astype({"lesion_pixels": "Int64"})


def test_each_class_shows_lowest_median_and_highest_patient_by_the_fullest_slice(pictures):
    found = chosen_pictures(pictures)
    assert found[["image_id", "case"]].to_numpy().tolist() == [
        ["scan_p1_0002", "lowest"],
        ["scan_p2_0002", "median"],
        ["scan_p4_0002", "highest"],
        ["scan_p6_0000", "highest"],  # the only patient of the test part
        ["scan_p5_0002", "highest"],  # a control: the middle of its first scan
    ]
    assert list(found.columns) == [*pictures.columns, "case"]


def test_without_masks_or_a_test_part_there_are_examples_all_the_same(pictures):
    trained = pictures.assign(lesion_pixels=pd.array([None] * len(pictures), "Int64"))
    trained["split"] = trained["split"].replace("test", "train")
    found = chosen_pictures(trained)
    assert found["label"].tolist() == ["covid"] * 3 + ["pneumonia"] * 2 + ["control"]
    assert found["image_id"].iloc[0] == "scan_p1_0002"


@pytest.fixture
def prepared(tmp_path):
    """One scan of two slices; the second holds two ground-glass lesions and a consolidation."""
    voxels = np.full((2, 32, 32), 200, np.uint8)
    mask = np.zeros((2, 32, 32), np.uint8)
    mask[1, 2:4, 2:6] = 1  # 8 pixels
    mask[1, 10:20, 10:20] = 1  # 100
    mask[1, 25, 25] = 2
    for name, values in (("scans", voxels), ("lesions", mask)):
        (tmp_path / name).mkdir()
        save_volume(tmp_path / name / "scan_p1.b2nd", values)
    return tmp_path


def test_stored_pictures_come_with_their_mask_where_there_is_one(prepared):
    asked = dict(
        zip(("scan_id", "slice", "label", "image_id"), ("scan_p1", 1, "covid", "a"), strict=True)
    )
    found = stored_picture(asked, prepared)
    assert found.title == "COVID-19\na"
    assert found.grey.dtype == np.uint8 and found.grey.shape == (32, 32)
    assert np.count_nonzero(found.lesions) == 109
    long = stored_picture(asked | {"image_id": "0123456789" * 9}, prepared)
    assert long.title == "COVID-19\n012345678...23456789"
    (prepared / "lesions/scan_p1.b2nd").unlink()
    assert stored_picture(asked, prepared).lesions is None


def test_lesions_are_counted_one_by_one(prepared):
    pictures = pd.DataFrame(
        [row("p1", 0, "", 0, split=""), row("p1", 1, "covid", 109, split="remaining")],
        columns=["image_id", "scan_id", "slice", "patient_id", "split", "label", "lesion_pixels"],
    )
    found = lesion_table(pictures, prepared / "lesions")
    assert sorted(found.itertuples(index=False, name=None)) == [
        ("scan_p1_0001", "train", CONSOLIDATION, 1 / 1024),
        ("scan_p1_0001", "train", GLASS, 8 / 1024),
        ("scan_p1_0001", "train", GLASS, 100 / 1024),
    ]
    # 1,000 pixels of 512 x 512 are 3.9 of 32 x 32
    assert len(lesion_table(pictures, prepared / "lesions", ignored_area=1000)) == 2
    assert lesion_table(pictures.iloc[:1], prepared / "lesions").empty


lesion = st.tuples(
    st.sampled_from("abc"), st.sampled_from([GLASS, CONSOLIDATION]), st.floats(1e-6, 1)
)


@given(st.lists(lesion, min_size=1, max_size=12))
def test_slices_hold_all_lesions_and_name_what_they_lack(drawn):
    lesions = pd.DataFrame(drawn, columns=["image_id", "lesion", "share"])
    table = slice_table(lesions.assign(split="test"))
    assert len(table) == 2 * lesions["image_id"].nunique()
    assert table["count"].sum() == len(lesions)
    for picked in table.itertuples():
        own = [s for image, name, s in drawn if (image, name) == (picked.image_id, picked.lesion)]
        assert picked.count == len(own)
        assert picked.share == pytest.approx(sum(own))


def test_statistics_show_every_part_with_its_shares():
    rows = [("a", "train", GLASS, 0.01)] * 2 + [("b", "train", CONSOLIDATION, 0.1)]
    rows += [("c", "test", GLASS, 0.02)] * 12
    figure = statistics_figure(pd.DataFrame(rows, columns=["image_id", "split", "lesion", "share"]))
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == ["train: 2 slices", "", "", "test: 1 slice", "", ""]
    for axis in figure.axes[:3]:  # each class sums to 100 %
        assert sum(bar.get_height() for bar in axis.patches) == pytest.approx(200)
    assert figure.axes[1].get_title(loc="right") == "medians 1, 10"
    assert figure.axes[4].get_title(loc="right") == "medians 2, none"
    labels = [label.get_text() for label in figure.axes[3].get_xticklabels()]
    assert labels[-1] == "10+"
    with pytest.raises(ValueError, match="needs a slice that has some"):
        statistics_figure(pd.DataFrame(columns=["image_id", "split", "lesion", "share"]))


def test_colours_of_masks():
    found = mask_colours(np.array([[0, 1, 2]]))
    assert found.shape == (1, 3, 3)
    wanted = [to_rgb("black"), to_rgb(COLOURS[GLASS]), to_rgb(COLOURS[CONSOLIDATION])]
    np.testing.assert_allclose(found[0], wanted)


def test_examples_stand_beside_their_masks():
    grey, mask = np.zeros((8, 8), np.uint8), np.eye(8, dtype=np.uint8)
    rows = [
        [LesionPicture("one", grey, mask), LesionPicture("two", grey, None)],
        [LesionPicture("three", grey, mask)],
    ]
    figure = example_figure(rows)
    left = [axis.get_title(loc="left") for axis in figure.axes]
    assert left == ["one", "\n12 % lesion", "two", "", "three", "\n12 % lesion", "", ""]
    assert figure.axes[3].texts[0].get_text() == "no mask known"
    assert [len(axis.images) for axis in figure.axes] == [1, 1, 1, 0, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="the mask has shape"):
        example_figure([[LesionPicture("one", grey, mask[:4])]])
    with pytest.raises(ValueError, match="needs something to show"):
        example_figure([])


def test_predictions_are_asked_for_under_every_threshold(monkeypatch):
    asked = []

    def found(model, pictures, *, nms_threshold):
        asked.append((nms_threshold, float(pictures[0].max())))
        boxes, masks = torch.tensor([[1.0, 2, 5, 6]]), torch.ones(1, 8, 8, dtype=bool)
        return [
            SimpleNamespace(
                boxes=boxes, labels=torch.tensor([2]), scores=torch.tensor([0.9]), masks=masks
            )
        ]

    monkeypatch.setattr(lesion_figures, "detections", found)
    picture = LesionPicture("one", np.full((8, 8), 255, np.uint8), None)
    filled = predicted_picture(torch.nn.Linear(1, 1), picture, thresholds=(0.3, 0.6))
    assert asked == [(0.3, 1.0), (0.6, 1.0)]
    assert list(filled.found) == ["RoI NMS 0.3", "RoI NMS 0.6"]
    assert filled.found["RoI NMS 0.3"].names == [CONSOLIDATION]
    figure = prediction_figure([filled])
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["RoI NMS 0.3: 1 box", "RoI NMS 0.6: 1 box", "truth: not known"]


def test_slices_are_shown_from_the_lowest_to_the_highest_precision(monkeypatch):
    monkeypatch.setattr(
        lesion_figures, "predicted_picture", lambda model, picture, *, mask_type: picture
    )
    grey, mask = np.zeros((8, 8), np.uint8), np.eye(8, dtype=np.uint8)
    slices = [LesionSlice(name, "scan", "patient", grey, mask) for name in "abcd"]
    shown = precision_pictures(None, slices, [0.5, 1.0, 0.0, 0.5], shares=(0, 0.34, 1))
    assert [one.title for one in shown] == ["c\nAP@0.5 0.00", "a\nAP@0.5 0.50", "b\nAP@0.5 1.00"]
    assert all(one.grey is grey and one.lesions is mask for one in shown)
    (only,) = precision_pictures(None, slices[:1], [0.2], shares=(1,))
    assert only.title == "a\nAP@0.5 0.20"


def test_truth_is_drawn_as_instances():
    mask = np.zeros((8, 8), np.uint8)
    mask[1:3, 1:3], mask[5:7, 5:7] = 1, 2
    found = true_lesions(mask)
    assert found.names == [GLASS, CONSOLIDATION]
    assert true_lesions(mask, mask_type="merged").names == ["lesion", "lesion"]
    figure = prediction_figure([LesionPicture("one", mask * 100, mask)], mask_type="both")
    (axis,) = figure.axes
    assert axis.get_title() == "truth: 2 lesions"
    boxes = [patch.get_bbox().bounds for patch in axis.patches if isinstance(patch, Rectangle)]
    assert sorted(boxes) == [(0.5, 0.5, 2, 2), (4.5, 4.5, 2, 2)]


def test_scores_do_not_cover_one_another():
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, 90, (60, 2))
    found = Found(
        names=[GLASS, CONSOLIDATION] * 30,
        boxes=np.concatenate([corners, corners + 10], axis=1),
        masks=np.zeros((60, 100, 100), bool),
        scores=np.sort(generator.random(60))[::-1],
    )
    grey = np.zeros((100, 100), np.uint8)
    figure = prediction_figure([LesionPicture("one\ntwo", grey, grey, {"all": found})] * 2)
    figure.canvas.draw()
    axis = figure.axes[2]
    written = axis.texts[1:]  # after the title of the row
    assert written[0].get_text() == f"{found.scores[0]:.2f}"  # the best is always there
    assert 10 < len(written) < 60
    places = [text.get_window_extent() for text in written]
    for number, place in enumerate(places):
        assert not any(place.overlaps(other) for other in places[number + 1 :])
