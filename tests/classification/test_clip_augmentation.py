import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from lib.classification.clip_augmentation import (
    CROP_PLACES,
    Affine,
    Crop,
    brightness_and_contrast,
    draw_affine,
    draw_crop,
    middle_crop,
    sampled,
    sampling_matrix,
)

CODE = {
    "degrees": 15,
    "translation": 0.1,
    "scale": 0.2,
    "shear_degrees": 10,
    "brightness": 0.5,
    "contrast": 0.3,
}
LENGTH, SIZE = 80, 64
WHOLE = Crop(0, 0, LENGTH, LENGTH)


def smooth_pictures(count=3, length=LENGTH, seed=0):
    """Pictures that change slowly, so that one or two interpolations are nearly the same."""
    noise = np.random.default_rng(seed).random((count, length, length)).astype(np.float32)
    blurred = np.stack([cv2.GaussianBlur(one, (0, 0), length / 16) for one in noise])
    low, high = blurred.min(), blurred.max()
    return np.rint((blurred - low) / (high - low) * 255).astype(np.uint8)


def view(planes, affine=None, crop=WHOLE, *, flip=False, size=SIZE):
    affine, outside = (Affine(), None) if affine is None else (affine, 0)
    matrix = sampling_matrix(affine, crop, length=planes.shape[-1], size=size, flip=flip)
    return sampled(planes, matrix, size=size, outside=outside)


# ---------------------------------------------------------------------------------------- draws


def test_an_affine_draw_is_whole_in_its_range_and_reaches_both_ends():
    generator = np.random.default_rng(0)
    draws = [draw_affine(generator, 280, CODE) for _ in range(3000)]
    for name, low, high, step in [
        ("angle", -15, 15, 1),
        ("across", -28, 28, 1),
        ("down", -28, 28, 1),
        ("scale", 0.8, 1.2, 0.1),
        ("shear", -10, 10, 1),
        ("brightness", 0.5, 1.5, 0.1),
        ("contrast", 0.7, 1.3, 0.1),
    ]:
        values = np.array([getattr(draw, name) for draw in draws])
        assert values.min() == pytest.approx(low)
        assert values.max() == pytest.approx(high)
        np.testing.assert_allclose(values / step, np.rint(values / step), atol=1e-9)
        assert len(np.unique(np.rint(values / step))) == round((high - low) / step) + 1


def test_ranges_of_nothing_leave_a_picture_alone():
    assert draw_affine(np.random.default_rng(0), 80, dict.fromkeys(CODE, 0)) == Affine()


def test_other_ranges_are_refused():
    with pytest.raises(ValueError, match=r"ranges of the affine draw are .*'translation'.*'angle'"):
        draw_affine(np.random.default_rng(0), 80, {"angle": 3})


@given(seed=st.integers(0, 2**32 - 1), length=st.integers(20, 300))
def test_a_crop_lies_inside_and_its_sides_differ_by_one_ratio(seed, length):
    top, left, height, width = draw_crop(np.random.default_rng(seed), length)
    assert 0 <= top <= length - height and 0 <= left <= length - width
    sides = [int(length * ratio) for ratio in (1, 0.875, 0.75, 0.66)]
    assert abs(sides.index(height) - sides.index(width)) <= 1


def test_crops_of_one_size_lie_at_13_places_spread_over_the_whole_room():
    generator = np.random.default_rng(0)
    crops = {draw_crop(generator, 280) for _ in range(5000)}
    assert {(crop.height, crop.width) for crop in crops} == {
        *((280, 280), (245, 245), (210, 210), (184, 184)),
        *((280, 245), (245, 280), (245, 210), (210, 245), (210, 184), (184, 210)),
    }
    places = {(crop.top, crop.left) for crop in crops if crop[2:] == (184, 184)}
    assert places == {(down * 24, across * 24) for down, across in CROP_PLACES}
    assert len(places) == 13
    assert {(crop.top, crop.left) for crop in crops if crop[2:] == (280, 280)} == {(0, 0)}


@pytest.mark.parametrize(("length", "size", "first"), [(280, 224, 28), (80, 64, 8), (9, 4, 2)])
def test_the_middle_crop(length, size, first):
    assert middle_crop(length, size) == Crop(first, first, size, size)
    pictures = torch.from_numpy(smooth_pictures(1, length))
    expected = functional.center_crop(pictures, [size, size])
    if (length - size) % 2 == 0:
        assert torch.equal(pictures[:, first : first + size, first : first + size], expected)


