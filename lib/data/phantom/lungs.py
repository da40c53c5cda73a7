"""Inside of healthy lungs: where they are, their trees of vessels and airways, the fissure."""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt
from scipy.spatial.distance import cdist

from lib.data.phantom.anatomy import Outlines, Patient, lung_distance
from lib.data.phantom.chest import CHEST_HEIGHT_MM, CHEST_REACH_MM, HILUM
from lib.data.phantom.shapes import Grid, Tubes
from lib.data.scan import LEFT_LUNG, RIGHT_LUNG

COARSE_SIZE, COARSE_SLICES = 48, 44  # about 7 mm in every direction
VESSEL_TIPS = 1100  # per lung
VESSEL_TIP_RADIUS_MM = 0.4
VESSEL_EXPONENT = 2.5  # radius ** exponent adds up at branchings (Murray's law says 3)
AIRWAY_LEAST_TIPS = 6  # thinner branches carry no visible airway


@dataclass(frozen=True)
class CoarseLungs:
    """The lungs on a coarse grid of the standard chest, to choose places in them.

    Attributes:
        points: (n, 3) positions x, y, z in mm.
        side: (n,) 1 right, 2 left.
        depth: (n,) distance to the nearest tissue that is not lung, mm.
        wall: (n,) distance to the chest wall, mm.
    """

    points: np.ndarray
    side: np.ndarray
    depth: np.ndarray
    wall: np.ndarray


def find_lungs(patient: Patient, outlines: Outlines) -> CoarseLungs:
    """The lungs of a patient before organs and large vessels are cut out of them."""
    size, slices = COARSE_SIZE, COARSE_SLICES
    grid = Grid(size, 2.1 * CHEST_REACH_MM / size, np.eye(2), (0.0, 0.0))
    levels = (np.arange(slices) + 0.5) / slices
    lungs, wall = np.empty((slices, size, size), bool), np.empty((slices, size, size))
    for k, level in enumerate(levels):
        wall[k] = grid.radius - outlines.at(level)[2][grid.angle]
        lungs[k] = lung_distance(patient, grid.x, grid.y, wall[k], level) < 0
    spacing = (CHEST_HEIGHT_MM / slices, grid.spacing, grid.spacing)
    k, row, column = np.nonzero(lungs)
    points = np.stack([grid.x[row, column], grid.y[row, column], levels[k] * CHEST_HEIGHT_MM], 1)
    return CoarseLungs(
        points=points.astype(float),
        side=np.where(points[:, 0] < 0, RIGHT_LUNG, LEFT_LUNG),
        depth=distance_transform_edt(lungs, spacing)[lungs],
        wall=-wall[lungs],
    )


def lung_tubes(lungs: CoarseLungs, rng: np.random.Generator) -> tuple[Tubes, Tubes]:
    """Vessels of both lungs, and the airways that run along the larger ones."""
    vessels, airways = [], []
    for side in (RIGHT_LUNG, LEFT_LUNG):
        starts, ends, tips = _branches(lungs, side, rng)
        radius = VESSEL_TIP_RADIUS_MM * tips ** (1 / VESSEL_EXPONENT)
        bend = rng.normal(0, 0.05, starts.shape) * np.linalg.norm(ends - starts, axis=1)[:, None]
        vessels.append(_sample_branches(starts, ends, bend, radius))
        large = tips >= AIRWAY_LEAST_TIPS
        beside = np.array([0.0, 1.0, 0.3]) * (2.1 * radius[large, None])
        airways.append(
            _sample_branches(
                starts[large] + beside, ends[large] + beside, bend[large], 0.95 * radius[large]
            )
        )
    return Tubes.of(np.concatenate(vessels)), Tubes.of(np.concatenate(airways))


def _branches(
    lungs: CoarseLungs, side: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grow a tree of vessels from the hilum to random places all over one lung.

    Every place, in the order of its distance from the hilum, joins the node that gives it a short
    and direct way.

    Returns:
        starts (n, 3), ends (n, 3) in mm and tips (n,), the number of places that a branch supplies.
    """
    inside = lungs.points[(lungs.side == side) & (lungs.depth > 3)]
    chosen = inside[rng.choice(len(inside), min(VESSEL_TIPS, len(inside)), replace=False)]
    root = np.array(HILUM[side]) * (1, 1, CHEST_HEIGHT_MM)
    nodes = np.concatenate([[root], chosen + rng.uniform(-3, 3, chosen.shape)])
    nodes = nodes[np.argsort(np.linalg.norm(nodes - root, axis=1), kind="stable")]
    distance = cdist(nodes, nodes)
    parent, way, tips = np.zeros(len(nodes), int), np.zeros(len(nodes)), np.ones(len(nodes))
    for node in range(1, len(nodes)):
        near = distance[node, :node]
        parent[node] = np.argmin(near + 0.45 * way[:node])
        way[node] = way[parent[node]] + near[parent[node]]
    for node in range(len(nodes) - 1, 0, -1):
        tips[parent[node]] += tips[node]
    nodes = _straighten(nodes, parent, tips)
    return nodes[parent[1:]], nodes[1:], tips[1:]


def _straighten(nodes: np.ndarray, parent: np.ndarray, tips: np.ndarray) -> np.ndarray:
    """Pull every node between its parent and its children, the larger child stronger."""
    weight = tips[1:, None] ** 2
    total = np.zeros((len(nodes), 1))
    np.add.at(total, parent[1:], weight)
    inner = (total[:, 0] > 0) & (np.arange(len(nodes)) > 0)
    for _ in range(4):
        ahead = np.zeros_like(nodes)
        np.add.at(ahead, parent[1:], weight * nodes[1:])
        middle = (nodes[parent[inner]] + ahead[inner] / total[inner]) / 2
        nodes = nodes.copy()
        nodes[inner] = (nodes[inner] + 2 * middle) / 3
    return nodes


def _sample_branches(
    starts: np.ndarray,
    ends: np.ndarray,
    bend: np.ndarray,
    radius: np.ndarray,
    step: float = 0.7,
) -> np.ndarray:
    """Spheres (x, y, z, radius) along slightly bent branches."""
    counts = np.ceil(np.linalg.norm(ends - starts, axis=1) / step).astype(int) + 1
    branch = np.repeat(np.arange(len(counts)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    t = ((np.arange(len(branch)) - first) / (counts[branch] - 1).clip(1))[:, None]
    points = starts[branch] * (1 - t) + ends[branch] * t + bend[branch] * np.sin(np.pi * t)
    return np.concatenate([points, radius[branch, None]], axis=1)


def fissure_distance(x: np.ndarray, y: np.ndarray, level: float | np.ndarray) -> np.ndarray:
    """Distance in mm to the oblique fissure; positive in the lower lobe (behind and below it)."""
    return (y - 48.0 + 210.0 * (level - 0.22) - 0.0012 * (np.abs(x) - 70.0) ** 2) * 0.85
