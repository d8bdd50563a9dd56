"""A message as a chat template reads it: text or content parts, tool calls, reasoning; and what became of its text."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefpipe.errors import DataError, RowFault
from prefpipe.schemas import Message

Turn = dict[str, Any]  # a message as a template reads it
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing; a template reads one of them
_CONTENT, _ARGUMENT = "\ue0a1", "\ue0a2"  # private characters: no template holds them
_USER: Turn = {"role": "user", "content": _CONTENT}


@dataclass(frozen=True)
class Shape:
    """The form in which a chat template reads messages.

    in_parts: it iterates over the parts of a content; a plain text would be lost
    arguments_as_text: it joins the arguments of a tool call to a text, so that they must be JSON and not an object
    reasoning: the name that it reads the reasoning of an answer under
    """

    in_parts: bool = False
    arguments_as_text: bool = False
    reasoning: str = REASONING[0]


def shape_of(template: str, render: Callable[[Sequence[Turn]], str]) -> Shape:
    """The shape of a template, by rendering small conversations; `render` raises RowFault for what it refuses.

    Raises DataError for a template that takes the message of a user and does not write it.
    """
    in_parts = not _shows(render, [_USER], _CONTENT) and _shows(render, [_in_parts(_USER)], _CONTENT)
    if not in_parts and _renders(render, [_USER]) and not _shows(render, [_USER], _CONTENT):
        raise DataError("the chat template does not write what the user says", "pass another one with --chat-template")
    user = _in_parts(_USER) if in_parts else _USER
    arguments = {"a": _ARGUMENT}
    as_object, as_json = ([user, _call(a)] for a in (arguments, json.dumps(arguments, ensure_ascii=False)))
    as_text = not _shows(render, as_object, _ARGUMENT) and _shows(render, as_json, _ARGUMENT)
    reasoning = next((name for name in REASONING if name in template), REASONING[0])
    return Shape(in_parts, as_text, reasoning)


def for_template(messages: Sequence[Message], shape: Shape) -> list[Turn]:
    """Messages in the form that a template reads."""
    return [_turn(message, shape) for message in messages]


def extra_of(message: Message) -> Turn:
    """What a message says beside role and content, by key."""
    return json.loads(message["extra"]) if "extra" in message else {}


def as_dict(message: Message) -> Turn:
    """A message as files hold it: role, content, and the keys of `extra` beside them."""
    return {"role": message["role"], "content": message["content"], **extra_of(message)}


def lost(messages: Sequence[Message], rendered: str) -> tuple[int, str] | None:
    """The first message whose text is not in a rendering, as its place and what is lost; None where all is there.

    White space may differ, and text may stand as JSON. Checked are content, reasoning, and names of called functions. A
    text that others hold too must be there as often as all of them have it.
    """
    texts = [(place, name, text) for place, message in enumerate(messages) for name, text in _texts(message)]
    squeezed = ""
    for place, name, text in texts:
        needed = sum(other.count(text) for _, _, other in texts) if len(texts) > 1 else 1
        if rendered.count(text) >= needed:
            continue
        squeezed = squeezed or _squeezed(rendered)
        forms = (_squeezed(text), _squeezed(json.dumps(text, ensure_ascii=False)[1:-1]))
        if not any(squeezed.count(form) >= needed for form in forms):
            return place, f"{name} {text[:60]!r}"
    return None


def lost_input(inputs: Mapping[str, Any], rendered: str) -> str | None:
    """The name of a tool or the text of a document that is not in a rendering, with what it is; None where all are."""
    tools = [_function(tool).get("name") for tool in _dicts(inputs.get("tools"))]
    documents = [document.get("text") or document.get("contents") for document in _dicts(inputs.get("documents"))]
    for kind, texts in (("tool", tools), ("document", documents)):
        for text in texts:
            if isinstance(text, str) and text.strip() and _squeezed(text) not in _squeezed(rendered):
                return f"{kind} {text[:60]!r}"
    return None


def _texts(message: Message) -> Iterator[tuple[str, str]]:
    content = message["content"].strip()
    if content:
        yield "content", content
    if "extra" not in message:
        return
    extra = extra_of(message)
    for name in REASONING:
        text = extra.get(name)
        if isinstance(text, str) and text.strip():
            yield name, text.strip()
    for call in _dicts(extra.get("tool_calls")):
        name = _function(call).get("name")
        if isinstance(name, str):
            yield "tool call", name


def _turn(message: Message, shape: Shape) -> Turn:
    turn: Turn = {"role": message["role"], "content": message["content"]}
    if "extra" not in message and not shape.in_parts:
        return turn
    for name, value in extra_of(message).items():
        if name == "tool_calls" and isinstance(value, list):
            value = [_with_arguments(call, as_text=shape.arguments_as_text) for call in value]
        turn[shape.reasoning if name in REASONING else name] = value
    return _in_parts(turn) if shape.in_parts else turn


def _in_parts(turn: Turn) -> Turn:
    return turn | {"content": [{"type": "text", "text": turn["content"]}] if turn["content"] else []}


def _with_arguments(call: Any, *, as_text: bool) -> Any:
    """A tool call with its arguments as an object, or as JSON for a template that takes text. Files hold either."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": _with_arguments(call["function"], as_text=as_text)}
    arguments = call.get("arguments")
    if as_text and isinstance(arguments, dict):
        return call | {"arguments": json.dumps(arguments, ensure_ascii=False)}
    if not as_text and isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError as error:
            raise RowFault("bad_tool_call", f"the arguments of a tool call are no JSON: {arguments[:60]!r}") from error
        return call | {"arguments": parsed} if isinstance(parsed, dict) else call
    return call


def _call(arguments: Any) -> Turn:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "a", "function": function}]}


def _shows(render: Callable[[Sequence[Turn]], str], turns: Sequence[Turn], mark: str) -> bool:
    try:
        text = render(turns)
    except RowFault:
        return False
    return mark in text and "'type'" not in text  # a list of parts as Python prints it is no text


def _renders(render: Callable[[Sequence[Turn]], str], turns: Sequence[Turn]) -> bool:
    try:
        render(turns)
    except RowFault:
        return False
    return True


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    return function if isinstance(function, dict) else call


def _dicts(value: Any) -> Iterable[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _squeezed(text: str) -> str:
    return "".join(text.split())
