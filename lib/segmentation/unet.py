"""The U-Net that papers 000 and 001 segment lungs with (FACTS 4.3): the network and what it sees.

This module and `lib.segmentation.bcdunet` have the same four functions, which is all that training
and inference (`lib.segmentation.lung_networks`) ask of a network: ``build``, ``pictures``,
``target`` and ``lungs``.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lib.data.masks import both_lungs
from lib.data.scan import Scan, to_grey


class UNet(nn.Module):
    """Encoder and decoder with skips, without batch normalisation.

    Per level two 3 x 3 convolutions with ReLU, halved by 2 x 2 maxima and doubled again by 3 x 3
    transposed convolutions with stride 2 and ReLU; dropout after each of the two deepest
    convolutions; one output channel. All weights start as He et al. 2015 draw them.

    Args:
        widths: channels of each level, the deepest last; published are 64, 128, 256, 512, 1024.
        dropout: probability of dropping at the deepest level.
    """

    def __init__(self, *, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        *outer, deepest = widths
        self.encoder = nn.ModuleList(map(convolution_pair, [1, *outer[:-1]], outer))
        self.deepest = convolution_pair(outer[-1], deepest, dropout=dropout)
        self.doubling = nn.ModuleList(map(_doubling, widths[:0:-1], outer[::-1]))
        self.decoder = nn.ModuleList(convolution_pair(2 * width, width) for width in outer[::-1])
        self.head = nn.Conv2d(outer[0], 1, 1)
        self.apply(initialise)

    def forward(self, pictures: Tensor) -> Tensor:
        """Score every pixel.

        Args:
            pictures: (batch, 1, height, width), 0 to 1; sides divisible by 2 per halving.

        Returns:
            Logits, same shape; their sigmoid is the published output.

        Raises:
            ValueError: if a side cannot be halved so often.
        """
        check_sides(pictures, halvings=len(self.encoder))
        features, skips = pictures, []
        for pair in self.encoder:
            skips.append(pair(features))
            features = functional.max_pool2d(skips[-1], 2)
        features = self.deepest(features)
        for doubling, pair, skip in zip(self.doubling, self.decoder, reversed(skips), strict=True):
            features = pair(torch.cat([skip, doubling(features)], 1))
        return self.head(features)


def convolution_pair(inputs: int, outputs: int, *, dropout: float = 0.0) -> nn.Sequential:
    """Two 3 x 3 convolutions with ReLU, each followed by dropout where there is any."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU(inplace=True)]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers)


def _doubling(inputs: int, outputs: int) -> nn.Sequential:
    """Twice the height and width by a transposed convolution."""
    convolution = nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1)
    return nn.Sequential(convolution, nn.ReLU(inplace=True))


def initialise(layer: nn.Module) -> None:
    """Draw a convolution's weights as He et al. 2015 do, biases 0; other layers stay."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        transposed = isinstance(layer, nn.ConvTranspose2d)  # its weights are (inputs, outputs, ...)
        mode = "fan_out" if transposed else "fan_in"
        nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def check_sides(pictures: Tensor, *, halvings: int) -> None:
    """Refuse pictures whose sides cannot be halved so often."""
    step = 2**halvings
    if pictures.ndim != 4 or pictures.shape[1] != 1 or any(n % step for n in pictures.shape[2:]):
        raise ValueError(
            f"the network takes (batch, 1, height, width) with sides divisible by {step}, "
            f"got {tuple(pictures.shape)}"
        )


build = UNet


def pictures(scan: Scan) -> np.ndarray:
    """What the network sees, in training and inference alike: each slice from black to white.

    Deviations: upstream trains on slices stretched to [0, 1] but feeds raw grey values later
    (FACTS 4.3), which is a mistake and not repeated. Upstream stretches whatever grey values the
    files hold; here Hounsfield units go through the lung window of the study first, so that metal
    does not make a slice dark.

    Args:
        scan: whole scan or single slice.

    Returns:
        uint8, shape of the scan: the lung-window grey of each slice, stretched so that its least
        value is 0 and its greatest 255; a slice of one value is 0.
    """
    grey = to_grey(scan.voxels).astype(np.float32)
    least, greatest = grey.min((1, 2), keepdims=True), grey.max((1, 2), keepdims=True)
    stretched = (grey - least) * (255 / np.maximum(greatest - least, 1))
    return np.rint(stretched).astype(np.uint8)


def target(scan: Scan, lungs: np.ndarray) -> np.ndarray:
    """What the network learns to predict: both lungs.

    Args:
        scan: not used; the other network's target depends on it.
        lungs: true lung mask, 0 background, 1 right lung, 2 left lung.

    Returns:
        bool, same shape.
    """
    return both_lungs(lungs)


def lungs(scan: Scan, predicted: np.ndarray) -> np.ndarray:
    """Both lungs: what the network predicts.

    Args:
        scan: not used; the other network's lungs depend on it.
        predicted: bool, shape of the scan, where the network finds its target.

    Returns:
        bool, same shape.
    """
    return predicted
