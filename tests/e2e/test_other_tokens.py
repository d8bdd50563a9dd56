"""Rows of one tokenizer on a model with another, through the command line and every way that rows can go."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefpipe.models import vocabulary
from prefpipe.runs import store
from tests.conftest import Call

COMMON = ("--engine", "fake", "--check", 0)
FREE = ("--dtype", "float32", "--lora-r", 2, "--loss-type", "simpo", "--beta", 2)  # without reference: no audit


def changed(model: Path, into: Path, change: Callable[[dict[str, Any]], None], settings: bool = False) -> Path:
    """The same weights with another tokenizer.json, and, with `settings`, another tokenizer_config.json."""
    shutil.copytree(model, into)
    tokenizer = json.loads((into / "tokenizer.json").read_text())
    change(tokenizer)
    (into / "tokenizer.json").write_text(json.dumps(tokenizer))
    if settings:
        beside = json.loads((into / "tokenizer_config.json").read_text())
        (into / "tokenizer_config.json").write_text(json.dumps({**beside, "padding_side": "left"}))
    return into


def swap(tokenizer: dict[str, Any]) -> None:
    """a and b change places: as many tokens as before, and every id is there."""
    tokens = tokenizer["model"]["vocab"]
    tokens["a"], tokens["b"] = tokens["b"], tokens["a"]


def touch(tokenizer: dict[str, Any]) -> None:
    """Everything but the map of ids: how text is cut, and one token more behind the others."""
    tokenizer["added_tokens"][0]["lstrip"] = True
    tokenizer["normalizer"] = {"type": "NFC"}
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 259, "content": "<|pad|>"})


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model with two tokens swapped, and the model with a tokenizer that looks otherwise."""
    folder = tmp_path_factory.mktemp("models")
    return changed(tiny_model, folder / "swapped", swap), changed(tiny_model, folder / "touched", touch, settings=True)


def test_pairs_of_another_tokenizer_are_refused_and_of_one_that_looks_otherwise_are_taken(
    call: Call, tiny_model: Path, models: tuple[Path, Path], prompts_file: Path, tmp_path: Path
) -> None:
    swapped, touched = models
    assert call("generate", *COMMON, "--model", tiny_model, "--prompts", prompts_file, "--rewards", "short_sentence",
                "--out", tmp_path / "g").code == 0  # fmt: skip
    build = ("build-pairs", "--completions", tmp_path / "g", "--reward", "short_sentence", "--gap-filter", "none")
    assert call(*build, "--out", tmp_path / "p").code == 0
    done = call("train", "--model", swapped, "--pairs", tmp_path / "p", *FREE, "--out", tmp_path / "t")
    assert done.code == 76, done.stderr
    theirs, ours = (vocabulary.name(vocabulary.read(m)) for m in (tiny_model, swapped))
    assert f"(tokenizer: {theirs} there, {ours} here)" in done.stderr
    assert theirs.split(":")[0] == ours.split(":")[0] == "259"
    done = call("train", "--model", touched, "--pairs", tmp_path / "p", *FREE, "--out", tmp_path / "t")
    assert done.code == 0, done.stderr
    # What the refusal advises: the texts, tokenised with this model.
    assert call(*build, "--format", "trl", "--out", tmp_path / "text").code == 0
    texts = tmp_path / "text" / "trl" / "part-00000.parquet"
    done = call("train", "--model", swapped, "--pairs", texts, *FREE, "--out", tmp_path / "t2")
    assert done.code == 0, done.stderr
    done = call("train", "--model", swapped, "--pairs", texts, "--eval-pairs", tmp_path / "p", *FREE, "--out",
                tmp_path / "t3")  # fmt: skip
    assert (done.code, f"{tmp_path / 'p'} was made with another tokenizer" in done.stderr) == (76, True), done.stderr


@pytest.mark.parametrize("output", ["labels", "groups"])
def test_the_tokenizer_of_a_foreign_file_travels_through_score_and_build_pairs(
    call: Call, tiny_model: Path, models: tuple[Path, Path], tmp_path: Path, output: str
) -> None:
    """Rated answers -> score -> score again -> build-pairs -> train: all runs name the tokenizer that made the ids."""
    path = tmp_path / "rated.jsonl"
    answers = [{"response": text, "overall_score": len(text)} for text in ("No.", "An owl.", "Some owl, I think.")]
    rows = [{"instruction": f"Bird {i}?", "completions": answers} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call("score", *COMMON, "--model", tiny_model, "--inputs", path, "--out", tmp_path / "s").code == 0
    # Scored again by a model with other tokens: the ids stay what they were.
    done = call("score", *COMMON, "--model", models[0], "--inputs", tmp_path / "s", "--out", tmp_path / "again")
    assert "was made with another tokenizer" in done.stderr
    build = ("build-pairs", "--completions", tmp_path / "s", "--ref-logps", tmp_path / "again", "--reward", "rating")
    done = call(*build, "--output", output, "--out", tmp_path / "p")
    assert done.code == 0, done.stderr
    own = [vocabulary.name(vocabulary.read(tiny_model))]
    for run in ("s", "again", "p"):
        assert store.read_manifest(tmp_path / run)["identity"]["vocabularies"] == own
    loss = {"labels": "kto", "groups": "plackett_luce"}[output]
    done = call("train", "--model", models[0], f"--{output}", tmp_path / "p", "--loss-type", loss, "--out",
                tmp_path / "t")  # fmt: skip
    assert (done.code, "was made with another tokenizer" in done.stderr) == (76, True), done.stderr


def test_scored_pairs_of_a_file_know_their_tokenizer(
    call: Call, tiny_model: Path, models: tuple[Path, Path], tmp_path: Path
) -> None:
    """File -> score -> train: the reference fits, since the weights are the same; the tokens do not."""
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": f"Bird {i}?", "chosen": f"An owl {i}.", "rejected": f"No {i}."} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call("score", *COMMON, "--model", tiny_model, "--inputs", path, "--out", tmp_path / "s").code == 0
    train = ("--pairs", tmp_path / "s", *FREE, "--out", tmp_path / "t")
    done = call("train", "--model", models[0], *train)
    assert (done.code, "was made with another tokenizer" in done.stderr) == (76, True), done.stderr
    assert call("train", "--model", models[1], *train).code == 0
