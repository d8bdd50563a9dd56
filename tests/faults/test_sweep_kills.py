"""A sweep killed anywhere: the same command goes on to the same bytes. Two variants, of which one pauses at a rung, and
reference log-probs that the first one makes. A sample of the points; all of them with PREFPIPE_ALL_FAULTS=1."""

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forge import Forge
from tests.stages.train import data

NUM_KILLS = 40 if "PREFPIPE_ALL_FAULTS" in os.environ else 5
# Passes through each point in an uninterrupted run, at most: a later fault is never reached.
POINTS = {"write": 40, "fsync": 50, "rename": 28, "fsync_dir": 40, "append": 10}
_MEMORY = Path("/dev/shm")
pytestmark = pytest.mark.slow


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        yield Path(folder)


def contents(out: Path) -> dict[str, bytes]:
    """Every file but checkpoints, times, locks and what was moved aside."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
        and path.name not in (".lock", ".owner", "timing.jsonl")
        and not {"checkpoints", "quarantine"} & set(path.relative_to(out).parts)
    }


def test_a_killed_sweep_goes_on_to_the_same_bytes(forged: Forge, tiny_model: Path, place: Path):
    pairs = data.write_pairs(place / "p", data.bare_pairs(16, num_prompts=8))
    arguments: list[object] = [
        "sweep", "--model", tiny_model, "--pairs", pairs, "--dtype", "float32", "--train-batch-size", 4, "--lora-r", 2,
        "--learning-rate", 0.02, "--eval-split", 0.25, "--eval-steps", 1, "--max-tokens-per-micro-batch", 256,
        "--gradient-checkpointing", "off", "--grid", "beta=0.1,0.5", "--halving", 0.5,
    ]  # fmt: skip
    done = forged.run(*arguments, "--out", place / "whole")
    assert done.code == 0, done.stderr
    whole, source, kills = contents(place / "whole"), random.Random(20_261_130), 0
    for _ in range(NUM_KILLS):
        point = source.choice(list(POINTS))
        fault = f"{point}:{source.randint(1, POINTS[point])}:kill"
        done = forged.run(*arguments, "--out", place / "s", fault=fault)
        assert done.code in (0, -signal.SIGKILL), (fault, done.stderr)
        kills += done.code < 0
        done = forged.run(*arguments, "--out", place / "s")
        assert done.code == 0, (fault, done.stderr)
        assert contents(place / "s") == whole, fault
        shutil.rmtree(place / "s")
    assert kills >= NUM_KILLS // 2
