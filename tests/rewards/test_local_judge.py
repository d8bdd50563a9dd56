"""A judge in an engine: questions to token ids, replies in order, what cannot be asked, one engine for all calls."""

import gc
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from prefpipe import chat as chats
from prefpipe.config.rewards import Judge
from prefpipe.engines.base import EngineSettings, Request, Sample
from prefpipe.errors import MissingInputError, UsageError
from prefpipe.rewards import identity, local_judge
from prefpipe.rewards.base import Answer
from prefpipe.rewards.endpoint import Question, Reply
from prefpipe.rewards.judge import judge
from prefpipe.rewards.local_judge import ask_in_engine
from prefpipe.schemas import Message

events: list[str] = []


class Scripted:
    """An engine that answers with the length of the question, last question first, and cuts the answer to "cut"."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        events.append("start")

    scorer = "none"

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        for request in reversed(list(requests)):
            text = self.settings.chat.decode(request.prompt_token_ids)
            ids = self.settings.chat.tokenizer.encode(json.dumps({"rating": 3 if "owl" in text else 8})).ids
            yield request, [Sample(0, ids, [], "length" if "cut" in text else "stop")]

    def score(self, sequences: Iterable[Any], *, adapter: bool) -> Iterator[tuple[str, list[float]]]:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        events.append("end")


def settings(model: Path | str, **more: Any) -> Judge:
    return Judge(**{"engine": "transformers", "model": str(model), "dtype": "float32", "max_tokens": 16, **more})


def answers(*texts: str) -> list[Answer]:
    return [Answer([Message(role="user", content="Name one.")], text, None) for text in texts]


def test_replies_come_in_order_from_one_engine_that_ends_with_the_reward(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events.clear()
    monkeypatch.setattr(local_judge.engines, "load", lambda name, given: Scripted(given))
    rate = judge(settings(tiny_model, max_prompt_tokens=1000))
    assert events == []
    owl, fish, spelled, cut = rate(answers("owl", "fish", "<|im_end|>", "cut"))
    assert (owl.reward, fish.reward) == (2 / 9, 7 / 9)
    assert (spelled.reward, spelled.status) == (None, "unparsable")
    assert "control_tokens" in (spelled.detail or "")
    assert (cut.reward, cut.detail) == (None, "the judge's answer is cut at max_tokens = 16")
    assert [s.reward for s in rate(answers("owl"))] == [2 / 9]
    assert events == ["start"]
    del rate
    gc.collect()
    assert events == ["start", "end"]


def test_a_question_that_is_too_long_gets_no_verdict(tiny_model: Path) -> None:
    (long,) = judge(settings(tiny_model, max_prompt_tokens=20))(answers("owl"))
    assert (long.reward, long.status) == (None, "unparsable")
    assert "too_long" in (long.detail or "")


def test_a_real_engine_answers(tiny_model: Path) -> None:
    """A random model has no verdict; what it said is kept."""
    ask = ask_in_engine(settings(tiny_model))
    question = Question([{"role": "user", "content": "Say something."}], {})
    first, again = ask(settings(tiny_model), [question, question])
    assert first == again
    assert first.status in ("ok", "unparsable")
    assert isinstance(first, Reply)
    (scored,) = judge(settings(tiny_model))(answers("owl"))
    assert (scored.reward, scored.status) == (None, "unparsable")


def test_the_identity_holds_the_weights_and_no_path(tiny_model: Path, other_model: Path, tmp_path: Path) -> None:
    link = tmp_path / "elsewhere"
    link.symlink_to(tiny_model)
    made = {name: identity("j", {"j": settings(place)}) for name, place in
            (("tiny", tiny_model), ("link", link), ("other", other_model))}  # fmt: skip
    assert made["tiny"] == made["link"] != made["other"]
    assert chats.load(tiny_model).digests["chat_template"] in made["tiny"]


def test_without_a_model() -> None:
    with pytest.raises(UsageError, match="needs a model"):
        judge(Judge(engine="transformers"))
    with pytest.raises(MissingInputError):
        judge(settings("./nowhere"))
