"""Rows of public datasets, whatever their columns are called, as one thing: a prompt, its answers, their ratings.

| format | columns |
|---|---|
| preference | `chosen`, `rejected`, and `prompt`, or without it conversations or transcripts with equal first turns |
| list | `prompt` (or `instruction`, `input`) and `completions` (or `generations`, `responses`), rated or not |
| label | `prompt`, `completion`, `label` |
| completion | `prompt`, `completion` |
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prefpipe.errors import DataError, RowFault
from prefpipe.schemas import Message, Messages

Row = Mapping[str, Any]
_PROMPTS = ("prompt", "instruction", "input")
_LISTS = ("completions", "generations", "responses")
_RATINGS = ("ratings", "scores")
_WRITERS = ("generation_models", "model_names", "models")
_SIDES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
_INSIDE = {
    "text": ("response", "content", "text", "completion", "generation"),
    "rating": ("overall_score", "rating", "score", "fine-grained_score"),
    "writer": ("model", "source"),
}
_KNOWN = {
    *_PROMPTS,
    *_LISTS,
    *_RATINGS,
    *_WRITERS,
    *(name for pair in _SIDES for name in pair),
    *("chosen", "rejected", "completion", "label", "answer", "messages", "system_prompt", "model"),
}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_UNRATED = ("", "n/a", "none", "null", "nan")


@dataclass(frozen=True)
class Answered:
    """A prompt and its answers as turns. `ratings` has one number (or None) per answer, or is None where the format has
    none; `writers` says who wrote each; `label` is that of the label format; `answer` is the expected answer."""

    prompt: Messages
    answers: list[Messages]
    ratings: list[float | None] | None
    writers: list[str]
    label: bool | None
    answer: str | None


def recognise(row: Row, where: str) -> str:
    """The format of a file from the columns of its first row. Raises DataError that lists the columns."""
    columns = {name for name, value in row.items() if value is not None}
    if {"chosen", "rejected"} & columns:
        return "preference"
    if _first(row, _LISTS) and _first(row, _PROMPTS):
        return "list"
    if {"prompt", "completion"} <= columns:
        return "label" if "label" in columns else "completion"
    raise DataError(
        f"{where}: no known format has the columns {', '.join(row) or '(none)'}",
        "docs/datasets.md lists what is understood: prompt, chosen, rejected for one",
    )


def has_ratings(row: Row, kind: str) -> bool:
    """Whether a file of this format rates its answers: by the columns of its first row, which may be empty there."""
    if kind == "preference":
        return any(a in row and b in row for a, b in _SIDES)
    if kind != "list":
        return False
    answers = row[_first(row, _LISTS) or ""]
    inside = isinstance(answers, list) and any(isinstance(a, dict) and a.keys() & _INSIDE["rating"] for a in answers)
    return any(name in row for name in _RATINGS) or inside


def parse(row: Row, kind: str, where: str) -> Answered:
    """A row of a format. Raises DataError for a missing or mistyped field, RowFault for a row that cannot be used."""
    return _PARSERS[kind](row, where)


def others(row: Row) -> dict[str, Any]:
    """The columns that no format reads: they stay with the prompt, for rewards that look at them."""
    return {name: value for name, value in row.items() if name not in _KNOWN}


def messages(value: object, where: str, name: str, role: str) -> Messages:
    """A field as messages; plain text is one message of `role`. Raises DataError naming the field."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    ):
        check_unicode(name, *(text for m in value for text in (m["role"], m["content"])))
        return [Message(role=m["role"], content=m["content"]) for m in value]
    raise DataError(
        f"{where}: field '{name}' is neither text nor a list of messages with 'role' and 'content'",
        'write it as [{"role": "user", "content": "..."}] or as plain text',
    )


def field(row: Row, name: str, where: str) -> Any:
    """A field that must be there."""
    if row.get(name) is None:
        raise DataError(f"{where}: field '{name}' is missing (fields: {', '.join(row) or 'none'})", f"add '{name}'")
    return row[name]


