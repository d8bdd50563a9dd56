"""Damaged and odd copies of a model directory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def edited(model: Path, directory: Path, **config: Any) -> Path:
    """A copy with other settings in config.json."""
    shutil.copytree(model, directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return directory


def with_tensors(directory: Path, change: Callable[[Tensors], object]) -> Path:
    """The same directory, after `change` of the tensors of its one safetensors file."""
    (path,) = directory.glob("*model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return directory
