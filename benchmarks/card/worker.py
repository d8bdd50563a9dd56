"""Run checks one after the other in this process, and tell the events."""

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from card.record import Fact, Figure

Event = dict[str, Any]
Found = Iterator[Figure | Fact]


class NotAtHand(Exception):
    """What a check needs is not on this machine: it is left out, which is no failure."""


@dataclass(frozen=True)
class Check:
    """A check: its name, the seconds that it may take, those that it needs at least, and what it does."""

    name: str
    limit: float
    needs: float
    work: Callable[[Any], Found]


def run(
    checks: Sequence[Check],
    bench: Any,
    tell: Callable[[Event], None],
    until: float,
    clock: Callable[[], float] = time.time,
) -> None:
    """Run checks until the moment `until` of the clock. One that does not fit in the time left is left out; one that
    fails or passes its limit keeps the figures before that, and the next one follows, without the model that it left
    halfway. Raises SystemExit where the card answers no more, after the event: a new process may go on."""
    for check in checks:
        left = until - clock()
        if left < check.needs:
            why = f"{max(0.0, left):.0f} s are left before the deadline, it needs {check.needs:.0f}"
            tell({"check": check.name, "kind": "end", "state": "left out", "why": why})
            continue
        start = clock()
        tell({"check": check.name, "kind": "start", "state": "running"})
        state, why = _outcome(check, bench, tell, lambda since=start: clock() - since, min(check.limit, left))
        healthy = _released(bench, whole=state == "done")
        if not healthy:
            state, why = "failed", why or "the card answers no more"
        tell({"check": check.name, "kind": "end", "state": state, "why": why, "seconds": clock() - start})
        if not healthy:
            raise SystemExit(1)


def _outcome(
    check: Check, bench: Any, tell: Callable[[Event], None], spent: Callable[[], float], limit: float
) -> tuple[str, str]:
    try:
        for found in check.work(bench):
            if isinstance(found, Fact):
                tell({"check": check.name, "kind": "fact", "name": found.name, "text": found.text})
            else:
                tell({"check": check.name, "kind": "figure", "figure": asdict(found)})
            if spent() > limit:
                return "cut", f"its {limit:.0f} s are over: what would follow is left out"
    except NotAtHand as missing:
        return "left out", str(missing)
    except Exception as error:  # whatever a kernel or a library raises: the other checks go on
        traceback.print_exc()
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        return "failed", f"{type(error).__name__}: {first[:300]}"
    return "done", ""


def _released(bench: Any, *, whole: bool) -> bool:
    """Free what the check left on the card, but for the model of one that is whole. Whether the card still answers."""
    try:
        bench.release() if whole else bench.drop()
    except RuntimeError:
        traceback.print_exc()
        return False
    return True
