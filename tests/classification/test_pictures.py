import dataclasses
from collections import OrderedDict

import numpy as np
import pandas as pd
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from lib.classification.inputs import content_digest
from lib.classification.picture_augmentation import Augmentation
from lib.classification.pictures import (
    UNKNOWN,
    PictureItem,
    colours,
    load_picture,
    picture_items,
    picture_views,
    prepared,
    start_from,
    varied_colours,
)
from lib.classification.task import Task
from lib.data.scan import apply_window
from lib.data.store import save_volume

CLASSES = ("control", "pneumonia", "covid")


@pytest.fixture
def listed(tmp_path):
    """A list of three slices of one scan in HU, and the folder of the scan."""
    voxels = np.random.default_rng(0).integers(-1000, 400, (4, 12, 12), dtype=np.int16)
    save_volume(tmp_path / "a.b2nd", voxels)
    (tmp_path / "a.json").write_text("a")
    pictures = pd.DataFrame(
        {
            "image_id": ["a_0000", "a_0002", "a_0003"],
            "scan_id": "a",
            "slice": [0, 2, 3],
            "label": ["covid", "", "control"],
        }
    )
    return pictures, tmp_path, voxels


def test_a_list_becomes_items_in_its_order_and_slices_without_a_class_stay(listed):
    pictures, folder, _ = listed
    items = picture_items(pictures, scans=folder, classes=CLASSES)
    assert [item.image_id for item in items] == ["a_0000", "a_0002", "a_0003"]
    assert [item.index for item in items] == [0, 2, 3]
    assert [item.target for item in items] == [2, UNKNOWN, 0]


def test_a_label_that_is_no_class_and_a_scan_that_is_not_stored_are_named(listed):
    pictures, folder, _ = listed
    with pytest.raises(ValueError, match="a_0000 is 'covid', the classes are control"):
        picture_items(pictures, scans=folder, classes=["control"])
    with pytest.raises(FileNotFoundError, match=r"b\.b2nd is not there: prepare the data set"):
        picture_items(pictures.assign(scan_id="b"), scans=folder, classes=CLASSES)


def test_a_picture_is_its_slice_through_the_lung_window(listed):
    pictures, folder, voxels = listed
    items = picture_items(pictures, scans=folder, classes=CLASSES)
    np.testing.assert_array_equal(load_picture(items[1], size=12), apply_window(voxels[2]))
    halved = load_picture(items[1], size=6)
    means = apply_window(voxels[2]).reshape(6, 2, 6, 2).mean((1, 3))
    assert np.abs(halved - means).max() <= 1  # rows and columns are rounded one after another
    with pytest.raises(IndexError):
        load_picture(PictureItem("a_0009", "a", folder / "a.b2nd", 9, 0), size=6)


def test_networks_see_three_equal_colours_from_0_to_1(listed):
    pictures, folder, voxels = listed
    items = picture_items(pictures, scans=folder, classes=CLASSES)
    view, target, name = picture_views(items, size=12)[2]
    assert (target, name, view.dtype, view.shape) == (0, "a", torch.float32, (3, 12, 12))
    np.testing.assert_array_equal((view[1] * 255).numpy().round(), apply_window(voxels[3]))
    assert torch.equal(view[0], view[2])
    white = colours(np.full((2, 3), 255, np.uint8))
    assert white.shape == (3, 2, 3) and white.eq(1).all()


def test_the_content_of_items_tells_other_slices_targets_and_scans_apart(listed):
    pictures, folder, _ = listed
    found = {
        content_digest(picture_items(changed, scans=folder, classes=CLASSES))
        for changed in (
            pictures,
            pictures.assign(slice=[0, 1, 3]),
            pictures.assign(label="covid"),
            pictures.iloc[::-1],
        )
    }
    (folder / "a.json").write_text("other")
    found.add(content_digest(picture_items(pictures, scans=folder, classes=CLASSES)))
    assert len(found) == 5


def test_a_random_view_changes_all_colours_alike_and_a_plain_one_nothing():
    grey = np.random.default_rng(0).integers(0, 256, (9, 9), dtype=np.uint8)
    ranges = Augmentation(probability=1.0, mirrored=True)
    assert varied_colours(grey, None, ranges=ranges).equal(colours(grey))
    found = varied_colours(grey, np.random.default_rng(0), ranges=ranges)
    assert found.equal(colours(grey).flip(-1))


def class_layer(classes, width=2):
    """A network of two layers, the second one for so many classes."""
    layers = {"features": nn.Linear(3, width), "output": nn.Linear(width, classes)}
    return nn.Sequential(OrderedDict(layers))


@pytest.mark.parametrize("classes, kept", [(3, True), (2, False)])
def test_a_start_gives_its_weights_but_the_class_layer_of_other_classes(classes, kept):
    model, trained = class_layer(classes), class_layer(3).state_dict()
    drawn = model.output.weight.clone()
    start_from(model, trained)
    assert model.features.weight.equal(trained["features.weight"])
    assert model.output.weight.equal(trained["output.weight"] if kept else drawn)


@pytest.mark.parametrize("other", [class_layer(3, width=4), nn.Linear(3, 2), nn.Sequential()])
def test_a_start_of_another_network_is_refused(other):
    with pytest.raises(ValueError, match="weights to start from are of another network"):
        start_from(class_layer(3), other.state_dict())


def test_pictures_without_a_class_are_not_learned_from(made_pictures, tmp_path):
    pictures = made_pictures(4)
    pictures[-1] = dataclasses.replace(pictures[-1], target=UNKNOWN)
    task = Task(
        scans=pictures,
        splits=6 * ["train"] + 2 * ["validation"],
        variant={},
        settings={},
        fabric=Fabric(accelerator="cpu", devices=1),
        folder=tmp_path,
        seed=0,
        classes=CLASSES,
    )
    with pytest.raises(ValueError, match="pictures_3_0001 has no class, so nothing is learned"):
        prepared(task, class_layer)
