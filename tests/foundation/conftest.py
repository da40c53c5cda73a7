import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def make_picture():
    """A smooth random picture of a height and width."""

    def make(seed: int, height: int, width: int) -> np.ndarray:
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 6), np.uint8)
        grey = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        return np.repeat(np.asarray(grey)[..., None], 3, axis=2)

    return make
