"""SAM's mask decoder for many prompts on one picture, without doing anything twice.

The original decoder repeats the picture's embedding for every prompt and then works on the copies.
Here, with the weights of segment-anything's own modules:

- what the first layer makes of the picture alone (three projections) is computed once per picture;
- predicted mask quality comes before the upscaling, so that only prompts with a mask good enough
  are upscaled;
- prompts are worked on in chunks that fit the processor's cache.

``exact`` keeps every sum in the original's order. Otherwise the projections of the picture's side
are folded into the few tokens they are multiplied with: for 7 tokens and 8 heads,
``keys @ (W q)`` instead of ``(keys @ W) q``, which takes less than half of the operations of an
attention and gives the same numbers up to rounding.

Operations per prompt at ViT size (4,096 picture tokens of 256 channels), in 10^9 (multiply and add
count as two): original 3.62; exact 1.99 + 0.82 if upscaled; folded 0.83 + 0.82 if upscaled.
"""

from typing import NamedTuple

import torch
from segment_anything.modeling import Sam
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor

CACHE_BYTES = 16 * 2**20  # of one chunk's picture tokens on a CPU
LEAST_CHUNK = 4  # with fewer prompts the libraries sum in another order


class SharedPicture(NamedTuple):
    """What is the same for every prompt on one picture.

    Attributes:
        keys: picture tokens with the embedding for "no mask given", shape (1, tokens, channels).
        positions: their positional encoding, same shape.
        first_keys: keys of the first attention of tokens to the picture, (1, tokens, inner).
        first_values: its values, same shape.
        first_queries: queries of the first attention of the picture to tokens, same shape.
        grid: rows and columns of the picture's embedding.
    """

    keys: Tensor
    positions: Tensor
    first_keys: Tensor
    first_values: Tensor
    first_queries: Tensor
    grid: tuple[int, int]


class Decoded(NamedTuple):
    """What the decoder makes of some prompts, before upscaling.

    Attributes:
        quality: predicted IoU of each mask, shape (prompts, 4); the first mask is the one for
            unambiguous prompts.
        mask_tokens: shape (prompts, 4, channels).
        keys: the picture as each prompt sees it, shape (prompts, picture tokens, channels).
    """

    quality: Tensor
    mask_tokens: Tensor
    keys: Tensor

    def take(self, chosen: Tensor) -> "Decoded":
        """Some of the prompts, by index or by truth value."""
        return self if chosen.all() else Decoded(*(values[chosen] for values in self))


def share_picture(sam: Sam, embedding: Tensor) -> SharedPicture:
    """Compute once what all prompts on a picture share.

    Args:
        sam: the network.
        embedding: of its encoder, shape (1, channels, rows, columns).

    Returns:
        The shared part.
    """
    no_mask = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    keys = (embedding + no_mask).flatten(2).transpose(1, 2)
    positions = sam.prompt_encoder.get_dense_pe().flatten(2).transpose(1, 2)
    first = sam.mask_decoder.transformer.layers[0]
    placed = keys + positions
    return SharedPicture(
        keys=keys,
        positions=positions,
        first_keys=first.cross_attn_token_to_image.k_proj(placed),
        first_values=first.cross_attn_token_to_image.v_proj(keys),
        first_queries=first.cross_attn_image_to_token.q_proj(placed),
        grid=tuple(embedding.shape[-2:]),
    )


