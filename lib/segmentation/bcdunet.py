"""BCDU-Net for lungs, variant D3, which paper 000 cites for its conventional way (FACTS 3.1).

A U-Net with densely connected deepest convolutions whose skips pass through convolutional LSTMs.
It does not predict the lung but the **tissue around it**; the lung is what remains of the field of
view. The functions are those of `lib.segmentation.unet`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

from lib.data.masks import body_mask, both_lungs, tissue_threshold
from lib.data.scan import LUNG_WINDOW, Scan
from lib.segmentation.morphology import air_inside_body, scaled
from lib.segmentation.unet import check_sides, convolution_pair, initialise

LOWEST, HIGHEST = -512, 512  # HU, black and white of the pictures
BODY_EROSION = 15  # pixels of a 512 x 512 picture, width of the square
DENSE_BLOCKS = 3  # "D3"
BATCH_NORM_EPSILON = 1e-3  # Keras's default, and its momentum in PyTorch's sense
BATCH_NORM_MOMENTUM = 0.01


class ConvLSTM2d(nn.Module):
    """Long short-term memory whose gates are convolutions (Shi et al. 2015), without peepholes.

    Args:
        inputs: channels of each picture of the sequence.
        filters: channels of the state and of the output.
        kernel: side of the convolutions, odd.
    """

    def __init__(self, inputs: int, filters: int, *, kernel: int = 3) -> None:
        super().__init__()
        self.of_input = nn.Conv2d(inputs, 4 * filters, kernel, padding=kernel // 2)
        self.of_state = nn.Conv2d(filters, 4 * filters, kernel, padding=kernel // 2, bias=False)

    def forget_little(self) -> None:
        """Set the bias of the forget gate to 1, so that the state survives the first steps."""
        with torch.no_grad():
            self.of_input.bias.chunk(4)[1].fill_(1)

    def forward(self, sequence: Sequence[Tensor]) -> Tensor:
        """Read a sequence.

        Args:
            sequence: pictures (batch, inputs, height, width), the first to be read first.

        Returns:
            The output after the last picture, (batch, filters, height, width).

        Raises:
            ValueError: for an empty sequence.
        """
        if not sequence:
            raise ValueError("a convolutional LSTM needs at least one picture")
        output = memory = None
        for picture in sequence:
            gates = self.of_input(picture)
            if output is not None:  # the first state is zero, and so is what comes of it
                gates = gates + self.of_state(output)
            enter, forget, candidate, leave = gates.chunk(4, 1)
            entering = enter.sigmoid() * candidate.tanh()
            memory = entering if memory is None else forget.sigmoid() * memory + entering
            output = leave.sigmoid() * memory.tanh()
        return output


class BCDUNet(nn.Module):
    """BCDU-Net D3.

    Per encoder level two 3 x 3 convolutions with ReLU and 2 x 2 maxima; at the deepest level three
    pairs of convolutions with dropout, the third fed by the first two; on the way up transposed
    convolution, batch normalisation and ReLU, a ConvLSTM over (doubled features, skip) in that
    order (the published ``go_backwards``), and two convolutions. The skip of the last encoder
    level passes dropout, the features that go deeper do not.

    Args:
        widths: channels of each level, the deepest last; published are 64, 128, 256, 512.
        dropout: probability of dropping.
    """

    def __init__(self, *, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        *outer, deepest = widths
        self.encoder = nn.ModuleList(map(convolution_pair, [1, *outer[:-1]], outer))
        self.dropout = nn.Dropout(dropout)
        entering = (outer[-1], deepest, 2 * deepest)
        self.dense = nn.ModuleList(convolution_pair(channels, deepest) for channels in entering)
        self.doubling = nn.ModuleList(map(_doubling, widths[:0:-1], outer[::-1]))
        self.memory = nn.ModuleList(ConvLSTM2d(width, width // 2) for width in outer[::-1])
        self.decoder = nn.ModuleList(convolution_pair(width // 2, width) for width in outer[::-1])
        self.head = nn.Sequential(
            nn.Conv2d(outer[0], 2, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(2, 1, 1)
        )
        self.apply(initialise)
        for memory in self.memory:
            memory.forget_little()

    def forward(self, pictures: Tensor) -> Tensor:
        """Score every pixel.

        Args:
            pictures: (batch, 1, height, width), 0 to 1; sides divisible by 2 per halving.

        Returns:
            Logits of the tissue around the lung, same shape.

        Raises:
            ValueError: if a side cannot be halved so often.
        """
        check_sides(pictures, halvings=len(self.encoder))
        features, skips = pictures, []
        for pair in self.encoder:
            skips.append(pair(features))
            features = functional.max_pool2d(skips[-1], 2)
        skips[-1] = self.dropout(skips[-1])

        # The third pair sees the second one's result, then the first one's.
        first, second, third = self.dense
        once = self.dropout(first(features))
        twice = self.dropout(second(once))
        features = self.dropout(third(torch.cat([twice, once], 1)))

        levels = zip(self.doubling, self.memory, self.decoder, reversed(skips), strict=True)
        for doubling, memory, pair, skip in levels:
            features = pair(memory([doubling(features), skip]))
        return self.head(features)


def _doubling(inputs: int, outputs: int) -> nn.Sequential:
    """Twice the height and width by a transposed convolution, normalised."""
    return nn.Sequential(
        nn.ConvTranspose2d(inputs, outputs, 2, stride=2),
        nn.BatchNorm2d(outputs, eps=BATCH_NORM_EPSILON, momentum=BATCH_NORM_MOMENTUM),
        nn.ReLU(inplace=True),
    )


build = BCDUNet


def pictures(scan: Scan) -> np.ndarray:
    """What the network sees: -512 to 512 HU from black to white.

    Deviations: published is the range of each volume from black to white after that clipping. It
    is the same wherever a volume holds air and dense bone; a slice alone or a picture in another
    window would show the same tissue in another grey. 8-bit pictures are taken for the study's
    lung window, as everywhere in the study.

    Args:
        scan: whole scan or single slice.

    Returns:
        uint8, shape of the scan.
    """
    hounsfield = scan.voxels.astype(np.float32)
    if not scan.is_hounsfield:
        hounsfield = LUNG_WINDOW.low + hounsfield * (LUNG_WINDOW.width / 255)
    shown = np.clip(hounsfield, LOWEST, HIGHEST) - LOWEST
    return np.rint(shown * (255 / (HIGHEST - LOWEST))).astype(np.uint8)


def body(scan: Scan) -> np.ndarray:
    """The patient's body with everything in it, lungs too.

    Deviation: published is all that lies above -512 HU, table and clothes too, with holes where
    the lungs are; why they are filled here is said at `field_of_view`. Bays of the skin, as
    between the shoulders and the table, stay outside: the network would find no tissue there.

    Args:
        scan: whole scan or single slice; of 8-bit pictures Otsu's threshold parts air and tissue.

    Returns:
        bool, shape of the scan.
    """
    threshold = LOWEST if scan.is_hounsfield else tissue_threshold(scan.voxels)
    tissue = scan.voxels > threshold
    return tissue & body_mask(tissue) | air_inside_body(~tissue)


def field_of_view(scan: Scan) -> np.ndarray:
    """The body without its outermost layer, in which the network tells lung from tissue.

    Deviation. Published is: body eroded with a square of 15 x 15, joined with the true lungs, holes
    filled. At inference there are no true lungs, so the field must come from the body alone, and it
    does here in training too. Filling the holes of the eroded body instead loses whole lungs where
    the erosion cuts the chest wall (a ninth of the lung in the Kaggle slices), so the body is
    filled first and eroded then, which is the same where the wall holds. The square scales with
    the picture.

    Args:
        scan: whole scan or single slice.

    Returns:
        bool, shape of the scan.
    """
    inside = body(scan)
    side = scaled(BODY_EROSION, inside)
    return ndimage.minimum_filter(inside, size=(1, side, side), mode="nearest")


def target(scan: Scan, lungs: np.ndarray) -> np.ndarray:
    """What the network learns to predict: the tissue around the lungs.

    Deviation: published is the tissue up to the border of the field of view. A small error there,
    at a border that cannot be seen, leaves a rim of the field that then counts as lung, all around
    the body and in slices without lungs too. So the tissue reaches to the skin here, and the field
    of view, from which it is taken away, keeps a margin.

    Args:
        scan: whole scan or single slice.
        lungs: true lung mask, 0 background, 1 right lung, 2 left lung.

    Returns:
        bool, same shape.
    """
    return body(scan) & ~both_lungs(lungs)


def lungs(scan: Scan, predicted: np.ndarray) -> np.ndarray:
    """Both lungs: the field of view less what the network predicts.

    Args:
        scan: whole scan or single slice.
        predicted: bool, shape of the scan, where the network finds tissue around the lungs.

    Returns:
        bool, same shape.
    """
    return field_of_view(scan) & ~predicted
