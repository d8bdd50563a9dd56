"""Lines in, answers out, with voices that say what a test tells them to."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from prefpipe.chat.settings import Settings
from prefpipe.chat.talk import talk
from prefpipe.errors import Interrupted, RowFault

CTRL_C = Interrupted(signal.SIGINT)


@dataclass
class Told:
    """A voice that says its words, or raises the error among them."""

    name: str
    words: list[str | BaseException] = field(default_factory=lambda: ["yes"])
    messages: list[Any] = field(default_factory=list)

    def answer(self, question: str, settings: Settings, show: Callable[[str], object]) -> None:
        self.messages.append((question, settings.seed))
        for word in self.words:
            if isinstance(word, BaseException):
                raise word
            show(word)


def lines(*said: str | BaseException) -> Callable[[], str | None]:
    source: Iterator[str | BaseException] = iter(said)

    def read() -> str | None:
        line = next(source, None)
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def spoken(capsys: pytest.CaptureFixture[str], *said: str | BaseException, **words: Any) -> tuple[str, str, list[Told]]:
    voices = [Told(name, **({"words": words[name]} if name in words else {})) for name in ("base", "policy")]
    talk(lines(*said), voices, Settings())  # type: ignore[arg-type]  # what it needs of a voice
    captured = capsys.readouterr()
    return captured.out, captured.err, voices


def test_both_answer_until_the_lines_end(capsys: pytest.CaptureFixture[str]) -> None:
    out, _, (base, policy) = spoken(capsys, "one\n", "  \n", "/seed 3\n", "two\n")
    assert out == "[base]\nyes\n[policy]\nyes\n" * 2
    assert base.messages == policy.messages == [("one", 0), ("two", 3)]


def test_the_base_is_silent_quit_ends_and_reset_forgets(capsys: pytest.CaptureFixture[str]) -> None:
    out, err, (base, policy) = spoken(capsys, "/base", "one", "/reset", "two", "/quit", "three")
    assert out == "yes\nyes\n"
    assert (base.messages, policy.messages) == ([], [("two", 0)])
    assert "the base is silent" in err
    assert "forgotten" in err


def test_ctrl_c_ends_an_answer_and_not_the_chat(capsys: pytest.CaptureFixture[str]) -> None:
    out, err, (base, policy) = spoken(capsys, "one", CTRL_C, "two", base=["be", CTRL_C, "gun"])
    assert out == "[base]\nbe\n" * 2
    assert err.splitlines() == ["stopped", "/quit ends the chat", "stopped"]
    assert ([q for q, _ in base.messages], policy.messages) == (["one", "two"], [])


def test_other_signals_end_it(capsys: pytest.CaptureFixture[str]) -> None:
    stop = Interrupted(signal.SIGTERM)
    for said in (("one",), (stop,)):
        with pytest.raises(Interrupted):
            spoken(capsys, *said, base=[stop])


def test_a_question_that_cannot_be_asked_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    _, err, _ = spoken(capsys, "one", base=[RowFault("too_long", "9 tokens in the prompt, the most is 8")])
    assert "not asked: 9 tokens in the prompt, the most is 8; /reset begins anew" in err
