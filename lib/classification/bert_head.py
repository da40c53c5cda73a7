"""Pooling of time steps by a BERT layer with a class token (paper section 4.1; FACTS 4.8).

A learned class token is put before the features of the time steps, a learned embedding of the
position is added, and one transformer layer lets all of them look at each other; what comes out in
the place of the class token stands for the clip (Kalfaoglu et al. 2020, after Devlin et al. 2019).

Parameters at the published sizes, 3,155,456: attention 4 x 262,656 = 1,050,624, feed-forward
2,099,712, two norms 2,048, positions 5 x 512 = 2,560, class token 512.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

EMBEDDING_DEVIATION = 0.02  # of the normal start of positions and class token


class BertOutput(NamedTuple):
    """What the head makes of clips.

    Attributes:
        embedding: output of the class token, shape (scans, width).
        attention: weights with which the class token looks at itself (first) and the time steps,
            before dropout, shape (scans, heads, steps + 1); each row sums to 1.
    """

    embedding: Tensor
    attention: Tensor


class UnbiasedLayerNorm(nn.Module):
    """Layer norm as the published head has it: gain * (x - mean) / (s + epsilon) + bias.

    Here s is the unbiased standard deviation, over width - 1, and epsilon stands outside the root;
    PyTorch's own divides by the root of (variance over width + epsilon), which gives values larger
    by a factor of about 1 + 1 / (2 * width).
    """

    def __init__(self, width: int, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, values: Tensor) -> Tensor:
        """Normalise the last axis."""
        deviation, mean = torch.std_mean(values, dim=-1, keepdim=True)
        return self.weight * (values - mean) / (deviation + self.epsilon) + self.bias


class SelfAttention(nn.Module):
    """Scaled dot-product attention of tokens, in several heads."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not share a width of {width} evenly")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Mix tokens.

        Args:
            tokens: shape (scans, tokens, width).
            kept: which tokens may be looked at, bool, shape (scans, tokens).

        Returns:
            The mixed tokens, same shape, and the weights before dropout, shape (scans, heads,
            tokens looking, tokens looked at); those of a token that is not kept are 0.
        """
        query, key, value = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )  # each (scans, heads, tokens, width / heads)
        scores = query @ key.transpose(-1, -2) / key.shape[-1] ** 0.5
        weights = scores.masked_fill(~kept[:, None, None, :], -torch.inf).softmax(-1)
        mixed = self.dropout(weights) @ value
        return self.output(mixed.transpose(1, 2).flatten(2)), weights


class TransformerLayer(nn.Module):
    """Attention, then a feed-forward network, each added to what it was given after a norm."""

    def __init__(self, *, width: int, heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = UnbiasedLayerNorm(width)
        self.attention = SelfAttention(width=width, heads=heads, dropout=dropout)
        self.feed_forward_norm = UnbiasedLayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, feed_forward),
            nn.GELU(approximate="tanh"),
            nn.Dropout(dropout),
            nn.Linear(feed_forward, width),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """As `SelfAttention`: tokens of the same shape, and the weights of the attention."""
        mixed, weights = self.attention(self.attention_norm(tokens), kept)
        tokens = tokens + self.dropout(mixed)
        tokens = tokens + self.dropout(self.feed_forward(self.feed_forward_norm(tokens)))
        return self.dropout(tokens), weights


class BertHead(nn.Module):
    """From features of the time steps to one embedding of the clip.

    Args:
        width: channels of the features.
        steps: time steps of a clip.
        heads: of the attention; they share the width.
        feed_forward: width of the layer inside the feed-forward network.
        dropout: probability, on embedded tokens, attention weights, the layer inside the
            feed-forward network, both branches, and the output of the layer.
        kept: in training, probability that a time step may be looked at; the class token always
            is. Evaluation looks at all.

    Raises:
        ValueError: if the heads cannot share the width, or ``kept`` is no probability.
    """

    def __init__(
        self,
        *,
        width: int = 512,
        steps: int = 4,
        heads: int = 8,
        feed_forward: int = 2048,
        dropout: float = 0.1,
        kept: float = 0.8,
    ) -> None:
        super().__init__()
        if not 0 <= kept <= 1:
            raise ValueError(f"kept is a probability, got {kept}")
        self.kept = kept
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + steps, width))
        for embedding in (self.class_token, self.positions):
            nn.init.normal_(embedding, std=EMBEDDING_DEVIATION)
        self.dropout = nn.Dropout(dropout)
        self.layer = TransformerLayer(
            width=width, heads=heads, feed_forward=feed_forward, dropout=dropout
        )

    def forward(self, features: Tensor) -> BertOutput:
        """Pool the time steps of clips.

        Args:
            features: shape (scans, steps, width).

        Raises:
            ValueError: for another number of steps or another width.
        """
        _, places, width = self.positions.shape
        if features.shape[1:] != (places - 1, width):
            got = tuple(features.shape[1:])
            raise ValueError(f"the head takes (steps, width) of {(places - 1, width)}, got {got}")
        tokens = torch.cat([self.class_token.expand(len(features), -1, -1), features], dim=1)
        tokens = self.dropout(tokens + self.positions)  # (scans, 1 + steps, width)

        tokens, attention = self.layer(tokens, self._draw_kept(features))
        return BertOutput(embedding=tokens[:, 0], attention=attention[:, :, 0])

    def _draw_kept(self, features: Tensor) -> Tensor:
        """Which tokens may be looked at, bool, shape (scans, 1 + steps)."""
        scans, steps, _ = features.shape
        probability = self.kept if self.training else 1.0
        drawn = torch.rand(scans, steps, device=features.device) < probability
        return torch.cat([drawn.new_ones(scans, 1), drawn], dim=1)
