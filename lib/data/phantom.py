"""The thorax phantom: a generated data set of chest CT scans in Hounsfield units.

Why it exists: no public set may be redistributed, so the default study runs on scans that are
drawn, not measured. They hold what the three papers rest on: closed-lung slices at both ends, a
variable number of slices, a table under the patient, scanner-dependent noise, COVID-19 (bilateral,
subpleural, posterior, basal, multifocal), common pneumonia (unilateral, lobar, air bronchograms)
and scans without infection. A **confounder** outside the lungs (an oxygen tube with an electrode
wire on the chest) can be correlated with COVID-19 on purpose, so that the claim that segmentation
helps can be tested.

How it is drawn: every organ is a function of the position in a *standard chest* in mm: ``x``
towards the patient's left, ``y`` towards the back, ``z`` towards the feet, with ``level = z /
CHEST_HEIGHT_MM`` from 0 (shoulders) to 1 (upper abdomen). An affine map per scan (size, aspect,
shear, turn) takes it to the picture. So a scan can have any number of slices and only one slice is
worked on at a time. Three kinds of shape suffice: outlines given by a radius per angle (body,
chest wall), ellipses interpolated between levels (organs) and tubes swept by spheres (vessels,
airways, bones).

Everything random hangs on ``record.seed`` with the patient's or the scan's identity, never on the
order in which scans are made.
"""

import gzip
import hashlib
import itertools
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.spatial.distance import cdist

from lib.data.scan import (
    CONSOLIDATION,
    GROUND_GLASS_OPACITY,
    HOUNSFIELD_AIR,
    HOUNSFIELD_LOWEST,
    LEFT_LUNG,
    RIGHT_LUNG,
    Scan,
    apply_window,
)

COVID, PNEUMONIA, NORMAL = "covid", "pneumonia", "normal"
LABELS = (COVID, PNEUMONIA, NORMAL)

# ------------------------------------------------------------------------------ the standard chest
# fmt: off

CHEST_HEIGHT_MM = 330.0
CHEST_REACH_MM = 152.0  # no lung is farther from the chest's centre line
DIAPHRAGM_END = 0.95  # level where the domes have filled the chest

# Outlines: distance of the surface from the chest's centre line, mm, by level.
LEVELS = (0.00, 0.10, 0.20, 0.30, 0.40, 0.55, 0.70, 0.85, 1.00)
OUTLINES = np.array([
    (245, 232, 212, 196, 187, 182, 180, 178, 176),  # body: half width
    ( 64,  88, 112, 121, 123, 124, 122, 118, 113),  # body: front
    ( 98, 107, 113, 117, 119, 117, 115, 113, 112),  # body: back
    ( 50,  84, 117, 132, 138, 141, 143, 143, 139),  # chest cavity: half width
    ( 15,  32,  63,  83,  91,  95,  96,  95,  92),  # chest cavity: front
    ( 62,  75,  83,  87,  88,  87,  86,  86,  85),  # chest cavity: back
], dtype=float)

# Ellipses that change with the level: rows of level, x, y, x radius, y radius (mm), tilt (radians).
MEDIASTINUM = np.array([
    (0.00, 0,   2, 20, 48, 0.0),
    (0.12, 0,   2, 26, 52, 0.0),
    (0.24, 2, -12, 29, 64, 0.0),
    (0.33, 3, -18, 33, 68, 0.0),
    (0.41, 2, -20, 42, 70, 0.0),
    (0.52, 6, -33, 52, 62, 0.1),
    (0.66, 14, -39, 60, 58, 0.2),
    (0.78, 13, -40, 60, 60, 0.1),
    (0.84, 10, -40, 60, 64, 0.0),
    (1.00, 8, -34, 60, 66, 0.0),
])
BEHIND_HEART = np.array([  # aorta, oesophagus and azygos vein lie in fat before the spine
    (0.00, 0, 30, 16, 22, 0.0),
    (0.25, 6, 34, 22, 24, 0.0),
    (0.70, 11, 34, 22, 26, 0.0),
    (1.00, 4, 36, 26, 28, 0.0),
])
HEART = np.array([
    (0.405, 0, -42, 8, 6, 0.0),
    (0.42, 0, -44, 32, 26, 0.0),
    (0.48, 6, -42, 48, 42, 0.2),
    (0.56, 14, -42, 60, 47, 0.4),
    (0.66, 24, -45, 65, 45, 0.4),
    (0.75, 29, -51, 60, 39, 0.3),
    (0.80, 33, -58, 46, 28, 0.2),
    (0.825, 36, -64, 10, 7, 0.1),
])
GROOVE_FAT = np.array([
    (0.46, -14, -66, 3, 2, 0.5),
    (0.50, -16, -66, 12, 6, 0.5),
    (0.62, -10, -74, 14, 5, 0.3),
    (0.74, -14, -76, 16, 6, 0.2),
    (0.80, -16, -74, 4, 2, 0.2),
])
LIVER_LEFT_LOBE = np.array([
    (0.80, -10, -48, 8, 5, 0.1),
    (0.83, -8, -50, 34, 22, 0.1),
    (0.90, -2, -52, 52, 30, 0.2),
    (1.00, -4, -50, 58, 32, 0.2),
])
STOMACH = np.array([
    (0.755, 66, -12, 5, 4, 0.0),
    (0.79, 68, -16, 34, 32, 0.0),
    (0.86, 70, -22, 48, 44, 0.1),
    (1.00, 56, -34, 50, 40, 0.2),
])
SPLEEN = np.array([
    (0.79, 92, 40, 6, 8, 0.5),
    (0.84, 97, 38, 22, 34, 0.5),
    (0.93, 102, 34, 24, 42, 0.4),
    (1.00, 102, 30, 22, 40, 0.4),
])
STERNUM = np.array([
    (0.135, 0, -50, 6, 3, 0.0),
    (0.15, 0, -57, 25, 7, 0.0),
    (0.20, 0, -76, 27, 7, 0.0),
    (0.27, 0, -93, 18, 6, 0.0),
    (0.40, 0, -104, 19, 6, 0.0),
    (0.55, 0, -108, 20, 5.5, 0.0),
    (0.62, 0, -107, 9, 4.5, 0.0),
    (0.66, 0, -106, 4, 2, 0.0),
])
AXILLA = np.array([  # fat between the chest wall and the shoulder muscles, mirrored to both sides
    (0.03, 118, 10, 5, 10, 0.2),
    (0.10, 128, 2, 22, 30, 0.3),
    (0.20, 148, 0, 15, 32, 0.2),
    (0.30, 160, 0, 9, 28, 0.1),
    (0.42, 164, 0, 3, 14, 0.0),
])
SPINE_BODY_Y, SPINE_CANAL_Y = 58.0, 80.0
VERTEBRA_MM, DISC_SHARE = 27.0, 0.22

