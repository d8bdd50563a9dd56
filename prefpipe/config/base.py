"""Settings of commands as frozen pydantic models: defaults < recipe < flags, merged once, every error reported at once.

A config class extends `Config`. The docstring below a field, or the description of its type, is the help text of the
setting. Marks in the annotation of a field say what part the setting has in the fingerprint of a run:

RUNTIME  the setting cannot change results, such as a batch size: no part
PATH     the setting names an input: the content of the input has a part, its path has none
ADDED    the setting is younger than runs that users have: no part while it has its default, so that those runs resume
BESIDE   the setting asks for more about the same answers: no part, and a complete run computes what is missing
FIRST    a list that was a single text in older versions: only its first entry has a part

REMOTE beside PATH says that the input may be an address. A class of many settings marks the first field under each
heading with `Heading`, and lists its headings in HEADINGS, in the order in which `prefpipe config` and --help show
them.
"""

import difflib
import itertools
import json
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from prefpipe import reading
from prefpipe.config import other_names, secrets
from prefpipe.config.values import booleans_for_numbers, expand_home, expanded, put
from prefpipe.errors import UsageError

RUNTIME = "runtime"
PATH = "path"
REMOTE = "remote"
ADDED = "added"
BESIDE = "beside"
FIRST = "first"
COMMAND_LINE = "command line"
_RECIPE_BYTES = 1 << 20


class Config(BaseModel):
    """Base of every config class: fields cannot be assigned, and unknown names and infinite numbers are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


@dataclass(frozen=True)
class Heading:
    """Marks a field as the first one under a heading."""

    text: str


C = TypeVar("C", bound=BaseModel)


def load(cls: type[C], recipe: Path | None, flags: Mapping[str, Any], place: str = COMMAND_LINE) -> C:
    """A config from its defaults, a recipe (TOML, or the JSON that a run saved) and flags; the later of these wins.

    `flags` maps dotted field names to values. `place` names in errors where the flags were written. Raises UsageError
    with every problem at once, and as `read_recipe` does.
    """
    values = read_recipe(recipe) if recipe is not None else {}
    for name, value in flags.items():
        put(values, name, value)
    expand_home(values, [name for name, field in fields(cls) if PATH in field.metadata])
    hint = f"`prefpipe config {command_name(cls)}` prints every setting with its default"
    where = str(recipe) if recipe is not None else place
    try:
        config = cls.model_validate(values)
    except ValidationError as error:
        raise UsageError("; ".join(f"{where}: {line}" for line in explain(cls, error)), hint) from error
    for name in booleans_for_numbers(values, config):
        raise UsageError(f"{where}: {name} = true or false: a number belongs here", hint)
    return _with_local_paths(config)


def local_path(text: str, name: str = "path") -> Path:
    """A path of this machine. Raises UsageError for an empty text, and for an address: Path makes `hf:/x` of `hf://x`."""
    if not text:
        raise UsageError(f"{name} is empty", "give a path; where it is a variable of the shell, that is not set")
    if "://" in text:
        raise UsageError(
            f"{name} = {text} is an address, and a path of this machine is needed",
            "rows to score, to train on and to sample for may be datasets of the hub; download anything else first",
        )
    return Path(expanded(text))


def _with_local_paths(config: C, prefix: str = "") -> C:
    """The same config, after a check that its inputs are on this machine, except those marked REMOTE. Raises as
    `local_path` does."""
    for name, field in fields(type(config)):
        value = _value(config, name)
        for key, table in value.items() if isinstance(value, dict) else ():
            _with_local_paths(table, f"{prefix}{name}.{key}.")
        if PATH in field.metadata and value != field.default:
            for text in (value,) if isinstance(value, str) else value:
                if REMOTE not in field.metadata or not text:
                    local_path(text, f"{prefix}{name}")
    return config


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a TOML recipe, or in the `config.json` of a run directory.

    Raises UsageError for a mistake in the syntax, and as `reading` does for a file that is missing or unreadable.
    """
    try:
        if path.suffix == ".json":
            saved = reading.read_json(path, _RECIPE_BYTES, by_hand=True)
            if not isinstance(saved, dict) or not isinstance(saved.get("config", {}), dict):
                raise UsageError(f"recipe {path} is not a JSON object", "give a .toml recipe or a config.json of a run")
            return saved.get("config", saved)
        return reading.read_toml(path, _RECIPE_BYTES)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"recipe {path}: {error}", "fix the file; recipes are TOML, saved configs JSON") from error


def explain(cls: type[BaseModel], error: ValidationError) -> list[str]:
    """One sentence per problem: the dotted field, what is wrong with which value, and the nearest right name."""
    problems = error.errors()
    parents = {problem["loc"][:-1] for problem in problems}  # a list counts the values that are right only
    return [_sentence(cls, p) for p in problems if p["type"] != "too_short" or p["loc"] not in parents]


def command_name(cls: type[BaseModel]) -> str:
    """`BuildPairsConfig` -> `build-pairs`."""
    words = cls.__name__.removesuffix("Config")
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in words).lstrip("-")


