"""Prompts of the training among those of the evaluation: an error that names them."""

from pathlib import Path
from typing import Any

import pytest

from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.stages.build_pairs import stage as build_pairs
from prefpipe.stages.evaluate import leaks
from prefpipe.stages.generate import stage as generate
from tests.conftest import Call, Write
from tests.stages.evaluate.cases import config, prompts_file, prompts_of, run, topics


@pytest.fixture
def trained(tiny_model: Path, write: Write, tmp_path: Path) -> Path:
    """A run of generate on three prompts."""
    path = write(*topics(3), name="train.jsonl")
    sampled: dict[str, Any] = {"model": str(tiny_model), "prompts": str(path), "split": "all", "engine": "fake"}
    settings = generate.GenerateConfig(**sampled, check=0, rewards=("length", "short_sentence"), num_samples=4)
    generate.run(settings, tmp_path / "g", force=False)
    return tmp_path / "g"


def test_a_leak_is_an_error_that_names_the_ids(
    call: Call, tiny_model: Path, trained: Path, write: Write, tmp_path: Path
) -> None:
    """The expected answer of the second prompt is another one, so its id is too: the model has seen the words."""
    rows = [*topics(2), *topics(4, "new")]
    rows[1]["answer"] = "another"
    path = write(*rows, name="heldout.jsonl")
    common = ("evaluate", "--model", tiny_model, "--prompts", path, "--engine", "fake", "--reward", "length")
    done = call(*common, "--trained-on", trained, "--out", tmp_path / "e")
    assert done.code == 65, done.stderr
    leaked = [p.prompt_id for p in prompts_of(path)][:2]
    assert f"2 of the prompts to evaluate on are among those that {trained} trained on (in {path})" in done.stderr
    assert all(prompt_id in done.stderr for prompt_id in leaked)
    assert not (tmp_path / "e").exists()


def test_clean_prompts_are_said_and_guards_are_looked_at(
    tiny_model: Path, trained: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean, dirty = prompts_file(write, 2, "clean.jsonl", "new"), prompts_file(write, 4, "dirty.jsonl")
    plain = run(config(tiny_model, clean), tmp_path / "e")
    assert run(config(tiny_model, clean, trained_on=(str(trained),)), tmp_path / "e") == plain
    assert f"none of 2 prompts is among those of {trained}" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"3 of the prompts .*dirty\.jsonl"):
        run(config(tiny_model, clean, guard=(f"{dirty}:length",), trained_on=(str(trained),)), tmp_path / "e")


@pytest.mark.parametrize("output", ["pairs", "labels", "groups"])
def test_rows_to_train_on_hold_their_prompts(trained: Path, write: Write, tmp_path: Path, output: str) -> None:
    settings = build_pairs.BuildPairsConfig(completions=(str(trained),), reward="short_sentence", output=output)
    build_pairs.run(settings, tmp_path / "p", force=False)
    leaks.check((str(tmp_path / "p"),), {"clean": prompts_of(prompts_file(write, 3, topic="new"))})
    with pytest.raises(DataError, match="of the prompts to evaluate on"):
        leaks.check((str(trained), str(tmp_path / "p")), {"f": prompts_of(prompts_file(write, 3))})
    with pytest.raises(DataError, match=f"that {tmp_path / 'p'} trained on"):
        leaks.check((str(tmp_path / "p"),), {"f": prompts_of(prompts_file(write, 3))})


def test_many_ids_are_counted(trained: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "_SHOWN", 2)
    with pytest.raises(DataError, match=r": \w{32}, \w{32} and 1 more$"):
        leaks.check((str(trained),), {"f": prompts_of(prompts_file(write, 3))})


def test_only_complete_runs_with_prompts_are_looked_at(tiny_model: Path, write: Write, tmp_path: Path) -> None:
    run(config(tiny_model, prompts_file(write, 2)), tmp_path / "e")
    with pytest.raises(UsageError, match="a run of evaluate holds no prompts"):
        leaks.check((str(tmp_path / "e"),), {})
    with pytest.raises(MissingInputError, match="holds no complete run"):
        leaks.check((str(tmp_path / "none"),), {})
