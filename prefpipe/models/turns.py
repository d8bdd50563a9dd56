"""A message in the form that a chat template reads (text or content parts, tool calls, reasoning), and a check that the
template writes its text."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefpipe.errors import DataError, RowFault
from prefpipe.schemas import Message

Turn = dict[str, Any]  # a message in the form that a template reads
REASONING = ("reasoning_content", "thinking", "reasoning")  # its names; a template reads one of them
_CONTENT, _ARGUMENT = "\ue0a1", "\ue0a2"  # private characters, which no template contains
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
    """The form that a template reads, from renderings of small conversations; `render` raises RowFault where it refuses
    one.

    Raises DataError for a template that accepts the message of a user and does not write it.
    """
    plain = _rendered(render, [_USER])
    in_parts = not _shows(plain, _CONTENT) and _shows(_rendered(render, [_in_parts(_USER)]), _CONTENT)
    if plain is not None and not in_parts and not _shows(plain, _CONTENT):
        raise DataError("the chat template does not write what the user says", "pass another one with --chat-template")
    user = _in_parts(_USER) if in_parts else _USER
    arguments = {"a": _ARGUMENT}
    as_json = json.dumps(arguments, ensure_ascii=False)
    by_object, by_text = (_shows(_rendered(render, [user, _call(a)]), _ARGUMENT) for a in (arguments, as_json))
    as_text = by_text and not by_object
    reasoning = next((name for name in REASONING if name in template), REASONING[0])
    return Shape(in_parts, as_text, reasoning)


def for_template(messages: Sequence[Message], shape: Shape) -> list[Turn]:
    """The messages in the form that a template reads."""
    return [_turn(message, shape) for message in messages]


def extra_of(message: Message) -> Turn:
    """The keys of a message beside role and content."""
    extra = message.get("extra")
    return json.loads(extra) if extra else {}


def as_dict(message: Message) -> Turn:
    """A message as it stands in a file: role, content, and the keys of `extra` beside them."""
    return {"role": message["role"], "content": message["content"], **extra_of(message)}


def lost(messages: Sequence[Message], rendered: str) -> tuple[int, str] | None:
    """The place of the first message whose text is missing in a rendering, and what is missing; None where nothing is.

    White space may differ, and text may stand as JSON. Content, reasoning, and names of called functions are checked. A
    text that several messages contain must occur as often as in all of them together.
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
    """The name of a tool or the text of a document that a rendering lacks, and its kind; None where it has all."""
    tools = [_function(tool).get("name") for tool in _dicts(inputs.get("tools"))]
    documents = [document.get("text") or document.get("contents") for document in _dicts(inputs.get("documents"))]
    squeezed = _squeezed(rendered)
    for kind, texts in (("tool", tools), ("document", documents)):
        for text in texts:
            if isinstance(text, str) and text.strip() and _squeezed(text) not in squeezed:
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


def _rendered(render: Callable[[Sequence[Turn]], str], turns: Sequence[Turn]) -> str | None:
    """The text of a conversation; None where the template refuses it."""
    try:
        return render(turns)
    except RowFault:
        return None


def _shows(text: str | None, mark: str) -> bool:
    return text is not None and mark in text and "'type'" not in text  # a list of parts as Python prints it is no text


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    return function if isinstance(function, dict) else call


def _dicts(value: Any) -> Iterable[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _squeezed(text: str) -> str:
    return "".join(text.split())
