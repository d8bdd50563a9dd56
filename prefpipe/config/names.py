"""Settings that name one of ours or a function of the user's, `module:function`, which is imported when it is used."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

_FUNCTION = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


@dataclass(frozen=True)
class Names:
    """Marks a setting with the names that it may have beside those of functions."""

    known: tuple[str, ...]


def is_function(name: str) -> bool:
    """Whether a name is one of a user's function."""
    return re.match(_FUNCTION, name) is not None


def known(marks: Iterable[object]) -> tuple[str, ...]:
    """The names that the marks of a setting (its metadata) list; none for a setting of another kind."""
    return next((mark.known for mark in marks if isinstance(mark, Names)), ())


def name_or_function(known: Sequence[str]) -> Any:
    """The type of a setting: one of these names, or `module:function`. Any other is an error as of a Literal."""
    schema = {"anyOf": [{"enum": list(known)}, {"type": "string", "pattern": _FUNCTION}]}
    return Annotated[str, Names(tuple(known)), AfterValidator(partial(_check, known)), WithJsonSchema(schema)]


def _check(known: Sequence[str], name: str) -> str:
    if name in known or is_function(name):
        return name
    expected = ", ".join(map(repr, [*known, "module:function"]))
    raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
