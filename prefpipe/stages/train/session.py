"""Rank 0 alone holds the run directory; what it reads there, every rank of a training run must know."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from prefpipe.runs.store import Run
from prefpipe.stages.train.parallel import World

T = TypeVar("T")


class Paused(Exception):
    """The run came to the step where it is to pause: its checkpoint is saved, and the same command goes on from it."""


@dataclass(frozen=True)
class Session:
    """The processes of a run, and its directory: `output` is None on every rank but 0, and where nothing is written.
    After `until` steps the run pauses; 0 is never."""

    world: World
    output: Run | None
    until: int = 0

    def lead(self, work: Callable[[Run], T]) -> T | None:
        """What `work` returns on rank 0, on every rank; None where nothing is written. No rank goes on before rank 0 is
        done. A collective call: every rank makes it, or those that do wait for ever."""
        return self.world.tell(None if self.output is None else work(self.output))
