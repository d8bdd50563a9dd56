"""A checkpoint that is written while training goes on: in a thread, from a copy on the host. At most one is under way.

Collective calls of a process need one order, so the thread makes none. What it wants to exchange with the threads of
other ranks, the main threads carry, at the end of a step (`Background.after_step`) or when they wait.
"""

import os
import queue
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from prefpipe import clock, log
from prefpipe.errors import PrefpipeError
from prefpipe.forward import shards
from prefpipe.forward.shards import Copied
from prefpipe.stages.train import host_copies
from prefpipe.stages.train.host_copies import HostCopies, Tensors
from prefpipe.stages.train.parallel import ALONE, World

_SAID_FROM_S = 1.0  # a write that takes less is not worth a line

Write = Callable[[Mapping[str, torch.Tensor | Copied], World], None]


class _GivenUp(Exception):
    """The run ends, and nobody carries values between threads any more."""


@dataclass(frozen=True)
class _Asked:
    """A value for all ranks, whose thread waits for the values of the others."""

    value: Any


@dataclass(frozen=True)
class _Ended:
    """The end of a thread: what went wrong, if anything, and how long it took."""

    error: BaseException | None
    seconds: float


@dataclass(frozen=True)
class _Relayed(World):
    """The world of a thread: what it gathers, the main threads exchange. None as an answer means that none will."""

    said: "queue.SimpleQueue[_Asked | _Ended]" = field(default_factory=queue.SimpleQueue)
    answers: "queue.SimpleQueue[list[Any] | None]" = field(default_factory=queue.SimpleQueue)

    def tell(self, value: Any) -> Any:
        return self.gather(value if self.leads else None)[0]

    def gather(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        self.said.put(_Asked(value))
        answer = self.answers.get()
        if answer is None:
            raise _GivenUp
        return answer


class _Save:
    """The thread that writes a checkpoint, and the world that it sees."""

    def __init__(self, step: int, world: World, write: Callable[[World], None], waited: float) -> None:
        self.step, self.waited = step, waited
        self.relayed = _Relayed(world.rank, world.size)
        self._write = write
        self._heard: _Asked | _Ended | None = None
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        start, error = clock.monotonic(), None
        try:
            self._write(self.relayed)
        except BaseException as raised:
            error = raised
        self.relayed.said.put(_Ended(error, clock.monotonic() - start))

    def heard(self, *, wait: bool) -> _Asked | _Ended | None:
        """What the thread said and nobody answered; None while it works."""
        if self._heard is None:
            try:
                self._heard = self.relayed.said.get(block=wait)
            except queue.Empty:
                return None
        return self._heard

    def answer(self, values: list[Any]) -> None:
        """Give the thread the values of all ranks."""
        self._heard = None
        self.relayed.answers.put(values)


class Background:
    """Saves checkpoints: while training goes on where a copy fits, else while it waits. Whether a save is under way is
    the same on all ranks, and all calls but `give_up` are collective."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._save: _Save | None = None
        self._copies = HostCopies()
        self._told = False

    def save(self, step: int, tensors: Tensors, write: Write, *, last: bool) -> None:
        """Let `write` write tensors as they are now. With `last`, as no step follows, it is done on return. The caller
        has waited for the save before."""
        assert self._save is None
        start = clock.monotonic()
        if last or not self._fits(tensors):
            write(tensors, self._world)
            took = clock.monotonic() - start
            _say(step, took, took)
            return
        copies = self._copies.take(tensors, leads=self._world.leads)
        waited = clock.monotonic() - start
        if any(map(shards.is_cut, tensors.values())):
            self._save = _Save(step, self._world, lambda world: write(copies, world), waited)
        elif self._world.leads:  # it has all, and needs no other rank
            self._save = _Save(step, ALONE, lambda world: write(copies, world), waited)
        else:
            self._save = _Save(step, ALONE, lambda _: None, waited)

    def after_step(self) -> None:
        """Between two steps: carry what the threads want to exchange. Raises the error of a save that failed."""
        if self._save is not None:
            self._exchange(self._save, wait=False)

    def wait(self) -> None:
        """Return when no save is under way. Raises the error of one that failed."""
        while self._save is not None:
            self._exchange(self._save, wait=True)

    def give_up(self) -> None:
        """The run ends with an error. A save that needs no other rank is finished; of another one nothing stays."""
        if self._save is not None:
            self._save.relayed.answers.put(None)
            self._save.thread.join()
            self._save = None

    def _exchange(self, save: _Save, *, wait: bool) -> None:
        start = clock.monotonic()
        heard = save.heard(wait=wait)
        if isinstance(heard, _Ended) and not isinstance(heard.error, PrefpipeError | None):
            self._save = None
            raise heard.error  # a mistake, which other ranks may not be able to read
        said = self._world.gather(heard)
        save.waited += clock.monotonic() - start if wait else 0
        failed = next((one.error for one in said if isinstance(one, _Ended) and one.error is not None), None)
        if failed is not None:
            self.give_up()
            raise failed
        asked = [one.value for one in said if isinstance(one, _Asked)]
        ends = [one.seconds for one in said if isinstance(one, _Ended)]
        if len(asked) == self._world.size:
            save.answer(asked)
        if len(ends) == self._world.size:
            self._save = None
            _say(save.step, save.waited, max(ends))

    def _fits(self, tensors: Tensors) -> bool:
        """Whether the host has memory for the copies of all ranks of a node: the same on all ranks."""
        size = self._copies.nbytes(tensors, leads=self._world.leads)
        on_gpu = any(tensor.device.type != "cpu" for tensor in tensors.values())
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if any(map(shards.is_cut, tensors.values())) else 1
        fits = all(self._world.gather(host_copies.fit(size * ranks, beside_gpu=on_gpu)))
        if not fits and not self._told:
            log.info(f"training waits for its checkpoints: the host has no room for a copy of {size / 2**20:,.0f} MiB")
            self._told = True
        return fits


@contextmanager
def background(world: World) -> Generator[Background]:
    """Saves that are done at the end. After an error they are done or given up; a second signal waits for nothing."""
    saving = Background(world)
    try:
        yield saving
        saving.wait()
    except Exception:  # Interrupted is none
        saving.give_up()
        raise


def _say(step: int, waited: float, took: float) -> None:
    if took >= _SAID_FROM_S:
        log.info(f"checkpoint after step {step}: training waited {waited:.1f} s, writing took {took:.1f} s")
