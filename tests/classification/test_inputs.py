import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lib.classification.inputs import (
    BINARY_CLASSES,
    ScanItem,
    ScanSlices,
    ScanViews,
    content_digest,
    load_slices,
    pack,
    resize_slice,
    scan_items,
    subsample_indices,
)
from lib.data.scan import LUNG_WINDOW, Window, apply_window
from lib.data.selection import Selection
from lib.data.store import open_volume, save_volume


class Recorder:
    """A volume that notes which slices were decoded."""

    def __init__(self, voxels):
        self.voxels, self.shape, self.read = voxels, voxels.shape, []

    def __len__(self):
        return len(self.voxels)

    def __getitem__(self, index):
        self.read.append(index)
        return self.voxels[index]


@pytest.fixture
def hounsfield():
    return np.random.default_rng(0).integers(-1024, 600, (7, 32, 32), dtype=np.int16)


@pytest.mark.parametrize(
    ("length", "limit", "expected"),
    [
        (1, 1, [0]),
        (5, 9, [0, 1, 2, 3, 4]),
        (5, 5, [0, 1, 2, 3, 4]),
        (5, 3, [0, 2, 4]),
        (6, 3, [0, 3, 5]),  # 2.5 rounds up
        (700, 2, [0, 699]),
        (9, 1, [0]),
    ],
)
def test_subsample_indices(length, limit, expected):
    assert subsample_indices(length, limit).tolist() == expected


@given(length=st.integers(1, 3000), limit=st.integers(1, 3000))
def test_subsampling_is_equidistant_and_keeps_both_ends(length, limit):
    chosen = subsample_indices(length, limit)
    assert len(chosen) == min(length, limit)
    assert chosen[0] == 0
    if len(chosen) > 1:
        assert chosen[-1] == length - 1
        steps = np.diff(chosen)
        assert steps.min() >= 1
        assert steps.max() - steps.min() <= 1
        exact = np.arange(len(chosen)) * (length - 1) / (len(chosen) - 1)
        assert np.abs(chosen - exact).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(("length", "limit"), [(0, 3), (3, 0)])
def test_nothing_to_choose_is_refused(length, limit):
    with pytest.raises(ValueError, match="at least 1"):
        subsample_indices(length, limit)


def test_slices_are_windowed_and_masked(hounsfield):
    mask = np.zeros(hounsfield.shape, np.uint8)
    mask[2:5, 8:20, 4:12] = 1
    mask[2:5, 8:20, 18:28] = 2
    loaded = load_slices(hounsfield, mask, size=32)
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, np.where(mask > 0, apply_window(hounsfield), 0))


def test_another_window(hounsfield):
    window = Window(centre=40, width=400)
    loaded = load_slices(hounsfield, size=32, window=window)
    np.testing.assert_array_equal(loaded, apply_window(hounsfield, window))
    assert not np.array_equal(loaded, apply_window(hounsfield, LUNG_WINDOW))


def test_grey_pictures_stay_as_they_are():
    grey = np.random.default_rng(1).integers(0, 256, (3, 16, 16), dtype=np.uint8)
    np.testing.assert_array_equal(load_slices(grey, size=16), grey)


def test_only_chosen_slices_are_decoded(hounsfield):
    volume, mask = Recorder(hounsfield), Recorder(np.ones(hounsfield.shape, np.uint8))
    loaded = load_slices(volume, mask, size=8, limit=3)
    assert loaded.shape == (3, 8, 8)
    assert volume.read == mask.read == [0, 3, 6]


def test_half_the_size_is_the_mean_of_two_by_two():
    grey = np.random.default_rng(2).integers(0, 256, (64, 64), dtype=np.uint8)
    means = grey.reshape(32, 2, 32, 2).mean((1, 3))
    assert np.abs(resize_slice(grey, 32) - means).max() <= 1  # rows and columns each round


@given(
    height=st.integers(8, 60), width=st.integers(8, 60), size=st.integers(4, 70), grey=st.just(93)
)
def test_resizing_keeps_a_flat_slice_flat(height, width, size, grey):
    resized = resize_slice(np.full((height, width), grey, np.uint8), size)
    assert resized.shape == (size, size)
    assert (resized == grey).all()


def test_scan_and_mask_of_different_shape_are_refused(hounsfield):
    with pytest.raises(ValueError, match="differ in shape"):
        load_slices(hounsfield, np.ones((7, 32, 31), np.uint8), size=8)


@pytest.fixture
def scans(tmp_path, hounsfield):
    """Three stored scans of different length, the last without a lung mask."""
    items = []
    for number, length in enumerate([7, 2, 4]):
        volume, mask = tmp_path / f"{number}.b2nd", tmp_path / f"{number}-lungs.b2nd"
        save_volume(volume, hounsfield[:length])
        save_volume(mask, (hounsfield[:length] > -300).astype(np.uint8))
        items.append(ScanItem(f"scan-{number}", volume, mask if number < 2 else None, number % 2))
    return items


