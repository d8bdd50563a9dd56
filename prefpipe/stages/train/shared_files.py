"""safetensors files that all ranks write together: each its rows, in place. Nothing is gathered and nothing copied."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from prefpipe import reading
from prefpipe.errors import UsageError
from prefpipe.forward import shards
from prefpipe.forward.shards import Copied
from prefpipe.forward.tensor_files import Plan
from prefpipe.runs import fsio, in_place
from prefpipe.runs.store import Run
from prefpipe.stages.train.parallel import World
from prefpipe.stages.train.session import Session


def write(
    world: World, folder: Path | None, files: Sequence[Plan], tensors: Mapping[str, torch.Tensor | Copied]
) -> list[str]:
    """Write planned files into the folder that rank 0 names, and return the digest of each, in the dtypes of the plan.
    Rank 0 makes them; every rank writes and syncs the rows that it has, and reads its share of the files back for their
    digests. Where rank 0 names no folder, nothing is written. A collective call; an error of one rank is raised on
    all."""
    into, *_ = world.shares(lambda: _make(folder, files))
    if into is None:
        return []
    world.together(lambda: _fill(world, into, files, tensors))
    names = [file.name for file in files]
    shares = world.shares(lambda: [reading.file_digest(into / name) for name in names[world.rank :: world.size]])
    return [shares[i % world.size][i // world.size] for i in range(len(names))]


def _make(folder: Path | None, files: Sequence[Plan]) -> Path | None:
    if folder is not None:
        for file in files:
            in_place.create(folder / file.name, file.head, file.size)
    return folder


def _fill(world: World, folder: Path, files: Sequence[Plan], tensors: Mapping[str, torch.Tensor | Copied]) -> None:
    for file in files:
        for name, stored in file.stored(folder).items():
            first, rows = shards.written_rows(tensors[name], leads=world.leads)
            if rows.numel():
                stored.write(first, rows)
        if not world.leads:  # rank 0 syncs all that it publishes
            fsio.sync_file(folder / file.name)


def check_directory(session: Session) -> None:
    """Raise UsageError unless every rank sees the run directory that rank 0 holds: checkpoints are written and read
    there by all of them. A collective call."""

    def owner(run: Run) -> tuple[Path, bytes]:
        path = run.out.absolute() / ".owner"  # another text at every start
        return path, path.read_bytes()

    held = session.lead(owner)
    if held is None:
        return
    path, text = held
    seen = path.is_file() and reading.read_bytes(path) == text
    blind = [rank for rank, sees in enumerate(session.world.gather(seen)) if not sees]
    if blind:
        raise UsageError(
            f"rank {blind[0]} does not see {path.parent} as rank 0 does, and every rank reads and writes checkpoints",
            "choose an --out on a file system that all nodes share",
        )
