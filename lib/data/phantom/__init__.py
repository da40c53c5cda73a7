"""The thorax phantom: a generated data set of chest CT scans in Hounsfield units.

Why it exists: no public set may be redistributed, so the default study runs on scans that are
drawn, not measured. They hold what the three papers rest on: closed-lung slices at both ends, a
variable number of slices, a table under the patient, scanner-dependent noise, COVID-19 (bilateral,
subpleural, posterior, basal, multifocal), common pneumonia (unilateral, lobar, air bronchograms)
and scans without infection. A **confounder** outside the lungs (an oxygen tube with an electrode
wire on the chest) can be correlated with COVID-19 on purpose, so that the claim that segmentation
helps can be tested.

How it is drawn: every organ is a function of the position in a *standard chest* in mm
(`lib.data.phantom.chest`). An affine map per scan (size, aspect, shear, turn) takes it to the
picture. So a scan can have any number of slices and only one slice is worked on at a time. Three
kinds of shape suffice: outlines given by a radius per angle (body, chest wall), ellipses
interpolated between levels (organs) and tubes swept by spheres (vessels, airways, bones).

Everything random hangs on ``record.seed`` with the patient's or the scan's identity, never on the
order in which scans are made.

The modules, each of which imports only from those before it: `plan`, `chest`, `scanners`; `shapes`,
`textures`; `anatomy`, `lungs`, `lesions`; `scene`, `canvas`, `paint_body`, `paint_lungs`,
`drawing`; `files`. Drawing a data set, with restart:

    records = plan_phantoms(scans_per_class={"train": 24, "test": 10}, seed=0)
    write_plan(records, root)
    map_scans(draw_phantom, records, root / "scans", suffix="", inputs=record_text,
              parameters={"size": 256, "hounsfield": True}, code=CODE, ...)
"""

from lib.data import scan
from lib.data.phantom import (
    anatomy,
    canvas,
    chest,
    drawing,
    files,
    lesions,
    lungs,
    paint_body,
    paint_lungs,
    plan,
    scanners,
    scene,
    shapes,
    textures,
)
from lib.data.phantom.drawing import PhantomScan, make_phantom
from lib.data.phantom.files import draw_phantom, record_text, write_plan
from lib.data.phantom.plan import (
    COVID,
    LABELS,
    NORMAL,
    PNEUMONIA,
    PhantomRecord,
    plan_phantoms,
)
from lib.data.phantom.scanners import SCANNERS, Scanner

# What a written phantom depends on, for the `code` of `map_scans`.
CODE = (
    *(files, drawing, paint_lungs, paint_body, canvas, scene, lesions, lungs, anatomy),
    *(textures, shapes, scanners, chest, plan, scan),
    *("numpy", "scipy", "scikit-image", "nibabel", "pillow"),
)

__all__ = [
    "CODE",
    "COVID",
    "LABELS",
    "NORMAL",
    "PNEUMONIA",
    "SCANNERS",
    "PhantomRecord",
    "PhantomScan",
    "Scanner",
    "draw_phantom",
    "make_phantom",
    "plan_phantoms",
    "record_text",
    "write_plan",
]