def test_batches_hold_scans_one_after_another(scans, hounsfield):
    data = ScanSlices(scans, size=16, limit=5)
    batches = list(DataLoader(data, batch_size=2, collate_fn=pack))
    assert [batch.lengths for batch in batches] == [[5, 2], [4]]
    first, last = batches
    assert (first.slices.shape, first.slices.dtype) == ((7, 1, 16, 16), torch.uint8)
    assert (first.targets.tolist(), first.targets.dtype) == ([0, 1], torch.int64)
    assert first.scan_ids == ["scan-0", "scan-1"]
    lungs = (hounsfield[:2] > -300).astype(np.uint8)
    np.testing.assert_array_equal(first.slices[5:, 0], load_slices(hounsfield[:2], lungs, size=16))
    np.testing.assert_array_equal(last.slices[:, 0], load_slices(hounsfield[:4], size=16))


@pytest.mark.parametrize(("cache", "openings"), [(True, 5), (False, 10)])
def test_cached_slices_are_read_once(scans, cache, openings):
    opened = []

    def counting(path):
        opened.append(path)
        return open_volume(path)

    data = ScanSlices(scans, size=16, cache=cache, open_volume=counting)
    first = [data[i] for i in range(len(data))]
    again = [data[i] for i in range(len(data))]
    assert len(opened) == openings
    for (slices, *labels), (same, *same_labels) in zip(first, again, strict=True):
        np.testing.assert_array_equal(slices, same)
        assert labels == same_labels


@pytest.fixture
def manifest(tmp_path):
    """Four stored scans, all with masks; `prepared/` and `masks/` hold them with their sidecars."""
    for folder in ("prepared", "masks"):
        (tmp_path / folder).mkdir()
        for number in range(4):
            voxels = np.full((1, 4, 4), number, np.uint8)
            save_volume(tmp_path / folder / f"000{number}.b2nd", voxels)
            (tmp_path / folder / f"000{number}.json").write_text(f"{folder} {number}")
    return pd.DataFrame(
        {
            "scan_id": ["0002", "0000", "0001", "0003"],
            "label": ["covid", "normal", "non-covid", "pneumonia"],
            "split": ["train", "test", "train", "validation"],
        },
        index=[5, 2, 9, 0],  # as a manifest without its unlabelled rows has
    )


def items_of(manifest, folder, *, masks="masks", positive=("covid",)):
    masks = folder / masks if masks else None
    return scan_items(manifest, scans=folder / "prepared", masks=masks, positive=positive)


@pytest.mark.parametrize(
    ("positive", "targets"),
    [
        (["covid"], [1, 0, 0, 0]),
        (["covid", "pneumonia"], [1, 0, 0, 1]),
        ([], [0, 0, 0, 0]),
    ],
)
def test_targets_are_indices_of_the_classes(manifest, tmp_path, positive, targets):
    items = items_of(manifest, tmp_path, positive=positive)
    assert [item.scan_id for item in items] == ["0002", "0000", "0001", "0003"]
    assert [item.target for item in items] == targets
    names = ["covid" if label in positive else "non_covid" for label in manifest["label"]]
    assert [BINARY_CLASSES[item.target] for item in items] == names


def test_items_name_the_stored_files(manifest, tmp_path):
    masked, bare = items_of(manifest, tmp_path)[0], items_of(manifest, tmp_path, masks=None)[0]
    assert masked.volume == bare.volume == tmp_path / "prepared" / "0002.b2nd"
    assert (masked.mask, bare.mask) == (tmp_path / "masks" / "0002.b2nd", None)


def test_items_carry_the_selected_slices(manifest, tmp_path):
    names = manifest["scan_id"]
    chosen = {name: Selection(name, "covid", 1, 2, (0, 0, 3, 3)) for name in names}
    places = {"scans": tmp_path / "prepared", "masks": None, "positive": ("covid",)}
    items = scan_items(manifest, **places, selections=chosen)
    whole = scan_items(manifest, **places)
    assert [item.selection for item in items] == [chosen[name] for name in names]
    assert all(item.selection is None for item in whole)
    assert content_digest(items) != content_digest(whole)
    del chosen["0003"]
    with pytest.raises(ValueError, match="0003 is not in the lists of selected slices"):
        scan_items(manifest, **places, selections=chosen)


@pytest.mark.parametrize("missing", ["prepared/0001.b2nd", "masks/0000.b2nd"])
def test_what_is_not_stored_is_named(manifest, tmp_path, missing):
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{missing} is not there: prepare and segment"):
        items_of(manifest, tmp_path)


