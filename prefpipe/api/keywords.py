"""Keyword arguments as settings by dotted name, as the command line has them; paths and functions become names."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, get_origin

from pydantic import BaseModel

from prefpipe import user_functions

# Settings that take functions -> what they are in errors; every other callable is a reward.
_FUNCTIONS = {"loss_type": "loss", "rule": "pair rule"}


def flags(cls: type[BaseModel], given: Mapping[str, Any], *, elsewhere: bool = False) -> dict[str, Any]:
    """The settings of a class by dotted name, with tables in them opened. A list setting takes a single value too.
    `elsewhere`: other processes will look for the functions. Raises UsageError for a function that no run can find."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        annotation = cls.model_fields[name].annotation if name in cls.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and isinstance(value, Mapping):
            inner = flags(annotation, value, elsewhere=elsewhere)
            found |= {f"{name}.{setting}": one for setting, one in inner.items()}
            continue
        single = get_origin(annotation) is tuple and (isinstance(value, str) or not isinstance(value, Sequence))
        found[name] = _plain([value] if single else value, _FUNCTIONS.get(name, "reward"), elsewhere=elsewhere)
    return found


def _plain(value: Any, what: str, *, elsewhere: bool) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {name: _plain(inner, what, elsewhere=elsewhere) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, what, elsewhere=elsewhere) for inner in value]
    return user_functions.name_of(value, what, elsewhere=elsewhere) if callable(value) else value
