"""Tests of lib/reporting/preprocessing_figure.py: what each picture shows, and of which slice."""

import numpy as np
import pandas as pd
import pytest

from lib.data.store import save_volume
from lib.reporting.preprocessing_figure import (
    preprocessing_case,
    preprocessing_figure,
    preprocessing_steps,
)

LUNGS = np.zeros((96, 96), np.uint8)
LUNGS[30:66, 22:42], LUNGS[30:66, 54:74] = 1, 2


def chest():
    """A body with two dark lungs, in grey."""
    grey = np.zeros((96, 96), np.uint8)
    grey[16:80, 10:86] = 200
    grey[LUNGS > 0] = 4
    return grey


def test_the_steps_are_those_of_the_paper():
    network = np.where(LUNGS == 1, 1, 0)
    steps = preprocessing_steps(chest(), network, LUNGS)
    assert [name[:3] for name in steps] == ["(a)", "(b)", "(c)", "(d)", "(e)", "(f)"]
    raw, binary, morphology, original, refined, masked = steps.values()
    np.testing.assert_array_equal(raw, chest())
    np.testing.assert_array_equal(original, 255 * (LUNGS == 1))
    np.testing.assert_array_equal(refined, 255 * (LUNGS > 0))
    np.testing.assert_array_equal(masked, chest() * (LUNGS > 0))
    assert binary[20, 48] == 255 and not binary[LUNGS > 0].any() and not binary[:14].any()
    assert (morphology[LUNGS > 0] == 255).mean() > 0.9 and not morphology[:25].any()
    assert all(picture.dtype == np.uint8 for picture in steps.values())


@pytest.mark.parametrize("wrong", ["network's", "refined"])
def test_a_mask_of_another_shape_is_named(wrong):
    masks = {"network's": LUNGS, "refined": LUNGS} | {wrong: LUNGS[:-1]}
    with pytest.raises(ValueError, match=rf"the {wrong} mask has shape \(95, 96\), the slice"):
        preprocessing_steps(chest(), *masks.values())


def test_six_pictures_with_their_letters():
    figure = preprocessing_figure(preprocessing_steps(chest(), LUNGS, LUNGS), title="one slice")
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[0] == "(a) raw slice" and titles[5] == "(f) masked lung" and len(titles) == 6
    assert figure.get_suptitle() == "one slice"


@pytest.fixture
def data(tmp_path):
    for folder in ("prepared/set/scans", "segmented/set/unet", "segmented/set/unet_refined"):
        (tmp_path / folder).mkdir(parents=True)
    for name in "abc":
        save_volume(tmp_path / f"prepared/set/scans/{name}.b2nd", np.stack([chest()] * 3))
        masks = np.stack([LUNGS, LUNGS * 0, LUNGS])
        masks[0, :60] = 0
        for folder in ("unet", "unet_refined"):
            save_volume(tmp_path / f"segmented/set/{folder}/{name}.b2nd", masks)
    return tmp_path


@pytest.mark.parametrize(
    ("labels", "splits", "expected"),
    [
        (["covid", "normal", "covid"], ["train", "test", "test"], "c"),
        (["covid", "normal", "covid"], ["train", "train", "train"], "a"),
        (["covid", None, "normal"], ["train", "test", "test"], "b"),
    ],
)
def test_the_first_covid_scan_of_the_test_part_and_its_fullest_slice(
    data, labels, splits, expected
):
    manifest = pd.DataFrame({"scan_id": list("abc"), "label": labels, "split": splits})
    figure = preprocessing_case(data, "set", manifest, positive=["covid"])
    assert figure.get_suptitle() == f"set: {expected}, slice 2"
