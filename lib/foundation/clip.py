"""CLIP: built by open_clip's own classes, and equations 2 to 5 of SAM2CLIP2SAM (section 3.1).

Two variants: ``ViT-L-14`` is OpenAI's (paper 000, section 4.3; FACTS 1.3), for the weights named in
`lib.foundation.checkpoints`; ``small`` has the same parts, reduced, and is trained by the study.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from open_clip import CLIP, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, SimpleTokenizer
from open_clip.model import set_model_preprocess_cfg
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from lib.inference import in_batches

VARIANTS = {
    "ViT-L-14": {
        "embed_dim": 768,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
        "text_cfg": {"context_length": 77, "width": 768, "heads": 12, "layers": 12},
    },
    "small": {
        "embed_dim": 64,
        "quick_gelu": True,
        # 16 patches and the mean over them: per second of training this learns several times as
        # fast as the 64 patches and the class token of a picture of 64 x 64.
        "vision_cfg": {
            **{"image_size": 32, "layers": 4, "width": 128, "patch_size": 8},
            **{"head_width": 32, "pool_type": "avg"},
        },
        "text_cfg": {"context_length": 48, "width": 64, "heads": 4, "layers": 2},
    },
}

# How a crop becomes a square. OpenAI's way, "shortest", cuts the ends off a long crop. The small
# network sees it whole, "longest": made to fit and padded with black, because a long thin crop
# (chest wall, table) without its ends passes for something else.
RESIZE_MODES = {"ViT-L-14": "shortest", "small": "longest"}


def build_clip(variant: str) -> CLIP:
    """CLIP with random weights, in evaluation mode.

    Args:
        variant: ``"ViT-L-14"`` or ``"small"``.

    Returns:
        open_clip's class; ``visual.preprocess_cfg`` says how pictures are prepared for it, in
        open_clip's terms.

    Raises:
        ValueError: for an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"CLIP is one of {', '.join(VARIANTS)}, got {variant!r}")
    model = CLIP(**VARIANTS[variant])
    reading = {
        "size": VARIANTS[variant]["vision_cfg"]["image_size"],
        "mode": "RGB",
        "interpolation": "bicubic",
    }
    reading |= {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "fill_color": 0}
    set_model_preprocess_cfg(model, reading | {"resize_mode": RESIZE_MODES[variant]})
    return model.eval()


@cache
def clip_tokenizer() -> SimpleTokenizer:
    """OpenAI's tokenizer; its vocabulary is a file of open_clip's package."""
    return SimpleTokenizer()


def crop_to_mask(grey: np.ndarray, mask: np.ndarray, cut_to_box: bool = True) -> np.ndarray:
    """What a mask shows of a slice (equation 2): the slice times the mask, cut to the mask's box.

    Equation 2 only multiplies; the cut is SaLIP's (FACTS 1.2, 9.4) and can be left out.

    Args:
        grey: uint8, shape (height, width).
        mask: bool, same shape.
        cut_to_box: whether rows and columns without mask are cut off.

    Returns:
        uint8, at least one pixel.

    Raises:
        TypeError: if the slice is not uint8.
        ValueError: if the shapes differ or the mask is empty.
    """
    if grey.dtype != np.uint8:
        raise TypeError(f"crops are made of uint8 grey values, got {grey.dtype}")
    mask = np.asarray(mask, bool)
    if grey.ndim != 2 or grey.shape != mask.shape:
        raise ValueError(f"slice {grey.shape} and mask {mask.shape} differ in shape")
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise ValueError("an empty mask has no crop")
    if not cut_to_box:
        return grey * mask
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return grey[box] * mask[box]


def tokenize(sentences: Sequence[str], context_length: int) -> Tensor:
    """Tokens of sentences.

    Args:
        sentences: texts.
        context_length: of the network.

    Returns:
        int64, shape (sentences, context_length), padded with 0.

    Raises:
        ValueError: if a sentence is empty or does not fit; the library would cut it silently.
    """
    tokenizer = clip_tokenizer()
    for sentence in sentences:
        length = len(tokenizer.encode(sentence)) + 2  # start and end
        if length > context_length:
            raise ValueError(f"{length} tokens, at most {context_length} fit: {sentence!r}")
        if not sentence.strip():
            raise ValueError("a sentence is empty")
    return tokenizer(list(sentences), context_length)


def embed_sentences(model: CLIP, sentences: Sequence[str]) -> Tensor:
    """One embedding of several sentences (equation 3).

    Each is encoded by itself; their mean, taken before any normalisation as in SaLIP (FACTS 1.2,
    9.5), is brought to length 1.

    Args:
        model: CLIP.
        sentences: at least one.

    Returns:
        float32 on the CPU, shape (embedding,), of length 1.

    Raises:
        ValueError: without sentences, or for one that is empty or too long.
    """
    if isinstance(sentences, str) or not sentences:
        raise ValueError("the sentences that describe lungs are a list of at least one")
    tokens = tokenize(sentences, model.context_length)
    with torch.inference_mode():
        encoded = model.encode_text(tokens.to(_device(model))).float()
    return normalize(encoded.mean(dim=0), dim=0).cpu()


