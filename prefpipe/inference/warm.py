"""An engine that outlives a step: the next step of the same process takes it, instead of a new one, if it is the same.

    with warm.shelf() as shelf:
        shelf.keep = True  # evaluate leaves its engine open
        ...
        shelf.keep = False  # generate takes it, and frees it when the last completion is there
        ...

Without a shelf every step starts and frees an engine of its own. What a step writes is the same either way.
"""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from prefpipe import engines, log
from prefpipe.engines.base import Engine, EngineSettings

_shelves: list["Shelf"] = []


@dataclass
class Shelf:
    """An engine that a step has left open, with what it was asked for. `keep`: whether the running step leaves its
    engine."""

    keep: bool = False
    asked: list[Any] = field(default_factory=list[Any])
    engine: Engine | None = None
    closing: ExitStack = field(default_factory=ExitStack)

    def take(self, asked: list[Any], stack: ExitStack) -> Engine | None:
        """The engine that is open, if it is what is asked for: it closes with `stack` from now on. Any other closes
        now."""
        engine = self.engine if self.asked == asked else None
        if engine is None:
            self.closing.close()
        stack.push(self.closing.pop_all())
        self.engine = None
        return engine


@contextmanager
def shelf() -> Generator[Shelf]:
    """A place for an engine between the steps that run inside the `with` block; at its end the engine closes."""
    made = Shelf()
    _shelves.append(made)
    try:
        yield made
    finally:
        _shelves.remove(made)
        made.closing.close()


@contextmanager
def engine(name: str, settings: EngineSettings) -> Generator[Engine]:
    """The engine on the shelf, if it is the same; else a new one. The start of one is said: it takes a while."""
    place = _shelves[-1] if _shelves else None
    asked = [
        name,
        dict(settings.chat.digests),
        *(getattr(settings, f.name) for f in fields(settings) if f.name != "chat"),
    ]
    with ExitStack() as stack:
        running = place.take(asked, stack) if place else None
        if running is None:
            log.info(f"starting engine {name} ({settings.policy.directory.name}, {settings.dtype})")
            running = stack.enter_context(engines.load(name, settings))
        else:
            log.info(f"engine {name} is running already, with the same policy and settings")
        yield running
        if place and place.keep:
            place.asked, place.engine, place.closing = asked, running, stack.pop_all()


def has_shelf() -> bool:
    """Whether an engine of this process goes on from step to step."""
    return bool(_shelves)
