"""What a page is about, and numbers in words."""

from pathlib import Path

import pytest

from prefpipe.stages.report.subject import Subject, label, number, percent, read, table


def test_rounds_and_their_names(subject: Subject) -> None:
    assert [label(run) for run in subject.of("evaluate")] == ["start", "round 1", "round 2"]
    assert [label(run) for run in subject.trained()] == ["round 1", "round 2"]
    assert len(subject.metrics(subject.trained()[0])) == 40
    assert subject.metrics(subject.of("evaluate")[0]) == []


def test_a_single_run_comes_with_those_it_was_made_from(finished: Path) -> None:
    alone = read(finished / "round-2/train")
    assert [run.command for run in alone.runs] == ["generate", "build-pairs", "train"]
    assert alone.runs[-1] is alone.root
    assert label(alone.root) == "train"


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234567, "1,234,567"), (-0.12345, "\u22120.123"), (None, "\u2013"), (True, "\u2013"), ("x", "\u2013")],
)
def test_numbers(value: object, text: str) -> None:
    assert number(value) == text


def test_shares() -> None:
    assert (percent(0.7375), percent(None)) == ("73.8%", "\u2013")


def test_nested_results_are_rows() -> None:
    values = {"kl": {"mean": 0.25, "rows": 4}, "wins": [{"win": 3}, 2], "name": "x", "difference_p_value": 1e-9}
    assert table(values) == [
        ("kl.mean", "0.25"), ("kl.rows", "4"), ("wins.0.win", "3"), ("wins.1", "2"), ("name", "x"),
        ("difference_p_value", "< 0.001"),
    ]  # fmt: skip
