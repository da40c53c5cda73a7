import numpy as np
import pytest

from lib.classification.inputs import load_slices
from lib.data.masks import both_lungs
from lib.data.scan import RIGHT_LUNG, Scan
from lib.segmentation.whole_slice import WholeSlice


@pytest.mark.parametrize("dtype", [np.int16, np.uint8])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 7)])
def test_every_pixel_is_kept(shape, dtype):
    scan = Scan(np.zeros(shape, dtype))
    mask = WholeSlice()(scan)
    assert (mask.shape, mask.dtype) == (shape, np.uint8)
    assert set(np.unique(mask)) == {RIGHT_LUNG}
    assert both_lungs(mask).all()


def test_a_classifier_sees_the_same_with_it_as_without_a_mask():
    voxels = np.random.default_rng(0).integers(-1024, 600, (3, 16, 16), dtype=np.int16)
    masked = load_slices(voxels, WholeSlice()(Scan(voxels)), size=16)
    np.testing.assert_array_equal(masked, load_slices(voxels, size=16))