# Tubes through points (x, y, level, radius); every one is swept by spheres.
BLOOD_TUBES = (
    ((-4, -34, 0.47, 15), (-14, -32, 0.40, 16), (-14, -30, 0.33, 15), (-6, -18, 0.275, 13),
     (8, 4, 0.255, 13), (20, 26, 0.28, 13), (25, 40, 0.34, 12.5), (24, 43, 0.55, 12),
     (16, 38, 0.75, 11.5), (4, 34, 0.88, 11), (3, 34, 1.02, 10)),  # aorta
    ((14, 2, 0.27, 5.5), (22, -4, 0.15, 5), (34, -10, 0.08, 5), (70, -12, 0.03, 4.5)),
    ((4, -8, 0.27, 4.5), (14, -14, 0.15, 4), (22, -24, 0.0, 4)),
    ((-6, -16, 0.28, 6.5), (-16, -14, 0.16, 6), (-24, -22, 0.0, 4.5)),
    ((-18, -14, 0.15, 5), (-40, -14, 0.07, 5), (-72, -14, 0.03, 4.5)),
    ((-24, -24, 0.47, 10), (-26, -22, 0.30, 9), (-26, -26, 0.20, 8), (-34, -30, 0.08, 6.5),
     (-36, -36, 0.0, 6)),  # superior vena cava
    ((-26, -28, 0.21, 7), (0, -36, 0.18, 6), (26, -34, 0.12, 6), (36, -38, 0.0, 6)),
    ((10, -50, 0.47, 13), (16, -44, 0.40, 14), (20, -26, 0.375, 12)),  # pulmonary trunk
    ((18, -28, 0.39, 10.5), (-6, -14, 0.405, 10), (-30, -6, 0.415, 9.5), (-46, -2, 0.43, 8)),
    ((18, -26, 0.38, 10.5), (34, -4, 0.365, 10), (46, 8, 0.39, 9), (50, 16, 0.43, 7)),
    ((8, -8, 0.49, 13), (-10, -4, 0.50, 14), (-30, 0, 0.49, 7), (-48, 2, 0.48, 5)),  # left atrium
    ((10, -8, 0.49, 13), (30, 6, 0.485, 7), (48, 12, 0.47, 5)),
    ((-22, -6, 0.66, 10), (-22, -2, 0.76, 11), (-20, 6, 0.90, 10), (-18, 8, 1.02, 10)),  # vena cava
)
OESOPHAGUS = ((2, 0, 0.0, 5), (3, 16, 0.15, 5), (4, 32, 0.38, 5.5), (8, 30, 0.6, 6),
              (14, 20, 0.76, 6.5), (26, 6, 0.84, 7))
AIRWAY_TUBES = (
    ((0, -24, -0.02, 8.5), (0, -12, 0.10, 8.5), (-1, 4, 0.24, 8.5), (-1, 15, 0.365, 9)),
    ((-3, 15, 0.36, 8), (-18, 17, 0.395, 7), (-32, 18, 0.43, 6.5), (-36, 20, 0.50, 5)),
    ((-30, 18, 0.42, 5), (-44, 16, 0.41, 4.5), (-58, 14, 0.40, 3.5)),
    ((1, 15, 0.36, 7.5), (18, 19, 0.40, 6.5), (36, 22, 0.44, 6), (44, 28, 0.50, 4.5)),
    ((38, 20, 0.44, 4.5), (50, 10, 0.45, 4), (60, 0, 0.46, 3)),
)
CLAVICLE = ((22, -50, 0.145, 8), (50, -52, 0.10, 6), (95, -42, 0.045, 6), (150, -18, -0.01, 7))
HUMERUS = ((196, 18, -0.05, 25), (196, 18, 0.075, 24), (206, 10, 0.14, 14))
SCAPULA = ((150, 40, 0.05), (96, 88, 0.05), (144, 62, 0.38), (108, 94, 0.38))  # its corners
SCAPULA_SPINE = ((162, 28, 0.035, 9), (146, 62, 0.045, 5), (112, 98, 0.06, 4))
HILUM = {RIGHT_LUNG: (-46, 4, 0.435), LEFT_LUNG: (48, 12, 0.435)}

# fmt: on
RIBS, RIB_DISTANCE_MM, RIB_DROP_MM = 12, 25.0, 95.0
CARTILAGE_SHARE = 0.84  # the last part of a rib's way to the sternum is cartilage
BONE_STRETCH = 1.5  # ribs are higher than thick

# Hounsfield units of tissues; what is not named here is written where it is painted.
SKIN_HU, FAT_HU, MUSCLE_HU, BLOOD_HU, LIVER_HU, SPLEEN_HU = 20.0, -100.0, 55.0, 42.0, 58.0, 50.0
STOMACH_HU, OESOPHAGUS_HU, AIRWAY_WALL_HU, GAS_HU = 45.0, 32.0, 20.0, -975.0
GLASS_LOWEST_HU, GLASS_HIGHEST_HU = -700.0, -300.0
HOUNSFIELD_HIGHEST = 3071
COMPACT_BONE_HU, MARROW_HU, CARTILAGE_HU, DISC_HU, CORD_HU = 620.0, 180.0, 95.0, 95.0, 35.0

# ------------------------------------------------------------------------------ scanners, textures


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

# ------------------------------------------------------------------------------------- the records


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


@dataclass(frozen=True)
class PhantomRecord:
    """One planned scan, a row of ``scans.csv``; everything that `make_phantom` depends on.

    Attributes:
        scan_id: pseudonymous identity; says nothing about the label.
        patient_id: scans of one patient share the anatomy and the split.
        label: one of `LABELS`.
        split: for example ``"train"``.
        scanner: key of `SCANNERS`.
        slices: number of axial slices.
        confounder: whether the tube and wire lie on the chest.
        difficulty: 0 (large lesions, clean normal scans) to 1 (small lesions, dependent density).
        seed: the study's seed.
    """

    scan_id: str
    patient_id: str
    label: str
    split: str
    scanner: str
    slices: int
    confounder: bool
    difficulty: float
    seed: int


def plan_phantoms(
    *,
    scans_per_class: Mapping[str, int],
    seed: int,
    confounder_correlation: Mapping[str, float] | None = None,
    slices: tuple[int, int] = (16, 26),
    scanner_b_share: float = 0.4,
    second_scan_share: float = 0.15,
    difficulty: float = 0.5,
    extra_slices: Sequence[int] = (),
) -> list[PhantomRecord]:
    """Plan a balanced data set; nothing is drawn yet.

    Args:
        scans_per_class: scans of each label, by split, for example ``{"train": 24, "test": 10}``.
        seed: of the plan and of every scan in it.
        confounder_correlation: by split, in [-1, 1]: 1 puts the confounder on every COVID-19 scan
            and on no other, -1 the reverse, 0 (also for a split not named) on half of each class.
        slices: smallest and largest number of slices.
        scanner_b_share: share of scans from scanner B, equal in every class.
        second_scan_share: share of scans that are the second one of their patient.
        difficulty: see `PhantomRecord`.
        extra_slices: one extra scan per entry with exactly that many slices, for example
            ``(1, 700)``, in the first split, labels in turn.

    Returns:
        Records sorted by scan_id, which does not tell class or split.

    Raises:
        ValueError: if a count, share, correlation or slice range makes no sense.
    """
    correlation = dict(confounder_correlation or {})
    _check_plan(scans_per_class, correlation, slices, extra_slices)
    _check_shares(scanner_b_share, second_scan_share, difficulty)
    rng = np.random.default_rng(seed)
    rows = []
    for split, count in scans_per_class.items():
        for label in LABELS:
            positive = (1 + correlation.get(split, 0.0) * (1 if label == COVID else -1)) / 2
            confounder = _share_of(count, positive, rng)
            scanner_b = _share_of(count, scanner_b_share, rng)
            lengths = rng.integers(slices[0], slices[1], count, endpoint=True)
            patients = _group_patients(f"{split} {label}", count, second_scan_share)
            rows += [
                (patients[i], label, split, scanner_b[i], lengths[i], confounder[i])
                for i in range(count)
            ]
    for i, length in enumerate(extra_slices):
        split = next(iter(scans_per_class))
        rows.append((f"extra {i}", LABELS[i % len(LABELS)], split, i % 2, length, False))
    return _number_records(rows, seed, difficulty, rng)


def _check_plan(scans_per_class, correlation, slices, extra_slices) -> None:
    if not scans_per_class or min(scans_per_class.values()) < 0:
        raise ValueError(f"scans_per_class needs a count of scans per split, got {scans_per_class}")
    unknown = set(correlation) - set(scans_per_class)
    if unknown:
        raise ValueError(f"confounder_correlation names splits without scans: {sorted(unknown)}")
    if any(abs(value) > 1 for value in correlation.values()):
        raise ValueError(f"confounder_correlation lies in [-1, 1], got {correlation}")
    if not 1 <= slices[0] <= slices[1] or any(length < 1 for length in extra_slices):
        raise ValueError(f"a scan has at least one slice, got {slices} and {extra_slices}")


