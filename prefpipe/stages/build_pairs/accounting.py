"""Counts of rows: on every level, rows in = rows out + rows dropped by reason."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from prefpipe.errors import PrefpipeError


@dataclass(frozen=True)
class Level:
    """Counts of one kind of rows (completions, prompts, pairs, labels, groups): before, after, dropped by reason."""

    came_in: int
    went_out: int
    dropped: Mapping[str, int]

    def to_json(self) -> dict[str, object]:
        """The counts as an entry of the manifest."""
        return {"in": self.came_in, "out": self.went_out, "dropped": dict(sorted(self.dropped.items()))}


@dataclass(frozen=True)
class BuildResult:
    """The result of building pairs, labels or groups: counts by level, ledger rows, and totals for the manifest.

    `facts` has one row per pair and `sample` the texts of some pairs, for the data report; both are empty for labels
    and groups.
    """

    levels: Mapping[str, Level]
    ledger: pl.DataFrame
    totals: Mapping[str, Any]
    facts: pl.DataFrame
    sample: pl.DataFrame


def count_reasons(ledger: pl.DataFrame) -> dict[str, int]:
    """The number of ledger rows by reason."""
    return dict(ledger.group_by("reason").len().sort("reason").iter_rows())


def check(levels: Mapping[str, Level], ledger_rows: int) -> None:
    """Raise PrefpipeError when a level lost a row without a reason, or the ledger does not have the rows that levels
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
