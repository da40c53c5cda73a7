"""The shared decoder against segment-anything's own."""

import pytest
import torch

from lib.foundation.prompt_decoder import (
    decode,
    prompts_per_chunk,
    share_picture,
    upscale,
)


@pytest.fixture(scope="module")
def inputs(lively_sam):
    """An embedding, embedded prompts, and what the original decoder makes of them."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn((1, 64, 16, 16), generator=generator)
    points = torch.rand((10, 1, 2), generator=generator) * 128
    with torch.inference_mode():
        prompts, no_mask = lively_sam.prompt_encoder((points, torch.ones(10, 1)), None, None)
        expected = lively_sam.mask_decoder.predict_masks(
            embedding, lively_sam.prompt_encoder.get_dense_pe(), prompts, no_mask
        )
    return embedding, prompts, expected


def test_exact_keeps_every_bit(lively_sam, inputs):
    embedding, prompts, (masks, quality) = inputs
    with torch.inference_mode():
        shared = share_picture(lively_sam, embedding)
        decoded = decode(lively_sam, shared, prompts, exact=True)
        logits = upscale(lively_sam, decoded, shared.grid)
    assert torch.equal(decoded.quality, quality)
    assert torch.equal(logits, masks)


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_change_the_last_bits_at_most(lively_sam, inputs, chunk):
    """Matrix products of few rows may be summed in another order by the processor's library."""
    embedding, prompts, (_, quality) = inputs
    with torch.inference_mode():
        shared = share_picture(lively_sam, embedding)
        parts = [decode(lively_sam, shared, part, exact=True) for part in prompts.split(chunk)]
    found = torch.cat([part.quality for part in parts])
    torch.testing.assert_close(found, quality, rtol=1e-5, atol=1e-6)


def test_folding_changes_rounding_only(lively_sam, inputs):
    embedding, prompts, (masks, quality) = inputs
    with torch.inference_mode():
        shared = share_picture(lively_sam, embedding)
        decoded = decode(lively_sam, shared, prompts, exact=False)
        logits = upscale(lively_sam, decoded, shared.grid)
    torch.testing.assert_close(decoded.quality, quality, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, masks, rtol=1e-4, atol=1e-4)


def test_only_chosen_prompts_are_upscaled(lively_sam, inputs):
    embedding, prompts, (masks, _) = inputs
    chosen = torch.zeros(10, dtype=torch.bool)
    chosen[[1, 4, 5, 8]] = True
    with torch.inference_mode():
        shared = share_picture(lively_sam, embedding)
        decoded = decode(lively_sam, shared, prompts, exact=True)
        torch.testing.assert_close(
            upscale(lively_sam, decoded.take(chosen), shared.grid), masks[chosen]
        )
        assert len(upscale(lively_sam, decoded.take(~chosen & chosen), shared.grid)) == 0


def test_chunks_fit_the_cache_on_a_cpu(lively_sam, inputs):
    shared = share_picture(lively_sam, inputs[0])
    bytes_per_prompt = 256 * 64 * 4
    assert prompts_per_chunk(shared, 10_000) == 16 * 2**20 // bytes_per_prompt
    assert prompts_per_chunk(shared, 7) == 7
