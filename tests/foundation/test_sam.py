import pytest
import torch

from lib.foundation.sam import build_sam, grey_to_picture

# The official sizes: FACTS 1.3 gives 641.1 million for ViT-H.
COUNTS = {"vit_b": 93_735_472, "vit_l": 312_342_832, "vit_h": 641_090_608, "small": 786_536}


@pytest.mark.parametrize("variant", COUNTS)
def test_parameter_counts(variant):
    with torch.device("meta"):
        sam = build_sam(variant)
    assert sum(values.numel() for values in sam.parameters()) == COUNTS[variant]
    assert not sam.training


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match=r"a SAM is one of .*got 'vit_x'"):
        build_sam("vit_x")


def test_three_equal_channels():
    grey = torch.rand(2, 5, 4)
    assert torch.equal(grey_to_picture(grey)[1, 2], grey[1])
    assert grey_to_picture(grey).shape == (2, 3, 5, 4)
