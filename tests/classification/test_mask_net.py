import numpy as np
import pytest
import safetensors.torch
import torch
from lightning_fabric import Fabric, seed_everything

from lib.classification import mask_net
from lib.classification.pictures import PictureItem
from lib.classification.task import Task
from lib.data.store import save_volume
from lib.segmentation import mask_rcnn

CLASSES = ("control", "pneumonia", "covid")
SIZE = 64
DETECTOR = mask_rcnn.VARIANTS["small"] | {"side": SIZE, "longest": 2 * SIZE}
VARIANT = {
    "detector": DETECTOR,
    "head": {"boxes": 16, "width": 32, "fan": "fan_in"},
    "padding": "spread",
}
SETTINGS = {
    "image_size": SIZE,
    "trained": "head",
    "head_first": None,
    "learning_rate": 3e-3,
    "detector_learning_rate": 1e-3,
    "weight_decay": 1e-3,
    "batch_scans": 8,
    "loader_processes": 0,
    "augmentation": {"mirrored": True},
    "cache_pictures": True,
    "epochs": 2,
    "patience": None,
    "chosen_by": "loss",
    "schedule": None,
}
CPU = Fabric(accelerator="cpu", devices=1)


@pytest.fixture
def pictures(tmp_path):
    """24 pictures of one scan: nothing, a square on the left, two squares."""
    voxels = np.random.default_rng(0).integers(0, 60, (24, SIZE, SIZE), dtype=np.uint8)
    for index, slice_ in enumerate(voxels):
        if index % 3:
            slice_[20:40, 6:26] = 200
        if index % 3 == 2:
            slice_[20:40, 36:56] = 200
    save_volume(tmp_path / "scan.b2nd", voxels)
    (tmp_path / "scan.json").write_text("scan")
    return [
        PictureItem(f"scan_{k:04d}", "scan", tmp_path / "scan.b2nd", k, k % 3) for k in range(24)
    ]


@pytest.fixture
def lesion_model(tmp_path):
    """The file of a lesion model, drawn at random."""
    seed_everything(0, verbose=False)
    path = tmp_path / "lesions.safetensors"
    safetensors.torch.save_file(mask_rcnn.build(classes=2, **DETECTOR).state_dict(), path)
    return path


def task(pictures, start, folder, *, classes=CLASSES, **changes):
    return Task(
        scans=pictures,
        splits=16 * ["train"] + 8 * ["validation"],
        variant=VARIANT,
        settings=SETTINGS | changes,
        fabric=CPU,
        folder=folder,
        seed=1,
        classes=classes,
        start=start,
    )


def detector_of(model):
    return {name: weights.clone() for name, weights in model.detector.state_dict().items()}


def test_s_alone_learns_from_boxes_computed_once_as_from_boxes_of_every_epoch(
    pictures, lesion_model, tmp_path, monkeypatch
):
    calls = []
    ranked = mask_net.MaskNet.ranked
    monkeypatch.setattr(
        mask_net.MaskNet,
        "ranked",
        lambda model, batch: calls.append(len(batch)) or ranked(model, batch),
    )
    model, histories, _ = mask_net.train(task(pictures, lesion_model, tmp_path / "cached"))
    assert sum(calls) == len(pictures)  # each picture once, in two epochs
    plain = mask_net.build(**VARIANT)
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / "cached" / mask_net.WEIGHTS))
    trained = safetensors.torch.load_file(lesion_model)
    for name, weights in detector_of(model).items():
        torch.testing.assert_close(weights, trained[name], rtol=0, atol=0)
    assert [row["epoch"] for row in histories[mask_net.S_ALONE]] == [1, 2]
    asked = {"settings": SETTINGS, "fabric": CPU}
    found = mask_net.predict(model, pictures, **asked)
    np.testing.assert_allclose(mask_net.predict(plain, pictures, **asked), found, atol=1e-6)
    assert found.shape == (24, 3) and np.allclose(found.sum(1), 1, atol=1e-6)
    boxes = mask_net.rank_pictures(model, pictures, **asked)
    with torch.no_grad():
        logits = model.head.eval()(boxes)
    np.testing.assert_allclose(logits.softmax(1).numpy(), found, atol=1e-5)


