import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from lib.foundation import clip

SENTENCES = ["A dark lung full of air.", "Vessels branch inside a lung.", "A fissure divides it."]


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return clip.build_clip("small")


@pytest.fixture(scope="module")
def official():
    """OpenAI's network without weights: shapes and preprocessing only, no memory."""
    with torch.device("meta"):
        return clip.build_clip("ViT-L-14")


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def test_the_official_network_has_the_published_size(official):
    assert sum(p.numel() for p in official.parameters()) == 427_616_513
    assert official.visual.output_dim == 768 and official.context_length == 77
    activations = {type(block.mlp.gelu).__name__ for block in official.transformer.resblocks}
    assert activations == {"QuickGELU"}  # OpenAI's weights are wrong with any other


def test_an_unknown_variant_is_one_sentence():
    with pytest.raises(ValueError, match="one of ViT-L-14, small, got 'ViT-B-32'"):
        clip.build_clip("ViT-B-32")


@pytest.mark.parametrize("variant", ["small", "official"])
@pytest.mark.parametrize(
    "shape", [(5, 200), (300, 6), (64, 64), (101, 77), (224, 225), (1, 1), (1, 9), (63, 65)]
)
def test_preparing_a_crop_equals_open_clips_own_transform(variant, shape, request):
    model = request.getfixturevalue(variant)
    crop, reading = picture(*shape), model.visual.preprocess_cfg
    transform = image_transform_v2(PreprocessCfg(**reading), is_train=False)
    expected = transform(Image.fromarray(crop).convert("RGB"))
    squares = clip.prepare_crops(model, [crop])
    on_cpu = torch.nn.Module()
    on_cpu.visual, on_cpu.logit_scale = model.visual, torch.zeros(())
    assert torch.equal(clip.to_input(on_cpu, squares)[0], expected)


def test_a_long_crop_is_seen_whole_by_the_small_network_and_cut_by_the_official(small, official):
    crop = np.zeros((8, 80), np.uint8)
    crop[:, :5] = crop[:, -5:] = 255
    assert clip.prepare_crops(small, [crop]).float().mean() > 0
    assert clip.prepare_crops(official, [crop]).float().mean() == 0


@settings(max_examples=60, deadline=None)
@given(
    grey=hnp.arrays(np.uint8, (7, 9)),
    mask=hnp.arrays(bool, (7, 9)).filter(np.any),
    cut_to_box=st.booleans(),
)
def test_a_crop_is_the_product_cut_to_the_box(grey, mask, cut_to_box):
    crop = clip.crop_to_mask(grey, mask, cut_to_box)
    assert crop.dtype == np.uint8 and crop.sum() == grey[mask].sum()
    if cut_to_box:
        rows, columns = np.nonzero(mask)
        assert crop.shape == (np.ptp(rows) + 1, np.ptp(columns) + 1)
    else:
        assert (crop == np.where(mask, grey, 0)).all()


def test_wrong_crops_are_one_sentence_each(small):
    grey, mask = picture(6, 6), np.ones((6, 6), bool)
    with pytest.raises(ValueError, match="an empty mask has no crop"):
        clip.crop_to_mask(grey, ~mask)
    with pytest.raises(ValueError, match="differ in shape"):
        clip.crop_to_mask(grey, mask[:3])
    with pytest.raises(TypeError, match="uint8 grey values, got int16"):
        clip.crop_to_mask(grey.astype(np.int16), mask)
    with pytest.raises(TypeError, match="uint8 grey values, got float64"):
        clip.embed_crops(small, [grey / 2], 4)
    with pytest.raises(ValueError, match=r"not empty, got \(0, 5\)"):
        clip.embed_crops(small, [np.zeros((0, 5), np.uint8)], 4)


def test_sentences_are_encoded_one_by_one_averaged_then_normalised(small):
    with torch.no_grad():
        encoded = [small.encode_text(clip.clip_tokenizer()([s], 48))[0] for s in SENTENCES]
    mean = torch.stack(encoded).mean(dim=0)
    expected = mean / mean.square().sum().sqrt()
    found = clip.embed_sentences(small, SENTENCES)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(clip.embed_sentences(small, SENTENCES[::-1]), found, atol=1e-6)


@pytest.mark.parametrize("sentences", [[], (), "lung"])
def test_without_a_list_of_sentences_there_is_no_question(small, sentences):
    with pytest.raises(ValueError, match="a list of at least one"):
        clip.embed_sentences(small, sentences)


def test_a_sentence_that_does_not_fit_is_refused_rather_than_cut(small):
    with pytest.raises(ValueError, match="62 tokens, at most 48 fit: 'lung lung"):
        clip.embed_sentences(small, ["lung " * 60])
    with pytest.raises(ValueError, match="a sentence is empty"):
        clip.embed_sentences(small, ["a lung", " "])


def test_crops_are_embedded_alike_in_any_batch_and_have_length_1(small):
    crops = [picture(10 + 7 * n, 40 - 5 * n, seed=n) for n in range(6)]
    together = clip.embed_crops(small, crops, 6)
    assert together.shape == (6, 64) and together.dtype == torch.float32
    assert torch.allclose(together.norm(dim=1), torch.ones(6))
    assert torch.allclose(clip.embed_crops(small, crops, 2), together, atol=1e-5)
    by_hand = clip.encode_crops(small, clip.prepare_crops(small, crops))
    assert torch.allclose(by_hand, together, atol=1e-5)
    assert clip.embed_crops(small, [], 4).shape == (0, 64)


def test_similarity_is_the_cosine():
    images, text = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]]), torch.tensor([5.0, 0.0])
    assert torch.allclose(clip.similarity(images, text), torch.tensor([0.6, 0.0, -1.0]))
    angle = torch.tensor([[math.cos(0.3), math.sin(0.3)]])
    assert clip.similarity(angle, text).item() == pytest.approx(math.cos(0.3))
