"""Painting everything but the lungs into a slice, and the confounder on it."""

import math
from collections.abc import Sequence

import numpy as np

from lib.data.phantom.anatomy import dome_at, mediastinum_distance
from lib.data.phantom.canvas import Canvas
from lib.data.phantom.chest import (
    AIRWAY_WALL_HU,
    AXILLA,
    BEHIND_HEART,
    BLOOD_HU,
    CARTILAGE_HU,
    COMPACT_BONE_HU,
    CORD_HU,
    DISC_HU,
    DISC_SHARE,
    FAT_HU,
    GAS_HU,
    GROOVE_FAT,
    HEART,
    LIVER_HU,
    LIVER_LEFT_LOBE,
    MARROW_HU,
    MUSCLE_HU,
    OESOPHAGUS_HU,
    SKIN_HU,
    SPINE_BODY_Y,
    SPINE_CANAL_Y,
    SPLEEN,
    SPLEEN_HU,
    STERNUM,
    STOMACH,
    STOMACH_HU,
    VERTEBRA_MM,
)
from lib.data.phantom.shapes import ellipse_at, ellipse_distance
from lib.data.scan import HOUNSFIELD_AIR, LEFT_LUNG, RIGHT_LUNG

MUSCLE_LAYERS = 3  # from the ribs to the fat under the skin


def paint_body(canvas: Canvas) -> None:
    """Everything of the body but the lungs, back to front."""
    _paint_walls(canvas)
    _paint_abdomen(canvas)
    _paint_mediastinum(canvas)
    _paint_bones(canvas)


def _paint_walls(canvas: Canvas) -> None:
    """Skin, fat, muscles and the walls of the chest."""
    grid, texture = canvas.grid, canvas.texture
    canvas.blend(SKIN_HU, grid.edge(canvas.skin))
    canvas.blend(FAT_HU + 12 * texture["middle"], grid.edge(canvas.skin + 2.2))
    share = 1 - _fat_planes(canvas)
    row = ellipse_at(AXILLA, canvas.level)
    if row is not None:
        rough = 4.0 * texture["coarse"]
        hole = ellipse_distance(np.abs(grid.x), grid.y, row[:2], row[2:4], row[4])
        share *= 1 - grid.edge(hole + rough)
    np.maximum(share, grid.edge(np.abs(canvas.cavity - 3.0) - 5.0), out=share)
    canvas.blend(MUSCLE_HU, share * grid.edge(canvas.muscle))
    middle = mediastinum_distance(canvas.scene.patient, grid.x, grid.y, canvas.level)
    canvas.blend(FAT_HU + 6, grid.edge(middle))
    canvas.ellipse(FAT_HU + 6, ellipse_at(BEHIND_HEART, canvas.level))


def _fat_planes(canvas: Canvas) -> np.ndarray:
    """Share of fat between muscles: they lie in layers on the chest wall, which meet and part."""
    layer = (canvas.cavity - canvas.muscle) / MUSCLE_LAYERS  # mm, thick at the shoulders only
    place = np.maximum(canvas.cavity / layer + 0.3 * canvas.texture["broad"], 0.5)
    away = np.abs(place - np.rint(place)) * layer
    return np.clip(1.0 + 0.9 * canvas.texture["coarse"] - 0.7 * away, 0.0, 1.0)


def _paint_abdomen(canvas: Canvas) -> None:
    """Liver, stomach with its gas, and spleen under the domes of the diaphragm."""
    grid, patient, level = canvas.grid, canvas.scene.patient, canvas.level
    for side, value in ((RIGHT_LUNG, LIVER_HU), (LEFT_LUNG, FAT_HU)):
        dome = dome_at(patient, side, level)
        if dome:
            shape = np.maximum(ellipse_distance(grid.x, grid.y, *dome), canvas.cavity + 1.0)
            canvas.blend(MUSCLE_HU, grid.edge(shape))  # the diaphragm itself
            canvas.blend(value, grid.edge(shape + 2.5))
    below = min(level - patient.dome_left + 0.75, 1.0)  # the organs move with the diaphragm
    if below < 0.77:
        return
    canvas.ellipse(LIVER_HU, ellipse_at(LIVER_LEFT_LOBE, below), blocks=True)
    canvas.ellipse(SPLEEN_HU, ellipse_at(SPLEEN, below))
    stomach = ellipse_at(STOMACH, below)
    if stomach is not None:
        canvas.ellipse(STOMACH_HU, stomach)
        _paint_gas(canvas, stomach)


def _paint_gas(canvas: Canvas, stomach: np.ndarray) -> None:
    """Gas rises to the front of a patient lying on the back; food and fluid end in a flat line."""
    grid = canvas.grid
    part = grid.window(stomach[0], stomach[1], max(stomach[2], stomach[3]))
    x, y = grid.x[part], grid.y[part]
    surface = float(stomach[1] - canvas.scene.patient.gas * stomach[3])
    wall = ellipse_distance(x, y, stomach[:2], stomach[2:4] - 4.0, stomach[4])
    wall = wall + 2.0 * canvas.texture["coarse"][part]
    canvas.blend(GAS_HU, grid.edge(np.maximum(wall, y - surface)), part)


def _paint_mediastinum(canvas: Canvas) -> None:
    """Heart, large vessels, oesophagus, trachea and main bronchi."""
    for rows, value in ((HEART, BLOOD_HU), (GROOVE_FAT, FAT_HU)):
        row = ellipse_at(rows, canvas.level)
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


def _paint_bones(canvas: Canvas) -> None:
    """Ribs, shoulders, sternum and spine: a dense shell around marrow."""
    marrow = MARROW_HU + 55 * canvas.texture["middle"]
    canvas.blend(CARTILAGE_HU, canvas.tubes("cartilage"))
    bones = canvas.tubes("bones")
    np.maximum(canvas.block, bones, out=canvas.block)
    canvas.blend(COMPACT_BONE_HU, bones)
    canvas.blend(marrow, canvas.tubes("bones", wider=-1.7))
    sternum = ellipse_at(STERNUM, canvas.level)
    if sternum is not None:
        _paint_shell(canvas, sternum, marrow)
    _paint_spine(canvas, marrow)


def _paint_shell(
    canvas: Canvas, row: Sequence[float], marrow: np.ndarray, shell: float = 1.4
) -> None:
    """One bone with an elliptic cut."""
    row = np.asarray(row, float)
    canvas.ellipse(COMPACT_BONE_HU, row)
    part = canvas.grid.window(row[0], row[1], max(row[2], row[3]))
    inner = np.maximum(row[2:4] - shell, 0.5)
    x, y = canvas.grid.x[part], canvas.grid.y[part]
    canvas.blend(
        marrow[part], canvas.grid.edge(ellipse_distance(x, y, row[:2], inner, row[4])), part
    )


def _paint_spine(canvas: Canvas, marrow: np.ndarray) -> None:
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


def paint_confounder(canvas: Canvas) -> None:
    """The tube (a ring), the wire and the clips, where the record asks for them."""
    if canvas.scene.record.confounder:
        canvas.blend(180.0, canvas.tubes("tube"))
        canvas.blend(float(HOUNSFIELD_AIR), canvas.tubes("tube", wider=-1.9))
        canvas.blend(1600.0, canvas.tubes("wire"))
