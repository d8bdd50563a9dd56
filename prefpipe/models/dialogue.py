"""What a chat template writes around the texts of a conversation, learnt from renderings of small conversations: tokens
that open and close turns, a default system message, the end of an answer."""

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Protocol

from tokenizers import AddedToken

from prefpipe.errors import RowFault
from prefpipe.schemas import Message

# The texts of two turns: private characters, which no template contains.
_FIRST, _SECOND = "\ue0a1", "\ue0a2"
_ANSWER = "Yes, it is."
_THOUGHTS = re.compile(r"[^a-z]*(begin|start|end)?_?(of)?_?(think(ing)?|thoughts?|reason(ing)?)[^a-z]*", re.IGNORECASE)


class Render(Protocol):
    """A function that renders conversations with one chat template."""

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The text of a conversation. Raises RowFault when the template refuses it."""
        ...


def control_tokens(
    added: Iterable[AddedToken], template: str, render: Render
) -> tuple[tuple[str, ...], frozenset[str]]:
    """The texts of control tokens in prompts, in the order of their ids, and those among them that are control tokens
    in answers too.

    Special tokens are control tokens in both. Any other added token is content, except in prompts where the template
    writes it around turns of user or system. White space is always content. Thinking marks are content of answers,
    where the model writes them.
    """
    prompts = _around_prompts(template, render)
    named = [token for token in added if token.content.strip()]
    special = [token.content for token in named if token.special]
    structure = {t.content for t in named if t.content in prompts and not _is_thinking_mark(t.content)}
    return (
        tuple(t.content for t in named if t.special or t.content in structure),
        frozenset(token for token in special if not _is_thinking_mark(token)),
    )


def default_system(render: Render, tokens: Iterable[str]) -> str:
    """The words that the template writes before the first user turn and not before the second; `tokens` are no
    words."""
    turns = [_user(_FIRST), _assistant(_FIRST), _user(_SECOND)]
    try:
        opening, *_ = render(turns[:1], add_generation_prompt=True).split(_FIRST)
        before_second = render(turns, add_generation_prompt=True).split(_SECOND)[0]
    except RowFault:
        return ""
    pairs = zip(reversed(opening), reversed(before_second), strict=False)
    header = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    added = opening[: len(opening) - header]
    for token in tokens:
        added = added.replace(token, " ")
    words = added.split()
    return " ".join(words) if len(words) > 1 else ""


def after_answer(render: Render, *, more: bool = False) -> str | None:
    """The text that the template writes after the last answer of a conversation, or with `more` between an answer and
    the next turn. None where the template does not show the answer."""
    turns = [_user("Is it?"), _assistant(_ANSWER), *([_user(_SECOND)] if more else [])]
    try:
        _, answer, tail = render(turns, add_generation_prompt=False).rpartition(_ANSWER)
    except RowFault:
        return None
    return tail.partition(_SECOND)[0] if answer else None


def _around_prompts(template: str, render: Render) -> str:
    """The text that the template writes around turns of system and user and to open an answer, without their content.
    For a template that refuses every probe it is the whole template."""
    system = Message(role="system", content=_SECOND)
    texts: list[str] = []
    for messages in ([_user(_FIRST)], [system, _user(_FIRST)]):
        try:
            texts.append(render(messages, add_generation_prompt=True))
        except RowFault:
            continue
    return "\n".join(texts) if texts else template


def _is_thinking_mark(token: str) -> bool:
    return _THOUGHTS.fullmatch(token) is not None


def _user(text: str) -> Message:
    return Message(role="user", content=text)


def _assistant(text: str) -> Message:
    return Message(role="assistant", content=text)
