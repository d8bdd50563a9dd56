"""JSON that a schema accepts: what is JSON, where it fails, and schemas that are none."""

import json
from pathlib import Path

import pytest

from prefpipe.config.rewards import JsonSchema
from prefpipe.errors import MissingInputError, UsageError
from prefpipe.rewards.base import Answer, RewardFunction, Scored
from prefpipe.rewards.json_schema import inputs, json_schema
from prefpipe.schemas import Message

SCHEMA = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer", "minimum": 0}}}


def rate(reward: RewardFunction, text: str) -> Scored:
    (scored,) = reward([Answer([Message(role="user", content="?")], text, None)])
    return scored


@pytest.fixture
def settings(tmp_path: Path) -> JsonSchema:
    path = tmp_path / "person.json"
    path.write_text(json.dumps(SCHEMA))
    return JsonSchema(schema_file=str(path))


@pytest.mark.parametrize(
    ("text", "reward", "status", "words"),
    [
        ('{"age": 3}', 1.0, "ok", None),
        ('Here:\n```json\n{"age": 3}\n```\nDone.', 1.0, "ok", None),
        ('```\n{"age": 3}\n```', 1.0, "ok", None),
        ('{"age": -3}', 0.0, "wrong", "$.age: -3 is less than the minimum of 0"),
        ("{}", 0.0, "wrong", "'age' is a required property"),
        ("[]", 0.0, "wrong", "is not of type 'object'"),
        ('Sure: {"age": 3}', 0.0, "unparsable", "no JSON"),
        ('{"age": 3, "age": 4}', 0.0, "unparsable", "twice"),
        ('{"age": NaN}', 0.0, "unparsable", "NaN is no JSON number"),
        ("[" * 100_000, 0.0, "unparsable", "no JSON"),
        ("", 0.0, "unparsable", "no JSON"),
    ],
)
def test_json_by_a_schema(settings: JsonSchema, text: str, reward: float, status: str, words: str | None) -> None:
    scored = rate(json_schema(settings), text)
    assert (scored.reward, scored.status) == (reward, status)
    assert words is None or words in (scored.detail or "")


def test_without_a_schema_any_json_is_right() -> None:
    assert rate(json_schema(JsonSchema()), "[1, null]") == Scored(1.0)
    assert rate(json_schema(JsonSchema()), "[1, null").status == "unparsable"
    assert inputs(JsonSchema()) == {}


def test_another_schema_is_another_reward(settings: JsonSchema) -> None:
    before = inputs(settings)
    Path(settings.schema_file).write_text("true")
    assert inputs(settings) != before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ('{"type": "nothing"}', "is no JSON Schema"),
        ('{"$ref": "http://127.0.0.1:9/x"}', "not fetched"),
    ],
)
def test_a_schema_that_is_none(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=words):
        json_schema(JsonSchema(schema_file=str(path)))


def test_a_schema_that_is_not_there(tmp_path: Path) -> None:
    for reads in (json_schema, inputs):
        with pytest.raises(MissingInputError, match="does not exist"):
            reads(JsonSchema(schema_file=str(tmp_path / "no.json")))
