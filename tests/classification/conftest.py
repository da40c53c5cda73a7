import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from lib.classification.inputs import ScanItem
from lib.classification.pictures import PictureItem
from lib.classification.task import Task
from lib.data.store import save_volume


@pytest.fixture
def made_scans(tmp_path):
    """A function that stores scans in HU, the odd ones with a bright block in a masked chest.

    Beside them lie their sidecars, as `map_scans` leaves them. The first scan has a single slice.
    """

    def make(number, *, slices=7, size=20, seed=0):
        generator = np.random.default_rng(seed)
        items = []
        for index in range(number):
            length = 1 if index == 0 else slices + index % 3
            voxels = generator.normal(-800, 60, (length, size, size)).astype(np.int16)
            target, middle = index % 2, length // 2
            if target:
                voxels[middle - 1 : middle + 2, size // 3 : 2 * size // 3, 6 : size // 2] += 700
            lungs = np.zeros(voxels.shape, np.uint8)
            lungs[:, 3:-3, 3:-3] = 1
            items.append(store(tmp_path, f"scan_{seed}_{index}", voxels, lungs, target))
        return items

    return make


@pytest.fixture
def black_scan(tmp_path):
    """A scan whose lung mask is empty, so that nothing of it is seen."""
    voxels = np.random.default_rng(0).integers(-1000, 400, (4, 20, 20), dtype=np.int16)
    return store(tmp_path, "black", voxels, np.zeros(voxels.shape, np.uint8), 0)


@pytest.fixture
def assert_it_learns(made_scans, black_scan, tmp_path):
    """A function that trains a classifier twice on bright blocks and checks what it predicts.

    Among the scans are one of a single slice, and one of which the mask leaves nothing.
    """

    def check(classifier, variant, settings):
        scans, fabric, found = made_scans(30), Fabric(accelerator="cpu"), []
        for run in ("first", "second"):
            task = Task(
                scans=scans,
                splits=18 * ["train"] + 6 * ["validation"] + 6 * ["test"],
                variant=variant,
                settings=settings,
                fabric=fabric,
                folder=tmp_path / run,
                seed=3,
            )
            model, histories, _ = classifier.train(task)
            assert list(histories) == [classifier.CARD.name]
            everything = [*scans, black_scan]
            found.append(classifier.predict(model, everything, settings=settings, fabric=fabric))
        first, second = found
        np.testing.assert_array_equal(first, second)
        assert first.shape == (31, 2)
        assert np.isfinite(first).all()
        np.testing.assert_allclose(first.sum(1), 1, atol=1e-6)
        truth = [scan.target for scan in scans]
        assert (first[18:30].argmax(1) == truth[18:]).mean() >= 0.9

    return check


@pytest.fixture
def made_pictures(tmp_path):
    """A function that stores scans of two 8-bit slices, and gives every slice as a picture.

    They show nothing, one bright square or two, by their class.
    """

    def make(scans, *, size=32, classes=3):
        generator = np.random.default_rng(0)
        items = []
        for number in range(scans):
            voxels = generator.integers(0, 80, (2, size, size), dtype=np.uint8)
            target, side = number % classes, size // 4
            for square in range(target):
                top, left = side, side // 2 + square * size // 2
                voxels[:, top : top + side, left : left + side] += 150
            path = tmp_path / f"pictures_{number}.b2nd"
            save_volume(path, voxels)
            path.with_suffix(".json").write_text(path.stem)
            items += [
                PictureItem(f"{path.stem}_{k:04d}", path.stem, path, k, target) for k in range(2)
            ]
        return items

    return make


@pytest.fixture
def assert_it_learns_pictures(made_pictures, tmp_path):
    """A function that trains a classifier of pictures twice and checks what it predicts.

    The second time the pictures to judge come in another order.
    """

    def check(classifier, variant, settings):
        pictures, fabric, found = made_pictures(36), Fabric(accelerator="cpu", devices=1), []
        for run, step in (("first", 1), ("second", -1)):
            task = Task(
                scans=pictures,
                splits=42 * ["train"] + 12 * ["validation"] + 18 * ["test"],
                variant=variant,
                settings=settings,
                fabric=fabric,
                folder=tmp_path / run,
                seed=3,
                classes=("control", "pneumonia", "covid"),
            )
            model, histories, _ = classifier.train(task)
            assert list(histories) == [classifier.CARD.name]
            judged = classifier.predict(model, pictures[::step], settings=settings, fabric=fabric)
            found.append(judged[::step])
        first, second = found
        np.testing.assert_allclose(first, second, atol=1e-5)
        assert (first.shape, first.dtype) == ((72, 3), np.float32)
        np.testing.assert_allclose(first.sum(1), 1, atol=1e-6)
        truth = [picture.target for picture in pictures]
        assert (first[54:].argmax(1) == truth[54:]).mean() >= 0.8

    return check


@pytest.fixture
def assert_it_separates():
    """A function that trains a network of pictures and checks that it tells three places apart."""

    def check(network, *, steps, learning_rate):
        generator = torch.Generator().manual_seed(0)
        pictures = 0.3 * torch.rand(12, 3, 48, 48, generator=generator)
        targets = torch.arange(12) % 3
        for picture, target in zip(pictures, targets.tolist(), strict=True):
            if target:  # the first class shows nothing
                picture[:, 16:32, 4 + 24 * (target - 1) : 20 + 24 * (target - 1)] += 0.6
        optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
        for _ in range(steps):
            loss = torch.nn.functional.cross_entropy(network(pictures), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert network(pictures).argmax(1).equal(targets)
        assert all(weights.grad.isfinite().all() for weights in network.parameters())

    return check


def store(folder, scan_id, voxels, lungs, target):
    """Store a scan, its mask, and their sidecars."""
    for name, values in ((scan_id, voxels), (f"{scan_id}_lungs", lungs)):
        save_volume(folder / f"{name}.b2nd", values)
        (folder / f"{name}.json").write_text(name)
    return ScanItem(scan_id, folder / f"{scan_id}.b2nd", folder / f"{scan_id}_lungs.b2nd", target)
