"""Shapes on the pixels of a slice: ellipses by their distance, tubes by the discs they leave."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import PchipInterpolator

from lib.data.phantom.chest import CHEST_HEIGHT_MM

ANGLES = 720  # outlines hold one radius per half degree
Discs = tuple[np.ndarray, np.ndarray, np.ndarray]  # x, y, radius in mm of the standard chest


class Grid:
    """Pixels of one slice plane and where they lie in the standard chest.

    Args:
        size: pixels per side.
        spacing: mm per pixel.
        patient_from_chest: matrix (2, 2) from the standard chest to mm in the picture.
        centre: (x, y) of the chest's centre in the picture, mm from the picture's centre.
    """

    def __init__(
        self,
        size: int,
        spacing: float,
        patient_from_chest: np.ndarray,
        centre: tuple[float, float],
    ) -> None:
        self.size, self.spacing = size, spacing
        self.to_pixels = patient_from_chest / spacing
        self.offset = np.asarray(centre) / spacing + (size - 1) / 2
        self.pixels_per_mm = float(np.sqrt(np.abs(np.linalg.det(self.to_pixels))))
        axis = np.arange(size, dtype=np.float32)
        columns, rows = axis[None, :] - self.offset[0], axis[:, None] - self.offset[1]
        inverse = np.linalg.inv(self.to_pixels).astype(np.float32)
        self.x = inverse[0, 0] * columns + inverse[0, 1] * rows
        self.y = inverse[1, 0] * columns + inverse[1, 1] * rows
        self.radius = np.hypot(self.x, self.y)
        turn = np.arctan2(self.y, self.x) * (ANGLES / (2 * np.pi))
        self.angle = np.rint(turn).astype(np.int32) % ANGLES

    def pixels(self, x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Columns and rows of points of the standard chest."""
        matrix, offset = self.to_pixels, self.offset
        return (
            matrix[0, 0] * x + matrix[0, 1] * y + offset[0],
            matrix[1, 0] * x + matrix[1, 1] * y + offset[1],
        )

    def window(self, x: float, y: float, reach: float) -> tuple[slice, slice]:
        """The part of the slice within ``reach`` mm of a point; it may be empty."""
        column, row = self.pixels(x, y)
        pixels = reach * self.pixels_per_mm * 1.2 + 2
        low = [max(0, int(value - pixels)) for value in (row, column)]
        high = [min(self.size, max(0, int(value + pixels) + 1)) for value in (row, column)]
        return slice(low[0], high[0]), slice(low[1], high[1])

    def edge(self, distance: np.ndarray) -> np.ndarray:
        """Share of each pixel inside a shape, from its signed distance in mm (inside negative)."""
        return np.clip(0.5 - distance * self.pixels_per_mm, 0.0, 1.0)


def ellipse_distance(
    x: np.ndarray,
    y: np.ndarray,
    centre: Sequence[float],
    radii: Sequence[float],
    tilt: float = 0.0,
) -> np.ndarray:
    """Signed distance to an ellipse in mm, exact on its edge, inside negative."""
    dx, dy = x - float(centre[0]), y - float(centre[1])
    cosine, sine = math.cos(tilt), math.sin(tilt)
    a, b = float(radii[0]), float(radii[1])
    u, v = (cosine / a) * dx + (sine / a) * dy, (cosine / b) * dy - (sine / b) * dx
    return (np.sqrt(u * u + v * v) - 1.0) * min(a, b)


def ellipse_at(rows: np.ndarray, level: float) -> np.ndarray | None:
    """A row (x, y, x radius, y radius, tilt) of a table of ellipses interpolated at one level.

    Args:
        rows: (n, 6) with the level first, as in `lib.data.phantom.chest`.
        level: where the chest is cut.

    Returns:
        The ellipse in mm and radians, or None above and below the table.
    """
    if not rows[0, 0] <= level <= rows[-1, 0]:
        return None
    return np.array([np.interp(level, rows[:, 0], column) for column in rows.T[1:]])


