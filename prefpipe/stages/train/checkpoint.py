"""Training checkpoints. Each is a directory that is complete or invisible; a run resumes only where digests match.

They are those of the checkpoint, of the part of metrics.jsonl before it, and of the best weights so far.

Tensors are whole in the files, whatever the number of ranks: each rank writes its rows in place and reads its rows
back, so that any number of them goes on. With `world` the functions here are collective calls; rank 0 publishes.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from prefpipe import log, reading
from prefpipe.errors import DataError, MissingInputError
from prefpipe.forward import tensor_files
from prefpipe.forward.shards import Copied
from prefpipe.forward.tensor_files import Stored
from prefpipe.runs import checkpoints, commits, fsio, manifests
from prefpipe.stages.train import shared_files
from prefpipe.stages.train.parallel import ALONE, World

FILE_BYTES = 4 << 30  # of tensors in a file: the digests of files are dealt out to the ranks
_NAME = re.compile(r"step-\d{8,}")
_MOST_METRICS = 1 << 30  # bytes
Held = TypeVar("Held", bound=torch.Tensor | Copied | Stored, covariant=True)


@dataclass(frozen=True)
class Checkpoint(Generic[Held]):
    """The state of training after `step` steps.

    Nothing else has state: rows are drawn by (seed, epoch), dropout by (seed, step, rank), and evaluations are lines of
    metrics.jsonl.
    """

    step: int
    # The size of metrics.jsonl at that moment, and the digest of its bytes.
    metrics_bytes: int
    metrics_digest: str
    # The state of the optimizer, with the float32 weights: in memory, as a copy of it, or where it stands in a file.
    tensors: Mapping[str, Held]
    # What the alert rules remember, as JSON.
    diagnostics: dict[str, Any] | None = None


def save(
    folder: Path,
    checkpoint: Checkpoint[torch.Tensor | Copied],
    fingerprint: str,
    limit: int = 2,
    records: Sequence[int] = (),
    world: World = ALONE,
) -> None:
    """Publish a checkpoint, then remove all but the newest `limit` (by step number, never by time).

    `records` are the steps, in order, whose weights were the best so far. The last record before each kept checkpoint
    stays too: a run that resumes from that checkpoint may end with these weights.
    """
    target = checkpoints.place(folder, checkpoint.step)
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    files = tensor_files.plan(shapes, "state", FILE_BYTES)
    if not world.leads or target.exists():
        shared_files.write(world, None, files, checkpoint.tensors)
        return

    def fill(into: Path) -> None:
        digests = shared_files.write(world, into, files, checkpoint.tensors)
        record = {
            "step": checkpoint.step,
            "metrics_bytes": checkpoint.metrics_bytes,
            "metrics_blake3": checkpoint.metrics_digest,
            "best": records[-1] if records else checkpoint.step,
            "diagnostics": checkpoint.diagnostics,
            "fingerprint": fingerprint,
            "files": {file.name: digest for file, digest in zip(files, digests, strict=True)},
        }
        (into / "state.json").write_text(json.dumps(manifests.sealed(record)), encoding="utf-8")

    fsio.publish_dir(target, fill)
    steps = _steps(folder)
    kept = steps[-limit:]
    best = {max((r for r in records if r <= _number(path)), default=0) for path in kept}
    for old in steps[:-limit]:
        if _number(old) not in best:
            fsio.remove_dir(old)


def newest(folder: Path, fingerprint: str, metrics: Path, world: World = ALONE) -> Checkpoint[Stored] | None:
    """The newest checkpoint of this run that can be trusted, with all that it stands on. Others that are met on the way
    move to quarantine/, with a copy of `metrics` (metrics.jsonl) where that is what they do not match."""
    aside = folder.parent / "quarantine"
    kept_aside = False
    for path in reversed(world.tell(_steps(folder))):
        record = _verified(path, world)
        if record is None or record["fingerprint"] != fingerprint:
            wrong = "is damaged or of another run"
        elif not world.tell(world.leads and _matches(metrics, record)):
            wrong = f"does not match {metrics.name}, which was changed"
            if world.leads and not kept_aside and metrics.is_file():
                fsio.copy_aside(metrics, aside)
                kept_aside = True
        elif not _has_best(folder, record, world):
            wrong = "needs the best weights so far, which are damaged or missing"
        else:
            return _load(path, record)
        log.warn(f"checkpoint {path} {wrong}: it moves to quarantine/")
        if world.leads:
            fsio.move_aside(path, aside)
    return None


def at_step(folder: Path, step: int, world: World = ALONE) -> Checkpoint[Stored]:
    """The checkpoint of a step. Raises DataError when it is damaged or gone."""
    path = checkpoints.place(folder, step)
    record = _verified(path, world)
    if record is None:
        raise DataError(
            f"checkpoint {path}, the best one, is damaged or missing",
            "run the same command again: it goes back to an earlier checkpoint; if not, start over with --force",
        )
    return _load(path, record)


def _has_best(folder: Path, record: Mapping[str, Any], world: World) -> bool:
    best = record.get("best", record["step"])
    return best == record["step"] or _verified(checkpoints.place(folder, best), world) is not None


def _load(path: Path, record: Mapping[str, Any]) -> Checkpoint[Stored]:
    tensors: dict[str, Stored] = {}
    for name in checkpoints.files(record):
        tensors |= tensor_files.stored(path / name)
    return Checkpoint(
        record["step"],
        record["metrics_bytes"],
        record.get("metrics_blake3", ""),
        tensors,
        record.get("diagnostics"),
    )


def _verified(path: Path, world: World) -> dict[str, Any] | None:
    """The record of a checkpoint, or None where the record or the tensors do not match their digests. Each rank reads
    its share of the files."""
    record = world.tell(checkpoints.record(path) if world.leads else None)
    if record is None:
        return None
    own = list(checkpoints.files(record).items())[world.rank :: world.size]
    intact = world.together(lambda: all(commits.matches(path / name, digest) for name, digest in own))
    return record if all(world.gather(intact)) else None


def _matches(metrics: Path, record: Mapping[str, Any]) -> bool:
    """Whether the metrics before a checkpoint are those that it was saved with. One of an older version does not say:
    then there must be a line for every step."""
    size = record["metrics_bytes"]
    try:
        if "metrics_blake3" in record:
            return reading.file_digest(metrics, size) == record["metrics_blake3"]
        lines = reading.read_bytes(metrics, _MOST_METRICS)[:size].splitlines()
        return [json.loads(line)["step"] for line in lines] == list(range(record["step"]))
    except (ValueError, KeyError, TypeError, RecursionError, DataError, MissingInputError):
        return False


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
