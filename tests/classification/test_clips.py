from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional

from lib.classification import clips
from lib.classification.clip_augmentation import draw_crop
from lib.classification.clips import (
    VIDEO_STATISTICS,
    ComposedScan,
    channel_statistics,
    compose,
    judged_clip,
    load_composed,
    resize_picture,
    training_clip,
)
from lib.classification.inputs import ScanItem
from lib.classification.resampling import random_positions, symmetrical_positions
from lib.data.scan import to_grey
from lib.data.selection import Selection
from lib.data.store import StoredVolume, save_volume

RANGES = {
    "degrees": 15,
    "translation": 0.1,
    "scale": 0.2,
    "shear_degrees": 10,
    "brightness": 0.5,
    "contrast": 0.3,
}
ONLY_GEOMETRY = RANGES | {"brightness": 0, "contrast": 0}


def random_volume(slices=9, height=40, width=50, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(-1400, 300, (slices, height, width), dtype=np.int16)


@pytest.fixture
def scan(tmp_path):
    volume = random_volume()
    mask = np.random.default_rng(1).integers(0, 3, volume.shape, dtype=np.uint8)
    save_volume(tmp_path / "scan.b2nd", volume)
    save_volume(tmp_path / "lungs.b2nd", mask)
    kept = Selection("a", "covid", first=2, last=6, box=(10, 4, 46, 36))
    return ScanItem("a", tmp_path / "scan.b2nd", tmp_path / "lungs.b2nd", 1, selection=kept)


@pytest.fixture
def decoded(monkeypatch):
    """Which slices are decoded: names of the files and numbers, in order."""
    seen, decode = [], StoredVolume._decode

    def watched(self, number, out):
        seen.append((self.path.stem, number))
        return decode(self, number, out)

    monkeypatch.setattr(StoredVolume, "_decode", watched)
    return seen


# ---------------------------------------------------------------------------------- composition


def by_definition(grey, lungs, letter):
    return {
        "R": grey,
        "M": np.where(lungs > 0, 255, 0),
        "L": np.where(lungs == 0, 0, grey),
    }[letter]


@given(channels=st.text("RML", min_size=3, max_size=3), seed=st.integers(0, 100))
def test_each_letter_is_one_channel(channels, seed):
    generator = np.random.default_rng(seed)
    grey = generator.integers(0, 256, (7, 9), dtype=np.uint8)
    lungs = generator.integers(0, 3, (7, 9), dtype=np.uint8)
    picture = compose(grey, lungs, channels)
    assert picture.dtype == np.uint8
    expected = np.stack([by_definition(grey, lungs, letter) for letter in channels], axis=-1)
    np.testing.assert_array_equal(picture, expected)


def test_raw_slices_need_no_mask():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert (compose(grey, None, "RRR") == grey[..., None]).all()


@pytest.mark.parametrize("channels", ["RM", "RMLR", "RGB", "rml", ""])
def test_other_letters_are_refused(channels):
    grey = np.zeros((4, 4), np.uint8)
    with pytest.raises(
        ValueError, match=f"channels are three letters of R, M and L, got '{channels}"
    ):
        compose(grey, grey, channels)


def test_a_mask_that_is_missing_or_of_another_shape_is_refused():
    grey = np.zeros((4, 4), np.uint8)
    with pytest.raises(ValueError, match="channels RML need a lung mask"):
        compose(grey, None, "RML")
    with pytest.raises(ValueError, match=r"differ in shape: \(4, 4\) and \(4, 5\)"):
        compose(grey, np.zeros((4, 5), np.uint8), "LLL")


@pytest.mark.parametrize(("length", "size"), [(512, 280), (100, 280), (160, 80), (150, 80)])
def test_resizing_is_bilinear_as_in_torchvision(length, size):
    picture = np.random.default_rng(0).integers(0, 256, (length, length, 3), dtype=np.uint8)
    whole = torch.from_numpy(picture.transpose(2, 0, 1)).float()
    expected = functional.resize(whole, [size, size], antialias=False)
    found = resize_picture(picture, size).transpose(2, 0, 1)
    np.testing.assert_allclose(found, expected.numpy(), atol=1.01)


@pytest.mark.parametrize(("length", "size"), [(320, 80), (320, 40), (64, 1)])
def test_reducing_by_more_than_two_takes_means(length, size):
    picture = np.random.default_rng(0).integers(0, 256, (length, length, 3), dtype=np.uint8)
    blocks = picture.reshape(size, length // size, size, length // size, 3)
    np.testing.assert_allclose(resize_picture(picture, size), blocks.mean(axis=(1, 3)), atol=2)


@pytest.mark.parametrize("shape", [(300, 70), (70, 300), (517, 333)])
def test_no_pixel_is_skipped_in_reducing(shape):
    """Single bright pixels far apart: everything they hold arrives."""
    picture = np.zeros((*shape, 3), np.uint8)
    picture[5::17, 3::19] = 255
    found = resize_picture(picture, 30)
    assert found.shape == (30, 30, 3)
    assert found.mean() == pytest.approx(picture.mean(), abs=0.5)


# --------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("cropped", [False, True])
@pytest.mark.parametrize("channels", ["RML", "LLL", "RRR"])
def test_the_kept_slices_are_composed_then_resized(scan, channels, cropped):
    found = load_composed(scan, channels=channels, size=30, cropped=cropped)
    assert found.dtype == np.uint8
    assert found.shape == (5, 3, 30, 30)
    grey = to_grey(random_volume())
    mask = np.random.default_rng(1).integers(0, 3, grey.shape, dtype=np.uint8)
    rows, columns = (slice(4, 36), slice(10, 46)) if cropped else (slice(None), slice(None))
    for row, index in enumerate(range(2, 7)):
        whole = compose(grey[index, rows, columns], mask[index, rows, columns], channels)
        np.testing.assert_array_equal(found[row], resize_picture(whole, 30).transpose(2, 0, 1))


def test_without_a_selection_all_slices_count(scan):
    whole = load_composed(replace(scan, selection=None), channels="RML", size=20, cropped=False)
    kept = load_composed(scan, channels="RML", size=20, cropped=False)
    assert len(whole) == 9
    np.testing.assert_array_equal(whole[2:7], kept)


def test_every_slice_is_decoded_once_and_masks_only_where_they_are_shown(scan, decoded):
    load_composed(scan, channels="RML", size=20, cropped=False)
    assert decoded == [(name, index) for index in range(2, 7) for name in ("scan", "lungs")]
    decoded.clear()
    load_composed(scan, channels="RRR", size=20, cropped=True)
    assert decoded == [("scan", index) for index in range(2, 7)]


def test_a_scan_that_is_indexed_decodes_what_is_asked_for_once(scan, decoded):
    composed = ComposedScan(scan, channels="RRR", size=20, cropped=False)
    positions = np.array([0, 0, 3, 3, 3, 4])
    found = composed[positions]
    assert decoded == [("scan", 2), ("scan", 5), ("scan", 6)]
    np.testing.assert_array_equal(
        found, load_composed(scan, channels="RRR", size=20, cropped=False)[positions]
    )


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"mask": None}, {}, "a: channels RML need a lung mask"),
        ({}, {"channels": "RGB"}, "a: channels are three letters of R, M and L, got 'RGB'"),
        ({"selection": None}, {"cropped": True}, "a: without a selection there is no body box"),
        (
            {"selection": Selection("a", "covid", 2, 9, (0, 0, 50, 40))},
            {},
            r"a: the selection reaches to slice 9, row 39 and column 49, .* \(9, 40, 50\)",
        ),
        (
            {"selection": Selection("a", "covid", 2, 8, (0, 0, 50, 41))},
            {},
            "a: the selection reaches to slice 8, row 40",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_name_of_the_scan(scan, changes, options, message):
    arguments = {"channels": "RML", "size": 20, "cropped": False} | options
    with pytest.raises(ValueError, match=message):
        load_composed(replace(scan, **changes), **arguments)


def test_a_mask_of_another_shape_is_refused_with_the_name_of_the_scan(scan, tmp_path):
    save_volume(tmp_path / "small.b2nd", np.zeros((9, 40, 49), np.uint8))
    wrong = replace(scan, mask=tmp_path / "small.b2nd")
    with pytest.raises(ValueError, match=r"a: scan and lung mask differ in shape: .*49\)"):
        load_composed(wrong, channels="RML", size=20, cropped=False)


def test_raw_slices_are_read_without_a_mask(scan):
    unmasked = replace(scan, mask=None)
    assert load_composed(unmasked, channels="RRR", size=20, cropped=False).shape == (5, 3, 20, 20)


# ----------------------------------------------------------------------------------------- clips


def random_pictures(slices=11, length=40, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (slices, 3, length, length), dtype=np.uint8)


def by_torchvision(pictures):
    """Slices as torchvision normalises them, put together as a clip."""
    scaled = functional.to_dtype(torch.from_numpy(pictures.copy()), torch.float32, scale=True)
    return functional.normalize(scaled, *VIDEO_STATISTICS).transpose(0, 1)


def clip(pictures, seed=0, *, slices=6, size=32, affine=None, multi_scale_crop=False):
    generator = np.random.default_rng(seed)
    return training_clip(
        pictures,
        generator,
        slices=slices,
        size=size,
        affine=affine,
        multi_scale_crop=multi_scale_crop,
    )


def test_a_clip_to_be_judged_is_the_normalised_middle_of_the_slices():
    pictures = random_pictures()
    positions = symmetrical_positions(11, 6)
    found = judged_clip(pictures, positions, size=32)
    assert found.dtype == torch.float32
    assert found.shape == (3, 6, 32, 32)
    assert found.is_contiguous()
    torch.testing.assert_close(found, by_torchvision(pictures[positions, :, 4:36, 4:36]))


def test_channels_may_be_normalised_by_statistics_of_their_own():
    by_letter = {"R": [0.6, 0.3], "M": [0.3, 0.5], "L": [0.1, 0.2]}
    statistics = channel_statistics("RLL", by_letter)
    assert statistics == ((0.6, 0.1, 0.1), (0.3, 0.2, 0.2))
    assert channel_statistics("RLL", None) is VIDEO_STATISTICS
    pictures, positions = random_pictures(), np.arange(6)
    found = judged_clip(pictures, positions, size=32, statistics=statistics)
    cut = torch.from_numpy(pictures[positions, :, 4:36, 4:36] / np.float32(255))
    expected = functional.normalize(cut, *statistics).transpose(0, 1)
    torch.testing.assert_close(found, expected)


def test_a_clip_is_the_same_whether_read_before_or_on_demand(scan):
    arguments = {"channels": "RML", "size": 40, "cropped": False}
    before, on_demand = load_composed(scan, **arguments), ComposedScan(scan, **arguments)
    positions = symmetrical_positions(5, 8)
    one, other = (judged_clip(source, positions, size=32) for source in (before, on_demand))
    assert torch.equal(one, other)
    one, other = (
        clip(source, 3, slices=8, affine=RANGES, multi_scale_crop=True)
        for source in (before, on_demand)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("seed", range(4))
def test_without_switches_a_training_clip_is_random_slices_sometimes_flipped(seed):
    pictures, generator = random_pictures(), np.random.default_rng(seed)
    expected = by_torchvision(pictures[random_positions(11, 6, generator), :, 4:36, 4:36])
    if generator.random() < 0.5:
        expected = expected.flip(-1)
    torch.testing.assert_close(clip(pictures, seed), expected)


def test_half_of_the_clips_are_flipped():
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8), (4, 3, 40, 40))
    flipped = [
        bool(found[0, 0, 0, 0] > found[0, 0, 0, -1])
        for found in map(clip, [ramp] * 400, range(400))
    ]
    assert abs(np.mean(flipped) - 0.5) < 0.08


