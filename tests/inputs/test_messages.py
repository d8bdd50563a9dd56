"""Fields of foreign files as messages: every key is kept, or the row is a fault."""

import json
from typing import Any

import pytest

from prefpipe.errors import RowFault
from prefpipe.inputs import messages

CALLS = [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize(("value", "content", "extra"), [
    ({"role": "user", "content": "a"}, "a", None),
    ({"role": "user", "content": 3}, "3", None),
    ({"role": "user", "content": "a", "name": None, "tool_calls": []}, "a", None),
    ({"role": "assistant", "content": None, "tool_calls": CALLS}, "", {"tool_calls": CALLS}),
    ({"role": "assistant", "content": "a", "reasoning_content": "b", "weight": 0}, "a",
     {"reasoning_content": "b", "weight": 0}),
    ({"role": "user", "content": [{"type": "text", "text": "a"}, "b", {"text": "c"}]}, "abc", None),
    ({"from": "human", "value": "a"}, "a", None),
    ({"from": "observation", "value": "a", "name": "f"}, "a", {"name": "f"}),
    ({"from": "function_call", "value": '{"name": "f"}'}, "",
     {"tool_calls": [{"type": "function", "function": {"name": "f"}}]}),
])  # fmt: skip
def test_a_message_keeps_its_keys(value: Any, content: str, extra: Any) -> None:
    (found,) = messages.messages([value], "x", "user")
    assert found["content"] == content
    assert (json.loads(found["extra"]) if "extra" in found else None) == extra


@pytest.mark.parametrize(("speaker", "role"), [
    ("human", "user"), ("gpt", "assistant"), ("system", "system"), ("observation", "tool"), ("user", "user"),
])  # fmt: skip
def test_roles_of_sharegpt(speaker: str, role: str) -> None:
    assert messages.messages([{"from": speaker, "value": "a"}], "x", "user")[0]["role"] == role


@pytest.mark.parametrize(("value", "reason"), [
    (None, "null"), (True, "bad_content"), ([None], "bad_content"), ([{"content": "a"}], "bad_content"),
    ([{"role": "user", "content": None}], "null"), ([{"role": "user", "content": {"a": 1}}], "bad_content"),
    ([{"role": "user", "content": [{"type": "image", "url": "a"}]}], "not_carried"),
    ([{"role": "user", "content": [{"type": "text", "text": None}]}], "null"),
    ([{"from": "function_call", "value": "f()"}], "bad_tool_call"),
    ([{"from": "function_call", "value": "[]"}], "bad_tool_call"),
    ([{"from": ["human"], "value": "a"}], "bad_content"), ([{"from": {}, "value": "a"}], "bad_content"),
])  # fmt: skip
def test_what_is_no_message_is_a_fault(value: Any, reason: str) -> None:
    with pytest.raises(RowFault) as fault:
        messages.messages(value, "x", "user")
    assert fault.value.reason == reason


def test_a_transcript_ends_where_the_assistant_is_to_answer() -> None:
    turns = messages.messages("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "x", "user")
    assert [(t["role"], t["content"]) for t in turns] == [("user", "a"), ("assistant", "b"), ("user", "c")]


@pytest.mark.parametrize(("row", "inputs"), [
    ({}, None), ({"tools": [], "documents": None, "chat_template_kwargs": {}}, None), ({"tools": "[]"}, None),
    ({"tools": CALLS}, {"tools": CALLS}), ({"tools": json.dumps(CALLS)}, {"tools": CALLS}),
    ({"chat_template_kwargs": {"a": False}}, {"chat_template_kwargs": {"a": False}}),
])  # fmt: skip
def test_inputs_of_the_template(row: Any, inputs: Any) -> None:
    found = messages.template_inputs(row)
    assert (json.loads(found) if found else None) == inputs


@pytest.mark.parametrize("row", [{"a": "\ud800"}, {"a": [{"b": "\ud800"}]}])
def test_half_a_character_anywhere_is_a_fault(row: Any) -> None:
    with pytest.raises(RowFault, match="field 'a' holds half a character"):
        messages.check_carried(row)


def test_lists_too_deep_are_a_fault() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RowFault, match="too deep"):
        messages.check_carried({"a": deep})
