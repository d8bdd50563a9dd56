"""Settings of runs by dotted name: those that differ from their defaults, and those that differ between runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from prefpipe.config.base import dump


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as a flat mapping of dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def changed(cls: type[BaseModel], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that differ from the defaults of their class."""
    defaults = flat(dump(cls()))
    return {name: value for name, value in flat(settings).items() if name not in defaults or defaults[name] != value}


def differing(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The settings that differ between runs: the value in each run, None where a run has no such setting."""
    every = [flat(settings) for settings in runs]
    names = dict.fromkeys(name for settings in every for name in settings)
    values = {name: [settings.get(name) for settings in every] for name in names}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}
