"""A tiny ACVLab, and thoraxes for it to judge."""

import numpy as np
import torch
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from torch import nn

from lib.classification.acvlab_networks import ACVLab, SequenceNetwork, SliceNetwork, Standardise
from lib.classification.inputs import ScanItem
from lib.data.store import save_volume

WIDTH = 16
TINY_SWIN = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_ratio": 1}


def tiny_acvlab():
    """The system on a CNN of one layer, with a picture of 16 x 16."""
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    slices = SliceNetwork(
        backbone=backbone,
        feature_width=8,
        embedding_width=WIDTH,
        mean=torch.full((3,), 0.5),
        deviation=torch.full((3,), 0.5),
    )
    swin = SwinTransformerV2Cr(img_size=(WIDTH, WIDTH), in_chans=1, num_classes=2, **TINY_SWIN)
    sequence = SequenceNetwork(embedding_width=WIDTH, width=4, hidden_width=4)
    return ACVLab(
        slices=slices,
        sequence=nn.Sequential(Standardise(WIDTH), sequence),
        picture=nn.Sequential(Standardise(WIDTH), nn.Unflatten(1, (1, WIDTH)), swin),
        picture_slices=WIDTH,
    )


def thorax(slices, *, lesion, size=64):
    """HU: a body with two lungs, on most slices with a patch in each lung where asked."""
    voxels = np.full((slices, size, size), -1000, np.int16)
    voxels[:, 8:56, 4:60] = 40
    voxels[:, 14:50, 8:28] = voxels[:, 14:50, 34:56] = -850
    if lesion:
        voxels[:, 30:44, 10:18] = voxels[:, 30:44, 46:54] = -350
    noise = np.random.default_rng(slices).normal(0, 20, voxels.shape)
    return (voxels + noise).astype(np.int16)


def stored(folder, name, voxels, target, *, mask="lungs"):
    """A scan in the store, with the sidecars that preparing leaves."""
    paths = [folder / f"{name}.b2nd", folder / f"{name}-lungs.b2nd"]
    inside = np.zeros(voxels.shape, np.uint8)
    if mask == "lungs":
        inside[:, 14:50, 8:28], inside[:, 14:50, 34:56] = 1, 2
    for path, values in zip(paths, (voxels, inside), strict=True):
        save_volume(path, values)
        path.with_suffix(".json").write_text("{}")
    return ScanItem(name, paths[0], paths[1] if mask else None, target)
