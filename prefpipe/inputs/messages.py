"""Fields of foreign files as messages and as inputs of a chat template: nothing is left out without a RowFault."""

import json
import re
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any

from prefpipe.errors import RowFault
from prefpipe.schemas import Message, Messages

Row = Mapping[str, Any]
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
    "bot": "assistant",
}
_NOT_CARRIED = ("image", "images", "video", "videos", "audio", "audios")
_LISTED = 30
_TURN = re.compile(r"\n\n(Human|Assistant):")
TEMPLATE_INPUTS = ("tools", "documents", "chat_template_kwargs")


def messages(value: object, name: str, role: str) -> Messages:
    r"""A field as messages: a list of them, one of them, a transcript ("\n\nHuman: ...\n\nAssistant: ..."), or a text
    or number, which is one message of `role`. Raises RowFault that names the field."""
    if value is None:
        raise RowFault("null", f"field '{name}' is null")
    if isinstance(value, str) and _TURN.match(value):
        return _transcript(value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return [Message(role=role, content=text(value, name))]
    return [_message(entry, f"{name}[{i}]") for i, entry in enumerate(value)]


def text(value: object, name: str) -> str:
    """A field as text; a number is written out. Raises RowFault for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if value is None:
        raise RowFault("null", f"field '{name}' is null")
    raise RowFault("bad_content", f"field '{name}' is {type(value).__name__}, not text or messages")


def template_inputs(row: Row) -> str | None:
    """The columns tools, documents and chat_template_kwargs of a row as JSON; None where they are empty.

    Each may be JSON in text. Raises RowFault for tools or documents that are no list and keyword arguments that are no
    object.
    """
    found: dict[str, Any] = {}
    for name in TEMPLATE_INPUTS:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise RowFault("bad_template_input", f"field '{name}' is text that is no JSON") from error
        if not value:
            continue
        wanted = dict if name == "chat_template_kwargs" else list
        if not isinstance(value, wanted):
            raise RowFault("bad_template_input", f"field '{name}' is {type(value).__name__}, not a {wanted.__name__}")
        found[name] = value
    return to_json(found) if found else None


def check_carried(row: Row) -> None:
    """Raise RowFault for a row with images or sound, and for text that has no bytes: JSON can hold half of a surrogate
    pair."""
    for name in _NOT_CARRIED:
        if row.get(name) not in (None, [], {}, ""):
            raise RowFault("not_carried", f"column '{name}': only text is trained on")
    for name, value in row.items():
        try:
            (value if isinstance(value, str) else to_json(value)).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            what = "half a character" if isinstance(error, UnicodeEncodeError) else "lists too deep to read"
            raise RowFault("not_unicode", f"field '{name}' holds {what}") from error


def listed(columns: Collection[str]) -> str:
    """Names of columns for a message; a row may have thousands."""
    more = f" and {len(columns) - _LISTED} more" if len(columns) > _LISTED else ""
    return ", ".join(islice(columns, _LISTED)) + more if columns else "none"


def to_json(value: object) -> str:
    """A value of a foreign file as JSON; what JSON cannot say is written as text."""
    return _JSON.encode(value)


_JSON = json.JSONEncoder(ensure_ascii=False, default=str)


def _message(value: object, name: str) -> Message:
    if not isinstance(value, dict):
        raise RowFault("bad_content", f"{name} is {type(value).__name__}, not a message")
    fields = {key: entry for key, entry in value.items() if entry is not None}
    if "from" in fields and "value" in fields:
        fields = _of_sharegpt(fields, name)
    role, content = fields.pop("role", None), fields.pop("content", None)
    if not isinstance(role, str):
        raise RowFault("bad_content", f"{name} has no role")
    if content is None and not fields:
        raise RowFault("null", f"the content of {name} is null")
    message = Message(role=role, content=_content(content, f"{name}.content"))
    fields = {key: entry for key, entry in fields.items() if entry not in ([], {}, "")}
    if fields:
        message["extra"] = to_json(fields)
    return message


def _of_sharegpt(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """A turn with `from` and `value`; that of a function_call holds the call as JSON."""
    speaker, said = fields.pop("from"), fields.pop("value")
    fields |= {"role": _SHAREGPT.get(speaker, speaker) if isinstance(speaker, str) else None, "content": said}
    if speaker == "function_call":
        try:
            call = json.loads(said)
        except (ValueError, TypeError, RecursionError):
            call = None
        if not isinstance(call, dict):
            raise RowFault("bad_tool_call", f"the function_call of {name} is no JSON object")
        fields |= {"content": "", "tool_calls": [{"type": "function", "function": call}]}
    return fields


def _content(value: object, name: str) -> str:
    """The text of a content: its text parts are joined, as templates that take parts write them."""
    if value is None:
        return ""
    if not isinstance(value, list):
        return text(value, name)
    parts: list[str] = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text":
            raise RowFault("not_carried", f"{name} has a part of type {kind!r}: only text is trained on")
        parts.append(text(part.get("text") if isinstance(part, dict) else part, name))
    return "".join(parts)


def _transcript(transcript: str) -> Messages:
    """The turns of a transcript; one that ends where the assistant is to answer has no turn for it."""
    _, *pieces = _TURN.split(transcript)
    turns = [
        Message(role="user" if who == "Human" else "assistant", content=said.strip())
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return turns[:-1] if turns[-1] == Message(role="assistant", content="") else turns
