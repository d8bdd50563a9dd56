"""Rows of public datasets, whatever their columns are called: a prompt, its answers, their ratings.

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
from dataclasses import dataclass, replace
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
class AnsweredPrompt:
    """A row of any format.

    prompt: messages up to the answers
    answers: the turns of each answer
    ratings: a number (or None) per answer; None where the format has no ratings
    writers: per answer the model that wrote it, "" where the row does not say
    label: desirable or not, in the label format
    answer: the expected answer
    """

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
    """Whether a file of this format rates its answers, from the columns of its first row; their values may be null."""
    if kind == "preference":
        return any(a in row and b in row for a, b in _SIDES)
    if kind != "list":
        return False
    if any(name in row for name in _RATINGS):
        return True
    entries = row[_first(row, _LISTS) or ""]
    return isinstance(entries, list) and any(isinstance(e, dict) and e.keys() & _INSIDE["rating"] for e in entries)


def parse(row: Row, kind: str, where: str) -> AnsweredPrompt:
    """A row of a format. Raises DataError for a missing or mistyped field, RowFault for a row that cannot be used."""
    return _PARSERS[kind](row, where)


def others(row: Row) -> dict[str, Any]:
    """The columns that no format reads. They stay with the prompt, for rewards that read them."""
    return {name: value for name, value in row.items() if name not in _KNOWN}


def messages(value: object, where: str, name: str, role: str) -> Messages:
    """A field as messages; plain text is one message of `role`. Raises DataError that names the field."""
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
    """The value of a field. Raises DataError where it is missing or null."""
    if row.get(name) is None:
        raise DataError(f"{where}: field '{name}' is missing (fields: {', '.join(row) or 'none'})", f"add '{name}'")
    return row[name]


def check_unicode(name: str, *texts: str) -> None:
    """Raise RowFault for text without bytes: JSON can hold half of a surrogate pair."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise RowFault("not_unicode", f"field '{name}' holds half a character: {error.reason}") from error


def answer_turns(prompt: Messages, turns: Messages) -> Messages:
    """The one assistant turn that answers the prompt, which many files repeat in front of it. Raises RowFault for no
    turn, for several, and for a turn of somebody else."""
    if turns[: len(prompt)] == prompt:
        turns = turns[len(prompt) :]
    if not turns:
        raise RowFault("empty", "an answer without messages")
    if turns[0]["role"] != "assistant":
        raise RowFault("bad_roles", f"an answer starts with the assistant, not with {turns[0]['role']!r}")
    if len(turns) > 1:
        raise RowFault("several_turns", f"an answer of {len(turns)} turns: what the user says in it is no completion")
    return turns


def _preference(row: Row, where: str) -> AnsweredPrompt:
    chosen, rejected = (_side(field(row, name, where), where, name) for name in ("chosen", "rejected"))
    if row.get("prompt") is not None:
        prompt = _prompt(row, where)
    elif len(chosen) > 1 or len(rejected) > 1:
        prompt = _shared_turns(chosen, rejected)
    else:
        prompt = messages(field(row, "prompt", where), where, "prompt", "user")
    columns = next((pair for pair in _SIDES if all(name in row for name in pair)), None)
    ratings = [_number(row[name], where, name) for name in columns] if columns else None
    answers = [answer_turns(prompt, turns) for turns in (chosen, rejected)]
    return AnsweredPrompt(prompt, answers, ratings, ["", ""], None, _expected(row))


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


def _list(row: Row, where: str) -> AnsweredPrompt:
    name = _first(row, _LISTS)
    prompt = _prompt(row, where)
    entries = field(row, name or _LISTS[0], where)
    if not isinstance(entries, list) or not entries:
        raise RowFault("empty", f"field '{name}' is not a list of answers")
    answers = [answer_turns(prompt, _answer(entry, where, f"{name}[{i}]")) for i, entry in enumerate(entries)]
    ratings = _per_answer(row, entries, _RATINGS, "rating", where)
    writers = _per_answer(row, entries, _WRITERS, "writer", where)
    numbers = [_number(r, where, f"rating {i} of {name}") for i, r in enumerate(ratings)]
    return AnsweredPrompt(prompt, answers, numbers, [str(w or "") for w in writers], None, _expected(row))


def _per_answer(row: Row, entries: list[Any], columns: Iterable[str], kind: str, where: str) -> list[Any]:
    """One value per answer: from the first of `columns` that the row has, else from inside the entries of the list."""
    name = _first(row, columns)
    if name is None:
        return [_inside(entry, kind) for entry in entries]
    values = row[name]
    if not isinstance(values, list) or len(values) != len(entries):
        count = len(values) if isinstance(values, list) else "no list"
        raise DataError(
            f"{where}: field '{name}' has {count} entries for {len(entries)} answers", "give one per answer"
        )
    return values


def _completion(row: Row, where: str) -> AnsweredPrompt:
    prompt = _prompt(row, where)
    turns = answer_turns(prompt, messages(field(row, "completion", where), where, "completion", "assistant"))
    return AnsweredPrompt(prompt, [turns], None, [str(row.get("model") or "")], None, _expected(row))


def _label(row: Row, where: str) -> AnsweredPrompt:
    value = field(row, "label", where)
    if not isinstance(value, bool):
        raise DataError(f"{where}: field 'label' is {value!r}", "write true (desirable) or false (undesirable)")
    return replace(_completion(row, where), label=value)


_PARSERS = {"preference": _preference, "list": _list, "label": _label, "completion": _completion}
FORMATS = tuple(_PARSERS)


def _prompt(row: Row, where: str) -> Messages:
    name = _first(row, _PROMPTS) or "prompt"
    prompt = messages(field(row, name, where), where, name, "user")
    system = row.get("system_prompt")
    if isinstance(system, str) and system.strip() and prompt and prompt[0]["role"] != "system":
        prompt = [Message(role="system", content=system), *prompt]
    return prompt


def _expected(row: Row) -> str | None:
    answer = row.get("answer")
    return answer if isinstance(answer, str) else None


def _answer(value: object, where: str, name: str) -> Messages:
    if isinstance(value, dict) and "role" not in value:
        value = _inside(value, "text")
    return messages(value, where, name, "assistant")


def _inside(entry: object, kind: str) -> Any:
    """The text, rating or writer inside an entry of the list; None for an entry that is plain text."""
    return entry.get(_first(entry, _INSIDE[kind]) or "") if isinstance(entry, dict) else None


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
