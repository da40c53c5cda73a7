import numpy as np
import pandas as pd
import pytest
import torch
from lightning_fabric import Fabric, seed_everything

from lib.data.store import save_volume
from lib.evaluation.detection import average_precisions
from lib.segmentation import mask_rcnn
from lib.segmentation.lesion_training import (
    LesionSlice,
    LesionSlices,
    load_slices,
    predict_lesions,
    train_lesion_model,
)
from lib.segmentation.mask_rcnn import FULL, HEADS, VARIANTS, build, choose_trained

torch.set_num_threads(1)

BOTH = {"mask_type": "both", "ignored_area": 0}
TINY = VARIANTS["small"] | {"width": 16, "box_width": 32, "mask_widths": [16], "side": 64}


def chest(*lesions, size=(64, 64)):
    """A slice in HU with rectangles of lesions (value, top, left, bottom, right), and its mask."""
    voxels, mask = np.full(size, -850, np.int16), np.zeros(size, np.uint8)
    for value, top, left, bottom, right in lesions:
        mask[top:bottom, left:right] = value
    voxels[mask == 1], voxels[mask == 2] = -450, 0
    return voxels, mask


SCANS = {
    "a": [chest((1, 8, 10, 28, 30)), chest(), chest((2, 30, 30, 50, 55))],
    "b": [chest(), chest((1, 4, 4, 24, 30), (2, 40, 10, 60, 30))],
    "one-pixel": [chest((2, 20, 21, 21, 22))],
}


@pytest.fixture
def prepared(tmp_path):
    """A prepared data set of three scans with masks, one of 8 bits and other size, one without."""
    for kind in ("scans", "lesions"):
        (tmp_path / "made" / kind).mkdir(parents=True)
    for name, slices in SCANS.items():
        for kind, volume in zip(("scans", "lesions"), zip(*slices, strict=True), strict=True):
            save_volume(tmp_path / f"made/{kind}/{name}.b2nd", np.stack(volume))
    mask = chest((1, 3, 5, 20, 40), size=(48, 80))[1][None]
    save_volume(tmp_path / "made/scans/wide.b2nd", 60 + 100 * mask)
    save_volume(tmp_path / "made/lesions/wide.b2nd", mask)
    save_volume(tmp_path / "made/scans/bare.b2nd", chest()[0][None])
    return tmp_path / "made"


def rows(*names):
    return pd.DataFrame({"scan_id": names, "patient_id": [f"of {name}" for name in names]})


ALL = rows("a", "b", "one-pixel", "wide", "bare")


def places(slices):
    return [one.image_id for one in slices.slices]


WITH_LESIONS = ["a_0000", "a_0002", "b_0001", "one-pixel", "wide"]


def test_slices_with_lesions_as_they_are_stored(prepared):
    slices = load_slices(ALL, prepared, **BOTH)
    assert places(slices) == WITH_LESIONS
    assert slices.table().iloc[1].tolist() == ["a_0002", "a", "of a"]
    assert len(slices.table()) == 5
    picture, lesions = slices[0]
    assert picture.dtype == torch.uint8 and picture.shape == (64, 64)
    assert picture.unique().tolist() == [85, 153]  # -850 and -450 HU in the lung window
    assert lesions.boxes.tolist() == [[10, 8, 30, 28]]
    assert slices[3][1].boxes.tolist() == [[21, 20, 22, 21]]
    assert slices[4][0].shape == (48, 80) and slices[4][0].unique().tolist() == [60, 160]
    assert slices.truth()[2].labels.tolist() == [1, 2] and slices.truth()[2].masks.dtype == bool


@pytest.mark.parametrize(("share", "expected"), [(0, []), (0.4, None), (9, ["a_0001", "b_0000"])])
def test_a_share_of_slices_without_lesions_is_added(prepared, share, expected):
    slices = load_slices(ALL, prepared, **BOTH, without_lesions=share, seed=1)
    assert places(slices)[:5] == WITH_LESIONS
    added = places(slices)[5:]
    assert added == expected if expected is not None else len(added) == 2
    assert all(not len(slices[5 + number][1].labels) for number in range(len(added)))


def test_no_more_than_wanted_evenly_spread(prepared):
    assert places(load_slices(ALL, prepared, **BOTH, most=3)) == WITH_LESIONS[::2]
    assert places(load_slices(ALL, prepared, **BOTH, most=9)) == WITH_LESIONS


