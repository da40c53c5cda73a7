"""Painting the lungs into a slice: parenchyma, lesions, vessels and airways, and their masks."""

from collections.abc import Mapping, Sequence

import numpy as np
from skimage.morphology import remove_small_objects

from lib.data.phantom.anatomy import Patient, lung_distance
from lib.data.phantom.canvas import Canvas, Part
from lib.data.phantom.chest import BLOOD_HU, CHEST_REACH_MM, GAS_HU
from lib.data.phantom.lesions import Lesion, lesion_score
from lib.data.phantom.lungs import fissure_distance
from lib.data.phantom.shapes import Grid
from lib.data.scan import CONSOLIDATION, GROUND_GLASS_OPACITY, LEFT_LUNG, RIGHT_LUNG

LEAST_LESION_MM2 = 15.0  # nobody labels a smaller speck of opacity in a slice
GLASS_LOWEST_HU, GLASS_HIGHEST_HU = -700.0, -300.0


def paint_lungs(canvas: Canvas) -> tuple[np.ndarray, np.ndarray]:
    """Paint parenchyma, lesions, vessels and airways where organs leave room.

    Returns:
        The lung mask and the lesion mask of the slice, uint8.
    """
    grid, patient = canvas.grid, canvas.scene.patient
    lungs, lesions = (np.zeros(canvas.picture.shape, np.uint8) for _ in range(2))
    part = grid.window(0.0, 0.0, CHEST_REACH_MM)
    x, y, wall = grid.x[part], grid.y[part], canvas.cavity[part]
    distance = lung_distance(patient, x, y, wall, canvas.level)
    cover = grid.edge(distance) * (1 - canvas.block[part])
    inside = cover > 0.5
    if not inside.any():
        return lungs, lesions
    texture = {name: field[part] for name, field in canvas.texture.items()}
    density = _parenchyma(patient, x, y, wall, canvas.level, texture)
    classes = _paint_lesions(canvas, density, part, texture) * inside
    specks = int(LEAST_LESION_MM2 * grid.pixels_per_mm**2)
    lesions[part] = classes * remove_small_objects(classes > 0, max_size=specks)
    lungs[part] = np.where(x < 0, RIGHT_LUNG, LEFT_LUNG) * inside
    _paint_lung_tubes(canvas, density, part)
    canvas.blend(density, cover, part)
    return lungs, lesions


def _parenchyma(
    patient: Patient,
    x: np.ndarray,
    y: np.ndarray,
    wall: np.ndarray,
    level: float,
    texture: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Density of healthy lung tissue: gravity, perfusion, dependent density, fissure, HU."""
    density = patient.lung_hu + (patient.gravity_hu / 160.0) * y
    density += 12 * texture["coarse"] + 14 * texture["middle"] + 18 * texture["fine"]
    behind = np.clip((y - 15.0) / 60.0, 0.0, 1.0)
    density += patient.dependent_hu * behind * np.exp(np.minimum(wall, 0.0) / 7.0)
    fissure = fissure_distance(x, y, level) + 1.5 * texture["coarse"]
    density += 70.0 * np.exp(-np.square(fissure / 1.1))
    return density


def _paint_lesions(
    canvas: Canvas, density: np.ndarray, part: Part, texture: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Put the lesions into the parenchyma in place; returns their classes."""
    scene = canvas.scene
    glass, dense = _score_lesions(scene.lesions, canvas.grid, canvas.z)
    if glass is None:
        return np.zeros(density.shape, np.uint8)
    rough = 0.17 * texture["coarse"] + 0.09 * texture["middle"]
    glass, dense = glass[part] + rough, dense[part] + 0.6 * rough
    opacity = -560.0 + 70 * texture["coarse"] + 75 * texture["middle"] + 25 * texture["fine"]
    opacity += np.exp(-np.square(texture["middle"] / 0.3)) * scene.crazy_paving
    opacity += 110 * np.clip(glass, 0.0, 1.0)  # denser inside
    opacity = np.clip(np.maximum(opacity, density + 60), GLASS_LOWEST_HU, GLASS_HIGHEST_HU)
    density += np.clip(glass / 0.22, 0.0, 1.0) * (opacity - density)
    density += np.clip(dense / 0.12, 0.0, 1.0) * (20 + 15 * texture["middle"] - density)
    classes = np.where(glass > 0.11, GROUND_GLASS_OPACITY, 0)
    return np.where(dense > 0.06, CONSOLIDATION, classes).astype(np.uint8)


def _score_lesions(
    lesions: Sequence[Lesion], grid: Grid, z: float
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """How deep every pixel lies in a lesion and in a consolidated core; None without lesions."""
    glass = dense = None
    for lesion in lesions:
        reach = 1.6 * max(lesion.radii)  # roughness carries a lesion beyond its smooth edge
        if abs(z - lesion.centre[2]) > reach:
            continue
        if glass is None:
            glass, dense = (np.full(grid.x.shape, -1.0, np.float32) for _ in range(2))
        part = grid.window(lesion.centre[0], lesion.centre[1], reach)
        score = lesion_score(lesion, grid.x[part], grid.y[part], z)
        np.maximum(glass[part], score, out=glass[part])
        if lesion.core > 0:
            np.maximum(dense[part], score - (1.0 - lesion.core), out=dense[part])
    return glass, dense


def _paint_lung_tubes(canvas: Canvas, density: np.ndarray, part: Part) -> None:
    """Vessels, then the airways beside them: air bronchograms where the lung is consolidated."""
    solid = np.maximum(canvas.tubes("vessels"), 0.6 * canvas.tubes("airways", wider=0.6))[part]
    density += solid * np.maximum(BLOOD_HU - density, 0.0)
    density += canvas.tubes("airways")[part] * (GAS_HU - density)
