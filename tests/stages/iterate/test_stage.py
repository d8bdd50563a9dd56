"""Rounds are linked, resumable and replayable: every step is a command of its own with a saved config."""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe import cli as commands
from prefpipe.config import base
from prefpipe.config.iterate import IterateConfig
from prefpipe.errors import MissingInputError, PrefpipeError, UsageError
from prefpipe.runs import store
from prefpipe.runs.store import Manifest
from prefpipe.stages.iterate import stage as iterate
from tests.conftest import ROOT, Cli

PER_ROUND = ("generate", "build-pairs", "train", "evaluate")
MakeConfig = Callable[..., IterateConfig]


def in_process(command: str, saved: Path, out: Path) -> None:
    """What a step's process does, without a process."""
    config_class, module = commands.STAGES[command]
    importlib.import_module(module).run(base.load(config_class, saved, {}), out, force=False)


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


def test_rounds_of_full_fine_tuning_are_linked_by_models(config: MakeConfig):
    full = config(train={"tuning": "full"})
    linked = [(s.name, s.config.model, s.config.adapter) for s in iterate.steps(full, Path("out"))  # type: ignore[attr-defined]
              if s.command != "build-pairs"]  # fmt: skip
    first = "out/round-1/train/model"
    assert [model for name, model, _ in linked if name.startswith("round-2")] == [
        first,
        first,
        "out/round-2/train/model",
    ]
    assert {adapter for _, _, adapter in linked} == {"none"}
    with pytest.raises(ValueError, match="reference = base needs an adapter"):
        config(train={"tuning": "full"}, reference="base")


def never(command: str, saved: Path, out: Path) -> None:
    raise AssertionError(f"{command} was run again")


@settings(deadline=None, max_examples=20)
@given(rounds=st.integers(min_value=1, max_value=5), reference=st.sampled_from(("previous", "base")))
def test_steps_are_linked(rounds: int, reference: str) -> None:
    config = IterateConfig.model_validate({"model": "m", "rounds": rounds, "reference": reference})
    out = Path("out")
    first, *steps = iterate.steps(config, out)
    assert (first.name, first.config.adapter) == ("round-0/evaluate", "none")
    assert [s.name for s in steps] == [f"round-{n}/{c}" for n in range(1, rounds + 1) for c in PER_ROUND]
    for number in range(1, rounds + 1):
        generate, build_pairs, train, evaluate = (s.config for s in steps[4 * (number - 1) : 4 * number])
        before = "none" if number == 1 else f"out/round-{number - 1}/train/adapter"
        assert generate.adapter == train.adapter == before
        assert evaluate.adapter == f"out/round-{number}/train/adapter"
        assert build_pairs.completions == (f"out/round-{number}/generate",)
        assert train.pairs == (f"out/round-{number}/build-pairs",)
        assert {generate.model, train.model, evaluate.model} == {"m"}
        assert generate.reference == ("base" if reference == "base" else "policy")
        assert evaluate.round == number
    assert len({s.config.seed for s in steps if s.command == "generate"}) == rounds
    assert len({s.config.seed for s in steps if s.command == "train"}) == rounds
    assert {s.config.seed for s in steps if s.command == "evaluate"} == {config.evaluate.seed}


def test_settings_of_the_tables_reach_their_steps() -> None:
    config = IterateConfig.model_validate(
        {"rounds": 1, "generate": {"num_samples": 3}, "build_pairs": {"min_gap": 0.5}, "train": {"beta": 0.7},
         "evaluate": {"split": "all"}}
    )  # fmt: skip
    _, generate, build_pairs, train, evaluate = (s.config for s in iterate.steps(config, Path("o")))
    assert (generate.num_samples, build_pairs.min_gap, train.beta, evaluate.split) == (3, 0.5, 0.7, "all")


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


def test_every_step_can_be_replayed_from_its_saved_config(
    config: MakeConfig, finished: tuple[Path, Manifest], tmp_path: Path
) -> None:
    out, _ = finished
    for step in iterate.steps(config(), out):
        assert base.load(type(step.config), out / f"{step.name}.json", {}) == step.config
    in_process("build-pairs", out / "round-2/build-pairs.json", tmp_path / "replayed")
    replayed = store.read_manifest(tmp_path / "replayed")
    assert replayed["digest"] == store.read_manifest(out / "round-2/build-pairs")["digest"]


def test_the_second_run_is_complete_and_runs_nothing(config: MakeConfig, finished: tuple[Path, Manifest]) -> None:
    out, manifest = finished
    assert iterate.run(config(), out, force=False, runner=never) == manifest


def test_other_settings_of_a_step_are_refused(config: MakeConfig, finished: tuple[Path, Manifest]) -> None:
    out, _ = finished
    with pytest.raises(UsageError, match="rounds: 2 there, 3 now"):
        iterate.run(config(rounds=3), out, force=False, runner=never)


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
    assert manifest["totals"] == expected["totals"]
    assert manifest["identity"] == expected["identity"]


