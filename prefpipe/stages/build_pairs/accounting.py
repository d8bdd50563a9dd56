"""What came in, what went out, what was dropped and why: in = out + sum of reasons, on every level."""

from collections.abc import Mapping
from dataclasses import dataclass

from prefpipe.errors import PrefpipeError


@dataclass(frozen=True)
class Level:
    """Rows of one kind (completions, prompts, pairs, labels, groups): their number before, after, and by reason."""

    came_in: int
    went_out: int
    dropped: Mapping[str, int]

    def to_json(self) -> dict[str, object]:
        """As it stands in the manifest."""
        return {"in": self.came_in, "out": self.went_out, "dropped": dict(sorted(self.dropped.items()))}


def check(levels: Mapping[str, Level], ledger_rows: int) -> None:
    """Raise when a row is lost on the way, or when the ledger has other rows than the counts say."""
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
