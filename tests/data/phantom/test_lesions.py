from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt
from skimage.measure import label as components

from lib.data.phantom import COVID, NORMAL, PNEUMONIA, make_phantom
from lib.data.phantom.paint_lungs import LEAST_LESION_MM2
from lib.data.scan import CONSOLIDATION, GROUND_GLASS_OPACITY, LEFT_LUNG, RIGHT_LUNG


def lesion_share(phantom, side):
    lung = phantom.lungs == side
    return (phantom.lesions[lung] > 0).mean()


@pytest.mark.parametrize("number", range(3))
def test_covid_is_bilateral_peripheral_and_posterior(phantoms, number):
    phantom = phantoms[COVID, number]
    assert min(lesion_share(phantom, side) for side in (RIGHT_LUNG, LEFT_LUNG)) > 0.001
    depth = distance_transform_edt(phantom.lungs > 0, phantom.scan.spacing_mm)
    lesions, healthy = phantom.lesions > 0, (phantom.lungs > 0) & (phantom.lesions == 0)
    assert np.median(depth[lesions]) < 0.8 * np.median(depth[healthy])
    assert np.nonzero(lesions)[1].mean() > np.nonzero(healthy)[1].mean()


@pytest.mark.parametrize("number", range(3))
def test_pneumonia_is_consolidated_in_one_lung(phantoms, number):
    phantom = phantoms[PNEUMONIA, number]
    shares = sorted(lesion_share(phantom, side) for side in (RIGHT_LUNG, LEFT_LUNG))
    assert shares[0] == 0 and shares[1] > 0.01
    assert (phantom.lesions == CONSOLIDATION).sum() > 0.2 * (phantom.lesions > 0).sum()


def test_pneumonia_has_air_bronchograms_and_no_specks(record):
    record = replace(record, label=PNEUMONIA, slices=12, difficulty=0.0)
    phantom = make_phantom(record, size=192)
    dense = phantom.lesions == CONSOLIDATION
    inner = distance_transform_edt(dense, phantom.scan.spacing_mm) > 3
    assert (phantom.scan.voxels[inner] < -250).sum() >= 3
    assert np.median(phantom.scan.voxels[inner]) > -60
    least = 0.8 * LEAST_LESION_MM2 / np.prod(phantom.scan.spacing_mm[1:])  # patients differ in size
    for picture in phantom.lesions:
        areas = np.bincount(components(picture > 0, connectivity=1).ravel())[1:]
        assert (areas > least).all()


def test_normal_scans_have_no_lesion(phantoms):
    assert not any(phantoms[NORMAL, number].lesions.any() for number in range(3))


def test_lesions_have_their_density(phantoms):
    for (label, _), phantom in phantoms.items():
        glass = phantom.scan.voxels[phantom.lesions == GROUND_GLASS_OPACITY]
        dense = phantom.scan.voxels[phantom.lesions == CONSOLIDATION]
        if label != NORMAL:
            assert -720 < np.median(glass) < -280
        if label == PNEUMONIA:
            assert -80 < np.median(dense) < 80


def test_difficulty_makes_lesions_smaller(record):
    def load(difficulty):
        records = [replace(record, scan_id=f"s{i}", slices=6) for i in range(3)]
        phantoms = [make_phantom(replace(r, difficulty=difficulty), size=40) for r in records]
        return sum((p.lesions > 0).sum() / (p.lungs > 0).sum() for p in phantoms)

    assert load(0.0) > 1.5 * load(1.0)
