"""Engines that go wrong, for the fault tests: the fake engine until it meets a prompt or an answer about poison."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import NoReturn

from prefpipe.engines.base import EngineSettings, Request, Sample, ScoreRequest
from tests.engines.cases import ScriptedEngine, over_fake
from tests.waiting import until


def raises(settings: EngineSettings) -> ScriptedEngine:
    """Has up to four prompts or answers inside; fails on the poisoned one as vLLM does when a CUDA kernel asserts."""

    def die() -> NoReturn:
        raise RuntimeError("EngineDeadError: CUDA error: device-side assert triggered")

    return poisoned(settings, die)


def vanishes(settings: EngineSettings) -> ScriptedEngine:
    """Takes the whole process with it, as the kernel does when memory is short."""
    return poisoned(settings, lambda: os.kill(os.getpid(), signal.SIGKILL))


def slow(settings: EngineSettings) -> ScriptedEngine:
    """Long enough at work to be disturbed."""
    engine = over_fake(settings)

    def sample(request: Request) -> list[Sample]:
        time.sleep(0.1)
        return engine.sample(request)

    return replace(engine, sample=sample)


def held(settings: EngineSettings) -> ScriptedEngine:
    """Answers four prompts. At the next one it says so, by a file named after its process in the folder of HELD_IN, and
    waits there for one named `go`."""
    engine, folder, answered = over_fake(settings), Path(os.environ["HELD_IN"]), count()

    def sample(request: Request) -> list[Sample]:
        if next(answered) == 4:
            (folder / str(os.getpid())).touch()
            until((folder / "go").exists)
        return engine.sample(request)

    return replace(engine, sample=sample)


def last(settings: EngineSettings) -> ScriptedEngine:
    """At work until every other process of its parent has ended."""
    engine = over_fake(settings)
    until(lambda: not _others())
    return engine


def _others() -> list[str]:
    """Children of the parent that run, but this one."""
    parent, found = os.getppid(), list[str]()
    for number in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with suppress(OSError):
            state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
            found += [number] if state != "Z" and int(number) != os.getpid() else []
    return found


def poisoned(settings: EngineSettings, die: Callable[[], object]) -> ScriptedEngine:
    """The fake engine with up to four requests inside, which calls `die` when one about poison enters."""

    def admit(work: Request | ScoreRequest) -> bool:
        answer = work.token_ids if isinstance(work, ScoreRequest) else []
        if "poison" in settings.chat.decode([*work.prompt_token_ids, *answer]):
            die()
        return True

    return replace(over_fake(settings), admit=admit, in_flight=4)
