"""Fixtures shared by every test."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real files and outside oracles, used in place; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no folder of reference data at {folder}: it is kept beside the checkout, not in it")
    return folder
