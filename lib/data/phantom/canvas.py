"""The canvas: one slice while it is painted."""

from collections.abc import Sequence
from types import EllipsisType

import numpy as np

from lib.data.phantom.chest import CHEST_HEIGHT_MM
from lib.data.phantom.scene import Scene
from lib.data.phantom.shapes import cover_of_discs, ellipse_distance, grow

Part = tuple[slice, slice] | EllipsisType  # a window of the slice, or all of it


class Canvas:
    """One slice while it is painted, back to front.

    Args:
        scene: of the scan.
        index: of the slice, from the head.

    Attributes:
        level: of the slice in the standard chest, ``z`` in mm.
        picture: HU, float32.
        block: share of each pixel where organs or large vessels leave no room for lung.
        texture: the scene's textures at this height.
        cavity: signed distance to the chest cavity, mm.
    """

    def __init__(self, scene: Scene, index: int) -> None:
        self.scene, self.index, self.grid = scene, index, scene.grid
        self.level = (index + 0.5) / scene.record.slices
        self.z = self.level * CHEST_HEIGHT_MM
        self.picture = scene.background.copy()
        self.block = np.zeros_like(self.picture)
        self.texture = {name: field.at(self.z) for name, field in scene.textures.items()}
        outlines = scene.outlines.at(self.level)
        self.skin, self.muscle, self.cavity = (
            self.grid.radius - outline[self.grid.angle] for outline in outlines
        )

    def blend(self, value: float | np.ndarray, cover: np.ndarray, part: Part = ...) -> None:
        """Put a material into (a part of) the picture, by its share of each pixel."""
        picture = self.picture[part]
        picture += cover * (value - picture)

    def ellipse(self, value: float, row: Sequence[float] | None, *, blocks: bool = False) -> None:
        """Paint an ellipse (x, y, x radius, y radius, tilt); None paints nothing."""
        if row is None:
            return
        part = self.grid.window(row[0], row[1], max(row[2], row[3]))
        x, y = self.grid.x[part], self.grid.y[part]
        cover = self.grid.edge(ellipse_distance(x, y, row[:2], row[2:4], row[4]))
        self.blend(value, cover, part)
        if blocks:
            np.maximum(self.block[part], cover, out=self.block[part])

    def tubes(self, name: str, *, wider: float = 0.0) -> np.ndarray:
        """Share of each pixel covered by tubes of the scene, ``wider`` mm thicker."""
        cut = grow(self.scene.tubes[name], wider).at(self.z, self.scene.scanner.thickness_mm)
        return cover_of_discs(self.grid, cut)
