"""The sentence says what the intervals say; what stopped a run and what fired is there."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefpipe.stages.report.subject import Subject, read
from prefpipe.stages.report.verdict import verdict


def with_totals(subject: Subject, **of_command: dict[str, Any]) -> Subject:
    """The same runs with other totals of the newest run of a command (named with underscores)."""
    runs = list(subject.runs)
    for command, changes in of_command.items():
        place = max(i for i, run in enumerate(runs) if run.command == command.replace("_", "-"))
        manifest = {**runs[place].manifest, "totals": {**runs[place].totals, **changes}}
        runs[place] = replace(runs[place], manifest=manifest)
    return replace(subject, runs=runs)


def greedy(share: float, low: float, high: float) -> dict[str, Any]:
    return {"pass": share, "low": low, "high": high}


def test_better_beyond_chance(subject: Subject) -> None:
    found = verdict(subject)
    assert found.tone == "good"
    assert found.sentence == (
        "After round 2 the policy passes 73.8% of 12 held-out prompts (95 % interval 63.8% to 83.8%), 2.5% (0.0% to "
        "12.5%) before training: it got better, beyond what chance explains."
    )
    assert [(row.name, row.greedy, row.best) for row in found.rounds] == [
        ("start", "2.5%", False), ("round 1", "37.5%", False), ("round 2", "73.8%", False),
    ]  # fmt: skip
    assert found.stops == []


@pytest.mark.parametrize(
    ("last", "tone", "words"),
    [
        (greedy(0.1, 0.05, 0.2), "unclear", "no proof of a change"),
        (greedy(0.0, -1.0, -0.5), "bad", "it got worse"),
    ],
)
def test_overlapping_intervals_and_worse_ones(subject: Subject, last: dict[str, Any], tone: str, words: str) -> None:
    found = verdict(with_totals(subject, evaluate={"greedy": last}))
    assert (found.tone, words in found.sentence) == (tone, True)


@pytest.mark.parametrize(("low", "high", "tone"), [(0.55, 0.8, "good"), (0.2, 0.45, "bad"), (0.4, 0.7, "unclear")])
def test_a_comparison_with_the_start_decides_where_there_is_one(
    subject: Subject, low: float, high: float, tone: str
) -> None:
    """Prompt by prompt it says more than two intervals."""
    entry = {
        "baseline": str(subject.of("evaluate")[0].path),
        "prompts": 12,
        "greedy": {"win_rate": 0.6, "low": low, "high": high, "win": 5, "tie": 4},
    }
    found = verdict(with_totals(subject, evaluate={"comparisons": [entry], "kl": {"mean": 0.25}}))
    assert (found.tone, "win 60.0% of comparisons" in found.sentence) == (tone, True)
    assert ("one half lies in that interval" in found.sentence) is (tone == "unclear")
    (compared,) = found.comparisons
    assert (compared.decoding, compared.counts, compared.win_rate) == ("greedy", "5 / 4 / \u2013", "60.0%")
    assert found.guards == [("kl.mean", "0.25")]


def test_alerts_newest_round_first(subject: Subject) -> None:
    found = verdict(subject).alerts
    assert [(alert.run, alert.rule, alert.newest) for alert in found] == [
        ("round 2", "A1", True), ("round 2", "A6", True), ("round 1", "A1", False), ("round 1", "A6", False),
    ]  # fmt: skip


def test_what_stopped_iterate_and_which_round_is_best(subject: Subject) -> None:
    stop = {"rule": "S1", "round": 2, "why": ["no round", "got better"], "advice": "take round 1"}
    totals = {**subject.root.totals, "stopped": stop, "best": {"round": 1, "metric": "pass", "value": 0.4}}
    root = replace(subject.root, manifest={**subject.root.manifest, "totals": totals})
    found = verdict(replace(subject, root=root))
    assert [(stop.what, stop.reason, stop.advice) for stop in found.stops] == [
        ("stopped by S1", "no round; got better", "take round 1")
    ]
    assert [row.name for row in found.rounds if row.best] == ["round 1"]


def test_a_run_that_was_cut_off_says_so(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "manifest.json").unlink()
    (copy / "round-2/train/manifest.json").unlink()
    shutil.rmtree(copy / "round-2/evaluate")
    for owner in copy.rglob(".owner"):
        owner.unlink()
    found = verdict(read(copy))
    assert [stop.what for stop in found.stops] == [
        "run is not complete", "round-2/train is not complete", "1 steps are not started",
    ]  # fmt: skip
    assert "After round 1" in found.sentence


def test_training_alone(finished: Path) -> None:
    found = verdict(read(finished / "round-2/train"))
    assert "on 20 held-out pairs it prefers the chosen side in 80.0%" in found.sentence
    assert found.tone == "good"


def test_data_alone(finished: Path) -> None:
    assert (
        verdict(read(finished / "round-1/build-pairs")).sentence
        == "24 pairs from 48 completions; 2 of its checks warn."
    )
    assert verdict(read(finished / "round-1/generate")).sentence == "48 completions of 12 prompts."
    assert "nothing here says what it passed before" in verdict(read(finished / "round-0/evaluate")).sentence
