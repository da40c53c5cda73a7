import math
import re

import pytest
import torch
from torch import nn

from lib.classification.bert_head import BertHead, UnbiasedLayerNorm

SMALL = {"width": 12, "steps": 3, "heads": 4, "feed_forward": 20}


def made_head(**kwargs) -> BertHead:
    """A small head with norms and biases that a mistake would show in."""
    torch.manual_seed(0)
    head = BertHead(**SMALL | kwargs)
    for weights in head.parameters():
        nn.init.normal_(weights, std=0.3)
    return head


def test_parameters_of_the_published_head():
    assert sum(weights.numel() for weights in BertHead().parameters()) == 3_155_456


def test_the_norm_is_the_published_formula():
    norm = UnbiasedLayerNorm(5, epsilon=0.1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    row = [1.0, -2.0, 0.5, 4.0, 0.0]
    mean = sum(row) / 5
    deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / 4)
    expected = [
        g * (x - mean) / (deviation + 0.1) + b
        for x, g, b in zip(row, norm.weight.tolist(), norm.bias.tolist(), strict=True)
    ]
    assert norm(torch.tensor(row)).tolist() == pytest.approx(expected, rel=1e-5)
    assert UnbiasedLayerNorm(5).epsilon == 1e-6


def test_a_constant_row_is_no_division_by_zero():
    values = torch.ones(2, 4, requires_grad=True)
    normed = UnbiasedLayerNorm(4)(values)
    normed.sum().backward()
    assert torch.equal(normed, torch.zeros(2, 4)) and torch.isfinite(values.grad).all()


def pytorchs_layer(head: BertHead) -> nn.TransformerEncoderLayer:
    """PyTorch's layer with the weights and norms of a head."""
    layer = nn.TransformerEncoderLayer(
        SMALL["width"],
        SMALL["heads"],
        SMALL["feed_forward"],
        dropout=0.0,
        activation=nn.GELU(approximate="tanh"),
        norm_first=True,
        batch_first=True,
    )
    ours = head.layer
    inputs = (ours.attention.query, ours.attention.key, ours.attention.value)
    layer.self_attn.in_proj_weight = nn.Parameter(torch.cat([part.weight for part in inputs]))
    layer.self_attn.in_proj_bias = nn.Parameter(torch.cat([part.bias for part in inputs]))
    layer.self_attn.out_proj = ours.attention.output
    layer.linear1, layer.linear2 = ours.feed_forward[0], ours.feed_forward[3]
    layer.norm1, layer.norm2 = ours.attention_norm, ours.feed_forward_norm
    return layer


def test_the_layer_computes_what_pytorchs_does_without_dropout():
    head = made_head(dropout=0.0)
    tokens, kept = torch.randn(5, 4, 12), torch.rand(5, 4) < 0.5
    kept[:, 0] = True
    theirs = pytorchs_layer(head)  # in training mode, which leaves out its fused path
    expected = theirs(tokens, src_key_padding_mask=~kept)
    weights = theirs.self_attn(
        *3 * [head.layer.attention_norm(tokens)],
        key_padding_mask=~kept,
        average_attn_weights=False,
    )[1]
    ours = head.layer(tokens, kept)
    torch.testing.assert_close(ours[0], expected)
    torch.testing.assert_close(ours[1], weights)


def test_the_head_is_that_layer_on_class_token_and_positions():
    head, features = made_head(dropout=0.0).eval(), torch.randn(2, 3, 12)
    tokens = torch.cat([head.class_token.repeat(2, 1, 1), features], dim=1) + head.positions
    expected = pytorchs_layer(head).train()(tokens)[:, 0]
    torch.testing.assert_close(head(features).embedding, expected)


def test_attention_is_the_class_tokens_and_sums_to_one():
    features = torch.randn(6, 3, 12)
    for head in (made_head().train(), made_head().eval()):
        attention = head(features).attention
        assert attention.shape == (6, 4, 4)
        torch.testing.assert_close(attention.sum(-1), torch.ones(6, 4))


