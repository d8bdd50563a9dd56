"""Training checkpoints. Each is a directory that is complete or invisible; a run resumes only where digests match."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from prefpipe import log
from prefpipe.errors import DataError
from prefpipe.ids import content_id
from prefpipe.runs import fsio


@dataclass(frozen=True)
class Checkpoint:
    """The state of training after `step` steps.

    Nothing else has state: rows are drawn by (seed, epoch), dropout by (seed, step, rank), and evaluations are lines of
    metrics.jsonl.
    """

    step: int
    # The size of metrics.jsonl at that moment.
    metrics_bytes: int
    # The state of the optimizer, with the float32 weights.
    tensors: dict[str, torch.Tensor]
    # What the alert rules remember, as JSON.
    diagnostics: dict[str, Any] | None = None


def save(folder: Path, checkpoint: Checkpoint, fingerprint: str, limit: int = 2, records: Sequence[int] = ()) -> None:
    """Publish a checkpoint, then remove all but the newest `limit` (by step number, never by time).

    `records` are the steps, in order, whose weights were the best so far. The last record before each kept checkpoint
    stays too: a run that resumes from that checkpoint may end with these weights.
    """
    target = _path(folder, checkpoint.step)
    if target.exists():
        return

    def fill(into: Path) -> None:
        save_file({k: v.contiguous() for k, v in checkpoint.tensors.items()}, into / "state.safetensors")
        record = {
            "step": checkpoint.step,
            "metrics_bytes": checkpoint.metrics_bytes,
            "diagnostics": checkpoint.diagnostics,
            "fingerprint": fingerprint,
            "blake3": fsio.file_digest(into / "state.safetensors"),
        }
        sealed = {**record, "record_id": content_id(record)}
        (into / "state.json").write_text(json.dumps(sealed), encoding="utf-8")

    fsio.publish_dir(target, fill)
    steps = _steps(folder)
    kept = steps[-limit:]
    best = {max((r for r in records if r <= _number(path)), default=0) for path in kept}
    for old in steps[:-limit]:
        if _number(old) not in best:
            fsio.remove_dir(old)


def newest(folder: Path, fingerprint: str) -> Checkpoint | None:
    """The newest checkpoint of this run whose digests match; others that are met on the way move to quarantine/."""
    for path in reversed(_steps(folder)):
        record = _verified(path)
        if record is not None and record["fingerprint"] == fingerprint:
            tensors = load_file(path / "state.safetensors")
            return Checkpoint(record["step"], record["metrics_bytes"], tensors, record.get("diagnostics"))
        log.warn(f"checkpoint {path} is damaged or of another run: it moves to quarantine/")
        fsio.move_aside(path, folder.parent / "quarantine")
    return None


def at_step(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of a step. Raises DataError when it is damaged or gone."""
    path = _path(folder, step)
    record = _verified(path)
    if record is None:
        raise DataError(
            f"checkpoint {path}, the best one, is damaged or missing",
            "start over with --force: it cannot be made again",
        )
    return Checkpoint(record["step"], record["metrics_bytes"], load_file(path / "state.safetensors"))


def _verified(path: Path) -> dict[str, Any] | None:
    """The record of a checkpoint, or None where the record or the tensors do not match their digests."""
    try:
        record = json.loads((path / "state.json").read_text(encoding="utf-8"))
        seal = record.pop("record_id")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    tensors = path / "state.safetensors"
    if seal != content_id(record) or not tensors.is_file() or fsio.file_digest(tensors) != record["blake3"]:
        return None
    return record


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
