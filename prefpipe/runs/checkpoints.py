"""Checkpoints of `train` as other runs take them: which one holds the optimizer of a complete run, and is it there.

RUN/checkpoints/step-00000008/state.json    the files of the checkpoint with their digests, under a seal
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefpipe import reading
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, IdentityError, MissingInputError
from prefpipe.runs import manifests, saved_config, store
from prefpipe.runs.store import Manifest

AGAIN = "the same settings make it again: run its command with --force, or go on with a new optimizer"
_FILE = re.compile(r"state(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class Source:
    """A complete run of train: its directory, its manifest, its kind of optimizer, and the step whose weights it ended
    with."""

    out: Path
    manifest: Manifest
    optim: str
    step: int

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that holds its optimizer."""
        return place(self.out.absolute() / "checkpoints", self.step)

    def lost(self) -> DataError:
        """What is raised where that checkpoint cannot be read."""
        wrong = f"the optimizer of {self.out} is lost: its checkpoint {self.step} is damaged or missing"
        return DataError(wrong, AGAIN)


def source(out: Path, optim: str) -> Source:
    """A run that another one with this kind of optimizer goes on from.

    Raises MissingInputError where it is not complete, UsageError where it is a run of something else, and as
    `check_kind`.
    """
    manifest = store.read_manifest(out)
    if manifest["command"] != "train":
        raise manifests.other_kind(out, manifest["command"], "train", "--optimizer-from")
    saved = (saved_config.read(out / "config.json", force=False) or {"config": {}})["config"]
    totals = manifest["totals"]
    best = totals.get("best") if saved.get("load_best_model_at_end") else None
    theirs = saved.get("optim", TrainConfig.model_fields["optim"].default)
    found = Source(out, manifest, theirs, best["step"] if best else totals["steps"])
    check_kind(found, optim)
    return found


def check_kind(found: Source, optim: str) -> None:
    """Raise IdentityError where a run has another kind of optimizer."""
    if found.optim != optim:
        raise IdentityError(
            f"{found.out} was trained with optim = {found.optim}, whose state is not that of {optim}",
            f"give --optim {found.optim}, or go on with a new optimizer",
        )


def check_there(found: Source) -> None:
    """Raise DataError where files of the checkpoint are missing. What they hold is left to who reads them."""
    described = record(found.checkpoint)
    if described is None or not all((found.checkpoint / name).is_file() for name in files(described)):
        raise found.lost()


def place(folder: Path, step: int) -> Path:
    """The checkpoint after a step, in the folder of them."""
    return folder / f"step-{step:08d}"


def record(path: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself; None where that is missing or was changed."""
    try:
        found = reading.read_json(path / "state.json")
        intact = manifests.is_intact(found) and all(map(_FILE.fullmatch, files(found)))
    except (ValueError, KeyError, AttributeError, TypeError, DataError, MissingInputError):
        return None
    return found if intact else None


def files(described: Mapping[str, Any]) -> dict[str, str]:
    """The files of tensors of a checkpoint with their digests; one of an older version has one, and no list."""
    return described["files"] if "files" in described else {"state.safetensors": described["blake3"]}
