"""One patient: how people differ, the outlines of body and lungs, vessels, airways and bones."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from lib.data.phantom.chest import (
    AIRWAY_TUBES,
    BEHIND_HEART,
    BLOOD_TUBES,
    BONE_STRETCH,
    CARTILAGE_SHARE,
    CHEST_HEIGHT_MM,
    CLAVICLE,
    DIAPHRAGM_END,
    HUMERUS,
    LEVELS,
    MEDIASTINUM,
    OESOPHAGUS,
    OUTLINES,
    RIB_DISTANCE_MM,
    RIB_DROP_MM,
    RIBS,
    SCAPULA,
    SCAPULA_SPINE,
    SPINE_CANAL_Y,
)
from lib.data.phantom.plan import PhantomRecord, generator
from lib.data.phantom.shapes import ANGLES, Tubes, ellipse_at, ellipse_distance, mirror, sample_tube
from lib.data.scan import LEFT_LUNG, RIGHT_LUNG


@dataclass(frozen=True)
class Patient:
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


def draw_patient(record: PhantomRecord) -> Patient:
    """The patient of a record, the same in all scans of that patient."""
    rng = generator(record, record.patient_id, "patient")
    breath = rng.normal(0, 0.02)  # the diaphragm and the density of the lungs move together
    dependent = rng.random() < 0.25 + 0.5 * record.difficulty
    size = rng.normal(0, 0.035)
    return Patient(
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


def _superellipse(
    half_width: np.ndarray,
    front: np.ndarray,
    back: np.ndarray,
    harmonics: np.ndarray,
    exponent: float,
) -> np.ndarray:
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


class Outlines:
    """Radius by angle of skin, muscles under the fat and chest cavity at every level, mm."""

    def __init__(self, patient: Patient, levels: int = 111) -> None:
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


def dome_at(
    patient: Patient, side: int, level: float
) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Centre and radii of the diaphragm's dome at one level, mm; None above it."""
    top = patient.dome_right if side == RIGHT_LUNG else patient.dome_left
    height = (level - top) / (DIAPHRAGM_END - top)
    if height <= 0.003:
        return None
    growth = math.sqrt(1 - (1 - min(height, 1.0)) ** 2) + 0.5 * max(0.0, height - 1)
    centre = (-66.0, -26.0) if side == RIGHT_LUNG else (68.0, -24.0)
    return centre, (79.0 * growth, 92.0 * growth)


def lung_distance(
    patient: Patient, x: np.ndarray, y: np.ndarray, cavity_distance: np.ndarray, level: float
) -> np.ndarray:
    """Signed distance in mm to the lungs before organs and large vessels are cut out of them."""
    distance = np.maximum(cavity_distance, 2.5 - np.abs(x))
    distance = np.maximum(distance, -mediastinum_distance(patient, x, y, level))
    behind = ellipse_at(BEHIND_HEART, level)
    distance = np.maximum(distance, -ellipse_distance(x, y, behind[:2], behind[2:4]))
    distance = np.maximum(distance, -ellipse_distance(x, y, (0.0, SPINE_CANAL_Y), (32.0, 37.0)))
    for side in (RIGHT_LUNG, LEFT_LUNG):
        dome = dome_at(patient, side, level)
        if dome:
            distance = np.maximum(distance, -ellipse_distance(x, y, *dome))
    closing = max(0.0, level - patient.base + 0.05) * 700.0  # the recesses taper off
    return np.maximum(distance, _apex_distance(patient, x, y, level)) + closing


def mediastinum_distance(
    patient: Patient, x: np.ndarray, y: np.ndarray, level: float
) -> np.ndarray:
    """Signed distance in mm to the fat around heart and vessels, narrower towards the sternum."""
    row = ellipse_at(MEDIASTINUM, level)
    swelling = np.clip(1 - abs(level - 0.62) / 0.25, 0, 1)  # a large heart widens it
    width = row[2] * (1 + (patient.heart - 1) * swelling)
    taper = np.interp(level, (0.1, 0.3, 0.5, 0.6), (0.0, 0.45, 0.3, 0.0))
    narrowed = (x - float(row[0])) * (1 - float(taper / row[3]) * (y - float(row[1])))
    return ellipse_distance(narrowed, y, (0.0, row[1]), (width, row[3]), row[4])


def _apex_distance(
    patient: Patient, x: np.ndarray, y: np.ndarray, level: float
) -> np.ndarray | float:
    """Signed distance in mm to the rounded tops of the lungs; minus infinity below them."""
    depth = (level - patient.apex) / (0.25 - patient.apex)
    if depth >= 1:
        return -np.inf
    if depth <= 0:
        return np.inf
    growth = math.sqrt(1 - (1 - depth) ** 2)
    return ellipse_distance(np.abs(x), y, (46.0 + 6 * growth, 26.0), (88.0 * growth, 92.0 * growth))


def body_tubes(patient: Patient, outlines: Outlines) -> dict[str, Tubes]:
    """Tubes outside the lungs by name: large vessels, oesophagus, trachea, bones, cartilage."""
    bones, cartilage = _bones(patient, outlines)
    trunk = np.concatenate([sample_tube(points) for points in AIRWAY_TUBES])
    return {
        "blood": Tubes.of(np.concatenate([sample_tube(points) for points in BLOOD_TUBES])),
        "oesophagus": Tubes.of(sample_tube(OESOPHAGUS)),
        "trachea": Tubes.of(trunk),
        "bones": bones,
        "cartilage": cartilage,
    }


def _bones(patient: Patient, outlines: Outlines) -> tuple[Tubes, Tubes]:
    """Bones and rib cartilage as tubes; vertebrae and sternum are ellipses."""
    bone, cartilage = [], []
    for number in range(RIBS):
        rib, soft = _rib(patient, outlines, number)
        bone.append(rib)
        cartilage.append(soft)
    arm = [sample_tube(points) for points in (CLAVICLE, HUMERUS, SCAPULA_SPINE)]
    bone.append(mirror(np.concatenate([*arm, _blade()])))
    return Tubes.of(np.concatenate(bone), BONE_STRETCH), Tubes.of(np.concatenate(cartilage), 1.2)


def _rib(patient: Patient, outlines: Outlines, number: int) -> tuple[np.ndarray, np.ndarray]:
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
    return mirror(points[way <= end]), mirror(points[(way > end) & (way <= last)])


def _blade() -> np.ndarray:
    """Spheres over the shoulder blade, a sheet between four corners."""
    u, v = np.mgrid[0:1:50j, 0:1:90j].reshape(2, -1, 1)
    corners = np.array(SCAPULA) * (1, 1, CHEST_HEIGHT_MM)
    top, bottom = (corners[i] * (1 - u) + corners[i + 1] * u for i in (0, 2))
    sheet = top * (1 - v) + bottom * v
    sheet[:, 1] += 6 * np.sin(np.pi * u[:, 0])  # it bends around the ribs
    return np.concatenate([sheet, np.full_like(u, 2.6) + 1.6 * (u < 0.15)], axis=1)
