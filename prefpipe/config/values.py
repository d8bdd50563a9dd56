"""Values as people write them, before a config takes them: dotted names, `~` in a path, true in place of a number."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prefpipe.config import secrets
from prefpipe.errors import UsageError


def put(values: dict[str, Any], name: str, value: object) -> None:
    """Set a setting in nested tables by its dotted name. Raises UsageError where one of these tables is a plain
    value."""
    *tables, leaf = name.split(".")
    for table in tables:
        inner = values.setdefault(table, {})
        if not isinstance(inner, dict):
            raise UsageError(
                f"{table} = {secrets.masked(inner)!r} is not a table", f"write its settings under [{table}]"
            )
        values = inner
    values[leaf] = value


def expand_home(values: dict[str, Any], names: Iterable[str]) -> None:
    """Replace the `~` at the start of these settings, by dotted name, by the home directory. No shell does this in a
    recipe or in `--model=~/m`."""
    for name in names:
        *tables, leaf = name.split(".")
        table: Any = values
        for part in tables:
            table = table.get(part) if isinstance(table, dict) else None
        if isinstance(table, dict) and leaf in table:
            table[leaf] = expanded(table[leaf])


def expanded(value: Any) -> Any:
    """A text, or each text of a list, with the home directory in place of a first `~`; any other value unchanged."""
    if isinstance(value, list | tuple):
        return [expanded(entry) for entry in value]
    return os.path.expanduser(value) if isinstance(value, str) else value  # noqa: PTH111  (a Path would change hf://)


def booleans_for_numbers(written: Any, read: Any, name: str = "") -> Iterator[str]:
    """The dotted names of values that were written as true or false and read as numbers: pydantic takes true for 1."""
    if isinstance(written, bool):
        if not isinstance(read, bool) and isinstance(read, int | float):
            yield name
    elif isinstance(written, Mapping):
        for key, value in written.items():
            inner = read.get(key) if isinstance(read, Mapping) else getattr(read, key, None)
            yield from booleans_for_numbers(value, inner, f"{name}.{key}" if name else key)
    elif isinstance(written, list | tuple) and isinstance(read, list | tuple):
        for place, (value, inner) in enumerate(zip(written, read, strict=False)):
            yield from booleans_for_numbers(value, inner, f"{name}.{place}")
