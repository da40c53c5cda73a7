"""The scene: everything that the slices of one scan share, drawn once per scan."""

from dataclasses import dataclass

import numpy as np

from lib.data.phantom.anatomy import Outlines, Patient, body_tubes, draw_patient
from lib.data.phantom.chest import CHEST_HEIGHT_MM
from lib.data.phantom.lesions import Lesion, draw_lesions
from lib.data.phantom.lungs import find_lungs, lung_tubes
from lib.data.phantom.plan import PhantomRecord, generator
from lib.data.phantom.scanners import NOISE_FIELDS, SCANNERS, Scanner
from lib.data.phantom.shapes import Grid, Tubes
from lib.data.phantom.textures import Texture, filtered_noise
from lib.data.scan import HOUNSFIELD_AIR


@dataclass(frozen=True)
class Scene:
    """Everything that the slices of one scan share.

    Attributes:
        record: of the scan.
        scanner: that made it.
        patient: who lies in it.
        outlines: of the patient.
        grid: of every slice.
        spacing: of slices, rows and columns, mm.
        background: air and table, HU, float32.
        padding: pixels outside the field of view, or None.
        tubes: by name, those of `body_tubes`, vessels and airways of the lungs, the confounder's.
        lesions: none in a normal scan.
        crazy_paving: density of thickened septa in ground glass, HU.
        textures: by name, from broad to fine.
        noise: `NOISE_FIELDS` fields, standard deviation 1.
        streaks: two fields drawn out along the rows, for the shoulders.
        noise_weight: the noise is strongest in the middle of the field of view.
    """

    record: PhantomRecord
    scanner: Scanner
    patient: Patient
    outlines: Outlines
    grid: Grid
    spacing: tuple[float, float, float]
    background: np.ndarray
    padding: np.ndarray | None
    tubes: dict[str, Tubes]
    lesions: tuple[Lesion, ...]
    crazy_paving: float
    textures: dict[str, Texture]
    noise: np.ndarray
    streaks: np.ndarray
    noise_weight: np.ndarray


def set_scene(record: PhantomRecord, size: int) -> Scene:
    """Draw what the slices of a scan share, on a grid of ``size`` pixels per side."""
    scanner = SCANNERS[record.scanner]
    patient = draw_patient(record)
    rng = generator(record, record.scan_id, "scan")
    field_of_view = rng.uniform(*scanner.field_of_view_mm)
    grid = _place(patient, rng, size, field_of_view)
    outlines = Outlines(patient)
    lungs = find_lungs(patient, outlines)
    vessels, airways = lung_tubes(lungs, generator(record, record.patient_id, "vessels"))
    texture = generator(record, record.scan_id, "texture")
    distance = np.hypot(*np.meshgrid(*[np.linspace(-1, 1, size, dtype=np.float32)] * 2))
    return Scene(
        record=record,
        scanner=scanner,
        patient=patient,
        outlines=outlines,
        grid=grid,
        spacing=(CHEST_HEIGHT_MM * patient.height / record.slices, grid.spacing, grid.spacing),
        background=_draw_table(scanner, grid, patient, rng),
        padding=distance > 1 if scanner.padding is not None and rng.random() < 0.6 else None,
        tubes=body_tubes(patient, outlines)
        | {"vessels": vessels, "airways": airways}
        | _lay_confounder(record, outlines),
        lesions=draw_lesions(record, lungs),
        crazy_paving=float(rng.uniform(80, 200) * (rng.random() < 0.4)),
        textures={
            "broad": Texture(texture, grid, (9.0, 22.0), 30.0),
            "coarse": Texture(texture, grid, (7.0, 7.0), 14.0),
            "middle": Texture(texture, grid, (2.8, 2.8), 7.0),
            "fine": Texture(texture, grid, (1.4, 1.4), 3.0),
        },
        noise=filtered_noise(texture, NOISE_FIELDS, size, (scanner.grain_mm / grid.spacing,) * 2),
        streaks=filtered_noise(texture, 2, size, (0.6, size / 12)),
        noise_weight=(1.15 - 0.35 * distance).astype(np.float32),
    )


def _place(patient: Patient, rng: np.random.Generator, size: int, field_of_view: float) -> Grid:
    """How this scan sees the patient: size, aspect, shear, a turn and a shift."""
    turn = np.deg2rad(rng.normal(0, 2.0))
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    shape = np.array([[patient.width, patient.shear], [0.0, patient.depth]])
    centre = (rng.normal(0, 5.0), rng.normal(-6.0, 5.0))
    return Grid(size, field_of_view / size, rotation @ shape, centre)


def _lay_confounder(record: PhantomRecord, outlines: Outlines) -> dict[str, Tubes]:
    """An oxygen tube, a wire and electrode clips on the front of the chest, outside the skin."""
    if not record.confounder:
        return {}
    rng = generator(record, record.scan_id, "confounder")
    z = np.arange(-2, CHEST_HEIGHT_MM + 2, 1.5)
    side = rng.choice((-1, 1))
    middle = rng.uniform(0.3, 0.75) + 0.06 * np.sin(z / rng.uniform(35, 60))
    tube = _on_skin(outlines, side * middle, z, gap=6.0, radius=4.6)
    wire = _on_skin(outlines, side * (middle - 0.25), z, gap=3.5, radius=1.3)
    clips = wire[rng.choice(len(wire), 3, replace=False)] * (1, 1, 1, 3.0)
    return {"tube": Tubes.of(tube), "wire": Tubes.of(np.concatenate([wire, clips]))}


def _on_skin(
    outlines: Outlines, angle: np.ndarray, z: np.ndarray, gap: float, radius: float
) -> np.ndarray:
    """Spheres on the chest, at an angle in radians from the midline in front, mm."""
    turn = -np.pi / 2 + angle
    away = outlines.radius(0, z / CHEST_HEIGHT_MM, turn) + gap
    return np.stack([away * np.cos(turn), away * np.sin(turn), z, np.full_like(z, radius)], axis=1)


def _draw_table(
    scanner: Scanner, grid: Grid, patient: Patient, rng: np.random.Generator
) -> np.ndarray:
    """Air and the table under the patient, HU, the same in every slice."""
    picture = np.full((grid.size, grid.size), HOUNSFIELD_AIR, np.float32)
    axis = (np.arange(grid.size, dtype=np.float32) - (grid.size - 1) / 2) * grid.spacing
    x, y = axis[None, :] + rng.normal(0, 5), axis[:, None]
    deepest = grid.offset[1] * grid.spacing - (grid.size - 1) / 2 * grid.spacing
    top = deepest + patient.depth * 119.0 + max(0.0, patient.fat - 14.0) + 5.0
    if scanner.table == "curved":
        surface, depth, shell, foam = top - x**2 / 620.0, 24.0, 30.0, -930.0
    else:
        edge = np.maximum(np.abs(x) - 110.0, 0.0)
        surface, depth, shell, foam = top - edge**2 / 160.0, 40.0, -250.0, -880.0
    below = y - surface
    inside = np.clip(below / grid.spacing, 0, 1) * np.clip((depth - below) / grid.spacing, 0, 1)
    picture += inside * (foam - HOUNSFIELD_AIR)
    for line, width in ((0.0, 1.2), (depth, 1.6)):
        cover = np.clip((width + 0.7 - np.abs(below - line)) / grid.spacing, 0, 1)
        picture += cover * (shell - picture)
    return picture
