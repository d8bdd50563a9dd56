"""An engine that outlives a step: the next step of the same process goes on with it, if it asks for the same model and
settings. Another adapter of the model is taken by the engine that runs (`Engine.take`).

    with warm.shelf(lora_rank=16) as shelf:
        shelf.keep = True  # evaluate leaves its engine open
        ...
        shelf.keep = False  # generate takes it, and frees it when the last completion is there
        ...

Without a shelf every step starts and frees an engine of its own. What a step writes is the same either way.
"""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

from prefpipe import engines, log
from prefpipe.engines.base import Engine, EngineSettings
from prefpipe.models.policy import Policy

_shelves: list["Shelf"] = []


@dataclass
class Shelf:
    """An engine that a step has left open, with what it was asked for and its policy. `keep`: whether the running step
    leaves its engine; `lora_rank`: of the adapters that later steps bring (`EngineSettings`)."""

    keep: bool = False
    lora_rank: int = 0
    asked: list[Any] = field(default_factory=list[Any])
    policy: Policy | None = None
    engine: Engine | None = None
    closing: ExitStack = field(default_factory=ExitStack)

    def take(self, asked: list[Any], policy: Policy, stack: ExitStack) -> Engine | None:
        """The engine that is open, if it is what is asked for: it closes with `stack` from now on. Any other closes
        now."""
        engine, self.engine = self.engine, None
        closing = stack.enter_context(self.closing.pop_all())
        if engine is not None and asked == self.asked and (policy == self.policy or engine.take(policy)):
            return engine
        closing.close()
        return None

    def put(self, engine: Engine, asked: list[Any], policy: Policy, stack: ExitStack) -> None:
        """Leave an engine open, with all that `stack` would close."""
        self.asked, self.policy, self.engine, self.closing = asked, policy, engine, stack.pop_all()


@contextmanager
def shelf(lora_rank: int = 0) -> Generator[Shelf]:
    """A place for an engine between the steps that run inside the `with` block; at its end the engine closes."""
    made = Shelf(lora_rank=lora_rank)
    _shelves.append(made)
    try:
        yield made
    finally:
        _shelves.remove(made)
        made.closing.close()


@contextmanager
def engine(name: str, settings: EngineSettings) -> Generator[Engine]:
    """The engine on the shelf, if it serves; else a new one. The start of one is said: it takes a while."""
    place = _shelves[-1] if _shelves else None
    policy = settings.policy
    asked = [
        *(name, policy.directory, policy.weights, dict(settings.chat.digests)),
        *(getattr(settings, f.name) for f in fields(settings) if f.name not in ("chat", "policy")),
    ]
    with ExitStack() as stack:
        running = place.take(asked, policy, stack) if place else None
        if running is None:
            log.info(f"starting engine {name} ({policy.directory.name}, {settings.dtype})")
            wanted = replace(settings, lora_rank=place.lora_rank) if place else settings
            running = stack.enter_context(engines.load(name, wanted))
        else:
            log.info(f"engine {name} is running already, with the same model and settings")
        yield running
        if place and place.keep:
            place.put(running, asked, policy, stack)


def has_shelf() -> bool:
    """Whether an engine of this process goes on from step to step."""
    return bool(_shelves)
