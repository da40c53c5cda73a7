"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real CT data; the test is skipped, with the reason, where it is absent."""
    folder = Path(os.environ.get("STUDY_REAL_DATA", REPOSITORY.parent / "shared" / "real"))
    if not folder.is_dir():
        pytest.skip(f"no real CT data at {folder} (set STUDY_REAL_DATA)")
    return folder


@pytest.fixture(scope="session")
def lively_sam():
    """A small SAM with random weights, enlarged so that it finds many masks of many qualities."""
    import torch

    from lib.foundation.sam import build_sam

    torch.manual_seed(0)
    sam = build_sam("small")
    with torch.no_grad():
        for network in sam.mask_decoder.output_hypernetworks_mlps:
            network.layers[-1].weight *= 30
        sam.mask_decoder.iou_prediction_head.layers[-1].weight *= 20
        sam.image_encoder.pos_embed.normal_()
        sam.image_encoder.neck[2].weight *= 3
    return sam.requires_grad_(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the long tests of the whole study first, so that the short ones run beside them."""
    items.sort(key=lambda item: "study" not in item.path.parts)