@pytest.mark.parametrize("label", [None, np.nan])
def test_a_scan_without_a_label_is_refused(manifest, tmp_path, label):
    manifest["label"] = manifest["label"].astype(object).where(manifest["scan_id"] != "0001", label)
    with pytest.raises(ValueError, match="without a label cannot be classified"):
        items_of(manifest, tmp_path)


SEVERITIES = ["mild", None, "severe", None]


def test_severities_are_those_of_the_manifest(manifest, tmp_path):
    assert [item.severity for item in items_of(manifest, tmp_path)] == 4 * [None]
    known = manifest.assign(severity=SEVERITIES)
    assert [item.severity for item in items_of(known, tmp_path)] == SEVERITIES


def test_the_digest_follows_the_contents_and_not_the_place(manifest, tmp_path):
    before = content_digest(items_of(manifest, tmp_path))
    shutil.copytree(tmp_path, tmp_path / "elsewhere")
    assert content_digest(items_of(manifest, tmp_path / "elsewhere")) == before


DIGEST_CHANGES = {
    "a scan": lambda m, d: (d / "prepared/0001.json").write_text("other") and items_of(m, d),
    "a mask": lambda m, d: (d / "masks/0001.json").write_text("other") and items_of(m, d),
    "no masks": lambda m, d: items_of(m, d, masks=None),
    "a target": lambda m, d: items_of(m, d, positive=["normal"]),
    "a severity": lambda m, d: items_of(m.assign(severity=SEVERITIES), d),
    "the order": lambda m, d: items_of(m, d)[::-1],
    "a scan less": lambda m, d: items_of(m, d)[:-1],
    "another name": lambda m, d: [
        ScanItem("0009", i.volume, i.mask, i.target) for i in items_of(m, d)
    ],
}


def test_the_digest_sees_every_change(manifest, tmp_path):
    digests = [content_digest(items_of(manifest, tmp_path))]
    for number, change in enumerate(DIGEST_CHANGES.values()):
        shutil.copytree(tmp_path / "prepared", tmp_path / f"{number}" / "prepared")
        shutil.copytree(tmp_path / "masks", tmp_path / f"{number}" / "masks")
        digests.append(content_digest(change(manifest, tmp_path / f"{number}")))
    assert len(set(digests)) == 1 + len(DIGEST_CHANGES)


@pytest.mark.real
def test_a_real_scan_shows_its_lungs(real_data):
    """Lung in the lung window is dark grey, neither black nor white."""
    from PIL import Image

    picture = sorted((real_data / "finding-lungs" / "2d_images").glob("*.tif"))[0]
    mask = real_data / "finding-lungs" / "2d_masks" / picture.name
    hounsfield, lungs = (np.asarray(Image.open(path))[None] for path in (picture, mask))
    loaded = load_slices(hounsfield.astype(np.int16), lungs, size=128)
    inside = load_slices(lungs, size=128) == 255
    assert 20 < np.median(loaded[inside]) < 120
    assert loaded[load_slices(lungs, size=128) == 0].max() == 0


def views(scans, **options):
    return ScanViews(ScanSlices(scans, size=16), **options)


def test_an_index_alone_asks_for_the_scan_as_it_is(scans):
    plain = views(scans, mirrored=True, left_out=0.5)
    for index in range(len(plain)):
        slices, target, scan_id = plain[index]
        expected, *labels = ScanSlices(scans, size=16)[index]
        np.testing.assert_array_equal(slices, expected)
        assert [target, scan_id] == labels


@given(seed=st.integers(0, 2**31 - 1), left_out=st.floats(0, 0.99))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_random_view_is_some_of_the_slices_in_order_maybe_mirrored(scans, seed, left_out):
    random = views(scans, mirrored=True, left_out=left_out)
    slices, _, _ = random[0, seed]
    np.testing.assert_array_equal(slices, random[0, seed][0])
    whole, _, _ = random[0]
    assert 1 <= len(slices) <= len(whole)
    for candidate in (whole, whole[..., ::-1]):
        places = [[np.array_equal(one, other) for other in candidate].index(True) for one in slices
                  if any(np.array_equal(one, other) for other in candidate)]  # fmt: skip
        if len(places) == len(slices):
            assert places == sorted(places)
            break
    else:
        pytest.fail("the view holds other slices than the scan")
    if left_out == 0:
        assert len(slices) == len(whole)


def test_prepared_slices_are_prepared_once_for_each_side(scans):
    seen = []

    def prepare(slices):
        seen.append(slices)
        return slices[:, None].astype(np.float32)

    random = views(scans, mirrored=True, prepare=prepare)
    batches = [pack([random[index, seed] for index in range(2)]) for seed in range(12)]
    assert len(seen) == 4  # two scans, two sides
    assert batches[0].slices.dtype == torch.float32 and batches[0].slices.ndim == 4


def test_leaving_everything_out_is_refused(scans):
    with pytest.raises(ValueError, match=r"left_out is a share below 1, got 1\.0"):
        views(scans, left_out=1.0)
