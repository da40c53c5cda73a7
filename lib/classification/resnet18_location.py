"""ResNet18 with location attention, an approximation (FACTS 6.10).

Xu et al. 2020 cut candidate patches out of scans with a 3-D segmentation network, classify each
patch with ResNet-18 and its place in the lung, appended to the features before the fully connected
layer, and join the patches of a scan by the Noisy-OR rule. Neither code nor weights are public.

Here a slice is judged alone, as the paper of Mask R-CNN compares it, and nothing proposes patches.
So a slice is divided into a grid of equal patches on the last features of ResNet-18. The place of a
patch is the distance of its middle from the nearest edge of the slice, relative to the diagonal of
the slice: no lung mask reaches this network. Noisy-OR then runs over the patches of the slice.
"""

import math
from collections.abc import Sequence

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from lib.classification.pictures import predict, shown, train_pictures
from lib.classification.task import Card, Task, Trained

__all__ = ["CARD", "VARIANTS", "build", "predict", "shown", "train"]

CONTROL = 0  # index of the class of pictures without any disease
SMALLEST = 1e-6  # of a probability, so that its logarithm is finite

VARIANTS = {
    "paper": {"widths": [64, 128, 256, 512], "grid": 4},
    # The same layers, a quarter as wide, for the phantom on two CPU cores.
    "small": {"widths": [16, 32, 64, 128], "grid": 4},
}

CARD = Card(
    name="ResNet18",
    source="Xu et al. 2020; FACTS 6.10",
    published="ResNet-18 on candidate patches of a 3-D segmentation, place of the patch appended "
    "before the fully connected layer, patches of a scan joined by Noisy-OR",
    ours="no code is public: a grid of patches of every slice instead of candidates, place "
    "relative to the edge of the slice instead of the lung's, Noisy-OR over the patches of one "
    "slice",
    parameters=11_178_054,
    approximation=True,
)


class LocationResNet(nn.Module):
    """Patches of a picture, each with its place, joined to class scores of the picture.

    Args:
        trunk: pictures to features, shape (pictures, width, rows, columns).
        width: channels of these features.
        grid: patches along each side.
        classes: number of outputs, the first one is that of pictures without disease.
    """

    def __init__(self, trunk: nn.Module, *, width: int, grid: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.trunk, self.pool = trunk, nn.AdaptiveAvgPool2d(grid)
        self.output = nn.Linear(width + 1, classes)
        self.register_buffer("places", distances_from_edge(grid), persistent=False)
        # Every other class starts at the same share of a patch, so small that half of all pictures
        # are without disease; from equal shares hardly any would be.
        healthy = 0.5 ** (1 / grid**2)
        nn.init.zeros_(self.output.bias)
        with torch.no_grad():
            self.output.bias[CONTROL] = math.log((classes - 1) * healthy / (1 - healthy))

    def forward(self, pictures: Tensor) -> Tensor:
        """Class scores.

        Args:
            pictures: colours 0 to 1, shape (pictures, 3, height, width).

        Returns:
            Logits, shape (pictures, classes), which are logarithms of `noisy_or`.
        """
        features = self.pool(self.trunk(pictures)).flatten(2).transpose(1, 2)
        places = self.places.expand(len(pictures), -1).unsqueeze(2)  # (pictures, patches, 1)
        patches = self.output(torch.cat([features, places.to(features.dtype)], dim=2))
        return noisy_or(patches)


def noisy_or(patches: Tensor) -> Tensor:
    """Class scores of pictures from those of their patches.

    A picture has a disease if at least one patch has it, and is without disease if all are. The
    probabilities of the diseases and of none do not sum to 1, as more than one may be there.

    Args:
        patches: logits, shape (pictures, patches, classes).

    Returns:
        Logarithms of the probabilities, shape (pictures, classes).
    """
    shares = functional.log_softmax(patches.float(), dim=2)
    absent = (-shares.exp()).clamp(min=SMALLEST - 1).log1p().sum(dim=1)  # of any disease
    present = (-absent.expm1()).clamp(min=SMALLEST).log()  # exact for small probabilities too
    return torch.cat([shares[:, :, CONTROL].sum(1, keepdim=True), present[:, CONTROL + 1 :]], dim=1)


def distances_from_edge(grid: int) -> Tensor:
    """Place of each patch: distance of its middle from the nearest edge, in diagonals of a square.

    Args:
        grid: patches along each side.

    Returns:
        float32, shape (grid * grid,), rows one after another.
    """
    middles = (torch.arange(grid) + 0.5) / grid
    nearest = torch.minimum(middles, 1 - middles)
    return torch.minimum(nearest[:, None], nearest[None]).flatten() / math.sqrt(2)


def build(
    *, widths: Sequence[int] = (64, 128, 256, 512), grid: int = 4, classes: int = 3
) -> LocationResNet:
    """The approximation, from pictures (pictures, 3, size, size), 0 to 1, to logits.

    Args:
        widths: channels of the four stages of ResNet-18.
        grid: patches along each side.
        classes: number of outputs.
    """
    trunk = timm.create_model(
        "resnet18", channels=tuple(widths), num_classes=0, global_pool="", pretrained=False
    )
    model = LocationResNet(trunk, width=widths[-1], grid=grid, classes=classes)
    return model.to(memory_format=torch.channels_last)


def train(task: Task) -> Trained:
    """Train it on a task; settings as for ``train_pictures``, Adam.

    The probabilities that Noisy-OR gives do not sum to 1. Cross entropy and the softmax behind it,
    in training as in judging, take their logarithms for logits: each is divided by their sum, so
    exactly one class is said to be there.
    """
    return train_pictures(task, build, name=CARD.name)
