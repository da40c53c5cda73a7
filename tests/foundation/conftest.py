import numpy as np
import pytest
import torch
from PIL import Image

from lib.foundation.sam import build_sam


@pytest.fixture(scope="session")
def lively_sam():
    """A small SAM with random weights, enlarged so that it finds many masks of many qualities."""
    torch.manual_seed(0)
    sam = build_sam("small")
    with torch.no_grad():
        for network in sam.mask_decoder.output_hypernetworks_mlps:
            network.layers[-1].weight *= 30
        sam.mask_decoder.iou_prediction_head.layers[-1].weight *= 20
        sam.image_encoder.pos_embed.normal_()
        sam.image_encoder.neck[2].weight *= 3
    return sam.requires_grad_(False)


@pytest.fixture(scope="session")
def make_picture():
    """A smooth random picture of a height and width."""

    def make(seed: int, height: int, width: int) -> np.ndarray:
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 6), np.uint8)
        grey = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        return np.repeat(np.asarray(grey)[..., None], 3, axis=2)

    return make
