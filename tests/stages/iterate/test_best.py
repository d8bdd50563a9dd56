"""The best round is the one with the highest metric, the earliest of equal ones, and none whose guard failed."""

from typing import Any

import pytest

from prefpipe.stages.iterate.best import best_place, guard_failed, value


def evaluation(passed: float, **more: Any) -> dict[str, Any]:
    return {"greedy": {"pass": 1 - passed, "mean_reward": 0.0}, "sampled": {"pass": passed, "mean_reward": 2.0}, **more}


FAILED = [{"prompts": "chat.jsonl", "reward": "r", "pass": 0.1, "drops": [{"baseline": "d", "failed": True}]}]


@pytest.mark.parametrize(
    ("passed", "best"), [([0.1, 0.4, 0.3], 1), ([0.5, 0.4], 0), ([0.2, 0.4, 0.4], 1), ([0.2, 0.2], 0), ([0.3], 0)]
)
def test_the_last_round_is_not_the_best_by_being_last(passed: list[float], best: int) -> None:
    assert best_place([evaluation(p) for p in passed], "sampled.pass") == best


def test_another_metric_may_decide_otherwise() -> None:
    rounds = [evaluation(0.1), evaluation(0.4), evaluation(0.3)]
    assert best_place(rounds, "greedy.pass") == 0
    assert value(rounds[1], "greedy.pass") == 0.6
    assert value(rounds[1], "sampled.mean_reward") == 2.0


def test_a_round_whose_guard_failed_is_not_the_best() -> None:
    rounds = [evaluation(0.1), evaluation(0.4), evaluation(0.9, guards=FAILED)]
    assert best_place(rounds, "sampled.pass") == 1
    assert best_place([evaluation(0.1, guards=FAILED)], "sampled.pass") == 0
    assert guard_failed(rounds[2]) == ["chat.jsonl"]


def test_a_perplexity_is_a_guard_and_one_that_held_is_none() -> None:
    text = {"text": "wiki.txt", "per_token": 3.0, "drops": [{"baseline": "d", "difference": 0.5, "failed": True}]}
    assert guard_failed(evaluation(0.5, perplexity=text)) == ["perplexity of wiki.txt"]
    held = [{**FAILED[0], "drops": [{"baseline": "d", "failed": False}]}]
    assert guard_failed(evaluation(0.5, guards=held)) == guard_failed(evaluation(0.5)) == []