def test_a_step_that_lost_its_data_is_made_again(
    config: MakeConfig, finished: tuple[Path, Manifest], tmp_path: Path
) -> None:
    _, expected = finished
    manifest = iterate.run(config(), tmp_path / "out", force=False, runner=in_process)
    assert manifest["identity"] == expected["identity"]
    (tmp_path / "out/round-2/evaluate/manifest.json").unlink()
    (tmp_path / "out/round-2/evaluate/evaluations/part-00000.parquet").unlink()
    again = iterate.run(config(), tmp_path / "out", force=False, runner=in_process)
    assert again["identity"] == expected["identity"]
    assert (tmp_path / "out/round-2/evaluate/evaluations/part-00000.parquet").exists()


def test_the_summary_shows_a_row_per_round_and_paths_that_exist(finished: tuple[Path, Manifest]) -> None:
    out, manifest = finished
    lines = iterate.summary(manifest, out)
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert rows == ["round", "---", "start", "1", "2"]
    assert any("1 held-out prompts" in line for line in lines)
    text = "\n".join(lines)
    assert "> Name a moss." in text
    for word in ("policy", "metrics", "replay"):
        line = next(x for x in lines if x.startswith(word))
        path = next(w for w in line.split() if w.startswith(str(out)))
        assert Path(path).exists(), line


def test_a_run_without_prompts_is_refused(config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no prompts given for evaluate"):
        iterate.run(config(evaluate={}), tmp_path / "o", force=False, runner=never)
    absent = {"prompts": "absent.jsonl", "rewards": config().generate.rewards}
    with pytest.raises(MissingInputError, match="absent"):
        iterate.run(config(generate=absent), tmp_path / "o", force=False, runner=never)
    assert not (tmp_path / "o").exists()


def test_a_failing_process_gives_its_exit_code_and_the_command_to_replay(tmp_path: Path) -> None:
    saved = tmp_path / "generate.json"
    saved.write_text(json.dumps({"command": "generate", "config": {"prompts": str(tmp_path / "absent.jsonl")}}))
    with pytest.raises(PrefpipeError, match="generate failed with exit code 66") as caught:
        iterate.run_process("generate", saved, tmp_path / "g")
    assert caught.value.exit_code == 66
    assert f"prefpipe generate {saved} --out {tmp_path / 'g'}" in caught.value.hint


def test_a_killed_process_gives_the_shells_exit_code(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = list(iterate.steps(config(), tmp_path))[1]
    assert step.command == "generate"
    saved = tmp_path / "generate.json"
    saved.write_text(json.dumps(base.dump(step.config.model_copy(update={"engine": "fake"}))))
    monkeypatch.setenv("PREFPIPE_FAULT", "write:1:kill")
    with pytest.raises(PrefpipeError) as caught:
        iterate.run_process("generate", saved, tmp_path / "g")
    assert caught.value.exit_code == 128 + 9
    monkeypatch.setenv("PREFPIPE_FAULT", "")
    iterate.run_process("generate", saved, tmp_path / "g")
    assert store.read_manifest(tmp_path / "g")["command"] == "generate"


def test_one_round_through_the_command_line(cli: Cli, config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(base.dump(config(rounds=1))))
    done = cli("iterate", tmp_path / "mine.json", "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    assert "[5/5] round 1: evaluate" in done.stderr
    assert "| start" in done.stdout
    assert "| 1 " in done.stdout
    again = cli("iterate", tmp_path / "mine.json", "--out", tmp_path / "o")
    assert again.returncode == 0, again.stderr
    assert done.stdout.endswith(again.stdout)  # after what the steps said
    assert "is complete already" in again.stderr


STALLING = """
import os, time
from pathlib import Path

def reward(completions, **columns):
    Path("pid.tmp").write_text(str(os.getpid()))
    os.replace("pid.tmp", "pid")
    time.sleep(60)
"""


def test_sigterm_reaches_the_running_step_and_gives_exit_143(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(STALLING)
    sampling = {"prompts": config().evaluate.prompts, "engine": "fake"}
    stalled = config(evaluate={**sampling, "reward": "own:reward"})
    (tmp_path / "mine.json").write_text(json.dumps(base.dump(stalled)))
    command = [sys.executable, "-m", "prefpipe", "iterate", "mine.json", "--out", "o"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.terminate()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert "error: stopped by signal 15" in stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_page_of_the_rounds_is_written_after_every_evaluation(
    config: MakeConfig, finished: tuple[Path, Manifest], tmp_path: Path
) -> None:
    """What is there when the second step starts is a page of a run that goes on; the last one is of a complete run."""
    seen: list[str] = []

    def runner(command: str, saved: Path, out: Path) -> None:
        page = out.parent.parent / "report.html"
        seen.append(page.read_text() if page.exists() else "")
        in_process(command, saved, out)

    manifest = iterate.run(config(rounds=1, report=True), tmp_path / "out", force=False, runner=runner)
    assert [bool(text) for text in seen] == [False, True, True, True, True]
    assert "out is running" in seen[1]
    assert "out is running" not in (tmp_path / "out/report.html").read_text()
    assert manifest["identity"]["round-1/evaluate"] == finished[1]["identity"]["round-1/evaluate"]