@pytest.mark.parametrize("trained", ["head_and_norms", "everything"])
def test_more_than_s_moves_what_it_names_and_no_statistics(
    pictures, lesion_model, tmp_path, trained
):
    asked = task(pictures, lesion_model, tmp_path / trained, trained=trained, epochs=1)
    model = mask_net.train(asked).model
    start = safetensors.torch.load_file(lesion_model)
    moved = {n for n, weights in detector_of(model).items() if not weights.equal(start[n])}
    assert not any("running" in name or "rpn" in name for name in moved)
    assert {"backbone.body.bn1.weight", "backbone.body.layer2.0.downsample.1.bias"} <= moved
    assert ("backbone.body.conv1.weight" in moved) == (trained == "everything")


def test_s_may_learn_alone_before_the_rest_learns_with_it(pictures, lesion_model, tmp_path):
    first = {"epochs": 3, "learning_rate": 1e-2}
    changes = {"trained": "head_and_norms", "head_first": first, "epochs": 1}
    model, histories, _ = mask_net.train(task(pictures, lesion_model, tmp_path / "run", **changes))
    assert {name: len(rows) for name, rows in histories.items()} == {
        mask_net.S_ALONE: 3,
        "COVID-CT-Mask-Net": 1,
    }
    assert histories[mask_net.S_ALONE][0]["learning_rate"] == 1e-2
    start = safetensors.torch.load_file(lesion_model)
    assert not detector_of(model)["backbone.body.bn1.weight"].equal(
        start["backbone.body.bn1.weight"]
    )


def test_boxes_of_a_random_detector_already_tell_pictures_apart(pictures, lesion_model, tmp_path):
    trained = mask_net.train(task(pictures, lesion_model, tmp_path / "run", epochs=60))
    losses = [row["train_loss"] for row in trained.histories[mask_net.S_ALONE]]
    assert losses[-1] < 0.1 < losses[0]


def test_a_classifier_is_fine_tuned_to_other_classes_but_keeps_the_rest(
    pictures, lesion_model, tmp_path
):
    first = mask_net.train(task(pictures, lesion_model, tmp_path / "first", epochs=1)).model
    two = [
        PictureItem(item.image_id, "scan", item.volume, item.index, int(item.target == 2))
        for item in pictures
    ]
    start = tmp_path / "first" / mask_net.WEIGHTS
    second = mask_net.build(**VARIANT, classes=2)
    mask_net.start_from(second, safetensors.torch.load_file(start))
    assert second.head[1].weight.equal(first.head[1].weight)
    assert second.head[5].weight.shape == (2, 32)
    again = mask_net.build(**VARIANT)
    mask_net.start_from(again, safetensors.torch.load_file(start))
    assert again.head[5].weight.equal(first.head[5].weight)
    asked = task(two, start, tmp_path / "second", classes=("control", "covid"), epochs=1)
    model = mask_net.train(asked).model
    assert mask_net.predict(model, two, settings=SETTINGS, fabric=CPU).shape == (24, 2)


def test_what_cannot_be_started_from_is_refused(pictures, lesion_model, tmp_path):
    with pytest.raises(ValueError, match="starts from a lesion model: train the lesions first"):
        mask_net.train(task(pictures, None, tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match="run the stage that trains it first"):
        mask_net.train(task(pictures, tmp_path / "none.safetensors", tmp_path / "run"))
    other = mask_net.build(**VARIANT | {"head": {"boxes": 8, "width": 32}})
    with pytest.raises(ValueError, match="the weights are of another classifier: size mismatch"):
        mask_net.start_from(mask_net.build(**VARIANT), other.state_dict())


def test_another_start_is_another_training(pictures, lesion_model, tmp_path):
    mask_net.train(task(pictures, lesion_model, tmp_path / "run", epochs=1))
    weights = safetensors.torch.load_file(lesion_model)
    weights["backbone.body.conv1.weight"] *= 2
    safetensors.torch.save_file(weights, lesion_model)
    model = mask_net.train(task(pictures, lesion_model, tmp_path / "run", epochs=1)).model
    assert model.detector.backbone.body.conv1.weight.equal(weights["backbone.body.conv1.weight"])
