"""Files that all ranks write, by one; `ranks.py` has two of them, and an error on one. Who sees the run directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefpipe import reading
from prefpipe.errors import UsageError
from prefpipe.forward import tensor_files
from prefpipe.runs import fsio
from prefpipe.runs.store import Run
from prefpipe.stages.train import shared_files
from prefpipe.stages.train.parallel import ALONE, World
from prefpipe.stages.train.session import Session


def test_one_process_writes_all_rows(tmp_path: Path):
    tensors = {"a": torch.arange(6.0).reshape(3, 2), "b": torch.tensor(2)}
    files = tensor_files.plan({n: (t.dtype, t.shape) for n, t in tensors.items()}, "w", 24)
    digests = shared_files.write(ALONE, tmp_path, files, tensors)
    assert digests == [reading.file_digest(tmp_path / file.name) for file in files]
    assert all(torch.equal(load_file(tmp_path / f.name)[n], tensors[n]) for f in files for n in f.places)


@dataclass(frozen=True)
class Told(World):
    """A rank that was told something by rank 0."""

    value: Any = None

    def tell(self, value: Any) -> Any:
        return value or self.value

    def gather(self, value: Any) -> list[Any]:
        return [True, value]


def test_a_rank_that_does_not_see_the_directory_is_named(tmp_path: Path):
    """Another start wrote another owner: a directory of the same name on another disk is not it."""
    run = Run(tmp_path / "t", "train", "", {}, {}, "")
    with fsio.lock(run.out):
        shared_files.check_directory(Session(ALONE, run))
        held = (run.out / ".owner", (run.out / ".owner").read_bytes())
        shared_files.check_directory(Session(Told(1, 2, held), None))
        for other in ((run.out / ".owner", b"process 1"), (tmp_path / "u" / ".owner", held[1])):
            with pytest.raises(UsageError, match=r"rank 1 does not see .* as rank 0 does"):
                shared_files.check_directory(Session(Told(1, 2, other), None))
    shared_files.check_directory(Session(ALONE, None))
