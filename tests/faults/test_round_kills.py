"""`iterate` killed anywhere: in any write of any step, between steps, while it links and ends, while it recovers.

The same command goes on to the digests of a run that nothing disturbed. Steps run inside the process that is killed, so
that one kill takes them with it; the engine is the fake one, the training a real one in float32. Some kills hit an
engine of transformers that goes through all rounds and takes the adapter of each; the run that nothing disturbed has a
new engine for every step.
"""

import json
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prefpipe.config import base
from prefpipe.runs import store
from tests.forge import Forge
from tests.stages.iterate import cases

ALL = "PREFPIPE_ALL_FAULTS" in os.environ
NUM_NAMED, NUM_TIMED, NUM_DOUBLE = (46, 10, 8) if ALL else (4, 1, 1)
NUM_WARM = 8 if ALL else 2
NUM_CONTINUED = 8 if ALL else 1
# Most passes through each point in a run that nothing disturbed, measured; a later fault is never reached.
POINTS = {"write": 167, "fsync": 175, "rename": 153, "fsync_dir": 163, "append": 16}
_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Case:
    """A recipe, where it runs (a comparison names its directories), and what its run has made that nothing
    disturbed."""

    recipe: Path
    out: Path
    whole: dict[str, str]


@pytest.fixture(scope="module")
def case(forged: Forge, tiny_model: Path) -> Iterator[Case]:
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as name:
        folder = Path(name)
        recipe = write_recipe(tiny_model, folder)
        done = run(forged, recipe, folder / "out")
        assert done.code == 0, done.stderr
        whole = digests(folder / "out")
        shutil.rmtree(folder / "out")
        yield Case(recipe, folder / "out", whole)


def write_recipe(model: Path, folder: Path, name: str = "recipe.json", **changes: Any) -> Path:
    """Two rounds with schedules, prompts of their own and replay; a checkpoint after every step of training."""
    sampling = {"max_tokens": 24, "num_samples": 4, "shard_rows": 1, "engine": changes.pop("engine", "fake")}
    config = cases.config(
        model,
        cases.write_prompts(folder / "prompts.jsonl"),
        prompts_per_round=3,
        replay=1.0,
        learning_rates=[1e-3, 5e-4],
        metric_for_best_round="sampled.mean_reward",
        generate=sampling,
        evaluate=sampling,
        train={"learning_rate": 0.0, "train_batch_size": 1, "save_steps": 1},
        **changes,
    )
    recipe = folder / name
    recipe.write_text(json.dumps(base.dump(config)))
    return recipe


def run(forged: Forge, recipe: Path, out: Path, **job: Any) -> Any:
    return forged.run("iterate", recipe, "--out", out, inline="tests.stages.iterate.cases", **job)


def digests(out: Path) -> dict[str, str]:
    """The digest of every manifest, and where the link to the best policy leads."""
    found = {str(p.relative_to(out)): store.read_manifest(p.parent)["digest"] for p in out.rglob("manifest.json")}
    best = out / "best"
    return {n: d for n, d in found.items() if not n.startswith("best/")} | (
        {"best": str(best.readlink())} if best.is_symlink() else {}
    )


@pytest.mark.slow
@pytest.mark.timeout(3600 if ALL else 900)
def test_rounds_cut_anywhere_and_run_again_have_the_same_digests(forged: Forge, case: Case) -> None:
    source = random.Random(20_261_129)
    kills = 0
    for number in range(NUM_NAMED + NUM_TIMED + NUM_DOUBLE):
        for _ in range(2 if number >= NUM_NAMED + NUM_TIMED else 1):
            if NUM_NAMED <= number < NUM_NAMED + NUM_TIMED:
                job: dict[str, object] = {"alarm": source.uniform(0.3, 3.0)}
            else:
                point = source.choice(list(POINTS))
                action = source.choice(["kill", "torn"] if point == "write" else ["kill"])
                job = {"fault": f"{point}:{source.randint(1, POINTS[point])}:{action}"}
            done = run(forged, case.recipe, case.out, **job)
            assert done.code in (0, -signal.SIGKILL, -signal.SIGALRM), (job, done.stderr)
            kills += done.code < 0
        done = run(forged, case.recipe, case.out)
        assert done.code == 0, (job, done.stderr)
        assert digests(case.out) == case.whole, job
        assert not list((case.out).rglob(".*.tmp")), job
        shutil.rmtree(case.out)
    assert kills >= (60 if ALL else 4)


@pytest.mark.slow
@pytest.mark.timeout(3600 if ALL else 900)
def test_a_warm_engine_that_is_killed_leaves_what_new_engines_make(
    forged: Forge, tiny_model: Path, tmp_path: Path
) -> None:
    cold = write_recipe(tiny_model, tmp_path, "cold.json", engine="transformers", keep_engine="never")
    warm = write_recipe(tiny_model, tmp_path, "warm.json", engine="transformers", keep_engine="always")
    done = run(forged, cold, tmp_path / "cold")
    assert done.code == 0, done.stderr
    starts = done.stderr.count("starting engine transformers")
    source, out, kills = random.Random(7), tmp_path / "warm", 0
    for _ in range(NUM_WARM):
        done = run(forged, warm, out, fault=f"rename:{source.randint(40, POINTS['rename'])}:kill")
        assert done.code in (0, -signal.SIGKILL), done.stderr
        kills += done.code < 0
        done = run(forged, warm, out)
        assert done.code == 0, done.stderr
        assert digests(out) == digests(tmp_path / "cold")
        shutil.rmtree(out)
    assert kills
    done = run(forged, warm, out)
    assert (done.stderr.count("starting engine transformers"), starts) == (1, 3)


@pytest.mark.slow
@pytest.mark.timeout(3600 if ALL else 600)
def test_a_round_that_goes_on_with_an_optimizer_and_is_killed_ends_with_the_same_bytes(
    forged: Forge, tiny_model: Path, tmp_path: Path
) -> None:
    """Kills in the second half of the appended lines, most of which are steps of training in round 2."""
    recipe, out = write_recipe(tiny_model, tmp_path, optimizer="continue"), tmp_path / "out"
    done = run(forged, recipe, out)
    assert done.code == 0, done.stderr
    assert done.stderr.count("the optimizer goes on with that of") == 1
    whole, weights = digests(out), cases.adapters(out, 1, 2)
    shutil.rmtree(out)
    source = random.Random(11)
    for number in source.sample(range(8, POINTS["append"] + 1), NUM_CONTINUED):
        done = run(forged, recipe, out, fault=f"append:{number}:kill")
        assert done.code == -signal.SIGKILL, done.stderr
        done = run(forged, recipe, out)
        assert done.code == 0, done.stderr
        assert digests(out) == whole, number
        assert cases.adapters(out, 1, 2) == weights, number
        shutil.rmtree(out)
