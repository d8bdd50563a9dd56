"""Which variant is the best, and which are not told apart from it: paired by prompt, numbers by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefpipe.config.grid import Variant
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError
from prefpipe.stages.sweep import results
from prefpipe.stages.sweep.results import Result


def result(name: str, by_prompt: dict[str, list[float]], metric: str = "accuracy") -> Result:
    values = [v for group in by_prompt.values() for v in group]
    mean = sum(values) / len(values)
    numbers: dict[str, Any] = {metric: (mean, mean - 0.1, mean + 0.1)}
    return Result(variant(name), "complete", 5, "p", "", numbers, {metric: by_prompt})


def variant(name: str, **settings: Any) -> Variant:
    return Variant(name, {}, TrainConfig(**settings))


def outcomes(*values: float) -> dict[str, list[float]]:
    return {f"prompt {number}": [value] for number, value in enumerate(values)}


def test_the_pairing_tells_apart_what_the_intervals_do_not() -> None:
    """Twenty prompts: 14 of 20 and 6 of 20 right overlap as intervals. Where the prompts of the worse one are among
    those of the better one the paired difference is clear; one prompt of difference is not."""
    best = result("best", outcomes(*[1.0] * 14, *[0.0] * 6))
    worse = result("worse", outcomes(*[1.0] * 6, *[0.0] * 14))
    near = result("near", outcomes(*[1.0] * 13, *[0.0] * 7))
    found = results.best([worse, near, best], "accuracy")
    assert found.result is best
    assert found.not_told_apart == ["near"]
    assert "not told apart from it: 1 (near)" in found.sentence
    assert "every other variant is below it" in results.best([worse, best], "accuracy").sentence


def test_rows_of_a_prompt_are_one_observation() -> None:
    """The same differences, eight rows each of two prompts, or sixteen prompts: clear only by prompts."""
    rows = {"a": [1.0] * 8, "b": [0.5] * 8}, {"a": [0.0] * 8, "b": [0.2] * 8}
    few = [result("x", rows[0], "margin"), result("y", rows[1], "margin")]
    assert results.best(few, "margin").not_told_apart == ["y"]
    spread = [outcomes(*[1.0] * 8, *[0.5] * 8), outcomes(*[0.0] * 8, *[0.2] * 8)]
    many = [result("x", spread[0], "margin"), result("y", spread[1], "margin")]
    assert results.best(many, "margin").not_told_apart == []


def test_of_equal_ones_the_earlier_is_the_best() -> None:
    same = outcomes(1.0, 0.0, 1.0)
    found = results.best([result("a", same), result("b", same)], "accuracy")
    assert found.result.variant.name == "a"
    assert found.as_json()["not_told_apart"] == ["b"]


def test_without_the_metric_there_is_no_best() -> None:
    with pytest.raises(DataError, match="no variant has margin: b: it broke"):
        results.best([result("a", outcomes(1.0)), Result(variant("b"), "failed", 0, why="it broke")], "margin")


def test_a_rung_reads_the_evaluation_of_its_step(tmp_path: Path) -> None:
    """The margin in nats is that of the log over beta; a run that has not come so far has none, one that ended has its
    last."""
    lines = [
        {"step": step, "loss": 1.0, **({"eval_loss": 1.0, "eval_rewards/accuracies": step / 10,
         "eval_rewards/margins": float(step)} if step % 2 else {})}
        for step in range(6)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mine = variant("a", beta=0.5)
    assert results.at_step(mine, tmp_path, 4, "accuracy") == 0.3
    assert results.at_step(mine, tmp_path, 4, "margin") == 6.0
    assert results.at_step(mine, tmp_path, 8, "margin") is None
    (tmp_path / "manifest.json").touch()
    assert results.at_step(mine, tmp_path, 8, "margin") == 10.0
    assert results.at_step(mine, tmp_path / "none", 2, "margin") is None
    assert [line["step"] for line in results.held_out(tmp_path)] == [1, 3, 5]


def test_numbers_become_rows_of_one_form() -> None:
    rows = list(result("a", outcomes(1.0, 0.0)).rows())
    assert [(row.of, row.name, row.value) for row in rows] == [("a", "accuracy", 0.5)]
    assert result("a", outcomes(1.0, 0.0)).as_json()["values"]["accuracy"]["value"] == 0.5
