"""Training killed anywhere, on a full disk, or asked to stop: the same command goes on to the same bytes.

With dropout, held-out rows, reference values made at the start and the best weights kept: everything that a resume
could get wrong. A sample of the points by default; all of them with PREFPIPE_ALL_FAULTS=1 (`make faults`).
"""

import json
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prefpipe.runs import manifests
from tests.forge import Forge
from tests.stages.train import data

ALL = "PREFPIPE_ALL_FAULTS" in os.environ
NUM_NAMED, NUM_TIMED, NUM_DOUBLE = (48, 16, 8) if ALL else (8, 2, 1)
NUM_FULL = 60 if ALL else 4
# Most passes through each point in an uninterrupted run of `arguments`, measured; a later fault is never reached.
POINTS = {"write": 24, "fsync": 30, "rename": 16, "fsync_dir": 24, "append": 8, "pwrite": 456}
_MEMORY = Path("/dev/shm")


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        yield Path(folder)


@dataclass(frozen=True)
class Case:
    """A command without --out, and its run that nothing disturbed."""

    arguments: list[object]
    whole: dict[str, bytes]


@pytest.fixture(scope="module")
def case(forged: Forge, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("case")
    pairs = data.write_pairs(folder / "p", data.bare_pairs(12, num_prompts=6))
    arguments: list[object] = [
        "train", "--model", tiny_model, "--pairs", pairs, "--dtype", "float32", "--train-batch-size", 2, "--lora-r", 4,
        "--learning-rate", 0.02, "--num-train-epochs", 2, "--lora-dropout", 0.2, "--eval-split", 0.34,
        "--eval-steps", 2, "--load-best-model-at-end", "--save-steps", 2, "--max-tokens-per-micro-batch", 128,
        "--gradient-checkpointing", "off",
    ]  # fmt: skip
    done = forged.run(*arguments, "--out", folder / "t")
    assert done.code == 0, done.stderr
    return Case(arguments, contents(folder / "t"))


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a run but checkpoints (an interrupted run keeps others), times and the lock."""
    skipped = (".lock", ".owner", "timing.jsonl")
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file() and p.name not in skipped and "checkpoints" not in p.parts
    }


def test_killed_anywhere_and_run_again_it_has_the_same_bytes(forged: Forge, case: Case, place: Path):
    """Kills at named points (a torn checkpoint file among them), at random times, and while a killed run recovers."""
    source = random.Random(20_241_125)
    kills = 0
    for number in range(NUM_NAMED + NUM_TIMED + NUM_DOUBLE):
        for _ in range(2 if number >= NUM_NAMED + NUM_TIMED else 1):
            if NUM_NAMED <= number < NUM_NAMED + NUM_TIMED:
                job: dict[str, object] = {"alarm": source.uniform(0.05, 1.0)}
            else:
                point = source.choice(list(POINTS))
                action = source.choice(["kill", "torn"] if point == "write" else ["kill"])
                job = {"fault": f"{point}:{source.randint(1, POINTS[point])}:{action}"}
            done = forged.run(*case.arguments, "--out", place / "t", **job)
            assert done.code in (0, -signal.SIGKILL, -signal.SIGALRM), (job, done.stderr)
            kills += done.code < 0 and "fault" in job  # the others may come too late, on a fast machine
        done = forged.run(*case.arguments, "--out", place / "t")
        assert done.code == 0, (job, done.stderr)
        assert contents(place / "t") == case.whole, job
        shutil.rmtree(place / "t")
    assert kills >= (40 if ALL else 7)


def test_killed_in_a_write_that_training_has_left_behind(forged: Forge, case: Case, place: Path):
    """Step 5 is done and noted while a thread writes the checkpoint of step 4: what counts is that of step 2."""
    done = forged.run(*case.arguments, "--out", place / "t", module="tests.faults.slow_disk")
    assert done.code == -signal.SIGKILL, done.stderr
    # The thread may see step 5 late. The checkpoint of step 6 waits for it.
    assert len((place / "t" / "metrics.jsonl").read_text().splitlines()) in (5, 6)
    left = sorted(path.name for path in (place / "t" / "checkpoints").iterdir())
    assert left[0].startswith(".step-00000004.")
    assert left[1:] == ["step-00000002"]
    again = forged.run(*case.arguments, "--out", place / "t")
    assert again.code == 0, again.stderr
    assert "resuming after step 2" in again.stderr
    assert contents(place / "t") == case.whole


def test_a_full_disk_leaves_the_last_checkpoint_and_a_clear_error(forged: Forge, case: Case, place: Path):
    """The n-th write fails; nothing half-written is left, the last checkpoint loads, and a rerun goes on from it."""
    numbers = range(1, NUM_FULL + 1) if ALL else sorted(random.Random(0).sample(range(4, 16), NUM_FULL))
    failed = 0
    for number in numbers:
        done = forged.run(*case.arguments, "--out", place / "t", fault=f"write:{number}:enospc")
        if done.code == 0:
            break
        failed += 1
        assert done.code == 74, done.stderr
        assert "no space left on the disk while writing" in done.stderr
        assert "run the same command again" in done.stderr
        assert not list((place / "t").rglob(".*.tmp"))
        assert not (place / "t" / "manifest.json").exists()
        saved = sorted((place / "t" / "checkpoints").glob("step-*"))
        again = forged.run(*case.arguments, "--out", place / "t")
        assert again.code == 0, again.stderr
        if saved:
            assert f"resuming after step {int(saved[-1].name[5:])}" in again.stderr
        assert contents(place / "t") == case.whole
        shutil.rmtree(place / "t")
    assert failed >= (15 if ALL else 4)


@pytest.mark.parametrize("step", [1, 3])
def test_sigterm_writes_a_checkpoint_and_leaves_with_143(forged: Forge, case: Case, place: Path, step: int):
    """Between checkpoints (there is one every 2 steps): the one at the signal is a new one, and nothing is lost."""
    done = forged.run(*case.arguments, "--out", place / "t", fault=f"append:{step}:sigterm")
    assert done.code == 143, done.stderr
    assert "the same command" in done.stderr
    saved = sorted(p.name for p in (place / "t" / "checkpoints").iterdir())
    assert len(saved) >= 1
    reached = int(saved[-1][5:])
    assert reached in (step, step + 1)
    lines = (place / "t" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == reached
    again = forged.run(*case.arguments, "--out", place / "t")
    assert again.code == 0, again.stderr
    assert f"resuming after step {reached}" in again.stderr
    assert contents(place / "t") == case.whole


def a_better_number(out: Path) -> None:
    """The last evaluation before the kill becomes the best of all: its weights would be the ones that are saved."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    place = max(i for i, line in enumerate(lines) if "eval_loss" in line)
    lines[place] = json.dumps(json.loads(lines[place]) | {"eval_loss": 0.0})
    (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def an_older_number(out: Path) -> None:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {"loss": 9.0})
    (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def fewer_lines(out: Path) -> None:
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[2:]))


