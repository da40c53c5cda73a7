"""Random textures: filtered noise, and fields of it that change slowly from slice to slice."""

import math

import numpy as np
from scipy.ndimage import gaussian_filter

from lib.data.phantom.chest import CHEST_HEIGHT_MM
from lib.data.phantom.shapes import Grid


class Texture:
    """A random field with mean 0 and standard deviation 1 that changes slowly from slice to slice.

    A few filtered fields are laid at regular heights, each moved by its own shift, and mixed in
    between, so that a field for any number of slices costs the same.

    Args:
        rng: of the scan.
        grid: gives size and scale of the picture.
        length_mm: correlation length along the columns and the rows, mm.
        step_mm: distance between the fields, mm.
        fields: how many are filtered.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        grid: Grid,
        length_mm: tuple[float, float],
        step_mm: float,
        fields: int = 4,
    ) -> None:
        self.step = step_mm
        sigma = tuple(max(length * grid.pixels_per_mm, 0.3) for length in length_mm)
        self.fields = filtered_noise(rng, fields, grid.size, sigma)
        self.shifts = rng.integers(0, grid.size, (int(CHEST_HEIGHT_MM / step_mm) + 3, 2))

    def at(self, z: float) -> np.ndarray:
        """The field at height z in mm."""
        knot = int(z / self.step)
        turn = (z / self.step - knot) * (math.pi / 2)
        return math.cos(turn) * self._knot(knot) + math.sin(turn) * self._knot(knot + 1)

    def _knot(self, knot: int) -> np.ndarray:
        return np.roll(self.fields[knot % len(self.fields)], self.shifts[knot], (0, 1))


def filtered_noise(
    rng: np.random.Generator, count: int, size: int, sigma: tuple[float, float]
) -> np.ndarray:
    """Periodic noise with a correlation length in pixels, standard deviation 1, float32."""
    white = rng.standard_normal((count, size, size), dtype=np.float32)
    fields = gaussian_filter(white, (0, *sigma), mode="wrap", truncate=3.0)
    return fields / fields.std(axis=(1, 2), keepdims=True)