def _check_shares(*shares: float) -> None:
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"shares and difficulty lie in [0, 1], got {shares}")


def _share_of(count: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """``count`` booleans in random order of which exactly ``round(share * count)`` are true."""
    return rng.permutation(np.arange(count) < round(share * count))


def _group_patients(prefix: str, count: int, second_scan_share: float) -> list[str]:
    """Patient of each of ``count`` scans; the last ones are second scans of the first patients."""
    patients = max(1, count - round(second_scan_share * count), -(-count // 2))
    return [f"{prefix} {i % patients}" for i in range(count)]


def _number_records(rows, seed, difficulty, rng) -> list[PhantomRecord]:
    """Number scans and patients at random, so that no number tells the class."""
    order = rng.permutation(len(rows))
    names = list(dict.fromkeys(rows[i][0] for i in rng.permutation(len(rows))))
    patient_number = {name: i for i, name in enumerate(names)}
    return [
        PhantomRecord(
            scan_id=f"scan_{number:04d}",
            patient_id=f"patient_{patient_number[rows[i][0]]:04d}",
            label=rows[i][1],
            split=rows[i][2],
            scanner="B" if rows[i][3] else "A",
            slices=int(rows[i][4]),
            confounder=bool(rows[i][5]),
            difficulty=float(difficulty),
            seed=int(seed),
        )
        for number, i in enumerate(order)
    ]


def _generator(record: PhantomRecord, identity: str, purpose: str) -> np.random.Generator:
    """Random numbers for one purpose of one patient or scan, whatever else is drawn."""
    digest = hashlib.sha256(f"{record.seed}/{identity}/{purpose}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


# ------------------------------------------------------------------------------------- the patient


@dataclass(frozen=True)
class _Patient:
    """What varies between people; lengths in mm of the standard chest, levels in [0, 1]."""

    width: float  # scale of x
    depth: float  # scale of y
    height: float  # scale of z
    shear: float  # mm of x per mm of y
    harmonics: np.ndarray  # relative deviations of the outlines, (body | cavity, cos | sin, order)
    fat: float  # thickness under the skin
    breast: float
    heart: float  # scale
    apex: float  # level of the highest lung tissue
    base: float  # level of the lowest lung tissue
    dome_right: float  # level of the top of the diaphragm
    dome_left: float
    lung_hu: float
    gravity_hu: float  # difference between front and back
    dependent_hu: float  # density along the back wall, as in shallow breathing
    rib_phase: float
    gas: float  # depth of the gas bubble in the stomach


def _draw_patient(record: PhantomRecord) -> _Patient:
    rng = _generator(record, record.patient_id, "patient")
    breath = rng.normal(0, 0.02)  # the diaphragm and the density of the lungs move together
    dependent = rng.random() < 0.25 + 0.5 * record.difficulty
    size = rng.normal(0, 0.035)
    return _Patient(
        width=float(np.clip(0.98 + size + rng.normal(0, 0.03), 0.88, 1.06)),
        depth=float(np.clip(1.0 + size + rng.normal(0, 0.04), 0.88, 1.12)),
        height=rng.uniform(0.9, 1.1),
        shear=rng.normal(0, 0.02),
        harmonics=rng.normal(0, 0.008, (2, 2, 4)),
        fat=rng.uniform(6, 22),
        breast=max(0.0, rng.uniform(-25, 24)),
        heart=rng.uniform(0.9, 1.08),
        apex=rng.uniform(0.085, 0.11),
        base=rng.uniform(0.915, 0.935),
        dome_right=0.69 + breath + rng.normal(0, 0.015),
        dome_left=0.73 + breath + rng.normal(0, 0.015),
        lung_hu=float(np.clip(-872 - 900 * breath + rng.normal(0, 16), -905, -790)),
        gravity_hu=rng.uniform(20, 60),
        dependent_hu=rng.uniform(80, 240) if dependent else rng.uniform(0, 40),
        rib_phase=rng.uniform(0, 1),
        gas=rng.uniform(-0.2, 0.7),
    )


# ----------------------------------------------------------------------------------- grids, shapes


class _Grid:
    """Pixels of one slice plane and where they lie in the standard chest.

    Args:
        size: pixels per side.
        spacing: mm per pixel.
        patient_from_chest: matrix (2, 2) from the standard chest to mm in the picture.
        centre: (x, y) of the chest's centre in the picture, mm from the picture's centre.
    """

    def __init__(self, size, spacing, patient_from_chest, centre) -> None:
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

    def pixels(self, x, y) -> tuple[np.ndarray, np.ndarray]:
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


ANGLES = 720  # outlines hold one radius per half degree
_ANGLE = np.arange(ANGLES) * (2 * np.pi / ANGLES)
_OUTLINE_AT = PchipInterpolator(LEVELS, OUTLINES, axis=1)


def _bump(centre: float, width: float) -> np.ndarray:
    """Smooth bump of height 1 over the angles, in radians."""
    difference = np.angle(np.exp(1j * (_ANGLE - centre)))
    return np.exp(-((difference / width) ** 2))


_BREASTS = _bump(-np.pi / 2 - 0.75, 0.42) + _bump(-np.pi / 2 + 0.75, 0.42)
_BACK_GROOVE = _bump(np.pi / 2, 0.13)
_BACK = _bump(np.pi / 2, 0.6)
_FLANKS = _bump(0, 0.6) + _bump(np.pi, 0.6)


def _superellipse(half_width, front, back, harmonics, exponent) -> np.ndarray:
    """Radius by angle (0 towards the patient's left, a quarter turn towards the back), mm.

    Args:
        half_width: (n, 1) mm, as ``front`` and ``back``.
        front: towards the sternum.
        back: towards the spine.
        harmonics: (cos | sin, order) relative deviations from the second order on.
        exponent: 2 for an ellipse, more for a box.
    """
    depth = np.where(np.sin(_ANGLE) > 0, back, front)
    power = np.abs(np.cos(_ANGLE) / half_width) ** exponent
    power += np.abs(np.sin(_ANGLE) / depth) ** exponent
    order = np.arange(2, 2 + harmonics.shape[1])[:, None] * _ANGLE
    deviation = harmonics[0] @ np.cos(order) + harmonics[1] @ np.sin(order)
    return power ** (-1 / exponent) * (1 + deviation)


class _Outlines:
    """Radius by angle of skin, muscles under the fat and chest cavity at every level, mm."""

    def __init__(self, patient: _Patient, levels: int = 111) -> None:
        level = np.linspace(0, 1, levels)[:, None]
        values = _OUTLINE_AT(level[:, 0])[..., None]
        cavity = _superellipse(*values[3:], patient.harmonics[1], 2.4)
        skin = _superellipse(*values[:3], patient.harmonics[0], 2.4)
        skin += patient.fat - 14.0 - 7.0 * _BACK_GROOVE
        # Below the shoulders muscles are a layer on the ribs, thick beside the spine only.
        thickest = 17.0 + 20.0 * _BACK + 240.0 * np.clip(0.36 - level, 0.0, None)
        muscle = np.minimum(skin - patient.fat * (0.8 + 0.25 * _FLANKS), cavity + thickest)
        muscle = np.maximum(muscle, cavity + 9.0)
        skin += patient.breast * np.exp(-(((level - 0.47) / 0.13) ** 2)) * _BREASTS
        self.table = np.stack([skin, muscle, cavity]).astype(np.float32)

    def at(self, level: float) -> np.ndarray:
        """Shape (3, angles): skin, muscle, cavity at one level."""
        place = min(max(level, 0.0), 1.0) * (self.table.shape[1] - 1)
        low = min(int(place), self.table.shape[1] - 2)
        share = place - low
        return self.table[:, low] * (1 - share) + self.table[:, low + 1] * share

    def radius(self, outline: int, level: np.ndarray, angle: np.ndarray) -> np.ndarray:
        """Radius of one outline (0 skin, 1 muscle, 2 cavity) at levels and angles (radians)."""
        row = np.rint(np.clip(level, 0, 1) * (self.table.shape[1] - 1)).astype(int)
        column = np.rint(angle * (ANGLES / (2 * np.pi))).astype(int) % ANGLES
        return self.table[outline, row, column]


def _ellipse(x, y, centre, radii, tilt=0.0) -> np.ndarray:
    """Signed distance to an ellipse in mm, exact on its edge, inside negative."""
    dx, dy = x - float(centre[0]), y - float(centre[1])
    cosine, sine = math.cos(tilt), math.sin(tilt)
    a, b = float(radii[0]), float(radii[1])
    u, v = (cosine / a) * dx + (sine / a) * dy, (cosine / b) * dy - (sine / b) * dx
    return (np.sqrt(u * u + v * v) - 1.0) * min(a, b)


def _row_at(rows: np.ndarray, level: float) -> np.ndarray | None:
    """A table of levels interpolated at one level; None outside of it."""
    if not rows[0, 0] <= level <= rows[-1, 0]:
        return None
    return np.array([np.interp(level, rows[:, 0], column) for column in rows.T[1:]])


def _dome(patient: _Patient, side: int, level: float):
    """Centre and radii of the diaphragm's dome at one level, mm; None above it."""
    top = patient.dome_right if side == RIGHT_LUNG else patient.dome_left
    height = (level - top) / (DIAPHRAGM_END - top)
    if height <= 0.003:
        return None
    growth = math.sqrt(1 - (1 - min(height, 1.0)) ** 2) + 0.5 * max(0.0, height - 1)
    centre = (-66.0, -26.0) if side == RIGHT_LUNG else (68.0, -24.0)
    return centre, (79.0 * growth, 92.0 * growth)


def _lung_distance(patient: _Patient, x, y, cavity_distance, level: float) -> np.ndarray:
    """Signed distance in mm to the lungs before organs and large vessels are cut out of them."""
    distance = np.maximum(cavity_distance, 2.5 - np.abs(x))
    distance = np.maximum(distance, -_mediastinum_distance(patient, x, y, level))
    behind = _row_at(BEHIND_HEART, level)
    distance = np.maximum(distance, -_ellipse(x, y, behind[:2], behind[2:4]))
    distance = np.maximum(distance, -_ellipse(x, y, (0.0, SPINE_CANAL_Y), (32.0, 37.0)))
    for side in (RIGHT_LUNG, LEFT_LUNG):
        dome = _dome(patient, side, level)
        if dome:
            distance = np.maximum(distance, -_ellipse(x, y, *dome))
    closing = max(0.0, level - patient.base + 0.05) * 700.0  # the recesses taper off
    return np.maximum(distance, _apex_distance(patient, x, y, level)) + closing


def _mediastinum_distance(patient: _Patient, x, y, level: float) -> np.ndarray:
    """Signed distance in mm to the fat around heart and vessels, narrower towards the sternum."""
    row = _row_at(MEDIASTINUM, level)
    swelling = np.clip(1 - abs(level - 0.62) / 0.25, 0, 1)  # a large heart widens it
    width = row[2] * (1 + (patient.heart - 1) * swelling)
    taper = np.interp(level, (0.1, 0.3, 0.5, 0.6), (0.0, 0.45, 0.3, 0.0))
    narrowed = (x - float(row[0])) * (1 - float(taper / row[3]) * (y - float(row[1])))
    return _ellipse(narrowed, y, (0.0, row[1]), (width, row[3]), row[4])


def _apex_distance(patient: _Patient, x, y, level: float) -> np.ndarray | float:
    """Signed distance in mm to the rounded tops of the lungs; minus infinity below them."""
    depth = (level - patient.apex) / (0.25 - patient.apex)
    if depth >= 1:
        return -np.inf
    if depth <= 0:
        return np.inf
    growth = math.sqrt(1 - (1 - depth) ** 2)
    return _ellipse(np.abs(x), y, (46.0 + 6 * growth, 26.0), (88.0 * growth, 92.0 * growth))


# ------------------------------------------------------------------------------------------- tubes


@dataclass(frozen=True)
class _Tubes:
    """Spheres along tubes, sorted by z; positions and radii in mm of the standard chest."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    radius: np.ndarray
    stretch: float = 1.0  # height of a sphere over its width

    @classmethod
    def of(cls, points: np.ndarray, stretch: float = 1.0) -> "_Tubes":
        """Tubes from rows of (x, y, z, radius)."""
        points = points[np.argsort(points[:, 2], kind="stable")]
        return cls(*points.T, stretch)

    def at(self, z: float, thickness: float):
        """Centres and radii (x, y, radius) of the cuts through the spheres near height z, mm."""
        reach = self.radius.max(initial=0.0) * self.stretch + thickness / 2
        part = slice(*np.searchsorted(self.z, (z - reach, z + reach)))
        away = np.maximum(np.abs(self.z[part] - z) - thickness / 2, 0.0) / self.stretch
        square = self.radius[part] ** 2 - away**2
        keep = square > 0
        return self.x[part][keep], self.y[part][keep], np.sqrt(square[keep])


def _sample_tube(points, step: float = 0.35) -> np.ndarray:
    """Spheres (x, y, z, radius) along a line through (x, y, level, radius) points."""
    corners = np.asarray(points, dtype=float) * (1, 1, CHEST_HEIGHT_MM, 1)
    lengths = np.linalg.norm(np.diff(corners[:, :3], axis=0), axis=1)
    way = np.concatenate([[0], np.cumsum(lengths)])
    count = int(way[-1] / max(step * corners[:, 3].min(), 0.4)) + 2
    curve = PchipInterpolator(way, corners, axis=0)
    return curve(np.linspace(0, way[-1], count))


def _mirror(points: np.ndarray) -> np.ndarray:
    """Points of one side of the body and their mirror images."""
    return np.concatenate([points, points * ((-1,) + (1,) * (points.shape[1] - 1))])


def _grow(tubes: _Tubes, by: float) -> _Tubes:
    """The same tubes with another radius, for walls (by > 0) and marrow (by < 0)."""
    return replace(tubes, radius=np.maximum(tubes.radius + by, 0.0))


def _cut_tubes(grid: _Grid, cut) -> np.ndarray:
    """Share of each pixel covered by discs (x, y, radius), float32 picture."""
    columns, rows = grid.pixels(cut[0], cut[1])
    radii = cut[2] * grid.pixels_per_mm
    picture = np.zeros((grid.size, grid.size), np.float32)
    reach = np.ceil(radii + 0.5).astype(int)
    limits = (0, 1, 2, 4, 8, 16, 64)
    for low, high in itertools.pairwise(limits):
        group = (reach > low) & (reach <= high)
        if group.any():
            _paint_discs(picture, columns[group], rows[group], radii[group], high)
    return picture


def _paint_discs(picture, columns, rows, radii, reach: int) -> None:
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


def _bones(patient: _Patient, outlines: _Outlines) -> tuple[_Tubes, _Tubes]:
    """Bones and rib cartilage as tubes; vertebrae and sternum are ellipses."""
    bone, cartilage = [], []
    for number in range(RIBS):
        rib, soft = _rib(patient, outlines, number)
        bone.append(rib)
        cartilage.append(soft)
    arm = [_sample_tube(points) for points in (CLAVICLE, HUMERUS, SCAPULA_SPINE)]
    bone.append(_mirror(np.concatenate([*arm, _blade()])))
    return _Tubes.of(np.concatenate(bone), BONE_STRETCH), _Tubes.of(np.concatenate(cartilage), 1.2)


def _rib(patient: _Patient, outlines: _Outlines, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Spheres of one pair of ribs: bone, and the cartilage at its end."""
    count = 360
    way = np.linspace(0, 1, count)  # from the spine to the sternum
    angle = np.pi / 2 - 0.27 - way * (np.pi - 0.45)
    slope = RIB_DROP_MM * (0.5 + 0.5 * min(1.0, number / 5))
    start = (number + patient.rib_phase) * RIB_DISTANCE_MM + 2
    z = start + slope * (1.25 * way - 0.25 * way**2)
    radius = outlines.radius(2, z / CHEST_HEIGHT_MM, angle) + 6.5
    thickness = 3.6 + 0.9 * np.sin(np.pi * way)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle), z, thickness], axis=1)
    end = CARTILAGE_SHARE if number < 7 else CARTILAGE_SHARE - 0.1 * (number - 6)
    last = 1.0 if number < 7 else end  # floating ribs end in muscle
    return _mirror(points[way <= end]), _mirror(points[(way > end) & (way <= last)])


def _blade() -> np.ndarray:
    """Spheres over the shoulder blade, a sheet between four corners."""
    u, v = np.mgrid[0:1:50j, 0:1:90j].reshape(2, -1, 1)
    corners = np.array(SCAPULA) * (1, 1, CHEST_HEIGHT_MM)
    top, bottom = (corners[i] * (1 - u) + corners[i + 1] * u for i in (0, 2))
    sheet = top * (1 - v) + bottom * v
    sheet[:, 1] += 6 * np.sin(np.pi * u[:, 0])  # it bends around the ribs
    return np.concatenate([sheet, np.full_like(u, 2.6) + 1.6 * (u < 0.15)], axis=1)


# -------------------------------------------------------------------------------- inside the lungs


@dataclass(frozen=True)
class _Coarse:
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


def _coarse_lungs(patient: _Patient, outlines: _Outlines) -> _Coarse:
    size, slices = 48, 44
    grid = _Grid(size, 2.1 * CHEST_REACH_MM / size, np.eye(2), (0.0, 0.0))
    levels = (np.arange(slices) + 0.5) / slices
    lungs, wall = np.empty((slices, size, size), bool), np.empty((slices, size, size))
    for k, level in enumerate(levels):
        wall[k] = grid.radius - outlines.at(level)[2][grid.angle]
        lungs[k] = _lung_distance(patient, grid.x, grid.y, wall[k], level) < 0
    spacing = (CHEST_HEIGHT_MM / slices, grid.spacing, grid.spacing)
    k, row, column = np.nonzero(lungs)
    points = np.stack([grid.x[row, column], grid.y[row, column], levels[k] * CHEST_HEIGHT_MM], 1)
    return _Coarse(
        points=points.astype(float),
        side=np.where(points[:, 0] < 0, RIGHT_LUNG, LEFT_LUNG),
        depth=distance_transform_edt(lungs, spacing)[lungs],
        wall=-wall[lungs],
    )


VESSEL_TIPS = 1100  # per lung
VESSEL_TIP_RADIUS_MM = 0.4
VESSEL_EXPONENT = 2.5  # radius ** exponent adds up at branchings (Murray's law says 3)
AIRWAY_LEAST_TIPS = 6  # thinner branches carry no visible airway


def _branches(lungs: _Coarse, side: int, rng: np.random.Generator):
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


def _lung_tubes(lungs: _Coarse, rng: np.random.Generator) -> tuple[_Tubes, _Tubes]:
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
    return _Tubes.of(np.concatenate(vessels)), _Tubes.of(np.concatenate(airways))


def _sample_branches(starts, ends, bend, radius, step: float = 0.7) -> np.ndarray:
    """Spheres (x, y, z, radius) along slightly bent branches."""
    counts = np.ceil(np.linalg.norm(ends - starts, axis=1) / step).astype(int) + 1
    branch = np.repeat(np.arange(len(counts)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    t = ((np.arange(len(branch)) - first) / (counts[branch] - 1).clip(1))[:, None]
    points = starts[branch] * (1 - t) + ends[branch] * t + bend[branch] * np.sin(np.pi * t)
    return np.concatenate([points, radius[branch, None]], axis=1)


def _fissure_distance(x, y, level) -> np.ndarray:
    """Distance in mm to the oblique fissure; positive in the lower lobe (behind and below it)."""
    return (y - 48.0 + 210.0 * (level - 0.22) - 0.0012 * (np.abs(x) - 70.0) ** 2) * 0.85


# ----------------------------------------------------------------------------------------- lesions


@dataclass(frozen=True)
class _Lesion:
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


def _lesion_score(lesion: _Lesion, x, y, z: float | np.ndarray) -> np.ndarray:
    """1 in the middle of a lesion, 0 on its smooth edge, negative outside; cut at the lobe."""
    (cx, cy, cz), (rx, ry, rz) = lesion.centre, lesion.radii
    u, v, w = (x - cx) / rx, (y - cy) / ry, (z - cz) / rz
    score = 1 - np.sqrt(u * u + v * v + w * w)
    if lesion.lobe:
        fissure = lesion.lobe * _fissure_distance(x, y, z / CHEST_HEIGHT_MM)
        score = np.minimum(score, fissure / 4.0)
    return np.where((x < 0) == (lesion.side == RIGHT_LUNG), score, -1.0)


def _draw_lesions(record: PhantomRecord, lungs: _Coarse) -> tuple[_Lesion, ...]:
    """Lesions of one scan by its label, until they fill a random share of the lungs."""
    if record.label == NORMAL:
        return ()
    rng = _generator(record, record.scan_id, "lesions")
    hard = record.difficulty
    if record.label == COVID:
        low, high = np.interp(hard, (0, 1), (0.08, 0.006)), np.interp(hard, (0, 1), (0.4, 0.12))
        return _covid_lesions(lungs, rng, np.exp(rng.uniform(np.log(low), np.log(high))))
    low, high = np.interp(hard, (0, 1), (0.6, 0.15)), np.interp(hard, (0, 1), (0.95, 0.6))
    return _pneumonia_lesions(lungs, rng, rng.uniform(low, high))


def _covid_lesions(lungs: _Coarse, rng, load: float) -> tuple[_Lesion, ...]:
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
        lesion = _Lesion(tuple(centre.tolist()), tuple(radii.tolist()), core, 0, side)
        filled |= _lesion_score(lesion, *lungs.points.T) > 0
        lesions.append(lesion)
        side = LEFT_LUNG if side == RIGHT_LUNG else RIGHT_LUNG
    return tuple(lesions)


def _pneumonia_lesions(lungs: _Coarse, rng, size: float) -> tuple[_Lesion, ...]:
    """One consolidated part of one lobe of one lung, with smaller ground glass around it.

    Args:
        lungs: where the lungs are.
        rng: of the scan.
        size: 0 to 1, from a segment to a whole lobe.
    """
    side, lobe = int(rng.integers(1, 3)), 1 if rng.random() < 0.65 else -1
    fissure = lobe * _fissure_distance(
        lungs.points[:, 0], lungs.points[:, 1], lungs.points[:, 2] / CHEST_HEIGHT_MM
    )
    inside = (lungs.side == side) & (fissure > 6)
    weight = np.where(inside, np.minimum(lungs.depth, 25.0), 0) + 1e-9 * inside
    centre = lungs.points[rng.choice(len(weight), p=weight / weight.sum())]
    radii = (24 + 44 * size) * rng.uniform(0.85, 1.2, 3)
    main = _Lesion(
        tuple(centre.tolist()), tuple(radii.tolist()), rng.uniform(0.7, 0.85), lobe, side
    )
    lesions = [main]
    for _ in range(int(rng.integers(1, 4))):
        near = np.where(inside, np.exp(-np.linalg.norm(lungs.points - centre, axis=1) / 40.0), 0)
        place = lungs.points[rng.choice(len(near), p=near / near.sum())].tolist()
        radii = rng.uniform(9, 20, 3).tolist()
        lesions.append(_Lesion(tuple(place), tuple(radii), rng.uniform(0, 0.5), lobe, side))
    return tuple(lesions)


# ---------------------------------------------------------------------------------------- textures


class _Texture:
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

    def __init__(self, rng, grid: _Grid, length_mm, step_mm: float, fields: int = 4) -> None:
        self.step = step_mm
        sigma = tuple(max(length * grid.pixels_per_mm, 0.3) for length in length_mm)
        self.fields = _filtered_noise(rng, fields, grid.size, sigma)
        self.shifts = rng.integers(0, grid.size, (int(CHEST_HEIGHT_MM / step_mm) + 3, 2))

    def at(self, z: float) -> np.ndarray:
        """The field at height z in mm."""
        knot = int(z / self.step)
        turn = (z / self.step - knot) * (math.pi / 2)
        return math.cos(turn) * self._knot(knot) + math.sin(turn) * self._knot(knot + 1)

    def _knot(self, knot: int) -> np.ndarray:
        return np.roll(self.fields[knot % len(self.fields)], self.shifts[knot], (0, 1))


def _filtered_noise(rng, count: int, size: int, sigma: tuple[float, float]) -> np.ndarray:
    """Periodic noise with a correlation length in pixels, standard deviation 1, float32."""
    white = rng.standard_normal((count, size, size), dtype=np.float32)
    fields = gaussian_filter(white, (0, *sigma), mode="wrap", truncate=3.0)
    return fields / fields.std(axis=(1, 2), keepdims=True)


# --------------------------------------------------------------------------------------- the scene


@dataclass(frozen=True)
class _Scene:
    """Everything that the slices of one scan share."""

    record: PhantomRecord
    scanner: Scanner
    patient: _Patient
    outlines: _Outlines
    grid: _Grid
    spacing: tuple[float, float, float]
    background: np.ndarray
    padding: np.ndarray | None
    tubes: dict[str, _Tubes]
    lesions: tuple[_Lesion, ...]
    crazy_paving: float
    textures: dict[str, _Texture]
    noise: np.ndarray
    streaks: np.ndarray
    noise_weight: np.ndarray


def _set_scene(record: PhantomRecord, size: int) -> _Scene:
    scanner = SCANNERS[record.scanner]
    patient = _draw_patient(record)
    rng = _generator(record, record.scan_id, "scan")
    field_of_view = rng.uniform(*scanner.field_of_view_mm)
    grid = _place(patient, rng, size, field_of_view)
    outlines = _Outlines(patient)
    lungs = _coarse_lungs(patient, outlines)
    vessels, airways = _lung_tubes(lungs, _generator(record, record.patient_id, "vessels"))
    texture = _generator(record, record.scan_id, "texture")
    distance = np.hypot(*np.meshgrid(*[np.linspace(-1, 1, size, dtype=np.float32)] * 2))
    return _Scene(
        record=record,
        scanner=scanner,
        patient=patient,
        outlines=outlines,
        grid=grid,
        spacing=(CHEST_HEIGHT_MM * patient.height / record.slices, grid.spacing, grid.spacing),
        background=_draw_table(scanner, grid, patient, rng),
        padding=distance > 1 if scanner.padding is not None and rng.random() < 0.6 else None,
        tubes=_all_tubes(patient, outlines, vessels, airways) | _lay_confounder(record, outlines),
        lesions=_draw_lesions(record, lungs),
        crazy_paving=float(rng.uniform(80, 200) * (rng.random() < 0.4)),
        textures={
            "broad": _Texture(texture, grid, (9.0, 22.0), 30.0),
            "coarse": _Texture(texture, grid, (7.0, 7.0), 14.0),
            "middle": _Texture(texture, grid, (2.8, 2.8), 7.0),
            "fine": _Texture(texture, grid, (1.4, 1.4), 3.0),
        },
        noise=_filtered_noise(texture, NOISE_FIELDS, size, (scanner.grain_mm / grid.spacing,) * 2),
        streaks=_filtered_noise(texture, 2, size, (0.6, size / 12)),
        noise_weight=(1.15 - 0.35 * distance).astype(np.float32),
    )


def _place(patient: _Patient, rng, size: int, field_of_view: float) -> _Grid:
    """How this scan sees the patient: size, aspect, shear, a turn and a shift."""
    turn = np.deg2rad(rng.normal(0, 2.0))
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    shape = np.array([[patient.width, patient.shear], [0.0, patient.depth]])
    centre = (rng.normal(0, 5.0), rng.normal(-6.0, 5.0))
    return _Grid(size, field_of_view / size, rotation @ shape, centre)


def _all_tubes(patient, outlines, vessels, airways) -> dict[str, _Tubes]:
    bones, cartilage = _bones(patient, outlines)
    trunk = np.concatenate([_sample_tube(points) for points in AIRWAY_TUBES])
    return {
        "blood": _Tubes.of(np.concatenate([_sample_tube(points) for points in BLOOD_TUBES])),
        "oesophagus": _Tubes.of(_sample_tube(OESOPHAGUS)),
        "trachea": _Tubes.of(trunk),
        "bones": bones,
        "cartilage": cartilage,
        "vessels": vessels,
        "airways": airways,
    }


def _lay_confounder(record: PhantomRecord, outlines: _Outlines) -> dict[str, _Tubes]:
    """An oxygen tube, a wire and electrode clips on the front of the chest, outside the skin."""
    if not record.confounder:
        return {}
    rng = _generator(record, record.scan_id, "confounder")
    z = np.arange(-2, CHEST_HEIGHT_MM + 2, 1.5)
    side = rng.choice((-1, 1))
    middle = rng.uniform(0.3, 0.75) + 0.06 * np.sin(z / rng.uniform(35, 60))
    tube = _on_skin(outlines, side * middle, z, gap=6.0, radius=4.6)
    wire = _on_skin(outlines, side * (middle - 0.25), z, gap=3.5, radius=1.3)
    clips = wire[rng.choice(len(wire), 3, replace=False)] * (1, 1, 1, 3.0)
    return {"tube": _Tubes.of(tube), "wire": _Tubes.of(np.concatenate([wire, clips]))}


def _on_skin(outlines: _Outlines, angle, z, gap: float, radius: float) -> np.ndarray:
    """Spheres on the chest, at an angle in radians from the midline in front, mm."""
    turn = -np.pi / 2 + angle
    away = outlines.radius(0, z / CHEST_HEIGHT_MM, turn) + gap
    return np.stack([away * np.cos(turn), away * np.sin(turn), z, np.full_like(z, radius)], axis=1)


def _draw_table(scanner: Scanner, grid: _Grid, patient: _Patient, rng) -> np.ndarray:
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


# -------------------------------------------------------------------------------------- the slices


class _Slice:
    """One slice while it is painted, back to front.

    Attributes:
        picture: HU, float32.
        block: share of each pixel where organs or large vessels leave no room for lung.
        texture: the scene's textures at this height.
        cavity: signed distance to the chest cavity, mm.
    """

    def __init__(self, scene: _Scene, index: int) -> None:
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

    def blend(self, value, cover: np.ndarray, part=...) -> None:
        """Put a material into (a part of) the picture, by its share of each pixel."""
        picture = self.picture[part]
        picture += cover * (value - picture)

    def ellipse(self, value, row, *, blocks: bool = False) -> None:
        """Paint an ellipse (x, y, x radius, y radius, tilt); None paints nothing."""
        if row is None:
            return
        part = self.grid.window(row[0], row[1], max(row[2], row[3]))
        x, y = self.grid.x[part], self.grid.y[part]
        cover = self.grid.edge(_ellipse(x, y, row[:2], row[2:4], row[4]))
        self.blend(value, cover, part)
        if blocks:
            np.maximum(self.block[part], cover, out=self.block[part])

    def tubes(self, name: str, *, wider: float = 0.0) -> np.ndarray:
        """Share of each pixel covered by tubes of the scene, ``wider`` mm thicker."""
        cut = _grow(self.scene.tubes[name], wider).at(self.z, self.scene.scanner.thickness_mm)
        return _cut_tubes(self.grid, cut)


def _paint_body(canvas: _Slice) -> None:
    """Skin, fat, muscles and the walls of the chest."""
    grid, texture = canvas.grid, canvas.texture
    canvas.blend(SKIN_HU, grid.edge(canvas.skin))
    canvas.blend(FAT_HU + 12 * texture["middle"], grid.edge(canvas.skin + 2.2))
    # Muscles are parted by planes of fat: the lines where a smooth random field crosses zero.
    share = np.clip((np.abs(texture["broad"]) - 0.1) * 6.0 + 0.2 * texture["middle"], 0.0, 1.0)
    row = _row_at(AXILLA, canvas.level)
    if row is not None:
        rough = 4.0 * texture["coarse"]
        hole = _ellipse(np.abs(grid.x), grid.y, row[:2], row[2:4], row[4])
        share *= 1 - grid.edge(hole + rough)
    np.maximum(share, grid.edge(np.abs(canvas.cavity - 3.0) - 5.0), out=share)
    canvas.blend(MUSCLE_HU, share * grid.edge(canvas.muscle))
    middle = _mediastinum_distance(canvas.scene.patient, grid.x, grid.y, canvas.level)
    canvas.blend(FAT_HU + 6, grid.edge(middle))
    canvas.ellipse(FAT_HU + 6, _row_at(BEHIND_HEART, canvas.level))


def _paint_abdomen(canvas: _Slice) -> None:
    """Liver, stomach with its gas, and spleen under the domes of the diaphragm."""
    grid, patient, level = canvas.grid, canvas.scene.patient, canvas.level
    for side, value in ((RIGHT_LUNG, LIVER_HU), (LEFT_LUNG, FAT_HU)):
        dome = _dome(patient, side, level)
        if dome:
            shape = np.maximum(_ellipse(grid.x, grid.y, *dome), canvas.cavity + 1.0)
            canvas.blend(MUSCLE_HU, grid.edge(shape))  # the diaphragm itself
            canvas.blend(value, grid.edge(shape + 2.5))
    below = min(level - patient.dome_left + 0.75, 1.0)  # the organs move with the diaphragm
    if below < 0.77:
        return
    canvas.ellipse(LIVER_HU, _row_at(LIVER_LEFT_LOBE, below), blocks=True)
    canvas.ellipse(SPLEEN_HU, _row_at(SPLEEN, below))
    stomach = _row_at(STOMACH, below)
    if stomach is not None:
        canvas.ellipse(STOMACH_HU, stomach)
        _paint_gas(canvas, stomach)


def _paint_gas(canvas: _Slice, stomach: np.ndarray) -> None:
    """Gas rises to the front of a patient lying on the back; food and fluid end in a flat line."""
    grid = canvas.grid
    part = grid.window(stomach[0], stomach[1], max(stomach[2], stomach[3]))
    x, y = grid.x[part], grid.y[part]
    surface = float(stomach[1] - canvas.scene.patient.gas * stomach[3])
    wall = _ellipse(x, y, stomach[:2], stomach[2:4] - 4.0, stomach[4])
    wall = wall + 2.0 * canvas.texture["coarse"][part]
    canvas.blend(GAS_HU, grid.edge(np.maximum(wall, y - surface)), part)


def _paint_mediastinum(canvas: _Slice) -> None:
    """Heart, large vessels, oesophagus, trachea and main bronchi."""
    for rows, value in ((HEART, BLOOD_HU), (GROOVE_FAT, FAT_HU)):
        row = _row_at(rows, canvas.level)
        if row is not None:
            row[2:4] *= canvas.scene.patient.heart
            canvas.ellipse(value, row, blocks=True)
    for name, value in (("blood", BLOOD_HU), ("oesophagus", OESOPHAGUS_HU)):
        cover = canvas.tubes(name)
        canvas.blend(value, cover)
        np.maximum(canvas.block, cover, out=canvas.block)
    wall = canvas.tubes("trachea", wider=1.6)
    canvas.blend(AIRWAY_WALL_HU, wall)
    canvas.blend(GAS_HU, canvas.tubes("trachea"))
    np.maximum(canvas.block, wall, out=canvas.block)


def _paint_bones(canvas: _Slice) -> None:
    """Ribs, shoulders, sternum and spine: a dense shell around marrow."""
    marrow = MARROW_HU + 55 * canvas.texture["middle"]
    canvas.blend(CARTILAGE_HU, canvas.tubes("cartilage"))
    bones = canvas.tubes("bones")
    np.maximum(canvas.block, bones, out=canvas.block)
    canvas.blend(COMPACT_BONE_HU, bones)
    canvas.blend(marrow, canvas.tubes("bones", wider=-1.7))
    sternum = _row_at(STERNUM, canvas.level)
    if sternum is not None:
        _paint_shell(canvas, sternum, marrow)
    _paint_spine(canvas, marrow)


def _paint_shell(canvas: _Slice, row, marrow, shell: float = 1.4) -> None:
    """One bone with an elliptic cut."""
    row = np.asarray(row, float)
    canvas.ellipse(COMPACT_BONE_HU, row)
    part = canvas.grid.window(row[0], row[1], max(row[2], row[3]))
    inner = np.maximum(row[2:4] - shell, 0.5)
    x, y = canvas.grid.x[part], canvas.grid.y[part]
    canvas.blend(marrow[part], canvas.grid.edge(_ellipse(x, y, row[:2], inner, row[4])), part)


def _paint_spine(canvas: _Slice, marrow) -> None:
    """Vertebral body or disc, arch with transverse and spinous process, canal with the cord."""
    phase = (canvas.z / VERTEBRA_MM + canvas.scene.patient.rib_phase) % 1.0
    arch = math.sin(math.pi * phase)  # the arch is strongest in the middle of a vertebra
    body, canal = (0.0, SPINE_BODY_Y, 18.0, 15.0, 0.0), SPINE_CANAL_Y
    for sign in (-1, 1):
        if arch > 0.35:
            _paint_shell(canvas, (sign * 24.0, canal + 5, 17.0, 4.2, sign * 0.4), marrow)
        _paint_shell(canvas, (sign * 9.0, canal + 12, 10.0, 3.4, sign * -0.6), marrow)
    _paint_shell(canvas, (0.0, canal + 22, 3.2, 5.0 + 7.0 * arch, 0.0), marrow)
    canvas.ellipse(500.0 * math.sqrt(arch), (0.0, canal, 12.0, 10.5, 0.0))
    if phase < DISC_SHARE:
        canvas.ellipse(DISC_HU, body)
    else:
        _paint_shell(canvas, body, marrow)
    canvas.ellipse(FAT_HU + 80, (0.0, canal, 9.0, 8.0, 0.0))
    canvas.ellipse(CORD_HU, (0.0, canal, 6.0, 5.0, 0.0))


def _paint_confounder(canvas: _Slice) -> None:
    """The tube (a ring), the wire and the clips, where the record asks for them."""
    if canvas.scene.record.confounder:
        canvas.blend(180.0, canvas.tubes("tube"))
        canvas.blend(float(HOUNSFIELD_AIR), canvas.tubes("tube", wider=-1.9))
        canvas.blend(1600.0, canvas.tubes("wire"))


def _paint_lungs(canvas: _Slice) -> tuple[np.ndarray, np.ndarray]:
    """Parenchyma, lesions, vessels and airways.

    Returns:
        The lung mask and the lesion mask of the slice, uint8.
    """
    grid, patient = canvas.grid, canvas.scene.patient
    lungs, lesions = (np.zeros(canvas.picture.shape, np.uint8) for _ in range(2))
    part = grid.window(0.0, 0.0, CHEST_REACH_MM)
    x, y, wall = grid.x[part], grid.y[part], canvas.cavity[part]
    distance = _lung_distance(patient, x, y, wall, canvas.level)
    cover = grid.edge(distance) * (1 - canvas.block[part])
    inside = cover > 0.5
    if not inside.any():
        return lungs, lesions
    texture = {name: field[part] for name, field in canvas.texture.items()}
    density = _parenchyma(patient, x, y, wall, canvas.level, texture)
    lesions[part] = _paint_lesions(canvas, density, part, texture) * inside
    lungs[part] = np.where(x < 0, RIGHT_LUNG, LEFT_LUNG) * inside
    _paint_lung_tubes(canvas, density, part)
    canvas.blend(density, cover, part)
    return lungs, lesions


def _parenchyma(patient: _Patient, x, y, wall, level: float, texture) -> np.ndarray:
    """Density of healthy lung tissue: gravity, perfusion, dependent density, fissure, HU."""
    density = patient.lung_hu + (patient.gravity_hu / 160.0) * y
    density += 12 * texture["coarse"] + 14 * texture["middle"] + 18 * texture["fine"]
    behind = np.clip((y - 15.0) / 60.0, 0.0, 1.0)
    density += patient.dependent_hu * behind * np.exp(np.minimum(wall, 0.0) / 7.0)
    fissure = _fissure_distance(x, y, level) + 1.5 * texture["coarse"]
    density += 70.0 * np.exp(-np.square(fissure / 1.1))
    return density


def _paint_lesions(canvas: _Slice, density, part, texture) -> np.ndarray:
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


def _score_lesions(lesions, grid: _Grid, z: float):
    """How deep every pixel lies in a lesion and in a consolidated core; None without lesions."""
    glass = dense = None
    for lesion in lesions:
        reach = 1.6 * max(lesion.radii)  # roughness carries a lesion beyond its smooth edge
        if abs(z - lesion.centre[2]) > reach:
            continue
        if glass is None:
            glass, dense = (np.full(grid.x.shape, -1.0, np.float32) for _ in range(2))
        part = grid.window(lesion.centre[0], lesion.centre[1], reach)
        score = _lesion_score(lesion, grid.x[part], grid.y[part], z)
        np.maximum(glass[part], score, out=glass[part])
        if lesion.core > 0:
            np.maximum(dense[part], score - (1.0 - lesion.core), out=dense[part])
    return glass, dense


def _paint_lung_tubes(canvas: _Slice, density, part) -> None:
    """Vessels, then the airways beside them: air bronchograms where the lung is consolidated."""
    solid = np.maximum(canvas.tubes("vessels"), 0.6 * canvas.tubes("airways", wider=0.6))[part]
    density += solid * np.maximum(BLOOD_HU - density, 0.0)
    density += canvas.tubes("airways")[part] * (GAS_HU - density)


def _render(scene: _Scene, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One slice: int16 HU, lung mask, lesion mask."""
    canvas = _Slice(scene, index)
    _paint_body(canvas)
    _paint_abdomen(canvas)
    _paint_mediastinum(canvas)
    _paint_bones(canvas)
    lungs, lesions = _paint_lungs(canvas)
    _paint_confounder(canvas)
    voxels = _reconstruct(canvas)
    if scene.padding is not None:
        for picture, value in ((voxels, scene.scanner.padding), (lungs, 0), (lesions, 0)):
            picture[scene.padding] = value
    return voxels, lungs, lesions


def _reconstruct(canvas: _Slice) -> np.ndarray:
    """The scanner's part: kernel, noise, streaks between the shoulders, offset; int16."""
    scene, scanner = canvas.scene, canvas.scene.scanner
    sigma = scanner.blur_mm / scene.grid.spacing
    picture = gaussian_filter(canvas.picture, sigma, truncate=3.0)
    if scanner.sharpening:
        smooth = gaussian_filter(picture, 1.6 * sigma, truncate=3.0)
        picture += scanner.sharpening * (picture - smooth)
    rng = _generator(scene.record, scene.record.scan_id, f"noise {canvas.index}")
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
        ValueError: if label or scanner are unknown or the size is too small to show a chest.
    """
    if record.label not in LABELS or record.scanner not in SCANNERS:
        raise ValueError(f"unknown label or scanner: {record.label!r}, {record.scanner!r}")
    if size < 32 or record.slices < 1:
        raise ValueError(f"a phantom has 32 pixels per side or more, got {size}")
    scene = _set_scene(record, size)
    shape = (record.slices, size, size)
    voxels = np.empty(shape, np.int16 if hounsfield else np.uint8)
    lungs, lesions = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
    for index in range(record.slices):
        picture, lungs[index], lesions[index] = _render(scene, index)
        voxels[index] = picture if hounsfield else apply_window(picture)
    return PhantomScan(Scan(voxels, scene.spacing), lungs, lesions)


# ----------------------------------------------------------------------------------- writing files

JPEG_QUALITY = 92
GZIP_LEVEL = 1  # noise hardly compresses; higher levels only cost time
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def write_plan(records: Sequence[PhantomRecord], folder: Path | str) -> Path:
    """Write ``scans.csv``, one row per scan.

    Args:
        records: from `plan_phantoms`.
        folder: root of the data set, made if absent.

    Returns:
        The path of the file.
    """
    path = Path(folder) / "scans.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = pd.DataFrame([asdict(record) for record in records]).to_csv(
        index=False, lineterminator="\n"
    )
    _write_whole(path, text.encode())
    return path


def write_phantom(
    record: PhantomRecord, folder: Path | str, *, size: int = 256, hounsfield: bool = True
) -> None:
    """Draw one scan and write it in the raw layout; every file appears whole or not at all.

    ``scans/<scan_id>.nii.gz`` (int16 HU) or, for 8-bit pictures, ``scans/<scan_id>/<k>.jpg`` from
    the head down; ``lungs/<scan_id>.nii.gz`` and ``lesions/<scan_id>.nii.gz`` (uint8). The same
    record gives the same bytes.

    Args:
        record: from `plan_phantoms`.
        folder: root of the data set, made if absent.
        size: pixels per side.
        hounsfield: see `make_phantom`.

    Raises:
        ValueError: if the scan's identity cannot be a file name.
    """
    if not _SAFE_ID.fullmatch(record.scan_id):
        raise ValueError(f"scan_id holds letters, digits, - and _ only, got {record.scan_id!r}")
    phantom = make_phantom(record, size=size, hounsfield=hounsfield)
    folder, name = Path(folder), f"{record.scan_id}.nii.gz"
    for part in ("scans", "lungs", "lesions"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    spacing, codes = phantom.scan.spacing_mm, SCANNERS[record.scanner].orientation
    _write_whole(folder / "lungs" / name, _nifti_bytes(phantom.lungs, spacing, codes))
    _write_whole(folder / "lesions" / name, _nifti_bytes(phantom.lesions, spacing, codes))
    if hounsfield:  # the scan comes last: where it is, its masks are
        _write_whole(folder / "scans" / name, _nifti_bytes(phantom.scan.voxels, spacing, codes))
    else:
        _write_pictures(folder / "scans" / record.scan_id, phantom.scan.voxels)


def _nifti_bytes(voxels: np.ndarray, spacing, orientation: str) -> bytes:
    """A gzipped NIfTI file whose bytes depend on nothing else, axes in the given orientation."""
    affine = np.zeros((4, 4))
    # Our axes run to the feet, the back and the left; NIfTI's world to the right, front and head.
    affine[2, 0], affine[1, 1], affine[0, 2] = -np.array(spacing)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(voxels.shape) - 1) / 2)
    affine[3, 3] = 1.0
    image = nibabel.Nifti1Image(voxels, affine)
    change = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(orientation)))
    image = image.as_reoriented(change)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=GZIP_LEVEL, mtime=0)


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _write_pictures(folder: Path, voxels: np.ndarray) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for index, picture in enumerate(voxels):
        Image.fromarray(picture).save(partial / f"{index}.jpg", quality=JPEG_QUALITY)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