@pytest.mark.parametrize("affine", [None, RANGES])
@pytest.mark.parametrize("multi_scale_crop", [False, True])
@pytest.mark.parametrize(("length", "size"), [(80, 64), (280, 224)])
def test_a_seed_gives_one_clip_another_seed_another(affine, multi_scale_crop, length, size):
    pictures = random_pictures(5, length)
    options = {"size": size, "affine": affine, "multi_scale_crop": multi_scale_crop}
    one, same, other = (clip(pictures, seed, **options) for seed in (7, 7, 8))
    assert one.dtype == torch.float32
    assert one.shape == (3, 6, size, size)
    assert one.is_contiguous()
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("seed", range(5))
def test_all_slices_go_through_one_transform(seed):
    pictures = np.repeat(random_pictures(1), 7, axis=0)
    found = clip(pictures, seed, affine=RANGES, multi_scale_crop=True)
    assert torch.equal(found, found[:, :1].expand_as(found))


def test_switches_act_separately(monkeypatch):
    drawn = []
    for name in ("draw_affine", "draw_crop"):
        draw = getattr(clips, name)
        monkeypatch.setattr(
            clips,
            name,
            lambda *given, draw=draw, name=name: drawn.append(name) or draw(*given),
        )
    pictures = random_pictures()
    for affine, multi_scale_crop, expected in [
        (None, False, []),
        (RANGES, False, ["draw_affine"]),
        (None, True, ["draw_crop"]),
        (RANGES, True, ["draw_affine", "draw_crop"]),
    ]:
        drawn.clear()
        clip(pictures, affine=affine, multi_scale_crop=multi_scale_crop)
        assert drawn == expected