def test_dropout_acts_on_attention_only_after_it_is_given():
    head, features = made_head(dropout=0.5, kept=1.0), torch.randn(6, 3, 12)
    head.dropout.p = 0.0  # of the embedding, which comes before
    given = head.train()(features).attention
    torch.testing.assert_close(given, head.eval()(features).attention)


def test_dropout_is_in_the_six_places():
    head, features = made_head(dropout=1e-9), torch.randn(2, 3, 12)
    calls = []
    for layer in (layer for layer in head.modules() if isinstance(layer, nn.Dropout)):
        layer.register_forward_hook(lambda _, __, output: calls.append(tuple(output.shape)))
    head(features)
    tokens = (2, 4, 12)
    # embedding, attention, its branch, feed-forward, its branch, output
    assert calls == [tokens, (2, 4, 4, 4), tokens, (2, 4, 20), tokens, tokens]


def test_a_masked_step_has_no_influence_and_a_kept_one_has():
    head, features = made_head(dropout=0.0, kept=0.5), torch.randn(8, 3, 12)

    def seeded(given):
        torch.manual_seed(3)
        return head(given)

    before = seeded(features)
    kept = (before.attention[:, :, 1:] > 0).all(1)  # the same in all heads
    assert torch.equal(kept, (before.attention[:, :, 1:] > 0).any(1))
    assert kept.any() and not kept.all()
    changed = features + torch.randn_like(features) * ~kept[..., None]
    assert torch.equal(seeded(changed).embedding, before.embedding)
    changed = features + torch.randn_like(features) * kept[..., None]
    moved = (seeded(changed).embedding != before.embedding).any(1)
    assert torch.equal(moved, kept.any(1))


def test_class_token_is_always_kept_and_steps_as_often_as_asked():
    head, features = made_head(kept=0.8), torch.randn(4000, 3, 12)
    seen = head(features).attention[:, 0] > 0
    assert seen[:, 0].all()
    assert seen[:, 1:].float().mean().item() == pytest.approx(0.8, abs=0.015)
    alone = made_head(kept=0.0)(features[:2]).attention
    assert torch.equal(alone, torch.tensor([1.0, 0, 0, 0]).expand(2, 4, 4))


def test_evaluation_looks_at_all_and_does_not_draw():
    features = torch.randn(4, 3, 12)
    few, all_ = made_head(kept=0.1).eval(), made_head(kept=1.0).eval()
    assert torch.equal(few(features).embedding, all_(features).embedding)
    assert (few(features).attention > 0).all()


def test_training_repeats_under_a_seed():
    head, features = made_head(), torch.randn(4, 3, 12)
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append(head(features).embedding)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_positions_and_class_token_start_small_and_steps_are_told_apart():
    head = BertHead()
    assert head.positions.std().item() == pytest.approx(0.02, rel=0.1)
    assert head.class_token.std().item() == pytest.approx(0.02, rel=0.15)
    head, features = made_head().eval(), torch.randn(1, 3, 12)
    assert not torch.allclose(head(features).embedding, head(features.flip(1)).embedding)


def test_every_parameter_learns():
    head = made_head()
    head(torch.randn(4, 3, 12)).embedding.square().sum().backward()
    for name, weights in head.named_parameters():
        # a bias of the keys moves all scores of a query alike, which softmax does not see
        assert (weights.grad.abs().max() > 1e-4) == (name != "layer.attention.key.bias"), name


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="5 heads do not share a width of 12 evenly"):
        BertHead(width=12, steps=3, heads=5)
    with pytest.raises(ValueError, match=r"kept is a probability, got 1.5"):
        BertHead(kept=1.5)
    with pytest.raises(ValueError, match=re.escape("(steps, width) of (3, 12), got (2, 12)")):
        made_head()(torch.zeros(1, 2, 12))
