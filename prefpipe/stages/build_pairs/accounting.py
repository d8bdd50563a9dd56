"""Rows that came in, went out and were dropped: in = out + sum of reasons, on every level."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from prefpipe.errors import PrefpipeError


@dataclass(frozen=True)
class Level:
    """Rows of one kind (completions, prompts, pairs, labels, groups): their number before, after, and by reason."""

    came_in: int
    went_out: int
    dropped: Mapping[str, int]

    def to_json(self) -> dict[str, object]:
        """The entry of the manifest."""
        return {"in": self.came_in, "out": self.went_out, "dropped": dict(sorted(self.dropped.items()))}


@dataclass(frozen=True)
class BuildResult:
    """What became of the candidates: counts by level, ledger rows, and the totals of the output for the manifest.

    `facts` has one row per pair and `sample` the texts of some pairs, for the data report; labels and groups leave both
    empty.
    """

    levels: Mapping[str, Level]
    ledger: pl.DataFrame
    totals: Mapping[str, Any]
    facts: pl.DataFrame
    sample: pl.DataFrame


def count_reasons(ledger: pl.DataFrame) -> dict[str, int]:
    """Ledger rows by reason."""
    return dict(ledger.group_by("reason").len().sort("reason").iter_rows())


def check(levels: Mapping[str, Level], ledger_rows: int) -> None:
    """Raise PrefpipeError when a level loses a row without a reason, or when the ledger has other rows than the levels
    count."""
    for name, level in levels.items():
        if level.came_in != level.went_out + sum(level.dropped.values()):
            raise _unbalanced(
                f"{name}: {level.came_in} in, {level.went_out} out, "
                f"{sum(level.dropped.values())} dropped ({dict(level.dropped)})"
            )
    counted = sum(sum(level.dropped.values()) for level in levels.values())
    if counted != ledger_rows:
        raise _unbalanced(f"{counted} dropped rows are counted, {ledger_rows} stand in the ledger")


def _unbalanced(what: str) -> PrefpipeError:
    return PrefpipeError(f"rows do not add up: {what}", "this is a bug: report it with the command")