@dataclass(frozen=True)
class Tubes:
    """Spheres along tubes, sorted by z; positions and radii in mm of the standard chest."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    radius: np.ndarray
    stretch: float = 1.0  # height of a sphere over its width

    @classmethod
    def of(cls, points: np.ndarray, stretch: float = 1.0) -> "Tubes":
        """Tubes from rows of (x, y, z, radius)."""
        points = points[np.argsort(points[:, 2], kind="stable")]
        return cls(*points.T, stretch)

    def at(self, z: float, thickness: float) -> Discs:
        """Centres and radii (x, y, radius) of the cuts through the spheres near height z, mm."""
        reach = self.radius.max(initial=0.0) * self.stretch + thickness / 2
        part = slice(*np.searchsorted(self.z, (z - reach, z + reach)))
        away = np.maximum(np.abs(self.z[part] - z) - thickness / 2, 0.0) / self.stretch
        square = self.radius[part] ** 2 - away**2
        keep = square > 0
        return self.x[part][keep], self.y[part][keep], np.sqrt(square[keep])


def sample_tube(points: Sequence[Sequence[float]], step: float = 0.35) -> np.ndarray:
    """Spheres (x, y, z, radius) along a line through (x, y, level, radius) points."""
    corners = np.asarray(points, dtype=float) * (1, 1, CHEST_HEIGHT_MM, 1)
    lengths = np.linalg.norm(np.diff(corners[:, :3], axis=0), axis=1)
    way = np.concatenate([[0], np.cumsum(lengths)])
    count = int(way[-1] / max(step * corners[:, 3].min(), 0.4)) + 2
    curve = PchipInterpolator(way, corners, axis=0)
    return curve(np.linspace(0, way[-1], count))


def mirror(points: np.ndarray) -> np.ndarray:
    """Points of one side of the body and their mirror images."""
    return np.concatenate([points, points * ((-1,) + (1,) * (points.shape[1] - 1))])


def grow(tubes: Tubes, by: float) -> Tubes:
    """The same tubes with another radius, for walls (by > 0) and marrow (by < 0)."""
    return replace(tubes, radius=np.maximum(tubes.radius + by, 0.0))


def cover_of_discs(grid: Grid, discs: Discs) -> np.ndarray:
    """Share of each pixel covered by discs (x, y, radius), float32 picture."""
    columns, rows = grid.pixels(discs[0], discs[1])
    radii = discs[2] * grid.pixels_per_mm
    picture = np.zeros((grid.size, grid.size), np.float32)
    reach = np.ceil(radii + 0.5).astype(int)
    limits = (0, 1, 2, 4, 8, 16, 64)
    for low, high in itertools.pairwise(limits):
        group = (reach > low) & (reach <= high)
        if group.any():
            _paint_discs(picture, columns[group], rows[group], radii[group], high)
    return picture


def _paint_discs(
    picture: np.ndarray, columns: np.ndarray, rows: np.ndarray, radii: np.ndarray, reach: int
) -> None:
    """Raise a picture to the coverage of antialiased discs of at most ``reach`` pixels."""
    side = np.arange(-reach, reach + 1)
    row = np.rint(rows).astype(int)[:, None, None] + side[:, None]
    column = np.rint(columns).astype(int)[:, None, None] + side
    distance = np.hypot(row - rows[:, None, None], column - columns[:, None, None])
    peak = np.minimum(1.0, 1.3 * radii)  # a disc thinner than a pixel covers a part of it only
    cover = np.clip(radii[:, None, None] + 0.5 - distance, 0, peak[:, None, None])
    inside = (cover > 0) & (row >= 0) & (row < len(picture)) & (column >= 0)
    inside &= column < picture.shape[1]
    flat = (row * picture.shape[1] + column)[inside]
    np.maximum.at(picture.reshape(-1), flat, cover[inside].astype(np.float32))
