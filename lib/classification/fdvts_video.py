"""FDVTS of ECCV 2022 (CMC v2): contrastive mixup classification with a video transformer.

Source: Hou et al. 2022 (CMC v2), of which abstract and results were at hand; FACTS 6.2. Its code is
not public: the transformer, the sizes and the slice augmentation are our reading. What it shares
with the entry of 2021 is in `contrastive_mixup`.
"""

from pathlib import Path

from lightning_fabric import seed_everything
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.video.swin_transformer import SwinTransformer3d

from lib.classification.contrastive_mixup import (
    ContrastiveNetwork,
    fit_contrastive,
    predict,
    shown,
)
from lib.classification.task import Card, Task, Trained

__all__ = ["CARD", "VARIANTS", "VideoEncoder", "build", "predict", "shown", "train"]

COLOURS = 3

VARIANTS = {
    # The numbers of Video Swin-T (Liu et al. 2022, section 3.3), which torchvision also brings with
    # weights of Kinetics-400.
    "paper": {
        "patch_size": [2, 4, 4],
        "embed_dim": 96,
        "depths": [2, 2, 6, 2],
        "num_heads": [3, 6, 12, 24],
        "window_size": [8, 7, 7],
        "stochastic_depth_prob": 0.1,
    },
    # The same architecture with fewer stages, blocks and channels; no stochastic depth, for it is
    # short, and larger patches, for speed.
    "small": {
        "patch_size": [2, 8, 8],
        "embed_dim": 48,
        "depths": [1, 1, 1],
        "num_heads": [2, 4, 8],
        "window_size": [4, 4, 4],
        "stochastic_depth_prob": 0.0,
        "projection_width": 32,
    },
}

CARD = Card(
    name="FDVTS (video transformer)",
    source="Hou et al. 2022 (CMC v2); FACTS 6.2",
    published="CMC v1 with a video transformer pre-trained on videos, mixup and cutmix, slice "
    "augmentation and small resolution",
    ours="no code is public: the transformer is Video Swin-T; small resolution is 32 slices of "
    "112 x 112 pixels; slice augmentation draws one slice of every segment of the scan; mixup or "
    "cutmix is drawn for each batch; losses and optimiser as in CMC v1",
    parameters=None,
    approximation=True,
)


class VideoEncoder(nn.Module):
    """A video transformer that sees grey volumes as videos, slices for frames.

    Args:
        transformer: from (videos, 3, frames, height, width) to features.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, volumes: Tensor) -> Tensor:
        """From (volumes, depth, height, width) to (volumes, feature_width)."""
        return self.transformer(volumes[:, None].expand(-1, COLOURS, -1, -1, -1))


def build(
    *,
    backbone_weights: str | Path | None = None,
    projection_width: int = 128,
    **numbers: object,
) -> ContrastiveNetwork:
    """Build FDVTS on torchvision's Video Swin transformer: ``build(**VARIANTS["paper"])``.

    Args:
        backbone_weights: safetensors file with torchvision's own names, for example those of
            Kinetics-400, as the published system starts from videos; None starts at random.
        projection_width: size of the embeddings.
        numbers: of torchvision's ``SwinTransformer3d``.

    Returns:
        The network, in training mode.
    """
    transformer = SwinTransformer3d(**numbers)
    transformer.head = nn.Identity()
    if backbone_weights is not None:
        states = load_file(backbone_weights)
        transformer.load_state_dict({name: states[name] for name in transformer.state_dict()})
    return ContrastiveNetwork(
        encoder=VideoEncoder(transformer),
        feature_width=transformer.num_features,
        projection_width=projection_width,
    ).train()


def train(task: Task) -> Trained:
    """Train FDVTS on a task.

    Args:
        task: settings as `contrastive_mixup.fit_contrastive` says.
    """
    seed_everything(task.seed, verbose=False)
    model = build(**task.variant)
    return Trained(model, {CARD.name: fit_contrastive(task, model)})
