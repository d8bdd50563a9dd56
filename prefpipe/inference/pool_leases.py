"""Which worker has which shards, and which shards no worker has."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from prefpipe.inference.inflight import Inflight
from prefpipe.inference.works import Lease, Work


@dataclass
class Worker:
    """A worker as the driver knows it. `batch`: it has been sent shards since it was last drained; `untaken`: one of
    them is not begun."""

    since: float
    up: bool = False
    ready: bool = False
    batch: bool = False
    untaken: bool = False
    drains: bool = False
    engine_died: bool = False
    leases: dict[int, Lease[Any]] = field(default_factory=dict[int, Lease[Any]])
    inside: dict[str, None] = field(default_factory=dict[str, None])
    advanced: float = 0.0  # of shards that are not whole


@dataclass
class Queue:
    """Shards that no worker has: those that came back, then those that nobody read yet."""

    again: deque[Lease[Any]]
    shards: Iterator[tuple[int, Any]]
    inflight: Inflight
    ended: bool = False

    def take(self, *, alone: bool) -> Lease[Any] | None:
        """The next shard; `alone`: its worker has no other, so that it may have suspects."""
        found = next((lease for lease in self.again if alone or not lease.suspects), None)
        if found is not None:
            self.again.remove(found)
        elif not self.ended:
            shard = next(self.shards, None)
            self.ended = shard is None
            found = None if shard is None else Lease(*shard)
        return found and replace(found, killers=tuple(self.inflight.killers))

    def __bool__(self) -> bool:
        return bool(self.again) or not self.ended


def suspected(lease: Lease[Any], work: Work, inflight: Inflight) -> Lease[Any]:
    """The lease with those of its keys that are under suspicion now."""
    return replace(lease, suspects=frozenset(inflight.suspects).intersection(work.keys(lease)))