def decode(sam: Sam, shared: SharedPicture, prompts: Tensor, *, exact: bool) -> Decoded:
    """Run the two-way transformer for some prompts and predict the quality of their masks.

    Args:
        sam: the network.
        shared: of `share_picture`.
        prompts: embedded points or boxes, shape (prompts, tokens, channels).
        exact: whether to keep the order of the original's sums.

    Returns:
        Quality, mask tokens and picture tokens.
    """
    decoder = sam.mask_decoder
    given = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([given.expand(len(prompts), -1, -1), prompts], dim=1)

    # First layer: the picture is still the same for all prompts.
    first, second = decoder.transformer.layers
    queries = first.norm1(first.self_attn(tokens, tokens, tokens))
    queries = _look_at_shared_picture(first, queries, tokens, shared)
    keys = _picture_looks_first(first, queries, tokens, shared, exact=exact)

    # Second layer and the last look: now every prompt has a picture of its own.
    placed = queries + tokens
    queries = second.norm1(queries + second.self_attn(placed, placed, queries))
    look, answer = (_look, _picture_looks) if exact else (_look_folded, _picture_looks_folded)
    seen = look(second.cross_attn_token_to_image, queries + tokens, keys, shared.positions)
    queries = second.norm2(queries + seen)
    queries = second.norm3(queries + second.mlp(queries))
    update = answer(second.cross_attn_image_to_token, queries + tokens, queries, keys, shared)
    keys = second.norm4(update.add_(keys))
    last = decoder.transformer.final_attn_token_to_image
    queries = queries + look(last, queries + tokens, keys, shared.positions)
    queries = decoder.transformer.norm_final_attn(queries)

    quality = decoder.iou_prediction_head(queries[:, 0])
    return Decoded(quality, queries[:, 1 : 1 + decoder.num_mask_tokens], keys)


def upscale(sam: Sam, decoded: Decoded, grid: tuple[int, int]) -> Tensor:
    """Low-resolution mask logits of decoded prompts.

    Args:
        sam: the network.
        decoded: of `decode`, or some of its rows.
        grid: rows and columns of the picture's embedding.

    Returns:
        Shape (prompts, 4, 4 * rows, 4 * columns).
    """
    decoder = sam.mask_decoder
    count, _, channels = decoded.keys.shape
    picture = decoded.keys.transpose(1, 2).reshape(count, channels, *grid)
    upscaled = decoder.output_upscaling(picture)
    weights = torch.stack(
        [
            network(decoded.mask_tokens[:, index])
            for index, network in enumerate(decoder.output_hypernetworks_mlps)
        ],
        dim=1,
    )
    return (weights @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])