def a_flipped_bit(out: Path) -> None:
    content = bytearray((out / "metrics.jsonl").read_bytes())
    content[0] ^= 4
    (out / "metrics.jsonl").write_bytes(content)


def no_metrics(out: Path) -> None:
    (out / "metrics.jsonl").unlink()


def a_pipe(out: Path) -> None:
    no_metrics(out)
    os.mkfifo(out / "metrics.jsonl")


def lost_weights(out: Path) -> None:
    for path in (out / "checkpoints").glob("step-*/state.safetensors"):
        path.write_bytes(path.read_bytes()[:-8] + b"\0" * 8)


def no_text(out: Path) -> None:
    for path in (out / "checkpoints").glob("step-*/state.json"):
        path.write_bytes(b"[" * 100_000)


CHANGES = [a_better_number, an_older_number, fewer_lines, a_flipped_bit, no_metrics, a_pipe, lost_weights, no_text]


@pytest.mark.parametrize("change", CHANGES if ALL else [a_better_number, an_older_number])
def test_what_a_resume_stands_on_was_changed(
    forged: Forge, case: Case, place: Path, change: Callable[[Path], None]
) -> None:
    """It goes back to what nobody changed, or starts over: the bytes are those of the whole run."""
    done = forged.run(*case.arguments, "--out", place / "t", fault="append:6:kill")
    assert done.code == -signal.SIGKILL
    assert len(list((place / "t" / "checkpoints").iterdir())) == 2
    change(place / "t")
    again = forged.run(*case.arguments, "--out", place / "t")
    assert again.code == 0, again.stderr
    assert "moves to quarantine/" in again.stderr
    made = {name: content for name, content in contents(place / "t").items() if not name.startswith("quarantine")}
    assert made == case.whole


def test_a_policy_that_no_manifest_vouches_for_is_made_again(forged: Forge, case: Case, place: Path) -> None:
    """Killed between the adapter and the manifest; then a bit of the adapter flips."""
    done = forged.run(*case.arguments, "--out", place / "t")
    assert done.code == 0, done.stderr
    (place / "t" / "manifest.json").unlink()
    weights = place / "t" / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = forged.run(*case.arguments, "--out", place / "t")
    assert again.code == 0, again.stderr
    assert weights.read_bytes() == content
    assert (place / "t" / "quarantine" / "adapter" / "adapter_model.safetensors").exists()


def test_the_case_is_worth_it(case: Case, tmp_path: Path):
    """Dropout changed the result, and the best evaluation was not the last."""
    (tmp_path / "m.json").write_bytes(case.whole["manifest.json"])
    totals = manifests.read_json(tmp_path / "m.json")["totals"]
    assert totals["best"]["step"] < totals["steps"]
    (tmp_path / "a.safetensors").write_bytes(case.whole["adapter/adapter_model.safetensors"])
    assert any(t.abs().max() > 0 for n, t in load_file(tmp_path / "a.safetensors").items() if "lora_B" in n)
