"""Answers to the same prompts side by side, pairs in order, and a budget that says what it left out."""

import re
from pathlib import Path

import pytest

from prefpipe.runs import overview
from prefpipe.schemas import Margin
from prefpipe.stages.report import answers
from prefpipe.stages.report.subject import Subject, number, read


def test_before_and_after(subject: Subject) -> None:
    found = answers.answers(subject)
    assert len(found.asked) == 12
    first = found.asked[0]
    assert first.prompt == "Tell me about ivy in one short sentence."
    assert [said.who for said in first.answers] == ["start", "round 2"]
    assert [said.reward for said in first.answers] == ["0.4", "1"]
    assert first.change == "better"
    assert "".join(span.text for span in first.answers[1].spans) == "Ivy is quiet, useful and older than it looks."
    assert {one.change for one in found.asked} == {"better", "same"}
    assert found.note == "Texts end after 2,000 characters."


def measured(group: answers.Group, name: str) -> list[float]:
    found = [re.search(rf"(?:^|· ){name} ([\u2212\d.e-]+)", pair.measures) for pair in group.pairs]
    return [float(one[1].replace("\u2212", "-")) for one in found if one]


def test_pairs_are_in_order_of_their_gap_and_of_the_margin_of_the_reference(subject: Subject) -> None:
    large, small, against = answers.answers(subject).groups[3:]
    assert measured(large, "reward gap") == sorted(measured(large, "reward gap"), reverse=True)
    assert measured(small, "reward gap") == sorted(measured(small, "reward gap"))
    assert measured(against, "reference margin") == sorted(measured(against, "reference margin"))
    assert len(against.pairs) == len(measured(against, "reference margin")) == 8
    assert large.pairs[0].chosen.who == "chosen"


def test_pairs_are_in_order_of_the_margin_that_training_gave_them(subject: Subject, finished: Path) -> None:
    """Of the newest round; every pair of it is among all that were read."""
    large, small, against = answers.answers(subject).groups[:3]
    rows = overview.rows(overview.look(finished / "round-2/train"), "margins", Margin, 100).rows
    margins = sorted(float(number(row["margin"]).replace("\u2212", "-")) for row in rows)
    assert measured(large, "margin") == margins[::-1][:8]
    assert [abs(value) for value in measured(small, "margin")] == sorted(map(abs, margins))[:8]
    assert measured(against, "margin") == [value for value in margins if value < 0][:8]
    assert {"(held out)" in pair.measures for pair in large.pairs + small.pairs + against.pairs} == {True, False}


def test_without_margins_the_other_pairs_are_there(finished: Path) -> None:
    titles = [group.title for group in answers.answers(read(finished / "round-1/build-pairs")).groups]
    assert titles == ["Largest gap", "Smallest gap", "Most against the reference"]


def test_a_budget_leaves_prompts_out_and_says_so(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "BUDGET", 700)
    found = answers.answers(subject)
    assert 0 < len(found.asked) < 12
    assert found.note.startswith(f"{len(found.asked)} of 12 prompts are shown.")


def test_a_single_evaluation_has_one_answer_to_a_prompt(finished: Path) -> None:
    found = answers.answers(read(finished / "round-0/evaluate"))
    assert [len(one.answers) for one in found.asked] == [1] * 12
    assert found.groups == []


def test_completions_alone_are_samples(finished: Path) -> None:
    found = answers.answers(read(finished / "round-1/generate"))
    assert found.asked == []
    assert found.samples[0].prompt == "Tell me about ivy in one short sentence."
    assert [said.who for said in found.samples[0].answers] == [f"sample {i}" for i in range(4)]
    assert all(float(said.reward) > 0 for said in found.samples[0].answers)
