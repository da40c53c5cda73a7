import numpy as np
import pytest
import torch

from lib.classification.acvlab_slices import augment, chosen_slices, embedding_view, slice_view
from lib.data.store import save_volume
from tests.classification.made_acvlab import stored, thorax


def disc(number=1, size=48):
    rows, columns = np.mgrid[:size, :size] - size / 2
    grey = np.where(rows**2 + (columns - 8) ** 2 < 36, 200, 60).astype(np.uint8)
    return np.repeat(grey[None], number, 0)


def test_augmentation_moves_and_lights_half_of_the_slices_within_bounds():
    slices = disc(400)
    changed = augment(slices, np.random.default_rng(0)).numpy()
    assert (changed.shape, changed.dtype) == (slices.shape, np.uint8)
    background = np.median(changed, (1, 2))
    assert 0.4 < (background == 60).mean() < 0.6
    assert background.min() >= 60 * 0.8 - 51 - 1
    assert background.max() <= 60 * 1.2 + 51 + 1
    unlit = changed[background == 60] > 130
    columns = (unlit * np.arange(48)).sum((1, 2)) / unlit.sum((1, 2))
    assert 0.35 < (columns < 24).mean() < 0.65  # mirrored
    sizes = unlit.sum((1, 2))
    assert 0.8**2 * 0.85 < sizes.min() / 111 < 0.85
    assert 1.15 < sizes.max() / 111 < 1.2**2 * 1.15


def test_augmentation_without_strength_only_mirrors():
    slices = disc(20)
    changed = augment(slices, np.random.default_rng(0), strength=0.0).numpy()
    kinds = {(part == slices[0]).all() + 2 * (part == slices[0][:, ::-1]).all() for part in changed}
    assert kinds == {1, 2}


def test_slices_without_generator_are_always_the_same_and_unchanged():
    slices = np.random.default_rng(0).integers(0, 256, (9, 24, 24), np.uint8)
    numbers = {"number": 4, "seed": 1, "strength": 1.0}
    plain = slice_view(slices, None, **numbers)
    assert torch.equal(plain, slice_view(slices, None, **numbers))
    rows = [next(i for i, s in enumerate(slices) if (s == p.numpy()).all()) for p in plain]
    assert rows == sorted(set(rows))
    random = [slice_view(slices, np.random.default_rng(seed), **numbers) for seed in (5, 5, 6)]
    assert torch.equal(random[0], random[1])
    assert not torch.equal(random[0], random[2])


@pytest.mark.parametrize("fresh", [True, False])
def test_embeddings_are_drawn_anew_only_where_asked(fresh):
    embeddings = np.arange(40, dtype=np.float32)[:, None]
    views = [
        embedding_view(embeddings, np.random.default_rng(seed), number=8, seed=0, fresh=fresh)
        for seed in (1, 2)
    ]
    assert views[0].shape == (8, 1)
    assert (views[0].diff(dim=0) > 0).all()
    assert torch.equal(*views) != fresh
    plain = embedding_view(embeddings, None, number=8, seed=0, fresh=fresh)
    assert torch.equal(plain, views[0]) != fresh


@pytest.mark.parametrize("mask", ["lungs", None])
def test_the_chosen_slices_are_cropped_to_the_body_and_masked(tmp_path, mask):
    voxels = thorax(9, lesion=False)
    voxels[:3, 14:50] = 40  # no lung at the head end
    slices = chosen_slices(stored(tmp_path, "a", voxels, 0, mask=mask), size=32, share=0.5)
    assert slices.shape == (5, 32, 32)
    inside = slices[:, 8:24, 6:12]
    assert (np.abs(inside.astype(int) - 85) < 25).all()  # lung, on every chosen slice
    border = slices[:, [0, -1]]
    assert (border == 0).all() if mask else (border > 200).all()


def test_scan_and_mask_of_different_shape_are_refused(tmp_path):
    scan = stored(tmp_path, "a", thorax(3, lesion=False), 0)
    save_volume(scan.mask, np.ones((3, 64, 63), np.uint8))
    with pytest.raises(ValueError, match="scan and lung mask differ in shape"):
        chosen_slices(scan, size=32, share=0.5)
