from functools import partial

import ipywidgets
import numpy as np
import pytest
import torch

from lib.data.store import save_volume
from lib.foundation.clip import build_clip
from lib.foundation.mask_generator import MaskGenerator
from lib.reporting import exploring
from lib.reporting.exploring import SliceExplorer, middle_slice, stored_journey
from lib.segmentation.sam2clip2sam import Choice, Sam2Clip2SamSegmenter

SETTINGS = {
    "generator": {
        "mode": "fast", "points_per_side": 4, "pred_iou_thresh": 0.3,
        "stability_score_thresh": 0.5, "stability_score_offset": 0.05,
    },
    "choice": {
        "sentences": ["a lung"], "area": (0.001, 0.7), "most_borders": 4, "regions": 2,
        "cut_to_box": True, "similarity_floor": None,
    },
}  # fmt: skip


def build(sam, clip, *, generator, choice):
    return Sam2Clip2SamSegmenter(MaskGenerator(sam, **generator), clip, Choice(**choice))


@pytest.fixture(scope="module")
def explorer(lively_sam, tmp_path_factory):
    file = tmp_path_factory.mktemp("scans") / "s1.b2nd"
    rng = np.random.default_rng(0)
    save_volume(file, rng.integers(0, 255, (4, 8, 8), np.uint8).repeat(8, 1).repeat(8, 2))
    torch.manual_seed(1)
    return SliceExplorer(partial(build, lively_sam, build_clip("small")), SETTINGS, {"s1": file})


def test_settings_change_the_journey(explorer):
    two = explorer.journey("s1", 1, area=(0.001, 1.0))
    assert len(two.candidates) > len(explorer.journey("s1", 1, area=(0.3, 1.0)).candidates)
    assert len(explorer.journey("s1", 1, similarity_floor=1.0).chosen) == 0
    assert len(explorer.journey("s1", 1, stability_score_thresh=1.0).sight.proposals) < len(
        two.sight.proposals
    )
    assert np.array_equal(
        explorer.journey("s1", 99).sight.grey, explorer.journey("s1", 3).sight.grey
    )
    assert middle_slice(explorer.volumes["s1"]) == 2


def test_controls_redraw_and_say_what_is_wrong(explorer):
    box = explorer.widgets()
    assert isinstance(box, ipywidgets.VBox)
    controls = {control.description: control for control in box.children[:-1]}
    assert controls["slice"].max == 3
    controls["regions"].value = 1
    controls["sentences"].value = ""
    controls["sentences"].value = "air in a lung\n"


def test_no_scan_is_an_error():
    with pytest.raises(ValueError, match="no scan to explore"):
        SliceExplorer(build, SETTINGS, {})


def test_a_stored_scan_is_shown_where_its_mask_is_fullest(explorer, tmp_path, monkeypatch):
    monkeypatch.setattr(exploring, "build_segmenter", lambda *weights, **own: explorer.build(**own))
    monkeypatch.setattr(exploring, "weight_files", lambda *asked: asked)
    mask = np.zeros((4, 64, 64), np.uint8)
    mask[1, :8], mask[2, :20] = 1, 2
    save_volume(tmp_path / "lungs.b2nd", mask)
    found, expected = (
        stored_journey(
            explorer.volumes["s1"],
            tmp_path / "lungs.b2nd",
            models=tmp_path,
            settings=SETTINGS,
            trained_on="phantom",
        ),
        explorer.draw("s1", 2),
    )
    for ours, theirs in zip(found.axes, expected.axes, strict=True):
        assert len(ours.images) == len(theirs.images)
        for image, other in zip(ours.images, theirs.images, strict=True):
            np.testing.assert_array_equal(image.get_array(), other.get_array())