def test_a_middle_larger_than_the_picture_is_refused():
    with pytest.raises(ValueError, match="pictures of 60 pixels hold no crop of 64"):
        middle_crop(60, 64)


# ------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_that_is_not_resized_keeps_every_pixel(flip):
    pictures = np.random.default_rng(0).integers(0, 256, (4, LENGTH, LENGTH), dtype=np.uint8)
    expected = pictures[:, 5 : 5 + SIZE, 11 : 11 + SIZE]
    found = view(pictures, crop=Crop(5, 11, SIZE, SIZE), flip=flip)
    np.testing.assert_array_equal(found, expected[..., ::-1] if flip else expected)


@pytest.mark.parametrize(
    "crop", [WHOLE, Crop(0, 0, 52, 60), Crop(28, 20, 52, 60), Crop(7, 5, 70, 60)]
)
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_resized_as_torchvision_does_it(crop, flip):
    """Inside; at the edge of the crop ours looks at the pixels beyond it, torchvision at none."""
    pictures = np.random.default_rng(1).integers(0, 256, (4, LENGTH, LENGTH), dtype=np.uint8)
    expected = functional.resized_crop(
        torch.from_numpy(pictures).float(), *crop, [SIZE, SIZE], antialias=False
    )
    expected = functional.hflip(expected) if flip else expected
    found = view(pictures, crop=crop, flip=flip)
    inside = (slice(None), slice(1, -1), slice(1, -1))
    np.testing.assert_allclose(found[inside], expected.numpy()[inside], atol=0.51)


@pytest.mark.parametrize(
    "affine",
    [
        Affine(),
        Affine(angle=15),
        Affine(across=8, down=-5),
        Affine(scale=0.8),
        Affine(shear=10),
        Affine(angle=-15, across=-8, down=8, scale=1.2, shear=-10),
        Affine(angle=7, across=3, down=-8, scale=0.9, shear=6),
    ],
)
@pytest.mark.parametrize("crop", [middle_crop(LENGTH, SIZE), Crop(7, 5, 70, 60)])
@pytest.mark.parametrize("flip", [False, True])
def test_all_geometry_at_once_is_that_of_torchvision_one_after_another(affine, crop, flip):
    """On smooth pictures, within 2 of 255 where the picture itself is seen, not its outside."""

    def one_after_another(pictures):
        moved = functional.affine(
            torch.from_numpy(pictures).float(),
            angle=affine.angle,
            translate=[affine.across, affine.down],
            scale=affine.scale,
            shear=[affine.shear, 0],
            interpolation=InterpolationMode.BILINEAR,
        )
        cut = functional.resized_crop(moved, *crop, [SIZE, SIZE], antialias=False)
        return (functional.hflip(cut) if flip else cut).numpy()

    pictures = smooth_pictures()
    covered = one_after_another(np.full_like(pictures, 255))
    seen = cv2.erode(covered.min(axis=0), np.ones((5, 5))) > 254.9
    assert seen.mean() > 0.5
    found, expected = view(pictures, affine, crop, flip=flip), one_after_another(pictures)
    np.testing.assert_allclose(found[:, seen], expected[:, seen], atol=2)
    outside = cv2.dilate(covered.max(axis=0), np.ones((5, 5))) == 0
    assert (found[:, outside] == 0).all()


def test_torchvision_would_notice_an_angle_the_other_way():
    """What the tolerance above is worth: a wrong sign is far outside of it."""
    pictures = smooth_pictures()
    right, wrong = (view(pictures, Affine(angle=angle)).astype(int) for angle in (7, -7))
    assert np.abs(right - wrong).max() > 20


# ------------------------------------------------------------------------------------ grey values


@pytest.mark.parametrize("brightness", [0.5, 1.0, 1.4])
@pytest.mark.parametrize("contrast", [0.7, 1.0, 1.3])
def test_brightness_and_contrast_are_those_of_torchvision(brightness, contrast):
    clip = np.stack([smooth_pictures(5, 40, seed).astype(np.float32) for seed in range(3)])
    slices = torch.from_numpy(clip.transpose(1, 0, 2, 3)) / 255
    expected = functional.adjust_contrast(
        functional.adjust_brightness(slices, brightness), contrast
    )
    found = brightness_and_contrast(clip.copy(), brightness=brightness, contrast=contrast)
    np.testing.assert_allclose(found.transpose(1, 0, 2, 3), expected.numpy() * 255, atol=1e-3)
    if brightness == contrast == 1:
        np.testing.assert_array_equal(found, clip)
