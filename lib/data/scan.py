"""The scan: what every reader returns, every segmenter takes and the store keeps.

Convention, stated here and nowhere else. Voxels are ordered ``(slice, row, column)`` in the
usual radiological view: slice 0 is nearest to the **head**, row 0 is **anterior**, column 0 is the
**patient's right**. In NIfTI's letters the array axes run towards (I, P, L).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

HOUNSFIELD_AIR = -1000
HOUNSFIELD_WATER = 0
HOUNSFIELD_LOWEST = -1024  # anything lower is padding outside the field of view, not tissue

RIGHT_LUNG = 1  # the patient's right, so the left side of the picture
LEFT_LUNG = 2
GROUND_GLASS_OPACITY = 1
CONSOLIDATION = 2


class ScanError(ValueError):
    """A scan that cannot be used, with the reason in a few words and the file at fault.

    Args:
        reason: short name of the fault, for example ``"truncated file"``; goes to quarantine.csv.
        file: the file or folder at fault.
        detail: one sentence for a person; never patient identity.
    """

    def __init__(self, reason: str, file: Path | str, detail: str = "") -> None:
        self.reason, self.file, self.detail = reason, Path(file), detail
        super().__init__(reason, str(file), detail)  # plain arguments, so that it can be pickled

    def __str__(self) -> str:
        return f"{self.reason}: {self.file}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Window:
    """An intensity window in Hounsfield units.

    Attributes:
        centre: middle of the window, HU.
        width: full width of the window, HU.
    """

    centre: float
    width: float

    @property
    def low(self) -> float:
        """Lower edge in HU, shown black."""
        return self.centre - self.width / 2

    @property
    def high(self) -> float:
        """Upper edge in HU, shown white."""
        return self.centre + self.width / 2


LUNG_WINDOW = Window(centre=-600, width=1500)  # FACTS 7.2; the only lung window of the study


@dataclass(frozen=True, eq=False)
class Scan:
    """One CT scan in the convention of this module.

    Attributes:
        voxels: shape (slices, height, width); int16 Hounsfield units, or uint8 where the source is
            an 8-bit picture.
        spacing_mm: distance between slices, rows and columns in mm, or None where unknown.
        flags: what the reader noticed and mended, in short words (``"mixed slice sizes"``).
    """

    voxels: np.ndarray
    spacing_mm: tuple[float, float, float] | None = None
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.voxels.ndim != 3 or self.voxels.dtype not in (np.int16, np.uint8):
            raise TypeError(
                "a scan holds (slices, height, width) in int16 or uint8, "
                f"got {self.voxels.shape} in {self.voxels.dtype}"
            )

    @property
    def is_hounsfield(self) -> bool:
        """Whether intensities are Hounsfield units (int16) rather than 8-bit grey values."""
        return self.voxels.dtype == np.int16


def apply_window(hounsfield: np.ndarray, window: Window = LUNG_WINDOW) -> np.ndarray:
    """Map Hounsfield units to 8-bit grey values through a window.

    Args:
        hounsfield: any shape, HU.
        window: black at ``window.low``, white at ``window.high``.

    Returns:
        Same shape, uint8, rounded to the nearest grey value.
    """
    scaled = (hounsfield.astype(np.float32) - window.low) * (255.0 / window.width)
    return np.rint(np.clip(scaled, 0.0, 255.0)).astype(np.uint8)


def to_grey(voxels: np.ndarray, window: Window = LUNG_WINDOW) -> np.ndarray:
    """8-bit grey values of Hounsfield units (windowed) or of 8-bit pictures (as they are).

    Args:
        voxels: any shape, int16 HU or uint8.
        window: used for Hounsfield units only.

    Returns:
        Same shape, uint8.
    """
    return voxels if voxels.dtype == np.uint8 else apply_window(voxels, window)
