"""Engines that outlive a step: the next step of the same process uses them if it asks for the same model and settings.
A running engine can take another adapter of the model (`Engine.take`).

    with warm.shelf(lora_rank=16) as shelf:
        shelf.keep = True  # evaluate leaves its engines open
        ...
        shelf.keep = False  # generate takes them, and frees them after its last completion
        ...

Without a shelf every step starts and frees its engines. Both ways write the same files.
"""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, TypeVar

from prefpipe import log
from prefpipe.engines.base import EngineSettings
from prefpipe.models.policy import Policy

_shelves: list["Shelf"] = []


class Warm(Protocol):
    """Engines with one policy."""

    def take(self, policy: Policy) -> bool:
        """Switch the engines to another adapter of their model; whether they could."""
        ...


_Warm = TypeVar("_Warm", bound=Warm)


@dataclass
class Shelf:
    """Engines that a step has left open, with their settings and their policy.

    keep: whether the running step leaves its engines open
    lora_rank: the largest rank of adapters that later steps bring (`EngineSettings`)
    """

    keep: bool = False
    lora_rank: int = 0
    asked: list[Any] = field(default_factory=list[Any])
    count: int = 0
    policy: Policy | None = None
    engines: Any = None
    closing: ExitStack = field(default_factory=ExitStack)

    def take(self, asked: list[Any], count: int, policy: Policy, stack: ExitStack) -> Any:
        """The open engines, if they have the wanted settings and are at least `count`; from now on `stack` closes them.
        Otherwise the open engines are closed, and the result is None."""
        found, self.engines = self.engines, None
        closing = stack.enter_context(self.closing.pop_all())
        alike = asked == self.asked and count <= self.count
        if found is not None and alike and (policy == self.policy or found.take(policy)):
            return found
        closing.close()
        return None

    def put(self, engines: Warm, asked: list[Any], count: int, policy: Policy, stack: ExitStack) -> None:
        """Leave engines open, with everything that `stack` would close."""
        self.asked, self.count, self.policy, self.engines, self.closing = asked, count, policy, engines, stack.pop_all()


@contextmanager
def shelf(lora_rank: int = 0) -> Generator[Shelf]:
    """A place for engines between the steps that run inside the `with` block; at its end they close."""
    made = Shelf(lora_rank=lora_rank)
    _shelves.append(made)
    try:
        yield made
    finally:
        _shelves.remove(made)
        made.closing.close()


@contextmanager
def engines(
    name: str, settings: EngineSettings, count: int, start: Callable[[EngineSettings], AbstractContextManager[_Warm]]
) -> Generator[_Warm]:
    """The engines on the shelf, if they have the wanted settings; else `count` new ones, started by `start` with the
    settings that the shelf needs."""
    place = _shelves[-1] if _shelves else None
    policy = settings.policy
    asked = [
        *(name, policy.directory, policy.weights, dict(settings.chat.digests)),
        *(getattr(settings, f.name) for f in fields(settings) if f.name not in ("chat", "policy")),
    ]
    with ExitStack() as stack:
        running = place.take(asked, count, policy, stack) if place else None
        if running is None:
            wanted = replace(settings, lora_rank=place.lora_rank) if place else settings
            running = stack.enter_context(start(wanted))
        else:
            count = place.count if place else count
            log.info(f"engine {name} is running already, with the same model and settings")
        yield running
        if place and place.keep:
            place.put(running, asked, count, policy, stack)


def has_shelf() -> bool:
    """Whether engines of this process go on from step to step."""
    return bool(_shelves)
