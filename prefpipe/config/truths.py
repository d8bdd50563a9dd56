"""Truth values where a number belongs: pydantic takes true for 1, as Python does."""

from collections.abc import Iterator, Mapping
from typing import Any


def for_numbers(given: Any, read: Any, name: str = "") -> Iterator[str]:
    """The dotted names of values that were `given` as true or false and `read` as numbers."""
    if isinstance(given, bool):
        if not isinstance(read, bool) and isinstance(read, int | float):
            yield name
    elif isinstance(given, Mapping):
        for key, value in given.items():
            inner = read.get(key) if isinstance(read, Mapping) else getattr(read, key, None)
            yield from for_numbers(value, inner, f"{name}.{key}" if name else key)
    elif isinstance(given, list | tuple) and isinstance(read, list | tuple):
        for place, (value, inner) in enumerate(zip(given, read, strict=False)):
            yield from for_numbers(value, inner, f"{name}.{place}")
