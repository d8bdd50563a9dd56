"""`import prefpipe`: light, complete, and the same runs as the command line makes."""

import inspect
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import prefpipe
from prefpipe.api import calls
from prefpipe.cli import app
from prefpipe.config.train import TrainConfig
from prefpipe.errors import Interrupted, MissingInputError, PrefpipeError, StorageError, UsageError
from tests.conftest import ROOT, Call
from tests.e2e.letters import most_letters

# Commands for a terminal: what they print is for people, or `load` has it as frames.
FOR_TERMINALS = {
    *("chat", "compare", "config", "demo", "doctor", "export", "push", "recipes", "runs", "show", "steps"),
}
IMPORT = """
import sys, json, pathlib, typing, dataclasses
before = {*sys.modules}
import prefpipe
print(json.dumps([sorted({*sys.modules} - before), dir(prefpipe)]))
"""


def sampled(model: Path, prompts: Path, out: Path, **settings: Any) -> prefpipe.Run:
    return prefpipe.generate(
        model=model, prompts=prompts, engine="fake", limit=3, max_tokens=48, out=out,
        **{"rewards": "short_sentence", "num_samples": 2, **settings},
    )  # fmt: skip


def test_the_import_takes_one_module_and_so_no_time() -> None:
    """Beside four of Python's."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, cwd=ROOT)
    modules, names = json.loads(done.stdout)
    assert modules == ["prefpipe"]
    assert set(prefpipe.__all__) <= set(names)


def test_a_function_brings_no_tensors() -> None:
    ask = "import sys, prefpipe; prefpipe.train; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"torch", "polars", "pyarrow"} & set(done.stdout.split())


def test_every_command_is_a_function_or_for_a_terminal() -> None:
    named = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None}
    named |= {group.name for group in app.registered_groups if group.name}
    assert {name.replace("-", "_") for name in named - FOR_TERMINALS} <= set(prefpipe.__all__)
    for name in prefpipe.__all__:
        assert getattr(prefpipe, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = prefpipe.trian  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", calls.STAGES)
def test_a_function_shows_its_settings_to_editors_and_to_help(command: str) -> None:
    function = getattr(prefpipe, command.replace("-", "_"))
    cls, _ = calls.STAGES[command]
    parameters = inspect.signature(function).parameters
    assert list(parameters) == ["recipe", "out", "force", *cls.model_fields]
    for name, field in cls.model_fields.items():
        assert parameters[name].default == field.get_default(call_default_factory=True)
        assert f"    {name}: " in function.__doc__


def test_a_run_is_that_of_the_command_line(tiny_model: Path, prompts_file: Path, tmp_path: Path, call: Call) -> None:
    """Settings by keyword, in a recipe, and both: the same manifests to the byte; and each resumes the other."""
    first = sampled(tiny_model, prompts_file, tmp_path / "api")
    recipe = tmp_path / "g.toml"
    recipe.write_text('engine = "fake"\nnum_samples = 7\nlimit = 3\nmax_tokens = 48\nrewards = ["short_sentence"]\n')
    flags = ("--model", tiny_model, "--prompts", prompts_file, "--num-samples", 2)
    assert call("generate", recipe, *flags, "--out", tmp_path / "cli").code == 0
    mixed = prefpipe.generate(recipe, model=tiny_model, prompts=prompts_file, num_samples=2, out=tmp_path / "mixed")
    found = {name: (tmp_path / name / "manifest.json").read_bytes() for name in ("api", "cli", "mixed")}
    assert len(set(found.values())) == 1
    assert (first.digest, first.config) == (mixed.digest, prefpipe.load(tmp_path / "cli").config)
    again = call("generate", recipe, *flags, "--out", tmp_path / "api")
    assert "is complete already" in again.stderr
    assert sampled(tiny_model, prompts_file, tmp_path / "cli").digest == first.digest


def test_a_callable_is_its_name_and_a_run_a_setting(
    tiny_model: Path, prompts_file: Path, tmp_path: Path, call: Call
) -> None:
    run = sampled(tiny_model, prompts_file, tmp_path / "g", num_samples=4, rewards=most_letters)
    pairs = prefpipe.build_pairs(completions=run, reward=most_letters, gap_filter="none", out=tmp_path / "p")
    assert (pairs.command, pairs.state) == ("build-pairs", "complete")
    name = "tests.e2e.letters:most_letters"
    model = ("--model", tiny_model, "--prompts", prompts_file, "--engine", "fake", "--limit", 3, "--max-tokens", 48)
    assert call("generate", *model, "--num-samples", 4, "--rewards", name, "--out", tmp_path / "g2").code == 0
    read = ("--completions", tmp_path / "g2", "--reward", name, "--gap-filter", "none")
    assert call("build-pairs", *read, "--out", tmp_path / "p2").code == 0
    for ours, theirs in ((run, "g2"), (pairs, "p2")):
        assert prefpipe.load(tmp_path / theirs).digest == ours.digest


def test_parts_are_gathered(tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    parts = [sampled(tiny_model, prompts_file, tmp_path / f"{n}", part=f"{n}/2", check=0, shard_rows=1) for n in (1, 2)]
    whole = sampled(tiny_model, prompts_file, tmp_path / "whole", check=0, shard_rows=1)
    assert prefpipe.gather(*parts, out=tmp_path / "gathered").digest == whole.digest


def test_force_starts_over(tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    sampled(tiny_model, prompts_file, tmp_path / "g")
    with pytest.raises(UsageError, match=r"1 now\nhint: choose another out, or start over with force=True"):
        sampled(tiny_model, prompts_file, tmp_path / "g", seed=1)
    assert sampled(tiny_model, prompts_file, tmp_path / "g", seed=1, force=True).config["seed"] == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"betta": 0.1}, r"prefpipe\.train\(\): unknown setting 'betta' \(did you mean 'beta'\?\)"),
        ({"beta": "much"}, r"beta = 'much'"),
        ({"beta": -1}, "beta = -1: Input should be greater than 0"),
        ({"loss_type": "sigmoyd"}, "did you mean 'sigmoid'"),
        ({"recipe": "nowhere.toml"}, r"nowhere\.toml does not exist"),
        ({}, "no pairs given"),
    ],
)
def test_an_error_says_what_to_do(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(PrefpipeError, match=words) as caught:
        prefpipe.train(out=tmp_path / "t", **settings)
    assert str(caught.value) == f"{caught.value.message}\nhint: {caught.value.hint}"


def test_tables_of_iterate_are_mappings(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown setting 'train\.betta' \(did you mean 'beta'\?\)"):
        prefpipe.iterate(train={"betta": 1}, out=tmp_path)


@pytest.mark.parametrize(
    ("raised", "error", "words"),
    [
        (ModuleNotFoundError("no", name="vllm"), MissingInputError, "needs the package 'vllm'\nhint: install it with"),
        (PermissionError(13, "Permission denied"), StorageError, "Permission denied\nhint: check permissions"),
        (SystemExit(0), PrefpipeError, "ended from inside, with exit code 0"),
        (Interrupted(2), KeyboardInterrupt, "stopped by signal 2; make the same call again"),
        (ZeroDivisionError("x"), ZeroDivisionError, "x"),
    ],
)
def test_what_ends_a_stage_is_an_error_of_ours(
    raised: BaseException, error: type[BaseException], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stage:
        @staticmethod
        def run(config: TrainConfig, out: Path, *, force: bool) -> None:
            raise raised

    monkeypatch.setattr(calls, "_stage", lambda command: Stage)
    with pytest.raises(error, match=words):
        prefpipe.train(out=tmp_path)


def test_a_page_and_a_model_are_paths(tiny_model: Path, prompts_file: Path, tmp_path: Path) -> None:
    run = sampled(tiny_model, prompts_file, tmp_path / "g")
    with pytest.raises(UsageError, match="is a run of generate; this command needs a run of train, or of iterate"):
        prefpipe.merge(run, tmp_path / "m")
    with pytest.raises(UsageError, match="is an address"):
        prefpipe.load("s3://bucket/run")
    with pytest.raises(UsageError, match="no pairs given"):
        prefpipe.plan(model=tiny_model)


def test_a_fork_of_a_process_that_has_called_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads of polars stay behind in a fork: it would wait for ever."""
    monkeypatch.setattr(calls, "_first", [1])
    with pytest.raises(UsageError, match=r"fork of process 1, .*\nhint: start it with .*'spawn'"):
        prefpipe.build_pairs(completions=tmp_path, reward="length", out=tmp_path / "p")


@pytest.mark.parametrize(("command", "is_alone"), [("train", True), ("sweep", True), ("score", False)])
def test_one_thread_trains_at_a_time(
    command: str, is_alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stage:
        @staticmethod
        def run(config: TrainConfig, out: Path, *, force: bool) -> dict[str, bool]:
            with ThreadPoolExecutor(1) as other:
                got = other.submit(calls._training.acquire, blocking=False).result()
                other.submit(calls._training.release).result() if got else None
            return {"is_alone": not got}

    monkeypatch.setattr(calls, "_stage", lambda command: Stage)
    assert calls.run(command, TrainConfig(), tmp_path) == {"is_alone": is_alone}
