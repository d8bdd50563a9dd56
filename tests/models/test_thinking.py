"""Reasoning and answer of a completion, by text and by token ids."""

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken

from prefpipe.models import thinking
from prefpipe.models.chat import Chat, load_chat
from prefpipe.models.thinking import Marks, Said, pair_of

THINK = ("<think>", "</think>")


@pytest.mark.parametrize(("setting", "tokens", "template", "pair"), [
    ("model", {"</think>"}, "", THINK), ("model", set(), "{{ '</think>' }}", THINK), ("model", {"a"}, "", None),
    ("none", {"</think>"}, "", None), ("<a> </a>", {"</think>"}, "", ("<a>", "</a>")),
    ("model", {"[/THINK]"}, "", ("[THINK]", "[/THINK]")),
])  # fmt: skip
def test_the_marks_of_a_model(setting: str, tokens: set[str], template: str, pair: tuple[str, str] | None) -> None:
    assert pair_of(setting, tokens, template) == pair


def reasoner(tiny_model: Path, *, special: bool | None) -> Chat:
    """The tiny model with marks as added tokens, special or not, or as plain text (None)."""
    chat = load_chat(tiny_model)
    if special is not None:
        tokens = [AddedToken(mark, special=special, normalized=False) for mark in THINK]
        (chat.tokenizer.add_special_tokens if special else chat.tokenizer.add_tokens)(tokens)
    closing = chat.tokenizer.encode(THINK[1], add_special_tokens=False).ids
    return replace(chat, thinking=Marks(*THINK, tuple(closing)))


@pytest.mark.parametrize("special", [True, False, None])
@pytest.mark.parametrize("answer", ["Three.", " Three.", ""])
@pytest.mark.parametrize("opening", ["<think>", ""])
def test_the_answer_stands_behind_the_last_closing_mark(
    tiny_model: Path, special: bool | None, answer: str, opening: str
) -> None:
    """A prompt that ends in an open mark leaves the completion with the closing one only."""
    chat = reasoner(tiny_model, special=special)
    before = chat.tokenizer.encode(f"{opening}One and two.</think>", add_special_tokens=False).ids
    ids = [*before, *chat.tokenizer.encode(f"\n\n{answer}", add_special_tokens=False).ids, 2]
    text = chat.decode(ids)
    said = chat.said(ids, text)
    assert said.text == answer.strip()
    assert (said.thinking or "") + said.text == text
    assert "One and two." in (said.thinking or "")
    assert said.thinking_tokens == len(before)


def test_reasoning_that_is_cut_short_is_no_answer(tiny_model: Path) -> None:
    chat = reasoner(tiny_model, special=False)
    ids = chat.tokenizer.encode("<think>One and", add_special_tokens=False).ids
    assert chat.said(ids, chat.decode(ids)) == Said("", "<think>One and", len(ids))


def test_an_answer_without_reasoning_is_all_answer(tiny_model: Path) -> None:
    chat = reasoner(tiny_model, special=False)
    assert chat.said([5, 2], "Three.") == Said("Three.")
    assert thinking.split([5, 2], "</think>Three.", None, chat.decode) == Said("</think>Three.")


def test_the_text_of_a_file_may_lack_the_marks_of_its_template(tiny_model: Path) -> None:
    """Templates write an empty pair of marks in front of an answer without reasoning: its tokens are none of the
    answer."""
    chat = reasoner(tiny_model, special=False)
    before = chat.tokenizer.encode("<think>\n\n</think>", add_special_tokens=False).ids
    ids = [*before, *chat.tokenizer.encode("\n\nThree.", add_special_tokens=False).ids, 2]
    assert chat.said(ids, "Three.") == Said("Three.", None, len(before))
