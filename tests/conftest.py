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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the long tests of the whole study first, so that the short ones run beside them."""
    items.sort(key=lambda item: "study" not in item.path.parts)
