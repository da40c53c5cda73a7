"""The two scanners, which differ in noise, kernel, field of view, table and file orientation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scanner:
    """What differs between two scanners.

    Attributes:
        noise_hu: standard deviation of the noise in the middle of the chest, HU.
        grain_mm: correlation length of the noise, mm.
        blur_mm: width of the reconstruction kernel, mm.
        sharpening: weight of the kernel's edge enhancement.
        offset_hu: calibration error, HU.
        field_of_view_mm: smallest and largest field of view, mm.
        thickness_mm: slice thickness, mm.
        table: ``"curved"`` or ``"flat"``.
        padding: value outside the round field of view, HU; None where the square is filled.
        orientation: axis codes of the NIfTI files that its converter writes.
    """

    noise_hu: float
    grain_mm: float
    blur_mm: float
    sharpening: float
    offset_hu: float
    field_of_view_mm: tuple[float, float]
    thickness_mm: float
    table: str
    padding: int | None
    orientation: str


SCANNERS = {
    "A": Scanner(15.0, 1.1, 0.75, 0.0, 0.0, (325, 365), 2.0, "curved", None, "LPS"),
    "B": Scanner(24.0, 0.8, 0.65, 0.45, -7.0, (340, 380), 4.0, "flat", -2048, "RAS"),
}
NOISE_FIELDS = 6  # white fields filtered once per scan; slices take shifted sums of two