def test_small_lesions_and_mask_types_decide_which_slices_have_lesions(prepared):
    ignored = 64  # pixels of 512 x 512: one of these slices
    counted = load_slices(ALL, prepared, mask_type="both", ignored_area=ignored)
    assert "one-pixel" not in places(counted) and len(counted) == 4
    ground_glass = load_slices(ALL, prepared, mask_type="ggo", ignored_area=0)
    assert places(ground_glass) == ["a_0000", "b_0001", "wide"]
    assert ground_glass.truth()[1].labels.tolist() == [1]


def test_what_cannot_be_learnt_from_is_refused_in_a_sentence(prepared):
    with pytest.raises(ValueError, match="none of these scans of made has a lesion mask"):
        load_slices(rows("bare"), prepared, **BOTH)
    save_volume(prepared / "lesions/bare.b2nd", np.zeros((1, 64, 64), np.uint8))
    with pytest.raises(ValueError, match="no slice of these scans of made has a lesion"):
        load_slices(rows("bare"), prepared, **BOTH)
    save_volume(prepared / "lesions/bare.b2nd", np.full((1, 64, 64), 7, np.uint8))
    with pytest.raises(ValueError, match=r"bare, slice 0: a lesion mask holds 0 .*, got 7"):
        load_slices(rows("bare"), prepared, **BOTH)
    save_volume(prepared / "lesions/bare.b2nd", np.zeros((2, 64, 64), np.uint8))
    with pytest.raises(ValueError, match="of bare do not match"):
        load_slices(rows("bare"), prepared, **BOTH)


def test_flipping_mirrors_picture_and_lesions_together_and_every_other_time():
    picture = np.tile(np.arange(8, dtype=np.uint8), (4, 1))
    slices = LesionSlices(
        [LesionSlice("s", "s", "p", picture, (picture == 1).astype(np.uint8))], **BOTH, flip=True
    )
    torch.manual_seed(0)
    drawn = [slices[0] for _ in range(200)]
    assert all((shown == 1).equal(lesions.masks[0] == 1) for shown, lesions in drawn)
    mirrored = sum(lesions.boxes[0, 0].item() == 6 for _, lesions in drawn)
    assert 70 < mirrored < 130


def test_the_digest_tells_slices_apart():
    picture, mask = np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
    other = mask.copy()
    other[3, 3] = 1
    pairs = [(picture, mask), (picture, other), (other, mask), (picture.reshape(2, 8), mask)]
    digests = {LesionSlices([LesionSlice("s", "s", "p", *pair)], **BOTH).digest() for pair in pairs}
    assert len(digests) == len(pairs)
    assert (
        LesionSlices([LesionSlice("s", "s", "p", picture, mask.copy())], **BOTH).digest() in digests
    )


@pytest.mark.parametrize("part", [FULL, HEADS])
def test_a_model_trained_on_few_slices_finds_their_lesions(prepared, tmp_path, part, monkeypatch):
    monkeypatch.setattr(mask_rcnn, "VARIANTS", {"tiny": TINY})
    slices = load_slices(rows("a", "b", "wide"), prepared, **BOTH, without_lesions=1)
    fabric = Fabric(accelerator="cpu")
    seed_everything(0, verbose=False)
    untrained = build(classes=2, **TINY)
    before = {name: values.clone() for name, values in untrained.named_parameters()}
    names = choose_trained(untrained, part)
    settings = {
        "variant": "tiny",
        "imagenet_weights": None,
        "part": part,
        "frozen": [],
        "mask_type": "both",
        "batch_slices": 4,
        "slices_per_epoch": 8 if part == HEADS else 48,
        "learning_rate": 3e-3,
        "weight_decay": 0.0,
        "epochs": 1 if part == HEADS else 4,
        "patience": None,
        "schedule": None,
    }
    model, history = train_lesion_model(
        slices, slices, settings=settings, fabric=fabric, folder=tmp_path / "trained", seed=0
    )
    moved = {name for name, values in model.named_parameters() if not values.equal(before[name])}
    assert moved and moved <= set(names)
    if part == HEADS:
        return
    found = predict_lesions(
        model, [one.picture for one in slices.slices], device=fabric.device, batch_size=4
    )
    assert [one.masks.shape[1:] for one in found] == [one.mask.shape for one in slices.slices]
    table = average_precisions(found, slices.truth())
    best = max(row["validation_precision"] for row in history)
    assert table.loc["paper", "AP@0.5"] == pytest.approx(best)
    assert best > 0.3
