"""safetensors files that all ranks write together: each its rows, in place. Nothing is gathered and nothing copied."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from prefpipe import reading
from prefpipe.errors import UsageError
from prefpipe.forward import shards
from prefpipe.forward.tensor_files import Plan
from prefpipe.runs import fsio, in_place
from prefpipe.runs.store import Run
from prefpipe.stages.train.parallel import World
from prefpipe.stages.train.session import Session


def write(world: World, folder: Path | None, files: Sequence[Plan], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Write planned files into the folder that rank 0 names, and return the digest of each, in the dtypes of the plan.
    Rank 0 makes them; every rank writes and syncs the rows that it has, and reads its share of the files back for their
    digests. A collective call; an error of one rank is raised on all."""
    into = world.tell(folder)
    assert into is not None

    def make() -> None:
        for file in files if world.leads else ():
            in_place.create(into / file.name, file.head, file.size)

    def fill() -> None:
        for file in files:
            for name, stored in file.stored(into).items():
                first, rows = shards.own_rows(tensors[name])
                if rows.numel() and (world.leads or rows is not tensors[name]):
                    stored.write(first, rows)
            if not world.leads:  # rank 0 syncs all that it publishes
                fsio.sync_file(into / file.name)

    world.together(make)
    world.together(fill)
    names = [file.name for file in files]
    own = world.together(lambda: [reading.file_digest(into / name) for name in names[world.rank :: world.size]])
    shares = world.gather(own)
    return [shares[i % world.size][i // world.size] for i in range(len(names))]


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
