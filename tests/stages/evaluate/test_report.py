"""Numbers for people, and for programs: every one with its interval, on one screen."""

import copy
from pathlib import Path
from typing import Any

import pytest

from prefpipe.runs import store
from prefpipe.schemas import Measure, from_table
from prefpipe.stages.evaluate import report, stage
from tests.conftest import Write
from tests.stages.evaluate.cases import PAIRWISE, config, prompts_file, run

OLD = {
    "round": 1, "prompts": 3,
    "greedy": {"answers": 3, "pass": 0.5, "low": 0.1, "high": 0.9, "mean_reward": 0.7, "mean_words": 4.0,
               "degenerate": 0.0},
    "sampled": {"answers": 6, "pass": 0.25, "low": 0.0, "high": 0.5, "mean_reward": 0.6, "mean_words": 12.0,
                "degenerate": 0.5},
}  # fmt: skip


@pytest.fixture
def everything(tiny_model: Path, other_model: Path, write: Write, tmp_path: Path) -> dict[str, Any]:
    """The manifest of a run with all that can be asked for, in OUT `b`."""
    path, text = prompts_file(write, 6), tmp_path / "text.txt"
    text.write_text("The owl sees at night. " * 60)
    asked = {"guard": (f"{path}:length",), "perplexity_text": str(text)}
    run(config(tiny_model, path, max_tokens=20, **asked), tmp_path / "a")
    judge = {**PAIRWISE["pairs"], "engine": "fake", "model": str(other_model)}
    settings = config(
        tiny_model, path, **asked, reward=("short_sentence", "repetition"), num_samples=4, judge="pairs",
        reward_settings={"pairs": judge}, baseline=(str(tmp_path / "a"),), kl_to=("base", str(other_model)),
    )  # fmt: skip
    return run(settings, tmp_path / "b")


def numbers(values: Any) -> int:
    """Numbers in totals that are no ends of intervals."""
    if isinstance(values, list):
        return sum(map(numbers, values))
    if isinstance(values, dict):
        ends = [n for n in values if n in ("low", "high") or n.endswith(("_low", "_high"))]
        return sum(numbers(v) for n, v in values.items() if n not in ends)
    return isinstance(values, int | float) and not isinstance(values, bool)


def test_every_number_is_a_row_with_its_interval(everything: dict[str, Any], tmp_path: Path) -> None:
    """All totals but counts of prompts and of the judge's bias, which are no estimates."""
    rows = from_table(Measure, store.read_dataset(tmp_path / "b", "measures", Measure))
    totals = copy.deepcopy(everything["totals"])
    for comparison in totals["comparisons"]:
        del comparison["prompts"], comparison["round"], comparison["judge"]["order_bias"], comparison["differs"]
    del totals["prompts"], totals["round"]
    assert len(rows) == numbers(totals)
    keys = [(r.of, r.against, r.decoding, r.name) for r in rows]
    assert len(set(keys)) == len(keys)
    counts = {
        "answers",
        "win",
        "tie",
        "loss",
        "judged",
        "inconsistent",
        "without_verdict",
        "tokens",
        "perplexity",
        "slope",
    }
    assert {r.name for r in rows if r.low is None} <= {*counts, "p_value", "difference_p_value"}
    assert all(r.low <= r.value + 1e-9 <= r.high + 2e-9 for r in rows if r.low is not None and r.high is not None)
    found = dict(zip(keys, rows, strict=True))
    greedy = everything["totals"]["greedy"]
    passed = found["answers", None, "greedy", "pass"]
    assert (passed.value, passed.low, passed.high) == (greedy["pass"], greedy["low"], greedy["high"])
    compared = found["comparison", store.read_manifest(tmp_path / "a")["digest"], "sampled", "win_rate"]
    assert compared.value == everything["totals"]["comparisons"][0]["sampled"]["win_rate"]
    assert found["kl per_token", "base", "sampled", "k3"].high is not None


def test_the_summary_fits_a_screen(everything: dict[str, Any], tmp_path: Path) -> None:
    lines = stage.summary(everything, tmp_path / "b")
    assert len(lines) <= 30
    text = "\n".join(lines)
    listed = ("pass@4", "reward repetition", "greedy at equal length: win rate", "judge pairs", "KL to base", "guard")
    assert [words for words in listed if words not in text] == []
    assert max(len(line.replace(str(tmp_path), "OUT")) for line in lines) <= 140


def test_totals_of_an_older_version_are_shown_as_they_are() -> None:
    text = "\n".join(report.summary(OLD, Path("out")))
    assert "50.0% [10.0%, 90.0%]" in text
    assert "12.0" in text
    assert report.failures(OLD, {}) == []


def test_failures_name_the_guard_and_the_baseline() -> None:
    drops = [{"baseline": "a", "failed": True}, {"baseline": "b", "failed": False}]
    totals = {"guards": [{"prompts": "p", "reward": "r", "drops": drops}], "perplexity": {"text": "t", "drops": drops}}
    assert report.failures(totals, {"a": "runs/a"}) == ["guard p:r against runs/a", "text t against runs/a"]


@pytest.mark.parametrize(
    ("passes", "rewards", "said"),
    [((0.0, 0.0), (0.18, 0.55), True), ((0.0, 0.1), (0.18, 0.55), False), ((0.0, 0.0), (0.0, 0.0), False)],
)
def test_rewards_of_which_none_passes_are_noticed(
    passes: tuple[float, float], rewards: tuple[float, float], *, said: bool
) -> None:
    both = zip(("greedy", "sampled"), passes, rewards, strict=True)
    totals = {decoding: {"pass": share, "mean_reward": mean} for decoding, share, mean in both}
    notice = report.nothing_passes(totals, 1.0)
    assert ("pass_reward is 1, the mean reward 0.55; " in notice, notice == "") == (said, not said)


def test_no_answers_are_no_notice() -> None:
    assert report.nothing_passes({}, 1.0) == ""
