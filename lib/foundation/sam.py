"""SAM, built from segment-anything's own classes: the official sizes and a small one.

Source: SAM2CLIP2SAM, sections 3.1 and 4.3 (ViT-H); FACTS 1.3. The small one has the same modules
with other numbers: it is trained on lungs of the study's own data, because no official weights can
be had without a download.
"""

from functools import partial
from typing import NamedTuple

import torch
from segment_anything import build_sam_vit_b, build_sam_vit_h, build_sam_vit_l
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torch import nn


class SamSize(NamedTuple):
    """The numbers of a SAM.

    Attributes:
        image_size: pixels per side of the encoder's input.
        patch_size: pixels per side of a patch.
        width: of the encoder.
        depth: blocks of the encoder.
        heads: of the encoder's attention.
        global_blocks: blocks with attention over the whole picture.
        window: patches per side of the other blocks' windows.
        embedding: channels of the picture's embedding and of the prompts.
        decoder_heads: heads of the decoder's attention.
        decoder_hidden: width of the decoder's inner layer.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    window: int
    embedding: int
    decoder_heads: int
    decoder_hidden: int


SMALL = SamSize(
    image_size=256,
    patch_size=16,
    width=96,
    depth=4,
    heads=4,
    global_blocks=(1, 3),
    window=8,
    embedding=64,
    decoder_heads=4,
    decoder_hidden=256,
)
OFFICIAL = {"vit_b": build_sam_vit_b, "vit_l": build_sam_vit_l, "vit_h": build_sam_vit_h}


def build_sam(variant: str) -> Sam:
    """A SAM with random weights, in evaluation mode.

    Args:
        variant: ``"vit_b"``, ``"vit_l"``, ``"vit_h"`` or ``"small"``.

    Raises:
        ValueError: for an unknown variant.
    """
    if variant == "small":
        return build_sam_of_size(SMALL).eval()
    if variant not in OFFICIAL:
        raise ValueError(f"a SAM is one of {[*OFFICIAL, 'small']}, got {variant!r}")
    return OFFICIAL[variant]().eval()


def build_sam_of_size(size: SamSize) -> Sam:
    """Put segment-anything's modules together with other numbers than the published ones.

    Args:
        size: the numbers.

    Returns:
        The network with random weights.
    """
    grid = size.image_size // size.patch_size
    encoder = ImageEncoderViT(
        img_size=size.image_size,
        patch_size=size.patch_size,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        out_chans=size.embedding,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=size.window,
        global_attn_indexes=size.global_blocks,
    )
    prompts = PromptEncoder(
        embed_dim=size.embedding,
        image_embedding_size=(grid, grid),
        input_image_size=(size.image_size, size.image_size),
        mask_in_chans=16,
    )
    decoder = MaskDecoder(
        transformer_dim=size.embedding,
        transformer=TwoWayTransformer(
            depth=2,
            embedding_dim=size.embedding,
            num_heads=size.decoder_heads,
            mlp_dim=size.decoder_hidden,
        ),
        iou_head_hidden_dim=size.embedding,
    )
    return Sam(encoder, prompts, decoder)


def grey_to_picture(grey: torch.Tensor) -> torch.Tensor:
    """Three equal channels of a grey slice, as SAM takes them.

    Args:
        grey: shape (..., height, width).

    Returns:
        Shape (..., 3, height, width), a view.
    """
    return grey.unsqueeze(-3).expand(*grey.shape[:-2], 3, *grey.shape[-2:])
