"""The headline of a run, complete or not."""

from dataclasses import replace
from pathlib import Path

import pytest

from prefpipe import clock
from prefpipe.views import facts, run_view


@pytest.mark.parametrize(
    ("name", "words"),
    [("g", "18 completions of 6 prompts"), ("p", "pairs of 6 prompts"), ("e", "6 prompts, passed: greedy")],
)
def test_a_complete_run_says_its_result(runs: Path, name: str, words: str) -> None:
    assert words in facts.headline(run_view.view(runs / name))


def test_a_run_that_goes_on_says_how_far_it_is(runs: Path) -> None:
    run = replace(run_view.view(runs / "g"), state="running", last_step={"step": 4, "loss": 0.5})
    assert facts.headline(run).startswith("step 5, loss 0.5; 18 completions")
    assert facts.headline(replace(run, rows={}, last_step={})) == "nothing committed yet"
    assert facts.headline(replace(run, problem="damaged")) == "damaged"


@pytest.mark.parametrize(("seconds", "age"), [(0, "0 s"), (59, "59 s"), (61, "1 min"), (7300, "2 h"), (200_000, "2 d")])
def test_age_has_its_largest_unit(runs: Path, monkeypatch: pytest.MonkeyPatch, seconds: int, age: str) -> None:
    monkeypatch.setattr(clock, "age", lambda _timestamp: seconds + 0.5)
    assert facts.age(run_view.view(runs / "g")) == age


def test_totals_without_a_reward_or_with_older_keys_have_a_headline(runs: Path) -> None:
    run = run_view.view(runs / "g")
    assert facts.headline(replace(run, totals={"prompts": 1, "completions": 2})) == "2 completions of 1 prompts"
    assert facts.headline(replace(run, command="score", totals={"rows": 3, "note": "x"})) == "3 rows"


@pytest.mark.parametrize("command", ["generate", "build-pairs", "train", "evaluate", "iterate", "sweep"])
@pytest.mark.parametrize("totals", [{}, {"prompts": None, "pairs": 3, "rounds": [], "variants": 2, "steps": "x"}])
def test_totals_that_nobody_knows_are_no_crash(runs: Path, command: str, totals: dict[str, object]) -> None:
    odd = replace(run_view.view(runs / "g"), command=command, totals=totals)
    assert facts.headline(odd).startswith("totals that this version does not know; 18 completions")


def test_a_sweep_says_its_best_variant_and_those_that_stopped(runs: Path) -> None:
    best = {"name": "beta-0.1", "metric": "accuracy", "value": 0.75, "low": 0.5, "high": 0.9}
    totals = {"variants": [{"state": "complete"}, {"state": "stopped"}, {"state": "stopped"}], "best": best}
    run = replace(run_view.view(runs / "g"), command="sweep", totals=totals)
    assert facts.headline(run) == "3 variants, 2 stopped, best beta-0.1, accuracy 0.75 [0.5, 0.9]"
