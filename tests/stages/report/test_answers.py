"""Answers to the same prompts side by side, pairs in order, and a budget that says what it left out."""

from pathlib import Path

import pytest

from prefpipe.stages.report import answers
from prefpipe.stages.report.subject import Subject, read


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


def test_pairs_are_in_order_of_their_gap_and_of_the_margin_of_the_reference(subject: Subject) -> None:
    large, small, against = answers.answers(subject).groups
    gaps = [float(pair.gap) for pair in large.pairs]
    assert gaps == sorted(gaps, reverse=True)
    assert [float(pair.gap) for pair in small.pairs] == sorted(float(pair.gap) for pair in small.pairs)
    margins = [float(pair.margin.replace("\u2212", "-")) for pair in against.pairs]
    assert margins == sorted(margins)
    assert large.pairs[0].chosen.who == "chosen"


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
