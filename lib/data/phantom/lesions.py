"""Lesions of COVID-19 and of common pneumonia: where they lie, how large and how dense they are."""

from dataclasses import dataclass

import numpy as np

from lib.data.phantom.chest import CHEST_HEIGHT_MM
from lib.data.phantom.lungs import CoarseLungs, fissure_distance
from lib.data.phantom.plan import COVID, NORMAL, PhantomRecord, generator
from lib.data.scan import LEFT_LUNG, RIGHT_LUNG


@dataclass(frozen=True)
class Lesion:
    """An opacity: an ellipsoid whose edge is roughened by texture.

    Attributes:
        centre: x, y, z in mm.
        radii: mm.
        core: share of the radius that is consolidated, 0 for pure ground glass.
        lobe: 1 for the lower lobe only, -1 for the rest only, 0 for both.
        side: the lung that it belongs to.
    """

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    core: float
    lobe: int
    side: int


def draw_lesions(record: PhantomRecord, lungs: CoarseLungs) -> tuple[Lesion, ...]:
    """Lesions of one scan by its label, until they fill a random share of the lungs."""
    if record.label == NORMAL:
        return ()
    rng = generator(record, record.scan_id, "lesions")
    hard = record.difficulty
    if record.label == COVID:
        low, high = np.interp(hard, (0, 1), (0.08, 0.006)), np.interp(hard, (0, 1), (0.4, 0.12))
        return _covid_lesions(lungs, rng, np.exp(rng.uniform(np.log(low), np.log(high))))
    low, high = np.interp(hard, (0, 1), (0.6, 0.15)), np.interp(hard, (0, 1), (0.95, 0.6))
    return _pneumonia_lesions(lungs, rng, rng.uniform(low, high))


def _covid_lesions(lungs: CoarseLungs, rng: np.random.Generator, load: float) -> tuple[Lesion, ...]:
    """Many subpleural, posterior and basal lesions, in both lungs in turn.

    Args:
        lungs: where the lungs are.
        rng: of the scan.
        load: share of the lungs to fill.
    """
    place = np.exp(-lungs.wall / 6.0) * (0.1 + 0.9 / (1 + np.exp(-lungs.points[:, 1] / 14.0)))
    place *= 0.2 + (lungs.points[:, 2] / CHEST_HEIGHT_MM) ** 1.5
    place[lungs.points[:, 2] < 0.2 * CHEST_HEIGHT_MM] = 0
    consolidated = rng.random() < 0.6
    reach = np.clip(60.0 * load ** (1 / 3), 11, 38)
    filled, lesions = np.zeros(len(lungs.points), bool), []
    side = int(rng.integers(1, 3))
    while len(lesions) < 4 or (filled.mean() < load and len(lesions) < 60):
        weight = np.where((lungs.side == side) & ~filled, place, 0) + 1e-12 * (lungs.side == side)
        centre = lungs.points[rng.choice(len(weight), p=weight / weight.sum())]
        radii = reach * rng.uniform(0.6, 1.15, 3) * (1, 0.9, 1.1)
        core = rng.uniform(0.3, 0.6) if consolidated and rng.random() < 0.5 else 0.0
        lesion = Lesion(tuple(centre.tolist()), tuple(radii.tolist()), core, 0, side)
        filled |= lesion_score(lesion, *lungs.points.T) > 0
        lesions.append(lesion)
        side = LEFT_LUNG if side == RIGHT_LUNG else RIGHT_LUNG
    return tuple(lesions)


def _pneumonia_lesions(
    lungs: CoarseLungs, rng: np.random.Generator, size: float
) -> tuple[Lesion, ...]:
    """One consolidated part of one lobe of one lung, with smaller ground glass around it.

    Args:
        lungs: where the lungs are.
        rng: of the scan.
        size: 0 to 1, from a segment to a whole lobe.
    """
    side, lobe = int(rng.integers(1, 3)), 1 if rng.random() < 0.65 else -1
    fissure = lobe * fissure_distance(
        lungs.points[:, 0], lungs.points[:, 1], lungs.points[:, 2] / CHEST_HEIGHT_MM
    )
    inside = (lungs.side == side) & (fissure > 6)
    weight = np.where(inside, np.minimum(lungs.depth, 25.0), 0) + 1e-9 * inside
    centre = lungs.points[rng.choice(len(weight), p=weight / weight.sum())]
    radii = (24 + 44 * size) * rng.uniform(0.85, 1.2, 3)
    main = Lesion(tuple(centre.tolist()), tuple(radii.tolist()), rng.uniform(0.7, 0.85), lobe, side)
    lesions = [main]
    for _ in range(int(rng.integers(1, 4))):
        near = np.where(inside, np.exp(-np.linalg.norm(lungs.points - centre, axis=1) / 40.0), 0)
        place = lungs.points[rng.choice(len(near), p=near / near.sum())].tolist()
        radii = rng.uniform(9, 20, 3).tolist()
        lesions.append(Lesion(tuple(place), tuple(radii), rng.uniform(0, 0.5), lobe, side))
    return tuple(lesions)


def lesion_score(lesion: Lesion, x: np.ndarray, y: np.ndarray, z: float | np.ndarray) -> np.ndarray:
    """1 in the middle of a lesion, 0 on its smooth edge, negative outside; cut at the lobe."""
    (cx, cy, cz), (rx, ry, rz) = lesion.centre, lesion.radii
    u, v, w = (x - cx) / rx, (y - cy) / ry, (z - cz) / rz
    score = 1 - np.sqrt(u * u + v * v + w * w)
    if lesion.lobe:
        fissure = lesion.lobe * fissure_distance(x, y, z / CHEST_HEIGHT_MM)
        score = np.minimum(score, fissure / 4.0)
    return np.where((x < 0) == (lesion.side == RIGHT_LUNG), score, -1.0)
