"""The type of a setting that takes a known name, or `module:function`, which is imported when it is used."""

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
    """Metadata of a setting: the names that it accepts beside `module:function`."""

    known: tuple[str, ...]


def is_function(name: str) -> bool:
    """Whether a text is written `module:function`."""
    return re.match(_FUNCTION, name) is not None


def known(marks: Iterable[object]) -> tuple[str, ...]:
    """The names in the `Names` mark among the metadata of a setting; empty for a setting without this mark."""
    return next((mark.known for mark in marks if isinstance(mark, Names)), ())


def name_or_function(known: Sequence[str]) -> Any:
    """The type of a setting that takes a name in `known` or `module:function`. It refuses other texts as a Literal
    does."""
    schema = {"anyOf": [{"enum": list(known)}, {"type": "string", "pattern": _FUNCTION}]}
    return Annotated[str, Names(tuple(known)), AfterValidator(partial(_check, known)), WithJsonSchema(schema)]


def _check(known: Sequence[str], name: str) -> str:
    if name in known or is_function(name):
        return name
    expected = ", ".join(map(repr, [*known, "module:function"]))
    raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
