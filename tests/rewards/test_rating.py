"""Rewards are loaded by name, and rate answers in their order."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from prefpipe import reading
from prefpipe.engines.base import Sample
from prefpipe.errors import DataError
from prefpipe.ids import content_id
from prefpipe.inference.sampling import EncodedPrompt, SampledPrompt
from prefpipe.inference.task import answers_of
from prefpipe.models.thinking import Said
from prefpipe.rewards import rating, text_rules
from prefpipe.rewards.base import Answer, Scored
from prefpipe.schemas import Message, Prompt
from tests.e2e import letters

LETTERS = "tests.e2e.letters:most_letters"


def prompt(text: str, answer: str | None = None) -> Prompt:
    messages = [Message(role="user", content=text)]
    return Prompt(content_id(messages, answer), messages, answer, "train", "", "{}")


def _sample(index: int) -> Sample:
    return Sample(index, [5, 2], [-1.0, -1.0], "stop")


def test_a_reward_sees_prompt_answer_and_text_and_comes_back_in_order() -> None:
    """Two prompts with two samples and one."""
    sampled = [
        SampledPrompt(EncodedPrompt(prompt("q", "a"), [1]), [_sample(0), _sample(1)], [Said("one"), Said("two")]),
        SampledPrompt(EncodedPrompt(prompt("r"), [1]), [_sample(0)], [Said("three")]),
    ]

    def reward(answers: Sequence[Answer]) -> list[Scored]:
        return [Scored(float(len(a.text)), "ok", f"{a.messages[0]['content']} {a.answer}") for a in answers]

    scores = rating.rate(answers_of(sampled, "answer"), reward, "length")
    assert [(s.reward, s.detail) for s in scores] == [(3, "q a"), (3, "q a"), (5, "r None")]
    assert rating.rate([], reward, "length") == []


def test_a_reward_that_crashes_on_all_rows_is_an_error_on_some_it_is_recorded() -> None:
    sampled = [SampledPrompt(EncodedPrompt(prompt("q"), [1]), [_sample(0), _sample(1)], [Said("good"), Said("bad")])]
    answers = answers_of(sampled, "answer")

    def crash(answers: Sequence[Answer]) -> list[Scored]:
        return [Scored(None, "crash", "no such file")] * len(answers)

    def partly(answers: Sequence[Answer]) -> list[Scored]:
        return [Scored(1.0) if a.text == "good" else Scored(None, "crash", "no such file") for a in answers]

    def huge(answers: Sequence[Answer]) -> list[Scored]:
        return [Scored(-1e30 if a.text == "good" else 1e31) for a in answers]

    assert [(s.reward, s.status) for s in rating.rate(answers, huge, "mine")] == [(-1e30, "ok"), (None, "crash")]
    with pytest.raises(DataError, match="reward mine failed on all 2 completions: no such file"):
        rating.rate(answers, crash, "mine")
    assert rating.rate(answers, partly, "mine") == [Scored(1.0), Scored(None, "crash", "no such file")]


def test_rewards_are_loaded_by_name_and_identified_by_content() -> None:
    """The identity enters the fingerprint of a run: the file's digest for a user's own, a version for ours."""
    functions, ids = rating.load_rewards([LETTERS, "short_sentence"])
    assert list(functions) == [LETTERS, "short_sentence"]
    assert ids == {
        f"reward {LETTERS}": reading.file_digest(Path(letters.__file__)),
        "reward short_sentence": f"short_sentence-{text_rules.VERSION}",
    }


def test_a_summary_counts_the_answers_without_a_rating(capfd: pytest.CaptureFixture[str]) -> None:
    totals = rating.totals({"all": [[1.0], [2.0]], "some": [[None, 3.0], []], "none": [[None], [None]], "empty": []})
    assert totals == {"mean_reward": {"all": 1.5, "some": 3.0, "none": None, "empty": None},
                      "unrated": {"some": 1, "none": 2}}  # fmt: skip
    assert "warning: reward none rated none of 2 answers" in " ".join(capfd.readouterr().err.split())
    assert rating.summary(totals) == [
        "  reward all: mean 1.500",
        "  reward some: mean 3.000, 1 answers not rated",
        "  WARNING: reward none rated no answer, 2 are without a rating",
    ]
    assert rating.summary({"mean_reward": {"old": 0.5}}) == ["  reward old: mean 0.500"]  # a manifest made before
