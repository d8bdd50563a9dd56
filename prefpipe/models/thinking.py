"""The reasoning that a model writes before its answer, and the answer without it, which people and rewards compare."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Marks around reasoning in the dialogue formats of open models: Qwen and most others, Mistral, Cohere, Seed, gpt-oss.
KNOWN = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
Decode = Callable[[Sequence[int]], str]  # from token ids to text without special tokens


@dataclass(frozen=True)
class Marks:
    """The texts that open and close reasoning; `closing_ids` are the token ids of the latter."""

    opening: str
    closing: str
    closing_ids: tuple[int, ...]


class Said(NamedTuple):
    """A completion in two parts: `thinking` with its marks and the white space behind them (None for an answer without
    it), the number of its tokens, and the answer."""

    text: str
    thinking: str | None = None
    thinking_tokens: int | None = None


def pair_of(setting: str, tokens: Collection[str], template: str) -> tuple[str, str] | None:
    """The marks of a model, from the texts of its added tokens and its chat template; None for a model without marks.

    `setting` is "model", "none", or the two marks with a space between them.
    """
    if setting == "none":
        return None
    if setting != "model":
        opening, closing = setting.split()
        return opening, closing
    return next((pair for pair in KNOWN if pair[1] in tokens or pair[1] in template), None)


def split(token_ids: Sequence[int], text: str, marks: Marks | None, decode: Decode) -> Said:
    """Split a completion at its last closing mark. A completion that opens reasoning and never closes it has no answer.

    A mark that is a special token is not in `text`; then the token ids show where it stands.
    """
    if marks is None:
        return Said(text)
    behind = _behind(token_ids, marks.closing_ids)
    place = text.rfind(marks.closing)
    if place >= 0:
        answer = text[place + len(marks.closing) :].lstrip()
        thinking = text[: len(text) - len(answer)]
        return Said(answer, thinking, behind or _covering(token_ids, place + len(marks.closing), decode))
    if behind is not None:
        thinking = decode(token_ids[:behind])
        answer = (text.removeprefix(thinking) if text.startswith(thinking) else decode(token_ids[behind:])).lstrip()
        return Said(answer, text[: len(text) - len(answer)] or None, behind)
    if text.lstrip().startswith(marks.opening):
        return Said("", text, len(token_ids))
    return Said(text)


def _behind(token_ids: Sequence[int], closing: tuple[int, ...]) -> int | None:
    """The place after the last occurrence of `closing`."""
    size = len(closing)
    for end in range(len(token_ids), size - 1, -1):
        if tuple(token_ids[end - size : end]) == closing:
            return end
    return None


def _covering(token_ids: Sequence[int], length: int, decode: Decode) -> int:
    """The smallest number of tokens whose text has at least `length` characters."""
    low, high = 0, len(token_ids)
    while low < high:
        middle = (low + high) // 2
        if len(decode(token_ids[:middle])) < length:
            low = middle + 1
        else:
            high = middle
    return low
