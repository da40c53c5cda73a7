"""From a record to a scan with its true masks, slice by slice."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from lib.data.phantom.canvas import Canvas
from lib.data.phantom.paint_body import paint_body, paint_confounder
from lib.data.phantom.paint_lungs import paint_lungs
from lib.data.phantom.plan import LABELS, PhantomRecord, generator
from lib.data.phantom.scanners import NOISE_FIELDS, SCANNERS
from lib.data.phantom.scene import Scene, set_scene
from lib.data.scan import HOUNSFIELD_LOWEST, Scan, apply_window

HOUNSFIELD_HIGHEST = 3071
LEAST_SIZE = 32  # pixels per side that can show a chest


@dataclass(frozen=True, eq=False)
class PhantomScan:
    """A phantom and its true masks.

    Attributes:
        scan: int16 HU, or uint8 in the lung window.
        lungs: same shape, uint8: 0 background, 1 right lung, 2 left lung. **Includes the lesions.**
        lesions: same shape, uint8: 0 none, 1 ground-glass opacity, 2 consolidation.
    """

    scan: Scan
    lungs: np.ndarray
    lesions: np.ndarray


def make_phantom(record: PhantomRecord, *, size: int = 256, hounsfield: bool = True) -> PhantomScan:
    """Draw one scan with its true masks.

    Args:
        record: from `plan_phantoms`. The result depends on it and on ``size`` alone, not on the
            order of calls or the number of workers.
        size: pixels per side; the field of view stays the same.
        hounsfield: int16 HU if true, else the 8-bit picture of the lung window.

    Returns:
        Voxels and masks in the convention of `lib.data.scan`.

    Raises:
        ValueError: if label or scanner are unknown, there is no slice, or the size is too small to
            show a chest.
    """
    if record.label not in LABELS or record.scanner not in SCANNERS:
        raise ValueError(f"unknown label or scanner: {record.label!r}, {record.scanner!r}")
    if size < LEAST_SIZE or record.slices < 1:
        raise ValueError(
            f"a phantom has {LEAST_SIZE} pixels per side and 1 slice or more, "
            f"got {size} and {record.slices}"
        )
    scene = set_scene(record, size)
    shape = (record.slices, size, size)
    voxels = np.empty(shape, np.int16 if hounsfield else np.uint8)
    lungs, lesions = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
    for index in range(record.slices):
        picture, lungs[index], lesions[index] = _render(scene, index)
        voxels[index] = picture if hounsfield else apply_window(picture)
    return PhantomScan(Scan(voxels, scene.spacing), lungs, lesions)


def _render(scene: Scene, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One slice: int16 HU, lung mask, lesion mask."""
    canvas = Canvas(scene, index)
    paint_body(canvas)
    lungs, lesions = paint_lungs(canvas)
    paint_confounder(canvas)
    voxels = _reconstruct(canvas)
    if scene.padding is not None:
        for picture, value in ((voxels, scene.scanner.padding), (lungs, 0), (lesions, 0)):
            picture[scene.padding] = value
    return voxels, lungs, lesions


def _reconstruct(canvas: Canvas) -> np.ndarray:
    """The scanner's part: kernel, noise, streaks between the shoulders, offset; int16."""
    scene, scanner = canvas.scene, canvas.scene.scanner
    sigma = scanner.blur_mm / scene.grid.spacing
    picture = gaussian_filter(canvas.picture, sigma, truncate=3.0)
    if scanner.sharpening:
        smooth = gaussian_filter(picture, 1.6 * sigma, truncate=3.0)
        picture += scanner.sharpening * (picture - smooth)
    rng = generator(scene.record, scene.record.scan_id, f"noise {canvas.index}")
    chosen = rng.choice(NOISE_FIELDS, 2, replace=False)
    shifts = rng.integers(0, scene.grid.size, (3, 2))
    noise = np.roll(scene.noise[chosen[0]], shifts[0], (0, 1))
    noise += np.roll(scene.noise[chosen[1]], shifts[1], (0, 1))
    noise *= scene.noise_weight * (scanner.noise_hu / math.sqrt(2))
    shoulders = max(0.0, 1 - canvas.level / 0.18)  # the way through both is long
    if shoulders:
        noise += np.roll(scene.streaks[canvas.index % 2], shifts[2], (0, 1)) * (22.0 * shoulders)
    picture += noise + scanner.offset_hu
    return np.rint(np.clip(picture, HOUNSFIELD_LOWEST, HOUNSFIELD_HIGHEST)).astype(np.int16)
