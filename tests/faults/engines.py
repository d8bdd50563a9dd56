"""Engines that go wrong, for the fault tests: the fake engine until it meets a prompt or an answer about poison."""

import os
import signal
import time
from collections.abc import Iterable, Iterator

from prefpipe.engines.base import EngineSettings, Request, Sample, ScoreRequest
from prefpipe.engines.fake import FakeEngine


class Raises(FakeEngine):
    """Takes four prompts or answers at a time, fails on the poisoned one as vLLM does when a CUDA kernel asserts."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self._chat = settings.chat

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        waiting: list[Request] = []
        for request in requests:
            waiting.append(request)
            if "poison" in self._chat.decode(request.prompt_token_ids):
                self.die()
            if len(waiting) == 4:
                yield from super().generate(waiting)
                waiting = []
        yield from super().generate(waiting)

    def score(self, sequences: Iterable[ScoreRequest], *, adapter: bool) -> Iterator[tuple[str, list[float]]]:
        waiting: list[ScoreRequest] = []
        for sequence in sequences:
            waiting.append(sequence)
            if "poison" in self._chat.decode(sequence.prompt_token_ids + sequence.token_ids):
                self.die()
            if len(waiting) == 4:
                yield from super().score(waiting, adapter=adapter)
                waiting = []
        yield from super().score(waiting, adapter=adapter)

    def die(self) -> None:
        raise RuntimeError("EngineDeadError: CUDA error: device-side assert triggered")


class Vanishes(Raises):
    """Takes the whole process with it, as the kernel does when memory is short."""

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Slow(FakeEngine):
    """Long enough at work for others to find the directory taken."""

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        for done in super().generate(requests):
            time.sleep(0.1)
            yield done
