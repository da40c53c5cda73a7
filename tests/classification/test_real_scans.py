"""Every classifier at its published size on real scans, from the raw files to probabilities.

Weights are random, so no accuracy can be asked for: what is tested is that nothing of a real scan
(slice count, spacing, intensities, lungs) stops a system. Seconds and memory are printed; `pytest
-s -m real` shows them.
"""

import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib import import_module
from multiprocessing import get_context
from time import perf_counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from lightning_fabric import Fabric, seed_everything

from lib.classification import cnn_bert
from lib.classification.inputs import ScanItem
from lib.data.readers import read_scan
from lib.data.selection import Selection
from lib.data.store import open_volume, save_volume
from lib.segmentation.morphology import MorphologySegmenter
from lib.segmentation.slice_selection import BOX, kept_range, measure_slices, volume_box

pytestmark = [pytest.mark.real, pytest.mark.slow]

SCANS = {
    "covid": "covid-ct-md/COVID-19 subjects/P001",
    "pneumonia": "covid-ct-md/Cap subjects/cap001",
    "normal": "covid-ct-md/Normal subjects/normal001",
    "covid_pictures": "cov19-ct-db-sample/validation/covid/ct_scan_77",
}
CLASSIFIERS = (
    "racnet", "mdap", "fdvts", "fdvts_video", "acvlab", "mc3_18", "densenet3d121", "covidnet3d",
    "emars_aps", "cnn_bert",
)  # fmt: skip
UNIT = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in


class Judged(NamedTuple):
    """Probabilities and seconds of each scan; how much the process grew at most, in MB."""

    probabilities: np.ndarray
    seconds: list[float]
    megabytes: float


@pytest.fixture(scope="module")
def scans(real_data, tmp_path_factory):
    """The real scans in a store, with the lungs that morphology finds in them."""
    folder, items = tmp_path_factory.mktemp("real"), []
    for name, place in SCANS.items():
        scan = read_scan(real_data / place)
        lungs = MorphologySegmenter()(scan)
        item = ScanItem(name, folder / f"{name}.b2nd", folder / f"{name}_lungs.b2nd", 0)
        save_volume(item.volume, scan.voxels, spacing_mm=scan.spacing_mm)
        save_volume(item.mask, lungs, spacing_mm=scan.spacing_mm)
        items.append(item)
    return items


def judge(classifier, settings, scans):
    """Predict scans one by one, where nothing was built before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    system = import_module(f"lib.classification.{classifier}")
    seed_everything(0, verbose=False)
    model = system.build(**system.VARIANTS["paper"])
    fabric = Fabric(accelerator="cpu", devices=1)  # bfloat16 is emulated on most CPUs
    rows, seconds = [], []
    for scan in scans:
        begin = perf_counter()
        rows.append(system.predict(model, [scan], settings=settings, fabric=fabric))
        seconds.append(perf_counter() - begin)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return Judged(np.concatenate(rows), seconds, grown * UNIT / 1e6)


def test_lungs_are_found_in_every_real_scan(scans):
    for scan in scans:
        volume, lungs = open_volume(scan.volume), open_volume(scan.mask)
        assert volume.shape == lungs.shape
        share = np.mean([(lungs[index] > 0).mean() for index in range(len(lungs))])
        assert 0.03 < share < 0.5, scan.scan_id


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_the_published_size_judges_real_scans(classifier, scans, repository):
    settings = yaml.safe_load((repository / "params.yaml").read_text())["classify"][classifier]
    settings = settings["paper"] | {"loader_processes": 0}  # whose memory would not be counted
    context = get_context("forkserver")  # a fresh process each: its peak never falls again
    context.set_forkserver_preload([import_module("lib.training").__name__])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        found = process.submit(judge, classifier, settings, scans).result()
    seconds = ", ".join(f"{one:.1f}" for one in found.seconds)
    print(
        f"\n{classifier}: {seconds} s for {[len(open_volume(scan.volume)) for scan in scans]} "
        f"slices, {found.megabytes:.0f} MB, {torch.get_num_threads()} threads"
    )
    assert found.probabilities.shape == (len(SCANS), 2)
    assert np.isfinite(found.probabilities).all()
    np.testing.assert_allclose(found.probabilities.sum(1), 1, atol=1e-5)


def selected(scan, settings):
    """A scan with the slices that the selection keeps, and its body box."""
    measured = measure_slices(open_volume(scan.volume))
    rule = settings | {"least_distance": settings["least_distance"]["train"]}
    kept = kept_range(measured["ratio"].to_numpy(), **rule)
    inside = measured["slice"].between(kept.first, kept.last)
    box = volume_box(measured.loc[inside, BOX].to_numpy())
    return replace(scan, selection=Selection(scan.scan_id, "covid", kept.first, kept.last, box))


@pytest.mark.parametrize("configuration", ["rml_msc_affine", "rml_msc_cropped"])
def test_real_scans_are_selected_composed_and_embedded(configuration, scans, repository):
    parameters = yaml.safe_load((repository / "params.yaml").read_text())
    presets = parameters["classify"]["cnn_bert"]
    settings = presets["paper"] | presets["configurations"][configuration]
    seed_everything(0, verbose=False)
    model = cnn_bert.build(**cnn_bert.VARIANTS["paper"]).eval()
    for scan in (selected(one, parameters["select_slices"]) for one in scans):
        begin = perf_counter()
        found = cnn_bert.embed_scan(model, scan, settings=settings, fabric=Fabric(devices=1))
        seconds, kept = perf_counter() - begin, len(scan.selection)
        print(f"\n{scan.scan_id}: {kept} slices, {len(found['positions'])} sets, {seconds:.1f} s")
        assert found["embeddings"].shape == (len(found["positions"]), 512)
        assert all(bool(values.isfinite().all()) for values in found.values())
        assert found["positions"].unique().tolist() == list(range(kept))  # fewer than 32
        pictures = cnn_bert.shown(scan, settings)
        assert pictures.shape == (32, 224, 224, 3)
        raw, mask, lungs = np.moveaxis(pictures, -1, 0)
        assert 0.1 < (mask > 127).mean() < 0.75  # the body box alone may be full of lung
        inside, outside = mask == 255, mask == 0
        assert (lungs[outside] == 0).all()
        assert np.abs(lungs[inside].astype(int) - raw[inside]).max() <= 1  # resizing rounds
