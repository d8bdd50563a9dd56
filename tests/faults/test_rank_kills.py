"""A rank killed while both write a checkpoint or the model in place: the same command goes on to the same bytes.

A sample of the points by default; more of them with PREFPIPE_ALL_FAULTS=1 (`make faults`).
"""

import os
import shutil
from pathlib import Path

import pytest

from tests.forge import Forge
from tests.stages.train import data
from tests.stages.train.runs import two_ranks

# A checkpoint has 63 tensors that are cut, the model 21; there are two checkpoints. Rank 0 also writes what is not cut.
POINTS = [(1, "pwrite:30:kill"), (0, "pwrite:120:kill"), (1, "pwrite:135:kill")]
ALL = "PREFPIPE_ALL_FAULTS" in os.environ
MORE = [(1, f"pwrite:{n}:kill") for n in (1, 63, 64, 126, 127, 147)] + [(1, f"fsync:{n}:kill") for n in (1, 2, 3)]
MORE += [(0, f"rename:{n}:kill") for n in range(1, 9)] + [(0, f"fsync:{n}:kill") for n in range(1, 20, 3)]
MORE += [(1, "pwrite:40:enospc"), (0, "pwrite:200:enospc")]


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a run but times and the lock, checkpoints included."""
    skipped = (".lock", ".owner", "timing.jsonl")
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in skipped]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_killed_while_both_write_and_run_again_it_has_the_same_bytes(forged: Forge, tiny_model: Path, tmp_path: Path):
    pairs = data.write_pairs(tmp_path / "p", data.with_reference(data.bare_pairs(4), tiny_model))
    config = data.config(
        tiny_model, pairs, distributed="fsdp2", tuning="full", lora_r=16, lora_alpha=32, num_train_epochs=2,
        max_tokens_per_micro_batch=128, gradient_checkpointing="off",
    )  # fmt: skip
    (tmp_path / "c.json").write_text(config.model_dump_json())
    out = tmp_path / "t"
    command = ("train", tmp_path / "c.json", "--out", out)
    done = two_ranks(forged, *command)
    assert done.code == 0, done.stderr[-4000:]
    whole = contents(out)
    assert sum("state.safetensors" in name for name in whole) == 2
    for rank, fault in POINTS + (MORE if ALL else []):
        shutil.rmtree(out)
        stopped = two_ranks(forged, *command, faults=("", fault) if rank else (fault, ""))
        assert stopped.code != 0, fault
        assert not (out / "manifest.json").exists(), fault
        again = two_ranks(forged, *command)
        assert again.code == 0, (fault, again.stderr[-4000:])
        assert contents(out) == whole, fault
