"""Settings that depend on the machine, as values. A run that goes on keeps those that it began with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from prefpipe import log, machine
from prefpipe.errors import DataError
from prefpipe.runs import saved_config

C = TypeVar("C", bound=BaseModel)
_AUTO = "auto"


def settled(config: C, out: Path | None = None) -> C:
    """The config with a number type for every `dtype = "auto"`, in its tables too. What the run in `out` saved wins: a
    run that began on a machine with bfloat16 goes on with it on one without."""
    saved: Mapping[str, Any] = {}
    if out is not None:
        try:
            saved = (saved_config.read(out / "config.json", force=True) or {}).get("config", {})
        except DataError:  # `open_run` says what is wrong with it
            saved = {}
    settings = _settled(config, saved)
    if settings != config and not saved:
        log.info("dtype = {}: {}".format(*_number_type(config)))
    return settings


def _settled(config: C, saved: Mapping[str, Any]) -> C:
    changes: dict[str, Any] = {}
    for name in type(config).model_fields:
        value, before = getattr(config, name), saved.get(name)
        if isinstance(value, BaseModel):
            changes[name] = _settled(value, before if isinstance(before, dict) else {})
        elif isinstance(value, dict):  # tables by name, such as those of rewards
            there: Mapping[str, Any] = before if isinstance(before, dict) else {}
            changes[name] = {
                key: _settled(table, there[key] if isinstance(there.get(key), dict) else {})
                if isinstance(table, BaseModel)
                else table
                for key, table in value.items()
            }
        elif name == "dtype" and value == _AUTO:
            changes[name] = before if isinstance(before, str) else _number_type(config)[0]
    return config.model_copy(update=changes) if changes else config


def _number_type(config: BaseModel) -> tuple[str, str]:
    """The number type for a command, and why. This machine says nothing about one behind a URL."""
    if getattr(config, "engine", None) == "server":
        return "bfloat16", "servers are taken to compute in it; set dtype if yours do not"
    return machine.number_type()
