"""Text of models, users and files for the page: bounded, with every control character visible, and word by word
against another text. Markup in it is escaped by the templates."""

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from prefpipe.terminal import escaped

LONGEST = 2_000  # characters of a text
_MOST_WORDS = 800  # that are compared
_WORD = re.compile(r"\s+|\w+|[^\w\s]")


@dataclass(frozen=True)
class Span:
    """A piece of a text that both sides have, or that only this side has."""

    kind: Literal["same", "changed"]
    text: str


def shown(text: object, longest: int = LONGEST) -> str:
    """A text as the page shows it: control characters and marks of direction as Python writes them, its end cut."""
    whole = text if isinstance(text, str) else str(text)
    cut = whole[:longest]
    rest = f" [… {len(whole) - longest:,} more characters]" if len(whole) > longest else ""
    return escaped(cut, keep="\n\t") + rest


def conversation(messages: object) -> str:
    """The turns of a prompt as one text; a single turn of the user alone is its content."""
    turns = [turn for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []
    if len(turns) == 1:
        return shown(turns[0].get("content", ""))
    return shown("\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in turns))


def difference(before: str, after: str) -> tuple[list[Span], list[Span]]:
    """Both texts, cut into the spans that they share and those that they do not."""
    old, new = _words(before), _words(after)
    if len(old) > _MOST_WORDS or len(new) > _MOST_WORDS:
        return [Span("same", before)], [Span("same", after)]
    left: list[Span] = []
    right: list[Span] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        state: Literal["same", "changed"] = "same" if kind == "equal" else "changed"
        left += [Span(state, "".join(old[a:b]))] if a < b else []
        right += [Span(state, "".join(new[c:d]))] if c < d else []
    return left, right


def _words(text: str) -> list[str]:
    return _WORD.findall(text)
