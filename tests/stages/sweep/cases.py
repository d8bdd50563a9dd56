"""Sweeps that are small enough for every test."""

import json
from pathlib import Path
from typing import Any

from prefpipe.config.sweep import SweepConfig
from prefpipe.runs import store

TRAINING: dict[str, Any] = {
    "dtype": "float32", "learning_rate": 3e-3, "train_batch_size": 4, "lora_r": 2, "lora_alpha": 4, "eval_split": 0.4,
    "eval_steps": 1, "max_tokens_per_micro_batch": 256,
}  # fmt: skip


def config(model: Path, pairs: Path, *grid: str, **changes: Any) -> SweepConfig:
    """A sweep over a grid: runs of two or three steps."""
    named = {"model": str(model), "pairs": (str(pairs),), "grid": grid}
    return SweepConfig.model_validate({**TRAINING, **named, **changes})


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a complete run that its digest covers."""
    return {name: (out / name).read_bytes() for name in store.read_manifest(out)["files"]}


def times(out: Path) -> dict[str, Any]:
    """What the last call of a sweep counted."""
    lines = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "variants"][-1]
