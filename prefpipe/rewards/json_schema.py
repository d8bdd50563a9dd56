"""A reward for JSON that a schema accepts."""

import json
from pathlib import Path
from typing import Any, NoReturn

import jsonschema
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from prefpipe import reading
from prefpipe.config.rewards import JsonSchema
from prefpipe.errors import MissingInputError, UsageError
from prefpipe.rewards.base import Answer, RewardFunction, Scored, one_by_one

VERSION = 1  # raise it when the reward can change: a run never mixes two versions
_FENCE = "```"


def inputs(settings: JsonSchema) -> dict[str, str]:
    """The digest of the schema."""
    return {"schema": reading.file_digest(_file(settings))} if settings.schema_file else {}


def json_schema(settings: JsonSchema) -> RewardFunction:
    """1 for JSON that the schema accepts, 0 otherwise. The JSON is the whole text, or the only fenced block in it.

    Status wrong comes with the first place that the schema refuses; unparsable is text that is no JSON. References in
    the schema are never fetched. A `pattern` of the schema has no time limit: the schema is trusted.
    """
    validator = _validator(settings)

    def rate(answer: Answer) -> Scored:
        try:
            value = json.loads(_payload(answer.text), parse_constant=_refuse, object_pairs_hook=reading.unique_keys)
        except (ValueError, RecursionError) as error:
            return Scored(0.0, "unparsable", f"no JSON: {error}")
        try:
            problem = next(iter(validator.iter_errors(value)), None)
        except RecursionError:
            return Scored(0.0, "wrong", "nested too deeply")
        if problem is None:
            return Scored(1.0)
        return Scored(0.0, "wrong", f"{problem.json_path}: {problem.message[:200]}")

    return one_by_one(rate)


def _file(settings: JsonSchema) -> Path:
    path = Path(settings.schema_file)
    if not path.is_file():
        raise MissingInputError(f"schema_file {path} does not exist", "give the path of a JSON Schema")
    return path


def _validator(settings: JsonSchema) -> Validator:
    schema: Any = True
    if settings.schema_file:
        path = _file(settings)
        try:
            schema = reading.read_json(path)
        except json.JSONDecodeError as error:
            raise UsageError(f"schema_file {path} is not JSON: {error}", "fix the file") from error
    chosen = validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        chosen.check_schema(schema)
        validator = chosen(schema, registry=Registry())
        next(iter(validator.iter_errors({})), None)  # finds a dangling reference at the top of the schema
    except (jsonschema.SchemaError, Unresolvable) as error:
        what = error.message if isinstance(error, jsonschema.SchemaError) else f"{error}: references are not fetched"
        raise UsageError(f"schema_file {settings.schema_file} is no JSON Schema: {what}", "fix the schema") from error
    return validator


def _payload(text: str) -> str:
    """The only fenced block of the text, or the whole text."""
    parts = text.split(_FENCE)
    if len(parts) != 3:  # text, the block, text
        return text
    language, _, block = parts[1].partition("\n")
    return block if language.strip().isalpha() or not language.strip() else parts[1]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")