def prepare_crops(model: CLIP, crops: Sequence[np.ndarray]) -> Tensor:
    """Crops as squares of the network's size: the part of equation 4 that runs on the CPU.

    Equal to open_clip's own transform of the same picture, but grey stays one channel and numbers
    stay 8-bit until they are on the device (`encode_crops`).

    Args:
        model: CLIP from `build_clip`.
        crops: uint8, shape (height, width) each, any size.

    Returns:
        uint8, shape (crops, size, size).

    Raises:
        TypeError: for a crop of another dtype.
        ValueError: for a crop that is not a picture of at least one pixel.
    """
    reading = model.visual.preprocess_cfg
    square = _pad_to_square if reading["resize_mode"] == "longest" else _cut_to_square
    squares = np.empty((len(crops), reading["size"], reading["size"]), np.uint8)
    for out, crop in zip(squares, crops, strict=True):
        if crop.dtype != np.uint8:
            raise TypeError(f"crops hold uint8 grey values, got {crop.dtype}")
        if crop.ndim != 2 or crop.size == 0:
            raise ValueError(f"a crop is (height, width), not empty, got {crop.shape}")
        square(crop, out)
    return torch.from_numpy(squares)


def _pad_to_square(crop: np.ndarray, out: np.ndarray) -> None:
    """Resize so that the longer side fits, black beside it."""
    size, (height, width) = len(out), crop.shape
    scale = size / max(height, width)
    height, width = (max(1, round(side * scale)) for side in (height, width))
    top, left = ((size - side) // 2 for side in (height, width))
    out[:] = 0
    resized = Image.fromarray(crop).resize((width, height), Image.Resampling.BICUBIC)
    out[top : top + height, left : left + width] = resized


def _cut_to_square(crop: np.ndarray, out: np.ndarray) -> None:
    """Resize so that the shorter side fits, and keep the middle."""
    size, (height, width) = len(out), crop.shape
    shorter = min(height, width)
    height, width = (int(size * side / shorter) for side in (height, width))
    top, left = (round((side - size) / 2) for side in (height, width))
    resized = Image.fromarray(crop).resize((width, height), Image.Resampling.BICUBIC)
    out[:] = np.asarray(resized)[top : top + size, left : left + size]


def to_input(model: CLIP, squares: Tensor) -> Tensor:
    """The network's input from prepared crops, on its device.

    Args:
        model: CLIP.
        squares: uint8, shape (crops, size, size), from `prepare_crops`.

    Returns:
        float32, shape (crops, 3, size, size), normalised with CLIP's mean and deviation.
    """
    device, reading = _device(model), model.visual.preprocess_cfg
    mean, deviation = (
        torch.tensor(reading[name], device=device)[:, None, None] for name in ("mean", "std")
    )
    grey = squares.to(device, non_blocking=True).float()[:, None] / 255
    return (grey - mean) / deviation


def encode_crops(model: CLIP, squares: Tensor) -> Tensor:
    """Embeddings of prepared crops: the part of equation 4 that runs on the network's device.

    Args:
        model: CLIP.
        squares: uint8, shape (crops, size, size), from `prepare_crops`.

    Returns:
        float32 on the network's device, shape (crops, embedding), rows of length 1.
    """
    with torch.inference_mode():
        return normalize(model.encode_image(to_input(model, squares)).float(), dim=1)


def embed_crops(model: CLIP, crops: Sequence[np.ndarray], batch_size: int) -> Tensor:
    """Embeddings of crops (equation 4).

    Args:
        model: CLIP from `build_clip`.
        crops: uint8, shape (height, width) each, from `crop_to_mask`; of one slice or of several.
        batch_size: largest number of crops on the device at once.

    Returns:
        float32 on the CPU, shape (crops, embedding), rows of length 1.

    Raises:
        TypeError: for a crop of another dtype.
        ValueError: for an empty crop or a batch size below 1.
    """
    embeddings = in_batches(
        lambda batch: list(encode_crops(model, prepare_crops(model, batch)).cpu()),
        crops,
        batch_size=batch_size,
    )
    return torch.stack(embeddings) if embeddings else torch.empty(0, model.visual.output_dim)


def similarity(image_embeddings: Tensor, text_embedding: Tensor) -> Tensor:
    """Cosine similarity of crops and sentences (equation 5).

    Args:
        image_embeddings: shape (crops, embedding).
        text_embedding: shape (embedding,).

    Returns:
        Shape (crops,), between -1 and 1. (SaLIP multiplies by 100, which changes no choice.)
    """
    return normalize(image_embeddings, dim=1) @ normalize(text_embedding, dim=0)


def _device(model: CLIP) -> torch.device:
    """Where the network is."""
    return model.logit_scale.device
