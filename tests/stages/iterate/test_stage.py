"""Rounds are linked, resumable and replayable: every step is a command of its own with a saved config."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prefpipe.config import base
from prefpipe.config.iterate import IterateConfig
from prefpipe.errors import MissingInputError, PrefpipeError, UsageError
from prefpipe.runs import store
from prefpipe.runs.store import Manifest
from prefpipe.stages.iterate import stage as iterate
from tests.conftest import ROOT
from tests.forge import Forge
from tests.stages.iterate.cases import NO_STOPS, PER_ROUND, in_process, never, planned
from tests.waiting import until

MakeConfig = Callable[..., IterateConfig]


@pytest.fixture(scope="module")
def config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    """Two rounds of two prompts and two samples on the tiny model, in float32."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [("kettle", "train"), ("owl", "train"), ("moss", "heldout")]
    lines = [{"messages": [{"role": "user", "content": f"Name a {t}."}], "answer": t, "split": s} for t, s in rows]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sampling = {
        "prompts": str(prompts),
        "engine": "transformers",
        "dtype": "float32",
        "max_tokens": 8,
        "num_samples": 2,
    }
    reward = "tests.e2e.letters:most_letters"

    def make(**changes: object) -> IterateConfig:
        return IterateConfig.model_validate(
            {
                "model": str(tiny_model),
                "rounds": 2,
                "stop": NO_STOPS,
                "generate": {**sampling, "rewards": [reward], "check": 0},
                "build_pairs": {"reward": reward, "truncated_chosen": "keep"},
                "train": {"dtype": "float32", "lora_r": 2, "learning_rate": 1e-3, "train_batch_size": 1},
                "evaluate": {**sampling, "reward": reward},
                **changes,
            }
        )

    return make


@pytest.fixture(scope="module")
def finished(config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """Two rounds, run to the end without a pause."""
    out = tmp_path_factory.mktemp("iterate") / "out"
    return out, iterate.run(config(), out, force=False, runner=in_process)


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        (
            {"build_pairs": {}},
            "no reward given",
            "set reward in the [build_pairs] table: the completions of [generate]",
        ),
        ({"build_pairs": {"reward": "length"}}, "hold no reward 'length'", "tests.e2e.letters:most_letters"),
        ({"build_pairs": {"reward": "2*length +"}}, "character 11 (the end)", "a sum is written as"),
        ({"evaluate": {"prompts": "p.jsonl"}}, "no reward given for evaluate", "set reward in the [evaluate] table"),
    ],
)
def test_rewards_are_named_before_anything_is_sampled(
    config: MakeConfig, tmp_path: Path, changes: dict[str, object], message: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        iterate.run(config(**changes), tmp_path / "o", force=False, runner=never)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert not (tmp_path / "o").exists()


def test_the_manifest_has_a_row_for_the_start_and_every_round(finished: tuple[Path, Manifest]) -> None:
    out, manifest = finished
    assert [r["round"] for r in manifest["totals"]["rounds"]] == [0, 1, 2]
    assert set(manifest["identity"]) == {"round-0/evaluate", *(f"round-{n}/{c}" for n in (1, 2) for c in PER_ROUND)}
    for name, digest in manifest["identity"].items():
        assert store.read_manifest(out / name)["digest"] == digest


def test_a_round_starts_from_the_policy_of_the_round_before(finished: tuple[Path, Manifest]) -> None:
    out, _ = finished
    identity = {
        n: store.read_manifest(out / n)["identity"] for n in ("round-1/train", "round-2/generate", "round-2/train")
    }
    trained = identity["round-1/train"]["policy"]
    assert identity["round-2/generate"]["policy"] == identity["round-2/generate"]["reference"] == trained
    assert identity["round-2/train"]["initial"] == identity["round-2/train"]["reference"] == trained
    assert "+adapter:" in trained
    assert identity["round-1/train"]["initial"] == trained.partition("+")[0]


def test_step_0_loss_of_every_round_is_ln_2(finished: tuple[Path, Manifest]) -> None:
    out, _ = finished
    for number in (1, 2):
        first = json.loads((out / f"round-{number}/train/metrics.jsonl").read_text().splitlines()[0])
        assert abs(first["loss"] - 0.693147) < 1e-4  # policy = reference, so the margin is 0 and -log sigmoid(0) = ln 2


def results(manifest: Manifest) -> dict[str, object]:
    """What a run in another directory has as well: nothing names a directory."""
    return {"digest": manifest["digest"], **manifest["identity"], "totals": manifest["totals"]}


def test_every_step_can_be_replayed_from_its_saved_config(
    config: MakeConfig, finished: tuple[Path, Manifest], tmp_path: Path
) -> None:
    out, _ = finished
    for step in planned(config(), out):
        assert base.load(type(step.config), out / f"{step.name}.json", {}) == step.config
    in_process("build-pairs", out / "round-2/build-pairs.json", tmp_path / "replayed")
    replayed = store.read_manifest(tmp_path / "replayed")
    assert replayed["digest"] == store.read_manifest(out / "round-2/build-pairs")["digest"]


def test_the_second_run_is_complete_and_runs_nothing(config: MakeConfig, finished: tuple[Path, Manifest]) -> None:
    out, manifest = finished
    assert iterate.run(config(), out, force=False, runner=never) == manifest


def test_other_settings_of_a_step_are_refused(config: MakeConfig, finished: tuple[Path, Manifest]) -> None:
    out, _ = finished
    with pytest.raises(UsageError, match="start: None there, 'base' now"):
        iterate.run(config(start="base"), out, force=False, runner=never)


@pytest.mark.parametrize("failing", [3, 8])
def test_a_failed_step_is_resumed_and_the_result_is_the_same(
    config: MakeConfig, finished: tuple[Path, Manifest], tmp_path: Path, failing: int
) -> None:
    calls: list[str] = []

    def fails_once(command: str, saved: Path, out: Path) -> None:
        if len(calls) == failing:
            calls.append("failed")
            raise PrefpipeError(f"{command} failed", "")
        calls.append(command)
        in_process(command, saved, out)

    with pytest.raises(PrefpipeError, match="failed"):
        iterate.run(config(), tmp_path / "out", force=False, runner=fails_once)
    assert not (tmp_path / "out" / "manifest.json").exists()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("round-*/*/manifest.json")}
    assert len(done) == failing
    manifest = iterate.run(config(), tmp_path / "out", force=False, runner=fails_once)
    assert {p: p.stat().st_mtime_ns for p in done} == done  # a step that was complete was not made again
    _, expected = finished
    assert results(manifest) == results(expected)


