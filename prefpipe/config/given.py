"""Values as people write them, before a config takes them: dotted names, `~` in a path, true where a number belongs."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prefpipe.config import secrets
from prefpipe.errors import UsageError


def put(values: dict[str, Any], name: str, value: object) -> None:
    """Write the value of a setting by its dotted name. Raises UsageError where a table of that name is a value."""
    *tables, leaf = name.split(".")
    for table in tables:
        inner = values.setdefault(table, {})
        if not isinstance(inner, dict):
            raise UsageError(
                f"{table} = {secrets.masked(inner)!r} is not a table", f"write its settings under [{table}]"
            )
        values = inner
    values[leaf] = value


def with_home(values: dict[str, Any], names: Iterable[str]) -> None:
    """Write the home directory in place of the `~` at the start of these settings, by dotted name: no shell has read a
    recipe, nor `--model=~/m`."""
    for name in names:
        *tables, leaf = name.split(".")
        table: Any = values
        for part in tables:
            table = table.get(part) if isinstance(table, dict) else None
        if isinstance(table, dict) and leaf in table:
            table[leaf] = expanded(table[leaf])


def expanded(value: Any) -> Any:
    """A text, or those of a list, with the home directory in place of its `~`; anything else as it is."""
    if isinstance(value, list | tuple):
        return [expanded(entry) for entry in value]
    return os.path.expanduser(value) if isinstance(value, str) else value  # noqa: PTH111  (a Path would change hf://)


def truths_for_numbers(given: Any, read: Any, name: str = "") -> Iterator[str]:
    """The dotted names of values that were `given` as true or false and `read` as numbers: pydantic takes true for 1,
    as Python does."""
    if isinstance(given, bool):
        if not isinstance(read, bool) and isinstance(read, int | float):
            yield name
    elif isinstance(given, Mapping):
        for key, value in given.items():
            inner = read.get(key) if isinstance(read, Mapping) else getattr(read, key, None)
            yield from truths_for_numbers(value, inner, f"{name}.{key}" if name else key)
    elif isinstance(given, list | tuple) and isinstance(read, list | tuple):
        for place, (value, inner) in enumerate(zip(given, read, strict=False)):
            yield from truths_for_numbers(value, inner, f"{name}.{place}")
