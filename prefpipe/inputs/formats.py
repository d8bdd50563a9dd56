"""Rows of public datasets, whatever their columns are called: a prompt, its answers, their ratings.

| format | columns |
|---|---|
| preference | `chosen`, `rejected`, and a prompt, or without it conversations or transcripts with equal first turns |
| list | a prompt and `completions` (or `generations`, `responses`), rated or not |
| label | a prompt, `completion` (or `output`, `response`), `label` |
| completion | a prompt and `completion`, or `messages` that go on behind the prompt or end with the answer, `rating` |

A prompt is `prompt`, `instruction` (with `input`), `input`, `question`, `messages` or `conversations`. `system_prompt`
or `system` goes in front. `tools`, `documents` and `chat_template_kwargs` go to the chat template.
"""

import math
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import takewhile
from typing import Any

from prefpipe.config.reward_sum import LARGEST_REWARD
from prefpipe.errors import DataError, RowFault
from prefpipe.inputs.messages import TEMPLATE_INPUTS, Row, check_carried, listed, messages, template_inputs, text
from prefpipe.inputs.prompt_columns import PROMPTS, SYSTEMS, behind_system, first, history, prompt_of
from prefpipe.models.encoding import ASKING
from prefpipe.schemas import Message, Messages

_COMPLETIONS = ("completion", "output", "response")
_LISTS = ("completions", "generations", "responses")
_RATINGS = ("ratings", "scores")
_WRITERS = ("generation_models", "model_names", "models")
_SIDES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
_INSIDE = {
    "text": ("response", "content", "text", "completion", "generation"),
    "rating": ("overall_score", "rating", "score", "fine-grained_score"),
    "writer": ("model", "source"),
}
_ALWAYS_READ = {
    *(*_LISTS, *_RATINGS, *_WRITERS, *TEMPLATE_INPUTS, *(name for pair in _SIDES for name in pair)),
    *("chosen", "rejected", "label", "answer", "model", "messages", "conversations"),
}
_LABELS = {
    **dict.fromkeys(("true", "1", "1.0", "yes", "desirable", "good"), True),
    **dict.fromkeys(("false", "0", "0.0", "no", "undesirable", "bad"), False),
}
_RENAMED = ("prompt", "chosen", "rejected", "completion", "messages", "label")
_USES = {  # format -> what reads a file of it
    "preference": "pairs go to --pairs of `prefpipe train`",
    "label": "labels go to --labels of `prefpipe train`, with --loss-type kto",
    "completion": "`prefpipe score --rewards NAME` rates answers, for `prefpipe build-pairs`; --sft imitates them",
    "list": "`prefpipe score` reads answers with ratings, then `prefpipe build-pairs --reward rating` pairs them",
}
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
    template_inputs: JSON of what else the chat template gets, as in the column of that name
    """

    prompt: Messages
    answers: list[Messages]
    ratings: list[float | None] | None
    writers: list[str]
    label: bool | None
    answer: str | None
    template_inputs: str | None = None


def recognise(columns: Collection[str], where: str) -> str:
    """The format of a file from the names of its columns. Raises DataError that lists them."""
    kind = _kind(columns)
    if kind is None:
        raise DataError(f"{where}: no known format has the columns {listed(columns)}", _way_out(columns))
    if kind == "preference" and not {"chosen", "rejected"} <= set(columns):
        raise DataError(
            f"{where}: a column 'chosen' or 'rejected' is missing; there are {listed(columns)}",
            "a preference has both; --column NAME=COLUMN renames a column",
        )
    return kind


def other_kind(found: str, kind: str, where: str) -> DataError:
    """The error for a file of format `found` where `kind` is read, with the option or command that reads it."""
    return DataError(f"{where}: a row of format '{found}', not '{kind}'", f"{_USES[found]}; docs/datasets.md has more")


def _way_out(columns: Collection[str]) -> str:
    """What to do with columns that are of no known format: names for those that nearly are, or where prompts go."""
    found = {name: next((c for c in columns if c.lower().startswith(name)), name) for name in _RENAMED}
    new = {name: column for name, column in found.items() if name not in columns and column != name}
    if _kind({*columns, *new}) and ("chosen" in new) == ("rejected" in new):
        return f"rename them: {' '.join(f'--column {name}={column}' for name, column in new.items())}"
    if {*columns} & {*PROMPTS}:
        return (
            "prompts without answers are for `prefpipe generate --prompts`; docs/datasets.md lists what is understood"
        )
    return "docs/datasets.md lists what is understood: prompt, chosen, rejected for one; --column NAME=COLUMN renames"


def has_ratings(rows: Iterable[Row], kind: str) -> bool:
    """Whether a file of this format rates its answers, from the names of columns in these rows of it; the values may be
    null."""
    if kind == "preference":
        return any(a in row and b in row for row in rows for a, b in _SIDES)
    if kind == "completion":
        return any("rating" in row for row in rows)
    return kind == "list" and any(_rates(row) for row in rows)


def _rates(row: Row) -> bool:
    entries = row.get(first(row, _LISTS) or "")
    inside = isinstance(entries, list) and any(isinstance(e, dict) and e.keys() & _INSIDE["rating"] for e in entries)
    return inside or any(name in row for name in _RATINGS)


def parse(row: Row, kind: str) -> AnsweredPrompt:
    """A row of a format. Raises RowFault for a row that cannot be used."""
    check_carried(row)
    if _kind(row) != kind:
        detail = f"the file began with rows of format '{kind}'; the columns of this row are {listed(row)}"
        raise RowFault("other_columns", detail)
    return replace(_PARSERS[kind](row), template_inputs=template_inputs(row))


def others(row: Row) -> dict[str, Any]:
    """The columns that no format reads. They stay with the prompt, for rewards that read them."""
    read = {*_ALWAYS_READ, first(row, PROMPTS), first(row, SYSTEMS), *(["history"] if history(row) else [])}
    if read & {"instruction"}:
        read.add("input")
    if not {"chosen", "rejected", *_LISTS} & row.keys():
        read.add(first(row, _COMPLETIONS))
    return {name: value for name, value in row.items() if name not in read}


def answer_turns(prompt: Messages, turns: Messages) -> Messages:
    """The turns that answer the prompt, which many files repeat in front of them, some without its system message: one
    of the assistant, or several that begin and end with one. Raises RowFault for no turn, for one of the assistant
    without text, and for other roles."""
    for repeated in (prompt, prompt[1:] if prompt and prompt[0]["role"] == "system" else []):
        if repeated and turns[: len(repeated)] == repeated:
            turns = turns[len(repeated) :]
            break
    if not turns:
        raise RowFault("empty", "an answer without messages")
    if turns[0]["role"] != "assistant":
        raise RowFault("bad_roles", f"an answer starts with the assistant, not with {turns[0]['role']!r}")
    roles = [turn["role"] for turn in turns]
    if roles[-1] != "assistant" or not {"assistant", *ASKING}.issuperset(roles):
        raise RowFault("bad_roles", f"an answer ends with the assistant and holds no system message; roles are {roles}")
    if any(turn["role"] == "assistant" and not turn["content"].strip() and "extra" not in turn for turn in turns):
        raise RowFault("empty", "an answer without text")
    return turns


def _kind(columns: Collection[str]) -> str | None:
    names = set(columns)
    if {"chosen", "rejected"} & names:
        return "preference"
    if names & set(_LISTS) and names & set(PROMPTS):
        return "list"
    if names & set(_COMPLETIONS) and names & set(PROMPTS):
        return "label" if "label" in names else "completion"
    return "completion" if names & {"messages", "conversations"} else None


def _field(row: Row, name: str) -> Any:
    if name not in row:
        raise RowFault("missing", f"field '{name}' is missing (fields: {listed(row)})")
    if row[name] is None:
        raise RowFault("null", f"field '{name}' is null")
    return row[name]


def _preference(row: Row) -> AnsweredPrompt:
    chosen, rejected = (messages(_field(row, name), name, "assistant") for name in ("chosen", "rejected"))
    of_column = first(row, PROMPTS)
    if of_column in (None, "messages") and (len(chosen) > 1 or len(rejected) > 1):
        shared = _shared_turns(chosen, rejected)  # `messages` repeats the whole conversation in some files
        prompt = behind_system(row, shared)
        chosen, rejected = chosen[len(shared) :], rejected[len(shared) :]
    else:
        prompt = prompt_of(row)
        if chosen[:-1] == rejected[:-1] and chosen[-1 - len(prompt) : -1] == prompt:
            prompt = chosen[:-1]  # in some files the column holds only the end of what both answer
    columns = next((pair for pair in _SIDES if all(name in row for name in pair)), None)
    ratings = [_number(row[name], name) for name in columns] if columns else None
    answers = [answer_turns(prompt, turns) for turns in (chosen, rejected)]
    return AnsweredPrompt(prompt, answers, ratings, ["", ""], None, _expected(row))


def _shared_turns(chosen: Messages, rejected: Messages) -> Messages:
    """The turns that both conversations begin with: all but the last; where they part earlier and only tools reply
    behind that, those in front of the answer in which they part. Raises RowFault for any others."""
    if chosen[:-1] == rejected[:-1]:
        return chosen[:-1]
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    while shared and not chosen[shared]["role"] == rejected[shared]["role"] == "assistant":
        shared -= 1
    if not shared or any(turn["role"] == "user" for turn in (*chosen[shared:], *rejected[shared:])):
        detail = "chosen and rejected part before their last turn: a column 'prompt' would say what both answer"
        raise RowFault("several_turns", detail)
    return chosen[:shared]


def _list(row: Row) -> AnsweredPrompt:
    name = first(row, _LISTS) or next(n for n in _LISTS if n in row)
    prompt = prompt_of(row)
    entries = _field(row, name)
    if not isinstance(entries, list) or not entries:
        raise RowFault("empty", f"field '{name}' is not a list of answers")
    answers = [answer_turns(prompt, _answer(entry, f"{name}[{i}]")) for i, entry in enumerate(entries)]
    ratings = _per_answer(row, entries, _RATINGS, "rating")
    writers = _per_answer(row, entries, _WRITERS, "writer")
    numbers = [_number(r, f"rating {i} of {name}") for i, r in enumerate(ratings)]
    return AnsweredPrompt(prompt, answers, numbers, [str(w or "") for w in writers], None, _expected(row))


def _per_answer(row: Row, entries: list[Any], columns: Iterable[str], kind: str) -> list[Any]:
    """One value per answer: from the first of `columns` that the row has, else from inside the entries of the list."""
    name = first(row, columns)
    if name is None:
        return [_inside(entry, kind) for entry in entries]
    values = row[name]
    if not isinstance(values, list) or len(values) != len(entries):
        count = len(values) if isinstance(values, list) else "no list"
        raise RowFault("bad_rating", f"field '{name}' has {count} entries for {len(entries)} answers")
    return values


def _completion(row: Row) -> AnsweredPrompt:
    name = first(row, _COMPLETIONS)
    conversation = first(row, ("messages", "conversations"))
    if name is None and conversation and conversation != first(row, PROMPTS):
        prompt = prompt_of(row)
        turns = messages(row[conversation], conversation, "assistant")
    elif name is None and not any(n in row for n in _COMPLETIONS):
        *prompt, answer = prompt_of(row) or [Message(role="", content="")]
        turns = [answer]
    else:
        prompt = prompt_of(row)
        turns = messages(row.get(name or ""), name or _COMPLETIONS[0], "assistant")
    writers = [str(row.get("model") or "")]
    ratings = [_number(row["rating"], "rating")] if "rating" in row else None
    return AnsweredPrompt(prompt, [answer_turns(prompt, turns)], ratings, writers, None, _expected(row))


def _label(row: Row) -> AnsweredPrompt:
    value = _field(row, "label")
    label = _LABELS.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None
    if label is None:
        raise RowFault("bad_label", f"field 'label' is {str(value)[:60]!r}, neither true nor false")
    return replace(_completion({**row, "rating": None}), ratings=None, label=label)


_PARSERS = {"preference": _preference, "list": _list, "label": _label, "completion": _completion}
FORMATS = tuple(_PARSERS)


def _expected(row: Row) -> str | None:
    answer = row.get("answer")
    return None if answer is None else text(answer, "answer")


def _answer(value: object, name: str) -> Messages:
    if isinstance(value, dict) and "role" not in value:
        value = _inside(value, "text")
    return messages(value, name, "assistant")


def _inside(entry: object, kind: str) -> Any:
    """The text, rating or writer inside an entry of the list; None for an entry that is plain text."""
    return entry.get(first(entry, _INSIDE[kind]) or "") if isinstance(entry, dict) else None


def _number(value: object, name: str) -> float | None:
    """A rating: a finite number, a number in text, or nothing."""
    if value is None or (isinstance(value, str) and value.strip().lower() in _UNRATED):
        return None
    number = None
    if isinstance(value, int | float | str | Decimal) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            number = float(value)
    if number is None:
        raise RowFault("bad_rating", f"{name} is {str(value)[:60]!r}, not a number")
    if LARGEST_REWARD < abs(number) < math.inf:
        raise RowFault("bad_rating", f"{name} is {number:g}: a rating is at most {LARGEST_REWARD:g}")
    return number if math.isfinite(number) else None