def test_the_random_crop_is_what_torchvision_cuts():
    pictures, seed = random_pictures(), 5
    generator = np.random.default_rng(seed)
    chosen = torch.from_numpy(pictures[random_positions(11, 6, generator)]).float()
    cut = functional.resized_crop(chosen, *draw_crop(generator, 40), [32, 32], antialias=False)
    if generator.random() < 0.5:
        cut = functional.hflip(cut)
    expected = functional.normalize(cut / 255, *VIDEO_STATISTICS).transpose(0, 1)
    found = clip(pictures, seed, multi_scale_crop=True)
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(found[inside], expected[inside], atol=0.6 / 255 / 0.21, rtol=0)


def test_geometry_alone_leaves_a_grey_picture_grey_and_black_outside():
    grey = np.full((3, 3, 40, 40), 100, np.uint8)
    found = clip(grey, 1, affine=ONLY_GEOMETRY | {"scale": 0, "degrees": 0})
    within, outside = by_torchvision(grey[:1, :, :1, :1]), by_torchvision(0 * grey[:1, :, :1, :1])
    assert ((found >= outside - 1e-5) & (found <= within + 1e-5)).all()
    torch.testing.assert_close(found[:, :, 12:20, 12:20], within.expand(3, 6, 8, 8))


@pytest.mark.parametrize("length", [1, 3, 6, 40])
def test_scans_of_any_length_fill_a_clip(length):
    assert clip(random_pictures(length), affine=RANGES).shape == (3, 6, 32, 32)


def test_pictures_smaller_than_the_clip_are_refused():
    with pytest.raises(ValueError, match="pictures of 20 pixels hold no crop of 32"):
        judged_clip(random_pictures(3, 20), np.arange(3), size=32)