def prompts_per_chunk(shared: SharedPicture, most: int) -> int:
    """How many prompts to decode at a time: all on a GPU, what fits the cache on a CPU."""
    if shared.keys.device.type != "cpu":
        return most
    return max(
        LEAST_CHUNK, min(most, CACHE_BYTES // (shared.keys.numel() * shared.keys.element_size()))
    )


# ------------------------------------------------------------------- first layer, shared picture
def _look_at_shared_picture(
    layer: TwoWayAttentionBlock, queries: Tensor, tokens: Tensor, shared: SharedPicture
) -> Tensor:
    """Tokens attend to a picture that is the same for all prompts; then their inner layer."""
    attention = layer.cross_attn_token_to_image
    q = _heads(attention, attention.q_proj(queries + tokens))  # (prompts, heads, tokens, inner)
    k, v = _heads(attention, shared.first_keys)[0], _heads(attention, shared.first_values)[0]
    prompts, heads, count, inner = q.shape
    q = q.transpose(0, 1).reshape(heads, prompts * count, inner)
    weights = _softmax(q @ k.transpose(1, 2), inner)  # (heads, prompts * tokens, picture)
    seen = (weights @ v).unflatten(1, (prompts, count)).permute(1, 2, 0, 3).flatten(2)
    queries = layer.norm2(queries + attention.out_proj(seen))
    return layer.norm3(queries + layer.mlp(queries))


def _picture_looks_first(
    layer: TwoWayAttentionBlock,
    queries: Tensor,
    tokens: Tensor,
    shared: SharedPicture,
    *,
    exact: bool,
) -> Tensor:
    """The shared picture attends to the tokens of each prompt, and so becomes the prompt's own."""
    attention = layer.cross_attn_image_to_token
    q = _heads(attention, shared.first_queries)  # (1, heads, picture, inner)
    k = _heads(attention, attention.k_proj(queries + tokens))
    v = _heads(attention, attention.v_proj(queries))
    if exact:
        update = _attend(attention, q, k, v)
    else:
        update = _mix(attention, torch.softmax(_scaled(k) @ q.transpose(2, 3), dim=2), v)
    return layer.norm4(update.add_(shared.keys))


# --------------------------------------------------------- later layers, sums in original order
def _look(attention: Attention, queries: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    """Tokens attend to the picture."""
    return attention(q=queries, k=keys + positions, v=keys)


def _picture_looks(
    attention: Attention, placed: Tensor, queries: Tensor, keys: Tensor, shared: SharedPicture
) -> Tensor:
    """The picture attends to the tokens."""
    return attention(q=keys + shared.positions, k=placed, v=queries)


def _attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with separate heads; ``q`` may be the same for all prompts."""
    weights = _softmax(q @ k.transpose(2, 3), q.shape[-1])
    return attention.out_proj((weights @ v).transpose(1, 2).flatten(2))


# ------------------------------------------------------------- later layers, projections folded
def _look_folded(attention: Attention, queries: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    """`_look` with the projections of the picture applied to the tokens instead.

    The bias of the keys adds the same to every score of a token and cancels in the softmax; the
    weights of a token sum to one, so the bias of the values is added once.
    """
    heads, inner = attention.num_heads, attention.internal_dim // attention.num_heads
    q = _scaled(_heads(attention, attention.q_proj(queries)))  # (prompts, heads, tokens, inner)
    to_keys = attention.k_proj.weight.unflatten(0, (heads, inner))  # (heads, inner, channels)
    to_values = attention.v_proj.weight.unflatten(0, (heads, inner))
    folded = q @ to_keys  # (prompts, heads, tokens, channels)
    scores = folded.flatten(1, 2) @ keys.transpose(1, 2)
    scores += folded.flatten(0, 2).matmul(positions[0].T).view_as(scores)
    context = torch.softmax(scores, dim=-1) @ keys  # (prompts, heads * tokens, channels)
    seen = context.unflatten(1, (heads, -1)) @ to_values.transpose(1, 2)
    return attention.out_proj(seen.transpose(1, 2).flatten(2) + attention.v_proj.bias)


def _picture_looks_folded(
    attention: Attention, placed: Tensor, queries: Tensor, keys: Tensor, shared: SharedPicture
) -> Tensor:
    """`_picture_looks` with the projections of the picture applied to the tokens instead."""
    heads, inner = attention.num_heads, attention.internal_dim // attention.num_heads
    k = _scaled(_heads(attention, attention.k_proj(placed)))  # (prompts, heads, tokens, inner)
    v = _heads(attention, attention.v_proj(queries))
    folded = k @ attention.q_proj.weight.unflatten(0, (heads, inner))
    scores = folded.flatten(1, 2) @ keys.transpose(1, 2)  # (prompts, heads * tokens, picture)
    scores += folded.flatten(0, 2).matmul(shared.positions[0].T).view_as(scores)
    scores = scores.unflatten(1, (heads, -1))
    scores += k @ attention.q_proj.bias.view(heads, inner, 1)
    return _mix(attention, torch.softmax(scores, dim=2), v)


def _mix(attention: Attention, weights: Tensor, v: Tensor) -> Tensor:
    """Sum of the tokens' values by weights (prompts, heads, tokens, picture), projected out."""
    heads, inner = attention.num_heads, attention.internal_dim // attention.num_heads
    out = attention.out_proj.weight.unflatten(1, (heads, inner)).permute(1, 2, 0)
    values = (v @ out).flatten(1, 2)  # (prompts, heads * tokens, channels)
    return weights.flatten(1, 2).transpose(1, 2) @ values + attention.out_proj.bias


def _heads(attention: Attention, x: Tensor) -> Tensor:
    """Split channels into heads: (prompts, heads, tokens, channels per head)."""
    return x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)


def _scaled(q: Tensor) -> Tensor:
    """Queries or keys divided by the root of their length, as attention scores are."""
    return q / q.shape[-1] ** 0.5


def _softmax(scores: Tensor, inner: int) -> Tensor:
    """Attention weights over the last axis, in the original's order: divide, then normalise."""
    return torch.softmax(scores.div_(inner**0.5), dim=-1)