def check_unicode(name: str, *texts: str) -> None:
    """JSON can hold half of a surrogate pair, which is no text: it has no bytes."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise RowFault("not_unicode", f"field '{name}' holds half a character: {error.reason}") from error


def answer_turns(prompt: Messages, turns: Messages) -> Messages:
    """The one assistant turn that answers: many files repeat the prompt in front of it."""
    if turns[: len(prompt)] == prompt:
        turns = turns[len(prompt) :]
    if not turns:
        raise RowFault("empty", "an answer without messages")
    if turns[0]["role"] != "assistant":
        raise RowFault("bad_roles", f"an answer starts with the assistant, not with {turns[0]['role']!r}")
    if len(turns) > 1:
        raise RowFault("several_turns", f"an answer of {len(turns)} turns: what the user says in it is no completion")
    return turns


def _preference(row: Row, where: str) -> Answered:
    chosen, rejected = (_side(field(row, name, where), where, name) for name in ("chosen", "rejected"))
    if row.get("prompt") is not None:
        prompt = _prompt(row, where)
    elif len(chosen) > 1 or len(rejected) > 1:
        prompt = _shared_turns(chosen, rejected)
    else:
        prompt = messages(field(row, "prompt", where), where, "prompt", "user")
    names = next((pair for pair in _SIDES if all(n in row for n in pair)), None)
    ratings = [_number(row[n], where, n) for n in names] if names else None
    answers = [answer_turns(prompt, turns) for turns in (chosen, rejected)]
    return Answered(prompt, answers, ratings, ["", ""], None, _expected(row))


def _side(value: object, where: str, name: str) -> Messages:
    if isinstance(value, str) and _TURN.match(value):
        return _transcript(value)
    return messages(value, where, name, "assistant")


def _transcript(text: str) -> Messages:
    r"""Turns of a text like "\n\nHuman: ...\n\nAssistant: ..."."""
    _, *pieces = _TURN.split(text)
    turns = [
        Message(role="user" if who == "Human" else "assistant", content=said.strip())
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    check_unicode("transcript", *(t["content"] for t in turns))
    return turns


def _shared_turns(chosen: Messages, rejected: Messages) -> Messages:
    """The turns before the last one, which both conversations must share."""
    if chosen[:-1] != rejected[:-1]:
        raise RowFault("several_turns", "chosen and rejected part before their last turn")
    return chosen[:-1]


def _list(row: Row, where: str) -> Answered:
    name = _first(row, _LISTS)
    prompt = _prompt(row, where)
    given = field(row, name or _LISTS[0], where)
    if not isinstance(given, list) or not given:
        raise RowFault("empty", f"field '{name}' is not a list of answers")
    answers = [answer_turns(prompt, _answer(a, where, f"{name}[{i}]")) for i, a in enumerate(given)]
    outside = _first(row, _RATINGS)
    if outside is not None:
        ratings = _aligned(row[outside], len(given), where, outside)
    else:
        ratings = [_inside(a, "rating") for a in given]
    writers = _first(row, _WRITERS)
    who = _aligned(row[writers], len(given), where, writers) if writers else [_inside(a, "writer") for a in given]
    numbers = [_number(r, where, f"rating {i} of {name}") for i, r in enumerate(ratings)]
    return Answered(prompt, answers, numbers, [str(w or "") for w in who], None, _expected(row))


def _completion(row: Row, where: str) -> Answered:
    prompt = _prompt(row, where)
    turns = answer_turns(prompt, messages(field(row, "completion", where), where, "completion", "assistant"))
    return Answered(prompt, [turns], None, [str(row.get("model") or "")], None, _expected(row))


def _label(row: Row, where: str) -> Answered:
    value = field(row, "label", where)
    if not isinstance(value, bool):
        raise DataError(f"{where}: field 'label' is {value!r}", "write true (desirable) or false (undesirable)")
    found = _completion(row, where)
    return Answered(found.prompt, found.answers, None, found.writers, value, found.answer)


_PARSERS = {"preference": _preference, "list": _list, "label": _label, "completion": _completion}
FORMATS = tuple(_PARSERS)


def _prompt(row: Row, where: str) -> Messages:
    name = _first(row, _PROMPTS) or "prompt"
    found = messages(field(row, name, where), where, name, "user")
    system = row.get("system_prompt")
    if isinstance(system, str) and system.strip() and found and found[0]["role"] != "system":
        found = [Message(role="system", content=system), *found]
    return found


def _expected(row: Row) -> str | None:
    answer = row.get("answer")
    return answer if isinstance(answer, str) else None


def _answer(value: object, where: str, name: str) -> Messages:
    if isinstance(value, dict) and "role" not in value:
        value = value.get(_first(value, _INSIDE["text"]) or "")
    return messages(value, where, name, "assistant")


def _inside(answer: object, what: str) -> Any:
    return answer.get(_first(answer, _INSIDE[what]) or "") if isinstance(answer, dict) else None


def _aligned(values: object, count: int, where: str, name: str) -> list[Any]:
    if not isinstance(values, list) or len(values) != count:
        found = len(values) if isinstance(values, list) else "no list"
        raise DataError(f"{where}: field '{name}' has {found} entries for {count} answers", "give one per answer")
    return values


def _number(value: object, where: str, name: str) -> float | None:
    """A rating: a finite number, a number in text, or nothing."""
    if value is None or (isinstance(value, str) and value.strip().lower() in _UNRATED):
        return None
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None:
        raise DataError(f"{where}: {name} is {value!r}, not a number", "write a number, or null for no rating")
    return number if math.isfinite(number) else None


def _first(row: Row, names: Iterable[str]) -> str | None:
    return next((n for n in names if row.get(n) is not None), None)
