"""Labels and ranked groups through the whole command line: sampled, labelled, scored, trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Cli

REWARD = "tests.e2e.letters:most_letters"
TRAIN = ("--dtype", "float32", "--lora-r", 2, "--train-batch-size", 4, "--max-tokens-per-micro-batch", 512)


@pytest.fixture(scope="module")
def sampled(cli: Cli, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("others") / "g"
    done = cli(
        "generate", "--model", tiny_model, "--prompts", ROOT / "data" / "prompts.jsonl", "--limit", 8, "--out", out,
        "--engine", "transformers", "--dtype", "float32", "--max-tokens", 8, "--num-samples", 4, "--rewards", REWARD,
        "--check", 0,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def steps(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("kind", "loss"), [("labels", "kto"), ("groups", "plackett_luce")])
def test_rows_of_another_kind_train_with_and_without_score(
    cli: Cli, sampled: Path, tiny_model: Path, tmp_path: Path, kind: str, loss: str
) -> None:
    build = ("--completions", sampled, "--reward", REWARD, "--output", kind, "--truncated-chosen", "keep")
    train = ("train", "--model", tiny_model, *TRAIN, "--loss-type", loss)
    for command in (
        ("build-pairs", *build, "--out", tmp_path / "rows"),
        (*train, f"--{kind}", tmp_path / "rows", "--out", tmp_path / "a"),
        ("score", "--model", tiny_model, "--inputs", tmp_path / "rows", "--engine", "transformers",
         "--dtype", "float32", "--check", 0, "--out", tmp_path / "scored"),
        (*train, f"--{kind}", tmp_path / "scored", f"--eval-{kind}", tmp_path / "rows", "--out", tmp_path / "b"),
    ):  # fmt: skip
        done = cli(*command)
        assert done.returncode == 0, done.stderr
    first, second = steps(tmp_path / "a"), steps(tmp_path / "b")
    assert len(first) == len(second) > 1
    assert [s["loss"] for s in first] == pytest.approx([s["loss"] for s in second], abs=1e-6)
    assert ("kto/z0" in first[0]) == (kind == "labels")
    assert ("eval_loss" in second[-1], "eval_loss" in first[-1]) == (True, False)
