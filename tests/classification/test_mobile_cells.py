import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from lib.classification.inputs import ScanItem
from lib.classification.mobile_cells import (
    MBCONVS,
    OPERATIONS,
    ZERO,
    Cell,
    CellShape,
    SearchSpace,
    architecture_parameters,
    judging_batches,
    learning_batches,
    load_centre,
    mbconv,
    parameters,
    random_architecture,
    scan_volumes,
    search_task,
    shown,
    standardised_foreground,
)
from lib.classification.task import Task
from lib.data.store import save_volume

SPACE = SearchSpace(
    stem_width=4,
    first_width=4,
    widths=(4, 6),
    cells=(2, 2),
    strides=(1, 2),
    head_width=8,
    dropout=0.0,
)
SETTINGS = {
    "slices": 4,
    "image_size": 16,
    "batch_scans": 2,
    "rounds": 1,
    "cache_volumes": True,
    "loader_processes": 0,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def stored(folder, voxels, mask=None, *, name="scan", target=0):
    paths = [folder / f"{name}.b2nd", folder / f"{name}_mask.b2nd"]
    save_volume(paths[0], voxels)
    if mask is not None:
        save_volume(paths[1], mask)
    return ScanItem(name, paths[0], None if mask is None else paths[1], target)


# ---------------------------------------------------------------------------------------- the cells


def test_nine_operations_of_which_seven_are_inverted_residual_blocks():
    assert len(OPERATIONS) == 9
    assert {"k3e3": (3, 3), "k3e6": (3, 6), "k7e4": (7, 4)}.items() <= MBCONVS.items()


def test_width_and_stride_change_in_the_first_cell_of_a_stage():
    assert SPACE.shapes == [(4, 4, 1), (4, 4, 1), (4, 6, 2), (6, 6, 1)]
    assert [shape.residual for shape in SPACE.shapes] == [True, True, False, True]


@pytest.mark.parametrize(
    ("kernel", "expansion", "expected"),
    # widen w*w*e, depthwise k^3*w*e, narrow w*e*w, and two numbers per normalised channel
    [(3, 3, 36 * 3 + 27 * 18 + 36 * 3 + 2 * (18 + 18 + 6)), (5, 1, 125 * 6 + 36 + 2 * (6 + 6))],
)
def test_parameters_of_a_block(kernel, expansion, expected):
    assert parameters(mbconv(6, 6, kernel=kernel, expansion=expansion)) == expected


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [CellShape(4, 4, 1), CellShape(4, 6, 2)])
def test_every_operation_gives_the_shape_of_its_cell(name, shape):
    if name not in shape.candidates:
        with pytest.raises(ValueError, match="a cell from 4 to 6 channels with stride 2 holds one"):
            Cell(shape, [name])
        return
    features = torch.randn(2, 4, 6, 8, 8)
    size = [-(-length // shape.stride) for length in features.shape[2:]]
    assert Cell(shape, [name])(features, name).shape == (2, shape.width, *size)


def test_a_cell_is_calibration_operation_and_residual():
    features = torch.randn(2, 4, 3, 5, 5)
    cell = Cell(CellShape(4, 4, 1), ["k3e3", "identity", "zero"])
    calibrated = nn.functional.conv3d(features, cell.calibration.weight, cell.calibration.bias)
    torch.testing.assert_close(cell(features, "identity"), features + calibrated)
    expected = features + cell.operations["k3e3"](calibrated)
    torch.testing.assert_close(cell(features, "k3e3"), expected)
    assert torch.equal(cell(features, "zero"), features)
    assert parameters(Cell(CellShape(4, 4, 1), ["zero"])) == 0


def test_a_gate_scales_the_operation_but_not_the_residual():
    features, gate = torch.randn(2, 4, 3, 5, 5), torch.tensor(0.5, requires_grad=True)
    cell = Cell(CellShape(4, 4, 1), ["identity"])
    plain, gated = cell(features, "identity"), cell(features, "identity", gate)
    torch.testing.assert_close(gated - features, (plain - features) / 2)
    (gradient,) = torch.autograd.grad(gated.sum(), gate)
    torch.testing.assert_close(gradient, (plain - features).sum())


# ------------------------------------------------------------------------------------- the networks


def test_an_architecture_needs_one_operation_per_cell():
    with pytest.raises(ValueError, match="each of the 4 cells, got 3"):
        SPACE.network(["k3e3"] * 3)


def test_a_supernet_needs_to_be_told_the_architecture():
    with pytest.raises(ValueError, match="a supernet needs an architecture"):
        SPACE.supernet()(torch.zeros(2, 1, 4, 16, 16))


def test_the_supernet_holds_every_architecture():
    """With its weights and its way of normalising a network computes the same."""
    supernet = SPACE.supernet()
    architecture = ["k5e3", "zero", "k3e6", "identity"]
    network = SPACE.network(architecture)
    states = supernet.state_dict()
    network.load_state_dict(
        {name: states[name] for name in states.keys() & network.state_dict()}, strict=False
    )
    network.train()  # batch statistics, as the supernet always takes them
    volumes = torch.randn(3, 1, 4, 16, 16)
    torch.testing.assert_close(network(volumes), supernet.eval()(volumes, architecture))


def test_parameters_of_an_architecture_are_counted_without_building_it():
    supernet = SPACE.supernet()
    for _ in range(10):
        architecture = random_architecture(supernet)
        with torch.device("meta"):
            network = SPACE.network(architecture)
        assert architecture_parameters(supernet, architecture) == parameters(network)


def test_random_architectures_reach_every_candidate():
    supernet = SPACE.supernet()
    drawn = [random_architecture(supernet) for _ in range(200)]
    assert [set(names) for names in zip(*drawn, strict=True)] == [
        set(shape.candidates) for shape in SPACE.shapes
    ]
    assert ZERO not in {names[2] for names in drawn}


# ------------------------------------------------------------------------------------------ volumes


def test_the_centre_is_cut_not_the_lower_right(tmp_path):
    voxels = np.zeros((3, 20, 20), np.uint8)
    voxels[:, 2:18, 2:18] = 9
    voxels[1, 2, 2] = 200
    loaded = load_centre(stored(tmp_path, voxels), size=16)
    assert loaded.shape == (3, 16, 16)
    assert loaded.min() == 9
    assert loaded[1, 0, 0] == 200


def test_hounsfield_units_are_clipped_and_what_is_no_lung_is_black(tmp_path):
    voxels = np.full((2, 20, 20), 3000, np.int16)
    mask = np.zeros((2, 20, 20), np.uint8)
    mask[:, :, 10:] = 1
    loaded = load_centre(stored(tmp_path, voxels, mask), size=16)
    assert (loaded[:, :, :8] == 0).all()
    assert (loaded[:, :, 8:] == 255).all()


@pytest.mark.parametrize("slices", [1, 3, 9])
def test_volumes_have_one_shape_and_lungs_of_mean_0(tmp_path, slices):
    voxels = np.random.default_rng(0).integers(-1000, 100, (slices, 20, 20)).astype(np.int16)
    mask = np.zeros(voxels.shape, np.uint8)
    mask[:, 5:12, 5:15] = 1
    scan = stored(tmp_path, voxels, mask)
    volumes = scan_volumes([scan], SETTINGS)
    for asked in (0, (0, 7)):
        volume, _, _ = volumes[asked]
        assert volume.shape == (1, 4, 16, 16)
        assert (volume == 0).sum() == 4 * (16 * 16 - 7 * 10)  # what is no lung
        torch.testing.assert_close(volume.sum(), torch.tensor(0.0), atol=1e-3, rtol=0)
        torch.testing.assert_close(volume.square().sum(), torch.tensor(280.0))
    pictures = shown(scan, SETTINGS)
    assert pictures.shape == (4, 16, 16)
    assert pictures.dtype == np.uint8


@pytest.mark.parametrize("grey", [0, 77])
def test_a_volume_without_contrast_becomes_0(grey):
    assert not standardised_foreground(np.full((2, 3, 3), grey, np.uint8)).any()


@pytest.mark.parametrize(("scans", "expected"), [(1, [1]), (4, [4]), (5, [3, 2]), (9, [3, 3, 3])])
def test_no_scan_is_judged_alone_beside_full_batches(tmp_path, scans, expected):
    scan = stored(tmp_path, np.zeros((1, 20, 20), np.uint8))
    batches = judging_batches([scan] * scans, SETTINGS | {"batch_scans": 4})
    assert [len(batch.targets) for batch in batches] == expected


def test_learning_batches_hold_every_scan_and_depend_on_the_seed(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 255, (6, 20, 20)).astype(np.uint8)
    scans = [stored(tmp_path, voxels, name=f"scan{number}") for number in range(4)]
    batches = learning_batches(scans, SETTINGS)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(list(batches))
    assert sorted(name for batch in drawn[0] for name in batch.scan_ids) == sorted(
        scan.scan_id for scan in scans
    )
    first, again, other = (torch.cat([batch.volumes for batch in batches]) for batches in drawn)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --------------------------------------------------------------------------------------- the search


def test_a_search_is_a_task_of_its_own(tmp_path):
    scan = stored(tmp_path, np.zeros((1, 20, 20), np.uint8))
    positive = ScanItem("positive", scan.volume, None, 1)
    task = Task(
        scans=[scan, positive, scan],
        splits=["train", "train", "validation"],
        variant={**vars(SPACE), "architecture": ["k3e3"] * 4},
        settings={**SETTINGS, "epochs": 9, "search": {"epochs": 2, "slices": 3}},
        fabric=Fabric(accelerator="cpu"),
        folder=tmp_path / "model",
        seed=0,
    )
    searching = search_task(task)
    assert searching.settings == {
        "cache_volumes": True,
        "loader_processes": 0,
        "epochs": 2,
        "slices": 3,
    }
    assert SearchSpace(**searching.variant) == SPACE
    assert searching.folder == tmp_path / "model" / "search"
