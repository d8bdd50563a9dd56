"""A model directory to edit."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the model's small files, to be edited."""
    directory = tmp_path / "model"
    directory.mkdir()
    for path in tiny_model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, directory)
    return directory
