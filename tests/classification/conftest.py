import numpy as np
import pytest

from lib.classification.inputs import ScanItem
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


def store(folder, scan_id, voxels, lungs, target):
    """Store a scan, its mask, and their sidecars."""
    for name, values in ((scan_id, voxels), (f"{scan_id}_lungs", lungs)):
        save_volume(folder / f"{name}.b2nd", values)
        (folder / f"{name}.json").write_text(name)
    return ScanItem(scan_id, folder / f"{scan_id}.b2nd", folder / f"{scan_id}_lungs.b2nd", target)
