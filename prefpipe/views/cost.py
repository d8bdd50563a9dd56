"""The cost of a run: seconds, peak memory and pace, from the newest lines of its timing.jsonl."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefpipe.runs import logs

_UNITS = ((3600.0, "h"), (60.0, "min"))
_NONE = "-"


@dataclass(frozen=True)
class Cost:
    """The cost of the last process of a run in words; "-" for a number that it did not record."""

    time: str
    memory: str
    gpu_memory: str
    pace: str

    def __str__(self) -> str:
        """The cost in one line."""
        parts = ((self.time, ""), (self.pace, ""), (self.memory, " of memory"), (self.gpu_memory, " of GPU memory"))
        return ", ".join(words + what for words, what in parts if words != _NONE)


def of(run_dir: Path) -> Cost | None:
    """The cost of a run; None where the run recorded none."""
    lines = logs.tail(run_dir / "timing.jsonl")
    if not lines:
        return None
    last = lines[-1]
    return Cost(_duration(last.get("seconds")), _gib(last, "memory"), _gib(last, "gpu_memory"), _pace(last))


def _duration(seconds: object) -> str:
    if not isinstance(seconds, int | float):
        return _NONE
    length, unit = next(((length, unit) for length, unit in _UNITS if seconds >= length), (1.0, "s"))
    return f"{seconds / length:.1f} {unit}"


def _gib(line: Mapping[str, Any], kind: str) -> str:
    value = line.get(f"peak_{kind}_gib")
    return f"{value:.2f} GiB" if isinstance(value, int | float) else _NONE


def _pace(line: Mapping[str, Any]) -> str:
    rate, tokens, seconds = (line.get(name) for name in ("tokens_unique_per_second", "tokens", "seconds"))
    if rate is None and isinstance(tokens, int) and isinstance(seconds, int | float) and seconds:
        rate = tokens / seconds
    return f"{rate:,.0f} tokens/s" if isinstance(rate, int | float) else _NONE
