from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from lib.classification.inputs import ScanItem
from lib.classification.task import Task
from lib.classification.volumes import (
    ScanVolumes,
    fit_volumes,
    plain_batches,
    predict_volumes,
    random_batches,
    slices_and_lungs,
    stack,
)
from lib.data.store import save_volume


def make_scans(count):
    return [
        ScanItem(scan_id=f"{number}", volume=Path(f"{number}"), mask=None, target=number % 2)
        for number in range(count)
    ]


def make_volumes(count, *, cache=False, read=None):
    def load(scan):
        if read is not None:
            read.append(scan.scan_id)
        return np.full((2, 3, 3), float(scan.scan_id), np.float32)

    def view(volume, generator):
        noise = 0.0 if generator is None else generator.uniform()
        return torch.from_numpy(volume[None] + np.float32(noise))

    return ScanVolumes(make_scans(count), load=load, view=view, cache=cache)


def test_a_batch_holds_views_targets_and_names():
    batch = stack([make_volumes(3)[index] for index in (0, 2)])
    assert batch.volumes.shape == (2, 1, 2, 3, 3)
    assert batch.volumes[1].unique().tolist() == [2.0]
    assert batch.targets.tolist() == [0, 0] and batch.scan_ids == ["0", "2"]


def test_a_seed_asks_for_a_random_view_and_none_for_the_plain_one():
    volumes = make_volumes(1)
    plain, seeded = volumes[0][0], volumes[0, 7][0]
    assert torch.equal(plain, volumes[0][0])
    assert not torch.equal(plain, seeded)
    assert torch.equal(seeded, volumes[0, 7][0]) and not torch.equal(seeded, volumes[0, 8][0])


@pytest.mark.parametrize(("cache", "expected"), [(False, 4), (True, 2)])
def test_a_cached_scan_is_read_once(cache, expected):
    read = []
    volumes = make_volumes(2, cache=cache, read=read)
    for index in (0, 1, 0, 1):
        assert volumes[index][0].unique().tolist() == [float(index)]
    assert len(read) == expected


def views_of(loader):
    torch.manual_seed(3)
    return torch.cat([batch.volumes for batch in loader])


def test_random_views_do_not_depend_on_the_number_of_processes():
    alone = views_of(random_batches(make_volumes(4), batch_size=2))
    helped = views_of(random_batches(make_volumes(4), batch_size=2, processes=2))
    assert torch.equal(alone, helped)


@pytest.mark.parametrize(("count", "size", "rounds"), [(5, 2, 1), (5, 4, 1), (3, 2, 3), (1, 2, 1)])
def test_no_training_batch_of_several_scans_is_left_with_one(count, size, rounds):
    loader = random_batches(make_volumes(count), batch_size=size, rounds=rounds)
    sizes = [len(batch.targets) for batch in loader]
    assert sizes and (min(sizes) > 1 or count == 1)
    if count > 1:
        nn.BatchNorm3d(1)(next(iter(loader)).volumes)


def test_balanced_batches_hold_every_class_equally_often():
    volumes = make_volumes(8)
    volumes.scans = [*volumes.scans[::2], volumes.scans[1]]  # four of one class, one of the other
    torch.manual_seed(0)
    loader = random_batches(volumes, batch_size=10, rounds=200, balanced=True)
    targets = torch.cat([batch.targets for batch in loader])
    assert len(targets) == 1000 and 0.45 < targets.float().mean() < 0.55


def test_plain_batches_keep_the_order():
    batches = list(plain_batches(make_volumes(3), batch_size=2))
    assert [name for batch in batches for name in batch.scan_ids] == ["0", "1", "2"]
    assert [len(batch.targets) for batch in batches] == [2, 1]


def test_slices_come_with_the_pixels_of_both_lungs(tmp_path):
    voxels = np.random.default_rng(0).integers(-1000, 400, (3, 5, 6), dtype=np.int16)
    lungs = np.random.default_rng(1).integers(0, 3, voxels.shape, dtype=np.uint8)
    save_volume(tmp_path / "scan.b2nd", voxels)
    save_volume(tmp_path / "lungs.b2nd", lungs)
    masked = ScanItem("scan", tmp_path / "scan.b2nd", tmp_path / "lungs.b2nd", 0)
    whole = ScanItem("scan", tmp_path / "scan.b2nd", None, 0)
    for scan, expected in ((masked, lungs > 0), (whole, np.ones(voxels.shape, bool))):
        slices, inside = zip(*slices_and_lungs(scan), strict=True)
        np.testing.assert_array_equal(slices, voxels)
        np.testing.assert_array_equal(inside, expected)
        assert inside[0].dtype == bool


class Recorder(nn.Module):
    """Scores 0 and the mean of a volume; keeps these means, where it learns and where it judges."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))
        self.seen = {True: [], False: []}

    def forward(self, volumes):
        means = volumes.flatten(1).mean(1)
        self.seen[self.training] += means.tolist()
        return torch.stack([torch.zeros_like(means), self.factor * means], 1)


@pytest.mark.parametrize("batch_scans", [1, 2, 5])
def test_probabilities_come_in_the_order_of_the_scans(batch_scans):
    settings = {"batch_scans": batch_scans, "loader_processes": 0}
    fabric = Fabric(accelerator="cpu", devices=1)
    found = predict_volumes(Recorder(), make_volumes(5), settings=settings, fabric=fabric)
    expected = 1 / (1 + np.exp(-np.arange(5.0)))
    np.testing.assert_allclose(found, np.stack([1 - expected, expected], 1), rtol=1e-5)


def test_learning_sees_random_views_and_choosing_plain_ones(made_scans, tmp_path):
    def volumes(scans):
        def view(target, generator):
            return torch.full((1, 2, 2, 2), 0.5 if generator is None else 10 + generator.uniform())

        return ScanVolumes(scans, load=lambda scan: np.array(scan.target), view=view)

    settings = {"batch_scans": 2, "rounds": 3, "loader_processes": 0, "epochs": 2}
    task = Task(
        scans=made_scans(6),
        splits=4 * ["train"] + 2 * ["validation"],
        variant={},
        settings=settings | {"patience": None, "chosen_by": "loss", "schedule": None},
        fabric=Fabric(accelerator="cpu", devices=1),
        folder=tmp_path / "model",
        seed=0,
    )
    model = Recorder()
    rows = fit_volumes(task, model, volumes, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    learned, chosen = model.seen[True], model.seen[False]
    assert len(rows) == 2
    assert len(learned) == len(set(learned)) == 2 * 3 * 4 and min(learned) >= 10
    assert chosen == 2 * 2 * [0.5]
