"""Messages in the form of each template, and text that a template leaves out."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest

from prefpipe.errors import DataError, RowFault
from prefpipe.models import template, turns
from prefpipe.models.turns import Shape
from prefpipe.schemas import Message

TEXT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
PARTS = (
    "{% for m in messages %}{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endfor %}"
)
CALLS = TEXT.replace("{% endfor %}", "{% for c in m.tool_calls %}{{ c.function.name }}ARGS{% endfor %}{% endfor %}")
AS_OBJECT, AS_TEXT = "{{ c.function.arguments | tojson }}", "{{ '(' + c.function.arguments + ')' }}"


def call(arguments: Any) -> Message:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]
    return Message(role="assistant", content="", extra=json.dumps({"tool_calls": calls}))


def renderer(text: str) -> Callable[[Sequence[Any]], str]:
    return partial(template.render, text, "today", tokens={}, add_generation_prompt=False)


@pytest.mark.parametrize(("text", "shape"), [
    (TEXT, Shape()), (PARTS, Shape(in_parts=True)), (CALLS.replace("ARGS", AS_OBJECT), Shape()),
    (CALLS.replace("ARGS", AS_TEXT), Shape(arguments_as_text=True)),
    (TEXT + "{# m.thinking #}", Shape(reasoning="thinking")), (template.PLAIN, Shape()),
])  # fmt: skip
def test_the_shape_of_a_template(text: str, shape: Shape) -> None:
    assert turns.shape_of(text, renderer(text)) == shape


@pytest.mark.parametrize("given", [{"town": "Lund"}, '{"town": "Lund"}'])
@pytest.mark.parametrize("written", [AS_OBJECT, AS_TEXT])
def test_arguments_reach_the_template_in_its_form(given: Any, written: str) -> None:
    """Files hold objects or, as OpenAI's API gives them, JSON in text. Neither is quoted twice."""
    text = CALLS.replace("ARGS", written)
    shape = turns.shape_of(text, renderer(text))
    assert '{"town": "Lund"}' in renderer(text)(turns.for_template([call(given)], shape))


def test_arguments_that_are_no_json_are_a_fault() -> None:
    with pytest.raises(RowFault, match="no JSON"):
        turns.for_template([call("{town")], Shape())


@pytest.mark.parametrize("name", turns.REASONING)
def test_reasoning_has_the_name_that_the_template_reads(name: str) -> None:
    message = Message(role="assistant", content="Yes", extra=json.dumps({name: "because"}))
    assert turns.for_template([message], Shape(reasoning="thinking")) == [
        {"role": "assistant", "content": "Yes", "thinking": "because"}
    ]


def test_parts_hold_the_text() -> None:
    (turn,) = turns.for_template([Message(role="user", content="Hi")], Shape(in_parts=True))
    assert turn["content"] == [{"type": "text", "text": "Hi"}]


@pytest.mark.parametrize(("rendered", "what"), [
    ("u: Is it?\na: Yes.", None), ("u: Is  it?  a: Yes.", None), ("u: Is it?", (1, "content 'Yes.'")),
    ("a: Yes.", (0, "content 'Is it?'")),
])  # fmt: skip
def test_text_that_is_missing_is_found(rendered: str, what: Any) -> None:
    messages = [Message(role="user", content=" Is it? "), Message(role="assistant", content="Yes.")]
    assert turns.lost(messages, rendered) == what


def test_two_equal_messages_must_both_be_there() -> None:
    messages = [Message(role="user", content="Go on.")] * 2
    assert turns.lost(messages, "u: Go on. u: Go on.") is None
    assert turns.lost(messages, "u: Go on.") == (0, "content 'Go on.'")


def test_a_text_inside_another_does_not_stand_for_it() -> None:
    messages = [Message(role="user", content="No."), Message(role="assistant", content="No. Never.")]
    assert turns.lost(messages, "u: No. a: No. Never.") is None
    assert turns.lost(messages, "a: No. Never.") == (0, "content 'No.'")


def test_text_in_quotes_of_json_is_there() -> None:
    message = Message(role="tool", content='{"a": "b\n"}')
    assert turns.lost([message], json.dumps(message["content"])) is None


def test_calls_reasoning_tools_and_documents_are_looked_for() -> None:
    assert turns.lost([call({})], "weather") is None
    assert turns.lost([call({})], "") == (0, "tool call 'weather'")
    thought = Message(role="assistant", content="", extra='{"thinking": "hm"}')
    assert turns.lost([thought], "") == (0, "thinking 'hm'")
    inputs = {"tools": [{"function": {"name": "weather"}}], "documents": [{"title": "T", "text": "It rains."}]}
    assert turns.lost_input(inputs, "weather It rains.") is None
    assert turns.lost_input(inputs, "It rains.") == "tool 'weather'"
    assert turns.lost_input(inputs, "weather") == "document 'It rains.'"


def test_a_template_that_does_not_write_what_the_user_says_is_refused() -> None:
    with pytest.raises(DataError, match="does not write what the user says"):
        turns.shape_of("{{ 'Hi' }}", renderer("{{ 'Hi' }}"))
    strict = "{{ raise_exception('no') }}"
    assert turns.shape_of(strict, renderer(strict)) == Shape()