def suggestion(word: str, candidates: list[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no candidate is near."""
    near = difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def dump(config: BaseModel) -> dict[str, Any]:
    """All settings as JSON types. `load` reads them back as the same config."""
    return config.model_dump(mode="json")


def result_fields(config: BaseModel) -> dict[str, Any]:
    """The settings that can change results, by dotted name. They are part of the fingerprint of a run."""
    values: dict[str, Any] = {}
    for name, field in fields(type(config)):
        if RUNTIME in field.metadata or PATH in field.metadata or (BESIDE in field.metadata and "." not in name):
            continue
        value = _value(config, name)
        if FIRST in field.metadata:
            value = value[0] if value else ""
        if ADDED not in field.metadata or value != field.default:
            values[name] = value
    return values


def runtime_fields(cls: type[BaseModel]) -> Iterator[str]:
    """The settings that cannot change results, by dotted name."""
    return (name for name, field in fields(cls) if RUNTIME in field.metadata)


def fields(cls: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Every setting with its dotted name, those of nested tables included, in the order of the headings."""
    return ((name, field) for name, field, _ in fields_under_headings(cls))


def fields_under_headings(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo, str]]:
    """Every setting with its dotted name and the heading that it stands under; "" when its class has none.

    Raises ValueError for a heading that HEADINGS does not list.
    """
    order: tuple[str, ...] = getattr(cls, "HEADINGS", ("",))
    heading, placed = "", list[tuple[int, str, FieldInfo]]()
    for name, field in cls.model_fields.items():
        heading = next((mark.text for mark in field.metadata if isinstance(mark, Heading)), heading)
        placed.append((order.index(heading), name, field))
    for place, name, field in sorted(placed, key=lambda item: item[0]):
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields_under_headings(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field, order[place]


def to_toml(config: BaseModel) -> str:
    """A recipe (TOML) with every setting of a config under its heading: its meaning as a comment, and its value."""
    lines: list[str] = []
    table = shown = ""
    for name, field, heading in sorted(fields_under_headings(type(config)), key=lambda item: item[0].count(".")):
        *path, leaf = name.split(".")
        if ".".join(path) != table:
            table, shown = ".".join(path), ""
            lines.append(f"[{table}]")
        if heading != shown:
            shown = heading
            lines += [f"# ---- {heading} ----", ""]
        description = " ".join((field.description or "").split())
        lines += [
            *(f"# {line}" for line in textwrap.wrap(description, 110)),
            f"{leaf} = {_toml(_value(config, name))}",
            "",
        ]
    return "\n".join(lines)


def json_schema(cls: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a recipe, by which editors complete and check settings."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **cls.model_json_schema()}


def _value(config: BaseModel, name: str) -> Any:
    """The value of a setting by its dotted name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _toml(value: object) -> str:
    if isinstance(value, BaseModel):
        value = dump(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def _sentence(cls: type[BaseModel], problem: Any) -> str:
    location, owner = _place(cls, problem["loc"])
    name = ".".join(location)
    value = "***" if name.endswith("api_key_env") else secrets.masked(problem["input"])
    if problem["type"] == "extra_forbidden":
        leaves = (leaf for leaf, _ in fields(owner) if "." in leaf)
        return f"unknown setting '{name}'{other_names.said(location[-1], [*owner.model_fields, *leaves])}"
    if problem["type"] in ("literal_error", "union_tag_invalid"):
        expected = problem["ctx"]["expected" if problem["type"] == "literal_error" else "expected_tags"]
        if problem["type"] == "union_tag_invalid":
            name, value = f"{name}.kind", secrets.masked(problem["ctx"]["tag"])
        allowed = re.findall(r"'([^']*)'", expected)
        if several := _written_as_one(location, value):
            return several
        return f"{name} = {value!r} is not one of {', '.join(map(repr, allowed))}{suggestion(str(value), allowed)}"
    if problem["type"] == "tuple_type" and isinstance(value, str | int | float):
        return f"{name} = {value!r} is not a list: write {json.dumps([value])}"
    if problem["type"] == "union_tag_not_found":
        return f"{name}: `kind` is missing, which says what it is"
    if not location or isinstance(value, dict | BaseModel):
        return ": ".join([*([name] if name else []), problem["msg"].removeprefix("Value error, ")])
    return _written_as_one(location, value) or f"{name} = {value!r}: {problem['msg'].removeprefix('Value error, ')}"


def _written_as_one(location: Sequence[str], value: object) -> str:
    """The error for several values of a list that are written as one text, `a,b`; empty for any other problem."""
    if not location[-1].isdigit() or not isinstance(value, str) or "," not in value:
        return ""
    name = ".".join(location[:-1])
    values = [part.strip() for part in value.split(",")]
    flags = " ".join(f"--{name.replace('_', '-')} {part}" for part in values)
    return f"{name} = {value!r} is one text: repeat the flag ({flags}), in a recipe write {json.dumps(values)}"


def _place(cls: type[BaseModel], location: Sequence[str | int]) -> tuple[list[str], type[BaseModel]]:
    """The name of a setting as the user writes it, and the class that has the setting.

    `location` is pydantic's. Where a table can be of several kinds, pydantic puts the kind behind the name of the
    table; the user does not write it there.
    """
    written: list[str] = []
    owner = cls
    parts = iter(map(str, location))
    for part in parts:
        written.append(part)
        field = owner.model_fields.get(part)
        if field is None:
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            owner = field.annotation
        elif kinds := _kinds(field.annotation):
            written += itertools.islice(parts, 1)
            kind = next(parts, "")
            owner = kinds.get(kind, owner)
            if kind and kind not in kinds:
                written.append(kind)
    return written, owner


def _kinds(annotation: Any) -> dict[str, type[BaseModel]]:
    """The classes that a field of type `dict[str, A | B]` can hold, by kind; empty for a field of another type."""
    if get_origin(annotation) is not dict:
        return {}
    _, value = get_args(annotation)
    choices = get_args(get_args(value)[0]) if get_origin(value) is Annotated else get_args(value)
    return {c.model_fields["kind"].default: c for c in choices if issubclass(c, BaseModel)}
