"""R(2+1)D-34 as pre-trained on IG-65M, the trunk of the 3-D CNN with BERT (FACTS 4.8).

Every 3-D convolution is factored into one within the slices and one across them (Tran et al.
2018), with a middle width that leaves the number of weights that of the full convolution. The
network of IG-65M (Ghadiyaram et al. 2019) was trained in Caffe2, which computes that width for each
convolution of a block; torchvision's ``BasicBlock`` computes it once per block, from its input.
They differ in the second convolution of the first blocks of stages 2 to 4: 288, 576 and 1152
instead of 230, 460 and 921, without which the published weights do not fit.

Parameters of the trunk at the published sizes: 63,491,975 (network of the paper: with the BERT head
3,155,456 and the output 1,026 in all 66,648,457).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.video.resnet import Conv2Plus1D

from lib.classification.video_resnet import WIDTHS, check_clips, video_trunk
from lib.foundation.checkpoints import CHECKPOINTS, CheckpointError, load_checkpoint

BLOCKS = (3, 4, 6, 3)
STEM_MIDDLE = 45 / 64  # of the stem's width; Caffe2 fixed 45 of 64, the formula would give 83
TEMPORAL_STRIDE = 8  # slices of one time step: stages 2 to 4 halve them; stem and stage 1 do not
NORM_EPSILON = 1e-3
IG65M = "r2plus1d_34_ig65m"


class AcrossSlices(nn.Conv3d):
    """Convolution over 3 slices, pixel by pixel.

    On a CPU it is computed as a 2-D one over slices and all pixels in a row, which is the same:
    PyTorch's 3-D one took 3 to 4 times as long there (one core, forward and backward).

    Args:
        before: channels that come in.
        after: channels that go out.
        stride: in slices.
    """

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__(
            before, after, (3, 1, 1), stride=(stride, 1, 1), padding=(1, 0, 0), bias=False
        )

    def forward(self, clips: Tensor) -> Tensor:
        """Convolve clips of shape (scans, before, slices, height, width)."""
        if clips.device.type != "cpu":
            return super().forward(clips)
        rows = clips.flatten(3)  # (scans, before, slices, pixels)
        mixed = functional.conv2d(
            rows, self.weight[..., 0], stride=self.stride[:2], padding=self.padding[:2]
        )
        return mixed.unflatten(3, clips.shape[3:])


class FactoredConvolution(Conv2Plus1D):
    """Convolution within the slices, then across them, with the middle width of Caffe2."""

    def __init__(
        self, before: int, after: int, _of_the_block: int | None = None, stride: int = 1
    ) -> None:
        middle = middle_width(before, after)
        super().__init__(before, after, middle, stride)
        self[-1] = AcrossSlices(middle, after, stride)


def middle_width(before: int, after: int) -> int:
    """Width between the two parts of a factored 3 x 3 x 3 convolution (Tran et al. 2018, 3.5).

    Args:
        before: channels that come in.
        after: channels that go out.

    Returns:
        The largest with no more weights than the full convolution has.
    """
    return (27 * before * after) // (9 * before + 3 * after)


def r2plus1d_trunk(
    *,
    widths: Sequence[int] = WIDTHS,
    blocks: Sequence[int] = BLOCKS,
    norm_momentum: float = 0.1,
    weights: str | Path | None = None,
    sha256: str | None = None,
) -> nn.Sequential:
    """Trunk for clips of three channels, without pooling and output.

    Takes clips of shape (scans, 3, slices, height, width), gives features of shape (scans,
    widths[-1], steps, rows, columns): a step for every 8 slices, a row for every 16 pixels. The
    published 32 slices of 224 x 224 give (scans, 512, 4, 14, 14).

    Args:
        widths: channels of the four stages.
        blocks: residual blocks of the four stages.
        norm_momentum: share of a new batch in the running statistics of the norms, as PyTorch
            counts. Deviation: the public code sets 0.9, which is Caffe2's number and means there
            the share of the old ones, so 0.1 here; taken over as it is, judging would rest on the
            statistics of little more than the last batch of four clips.
        weights: file of weights, the published checkpoint of IG-65M or other tensors of the same
            names (.pth or .safetensors); its class layer is left out. None starts at random.
        sha256: that the file must have, or its first digits; None takes the published ones.

    Raises:
        ValueError: if there are not four widths and numbers of blocks; by the trunk, for clips of
            another shape or of fewer than 8 slices.
        CheckpointError: if the file is absent, has another hash, holds more than tensors, or is not
            of a network of these sizes.
    """
    trunk = video_trunk(
        4 * [FactoredConvolution], widths=widths, blocks=blocks, stem=_stem(widths[0])
    )
    for layer in trunk.modules():
        if isinstance(layer, nn.BatchNorm3d):
            layer.eps, layer.momentum = NORM_EPSILON, norm_momentum
    trunk.register_forward_pre_hook(partial(check_clips, stride=TEMPORAL_STRIDE))
    if weights is not None:
        _load_weights(trunk, Path(weights), sha256 or CHECKPOINTS[IG65M].sha256)
    return trunk


def _stem(width: int) -> nn.Sequential:
    """First convolution: 7 by 7 within the slices, halving height and width, 3 across them.

    Torchvision's ``R2Plus1dStem`` with other widths.
    """
    middle = max(1, round(width * STEM_MIDDLE))
    return nn.Sequential(
        nn.Conv3d(3, middle, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False),
        nn.BatchNorm3d(middle),
        nn.ReLU(inplace=True),
        AcrossSlices(middle, width),
        nn.BatchNorm3d(width),
        nn.ReLU(inplace=True),
    )


def _load_weights(trunk: nn.Sequential, path: Path, sha256: str) -> None:
    """Weights of a checkpoint whose names are torchvision's, without its class layer ``fc``."""
    loaded = load_checkpoint(path, sha256)
    try:
        trunk.load_state_dict({n: w for n, w in loaded.items() if not n.startswith("fc.")})
    except (RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not hold the weights of an R(2+1)D network of these widths and blocks"
        ) from error