def test_a_step_that_lost_its_data_is_made_again(
    config: MakeConfig, finished: tuple[Path, Manifest], tmp_path: Path
) -> None:
    _, expected = finished
    manifest = iterate.run(config(), tmp_path / "out", force=False, runner=in_process)
    assert results(manifest) == results(expected)
    (tmp_path / "out/round-2/evaluate/manifest.json").unlink()
    (tmp_path / "out/round-2/evaluate/evaluations/part-00000.parquet").unlink()
    again = iterate.run(config(), tmp_path / "out", force=False, runner=in_process)
    assert again["identity"] == manifest["identity"]
    assert (tmp_path / "out/round-2/evaluate/evaluations/part-00000.parquet").exists()


def test_a_run_without_prompts_is_refused(config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no prompts given for evaluate"):
        iterate.run(config(evaluate={}), tmp_path / "o", force=False, runner=never)
    absent = {"prompts": "absent.jsonl", "rewards": config().generate.rewards}
    with pytest.raises(MissingInputError, match="absent"):
        iterate.run(config(generate=absent), tmp_path / "o", force=False, runner=never)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("kind", ["guard", "perplexity_text", "chat_template", "baseline"])
def test_the_content_of_every_file_that_a_table_names_belongs_to_the_run(
    config: MakeConfig, finished: tuple[Path, Manifest], tmp_path: Path, kind: str
) -> None:
    """As it stands in another place it is the same; with another content it is not, under the same name."""
    tables = config().evaluate.model_dump()
    found: list[dict[str, str]] = []
    for folder, content in (("a", "one"), ("b", "one"), ("b", "two")):
        path = tmp_path / folder / "file.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"prompt": content}) + "\n")
        value: object = {"guard": [f"{path}:length"], "baseline": [str(path)]}.get(kind, str(path))
        found.append(iterate._inputs(config(evaluate={**tables, kind: value})))
    assert found[0] == found[1] != found[2]
    assert found[0].keys() - iterate._inputs(config()).keys() in ({f"evaluate.{kind}"}, {f"evaluate.{kind} 0"})


def test_one_round_through_the_command_line(forged: Forge, config: MakeConfig, tmp_path: Path) -> None:
    """Its steps run in the process of the command: test_runners starts those of their own."""
    (tmp_path / "mine.json").write_text(json.dumps(base.dump(config(rounds=1))))
    words = ("iterate", tmp_path / "mine.json", "--out", tmp_path / "o")
    done = forged.run(*words, inline="tests.stages.iterate.cases")
    assert done.code == 0, done.stderr
    assert "round 1/1: evaluate" in done.stderr
    assert "| start" in done.stdout
    assert "| 1 " in done.stdout
    again = forged.run(*words)
    assert again.code == 0, again.stderr
    assert done.stdout.endswith(again.stdout)  # after what the steps said
    assert "is complete already" in again.stderr


STALLING = """
import os, time
from pathlib import Path

def reward(completions, **columns):
    Path("pid.tmp").write_text(str(os.getpid()))
    os.replace("pid.tmp", "pid")
    time.sleep(600)
"""


def test_sigterm_reaches_the_running_step_and_gives_exit_143(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(STALLING)
    sampling = {"prompts": config().evaluate.prompts, "engine": "fake"}
    stalled = config(evaluate={**sampling, "reward": "own:reward"})
    (tmp_path / "mine.json").write_text(json.dumps(base.dump(stalled)))
    command = [sys.executable, "-m", "prefpipe", "iterate", "mine.json", "--out", "o"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as process:
        until((tmp_path / "pid").exists)
        process.terminate()
        _, stderr = process.communicate()
    assert process.returncode == 143, stderr
    assert "error: stopped by signal 15" in stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_page_of_the_rounds_is_written_after_every_evaluation(
    config: MakeConfig, finished: tuple[Path, Manifest], tmp_path: Path
) -> None:
    """It is written while the second step runs, and shows a run that goes on; the last one is of a complete run."""
    page, steps = tmp_path / "out/report.html", list[str]()

    def runner(command: str, saved: Path, out: Path) -> None:
        if steps == ["evaluate"]:
            until(page.exists)
            assert "out is running" in page.read_text()
        else:
            assert page.exists() == bool(steps)
        steps.append(command)
        in_process(command, saved, out)

    manifest = iterate.run(config(rounds=1, report=True), tmp_path / "out", force=False, runner=runner)
    assert steps == ["evaluate", *PER_ROUND]
    assert "out is running" not in page.read_text()
    assert manifest["identity"]["round-1/train"] == finished[1]["identity"]["round-1/train"]
