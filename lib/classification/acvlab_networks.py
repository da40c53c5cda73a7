"""The three networks of ACVLab: a CNN on slices, an LSTM on their embeddings; how all three judge.

The third, a Swin V2 CR on the picture of the embeddings, is timm's (FACTS 6.3).
"""

import numpy as np
import torch
from torch import Tensor, nn

from lib.classification.slice_range import draw

LARGEST_GREY = 255.0
SLICES_PER_CHUNK = 64  # through the CNN at a time when whole scans are embedded; bounds memory


class SliceNetwork(nn.Module):
    """Step 1: a CNN that judges single slices, and embeds them on the way.

    Args:
        backbone: from (slices, 3, height, width) to pooled features (slices, feature_width).
        feature_width: size of the backbone's features.
        embedding_width: size of an embedding.
        batch_norm: standardise the backbone's features first.
        mean: of each colour channel on the scale 0 to 1, subtracted inside.
        deviation: of each colour channel on that scale, divided by inside.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        feature_width: int,
        embedding_width: int,
        mean: Tensor,
        deviation: Tensor,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        norm = nn.BatchNorm1d(feature_width, affine=False) if batch_norm else nn.Identity()
        self.normalisation = norm
        self.embedding = nn.Linear(feature_width, embedding_width)
        self.output = nn.Linear(embedding_width, 1)
        self.register_buffer("mean", mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", deviation.view(1, 3, 1, 1), persistent=False)

    def embed(self, slices: Tensor) -> Tensor:
        """Embeddings of slices.

        Args:
            slices: uint8, shape (slices, height, width).

        Returns:
            Shape (slices, embedding_width).
        """
        colour = slices[:, None].expand(-1, 3, -1, -1).float() / LARGEST_GREY
        features = self.backbone((colour - self.mean) / self.deviation)
        return self.embedding(self.normalisation(features))

    def judge(self, embeddings: Tensor) -> Tensor:
        """Logit of COVID-19 of each embedding, shape (slices,)."""
        return self.output(embeddings).squeeze(1)

    def forward(self, volumes: Tensor) -> Tensor:
        """Logit of COVID-19 of each slice of some scans.

        Args:
            volumes: uint8, shape (scans, slices, height, width).

        Returns:
            Shape (scans, slices).
        """
        return self.judge(self.embed(volumes.flatten(0, 1))).view(volumes.shape[:2])


class Standardise(nn.Module):
    """Embeddings with mean 0 and deviation 1 over the training part, feature by feature.

    How the original scales them is not known; unscaled, the rates of step 2 would mean something
    else for every training of step 1.

    Args:
        width: number of features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def measure(self, embeddings: Tensor) -> None:
        """Take mean and deviation of embeddings, shape (slices, width)."""
        self.mean.copy_(embeddings.mean(0))
        self.deviation.copy_(embeddings.std(0, correction=0) + 1e-6)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Standardised embeddings, shape (..., width)."""
        return (embeddings - self.mean) / self.deviation


class SequenceNetwork(nn.Module):
    """Step 2a: a bidirectional LSTM over the embeddings of a scan.

    Args:
        embedding_width: size of an embedding.
        width: LSTM units in each direction.
        hidden_width: units of the layer behind it.
        layers: of the LSTM.
    """

    def __init__(
        self, *, embedding_width: int, width: int, hidden_width: int, layers: int = 4
    ) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(
            embedding_width, width, layers, bidirectional=True, batch_first=True
        )
        self.head = nn.Sequential(
            nn.Dropout(0.1),
            nn.Linear(2 * width, hidden_width),
            nn.LayerNorm(hidden_width),
            nn.ReLU(),
            nn.Dropout(0.15),
            nn.Linear(hidden_width, 1),
        )

    def forward(self, sequences: Tensor) -> Tensor:
        """Logit of COVID-19 of each scan, shape (scans,), from (scans, slices, embedding_width)."""
        _, (states, _) = self.recurrent(sequences)  # (2 x layers, scans, width), last layer last
        return self.head(torch.cat([states[-2], states[-1]], 1)).squeeze(1)


class ACVLab(nn.Module):
    """The three networks of the system.

    Args:
        slices: step 1, from slices to embeddings and logits.
        sequence: step 2a, from (scans, slices, embedding_width) to one logit per scan.
        picture: step 2b, from (scans, picture_slices, embedding_width) to two class scores.
        picture_slices: height of the picture.
    """

    def __init__(
        self,
        *,
        slices: SliceNetwork,
        sequence: nn.Module,
        picture: nn.Module,
        picture_slices: int,
    ) -> None:
        super().__init__()
        self.slices, self.sequence, self.picture = slices, sequence, picture
        self.picture_slices = picture_slices

    def embed(self, slices: Tensor) -> Tensor:
        """Embeddings of the slices of a scan, some at a time: (slices, height, width), uint8."""
        return torch.cat([self.slices.embed(part) for part in slices.split(SLICES_PER_CHUNK)])

    def forward(
        self, slices: Tensor, *, draws: int, slices_per_scan: int, sequence_slices: int, seed: int
    ) -> dict[str, Tensor]:
        """What each network thinks of one scan.

        Every slice is embedded once; drawing embeddings equals drawing slices.

        Args:
            slices: uint8, the slice range of the scan, shape (slices, height, width).
            draws: over so many draws the probability of step 1 is averaged.
            slices_per_scan: slices in one of these draws.
            sequence_slices: slices drawn for the LSTM.
            seed: of all draws, so that a scan is judged the same in any company.

        Returns:
            Probability of COVID-19 by ``slices``, ``sequence`` and ``picture``, scalars.
        """
        embeddings = self.embed(slices)
        generator = np.random.default_rng(seed)
        drawn = [draw(len(slices), slices_per_scan, generator) for _ in range(draws)]
        sequence = embeddings[draw(len(slices), sequence_slices, np.random.default_rng(seed))]
        picture = embeddings[draw(len(slices), self.picture_slices, np.random.default_rng(seed))]
        chances = self.slices.judge(embeddings).float().sigmoid()
        return {
            "slices": chances[np.concatenate(drawn)].mean(),
            "sequence": self.sequence(sequence[None]).float().sigmoid()[0],
            "picture": self.picture(picture[None]).float().softmax(1)[0, 1],
        }
