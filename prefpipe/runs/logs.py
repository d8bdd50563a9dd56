"""Logs of JSON lines, metrics.jsonl and timing.jsonl, for people to look at: whole, or their end. A line that was torn,
and one that is no object, is left out."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prefpipe import reading
from prefpipe.errors import PrefpipeError

_MOST = 1 << 30  # bytes
_TAIL = 1 << 16  # bytes: some twenty lines of metrics.jsonl


def lines(path: Path) -> Sequence[dict[str, Any]]:
    """Every object of a log; none when there is no such file."""
    try:
        return _objects(reading.read_bytes(path, _MOST).splitlines())
    except PrefpipeError:
        return []


def tail(path: Path) -> Sequence[dict[str, Any]]:
    """The last objects of a log, some twenty, whatever its size. Raises StorageError where it cannot be read."""
    if not reading.is_there(path):
        return []
    with reading.opened(path) as file, reading.reading(path):
        file.seek(max(0, path.stat().st_size - _TAIL))
        return _objects(file.read().splitlines())


def _objects(found: Iterable[bytes]) -> list[dict[str, Any]]:
    return [value for line in found if isinstance(value := _parsed(line), dict)]


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
