"""ResNeXt3D-101, tried in the place of R(2+1)D (paper section 5.3.1: accuracy "around 0.71").

ResNeXt (Xie et al. 2017) with 3-D convolutions as in Hara et al. 2018: bottlenecks whose middle
convolution works in 32 groups. The paper names a "resneXt3D" and no more: its depth, groups,
weights and size of clips are not published, and its reference 23 is that of R(2+1)D. Taken here is
the one that Kalfaoglu et al. 2020, whose code the paper builds on, pool with BERT; the sentence in
the paper stands among the networks without BERT.

Parameters of the trunk at the published sizes: 47,521,216, which is ResNeXt-101 (32 x 4d) for
pictures with deeper kernels; 48,340,816 with an output of 400 classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn
from torchvision.models.video.resnet import Bottleneck

from lib.classification.video_resnet import check_clips, video_trunk

WIDTHS = (256, 512, 1024, 2048)
BLOCKS = (3, 4, 23, 3)
CARDINALITY = 32
# Slices of one time step: the pooling of the stem and stages 2 to 4 halve them.
TEMPORAL_STRIDE = 16


class WideBottleneck(Bottleneck):
    """Torchvision's bottleneck, inside half as wide as outside instead of a quarter."""

    expansion = 2


@dataclass(frozen=True)
class GroupedConvolutions:
    """Builder of 3 x 3 x 3 convolutions in groups of channels, as torchvision's blocks call one."""

    groups: int

    def __call__(
        self, before: int, after: int, _middle: int | None = None, stride: int = 1
    ) -> nn.Conv3d:
        """A convolution; the blocks give a middle width too, for factored ones."""
        return nn.Conv3d(before, after, 3, stride=stride, padding=1, groups=self.groups, bias=False)

    def get_downsample_stride(self, stride: int) -> tuple[int, int, int]:
        """Steps of the shortcut beside one."""
        return stride, stride, stride


def resnext3d_trunk(
    *,
    widths: Sequence[int] = WIDTHS,
    blocks: Sequence[int] = BLOCKS,
    cardinality: int = CARDINALITY,
) -> nn.Sequential:
    """Trunk for clips of three channels, without pooling and output.

    Takes clips of shape (scans, 3, slices, height, width), gives features of shape (scans,
    widths[-1], steps, rows, columns): a step for every 16 slices, a row for every 32 pixels, so
    (scans, 2048, 2, 7, 7) for the published 32 slices of 224 x 224.

    Args:
        widths: channels that the four stages give; inside their blocks half as many. The stem has
            a quarter of the first.
        blocks: residual blocks of the four stages.
        cardinality: groups of the middle convolutions.

    Raises:
        ValueError: if there are not four widths and numbers of blocks, or the groups cannot share
            half of each width; by the trunk, for clips of another shape or of fewer than 16 slices.
    """
    for width in widths:
        if width % (2 * cardinality):
            raise ValueError(f"{cardinality} groups do not share half of the width {width} evenly")
    trunk = video_trunk(
        4 * [GroupedConvolutions(cardinality)],
        widths=[width // 2 for width in widths],
        blocks=blocks,
        stem=_stem(widths[0] // 4),
        stem_width=widths[0] // 4,
        block=WideBottleneck,
    )
    trunk.register_forward_pre_hook(partial(check_clips, stride=TEMPORAL_STRIDE))
    return trunk


def _stem(width: int) -> nn.Sequential:
    """Convolution of 7 x 7 x 7 halving height and width, then maximum pooling halving all."""
    return nn.Sequential(
        nn.Conv3d(3, width, 7, stride=(1, 2, 2), padding=3, bias=False),
        nn.BatchNorm3d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool3d(3, stride=2, padding=1),
    )
