"""Rows add up from level to level, every reason is a branch, and pictures say what they are drawn from."""

from dataclasses import replace
from pathlib import Path

import pytest

from prefpipe.stages.report import data
from prefpipe.stages.report.subject import Subject, read


def test_every_level_of_the_newest_round_with_its_reasons(subject: Subject) -> None:
    found = data.data(subject)
    assert [(level.kind, level.came_in, level.went_on) for level in found.levels] == [
        ("prompts sampled", 13, 12), ("completions", 48, 44), ("prompts", 12, 11), ("pairs", 26, 24),
        ("pairs trained on", 24, 24),
    ]  # fmt: skip
    reasons = {level.kind: [(b.reason, b.rows, b.share) for b in level.branches] for level in found.levels}
    assert reasons["completions"] == [("truncated", "3", "6.2%"), ("empty", "1", "2.1%")]
    assert reasons["prompts sampled"] == [("too_long", "1", "7.7%")]
    assert {level.run for level in found.levels} == {"round 2"}
    assert {level.run for level in found.earlier} == {"round 1"}
    assert found.flow is not None
    assert found.flow.title == "From prompts to pairs, round 2"


def test_checks_and_pictures(subject: Subject) -> None:
    found = data.data(subject)
    assert [(check["id"], check["level"]) for check in found.checks][2:4] == [("D6", "WARN"), ("D7", "WARN")]
    titles = [chart.title for chart in found.pictures]
    assert titles == ["Reward gap (D1)", "Length of the sides (D7)", "Hardness (D4)", "Off-policyness (D11)",
                      "Length against reward (D7)"]  # fmt: skip
    assert all(chart.says for chart in found.pictures)


def test_pictures_of_some_rows_say_so(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MOST_ROWS", 10)
    assert data.data(subject).pictures[0].says.endswith("; the first 10 of 24 pairs")


def test_sources_and_their_weights(finished: Path) -> None:
    alone = read(finished / "round-1/train")
    (source,) = data.data(alone).sources
    assert (source.kind, source.weight) == ("pairs of train", "")
    assert source.place.endswith("round-1/build-pairs")
    assert source.digest == alone.runs[-1].manifest["inputs"]["pairs.0"]
    weighted = replace(alone.root, config={**alone.root.config, "source_weights": [0.6]})
    assert data.data(replace(alone, runs=[weighted])).sources[0].weight == "0.6"


def test_a_run_without_rows_has_an_empty_section(finished: Path) -> None:
    found = data.data(read(finished / "round-0/evaluate"))
    assert (found.levels, found.flow, found.checks, found.pictures) == ([], None, [], [])
