"""An engine for tests of what is done with an engine: what enters it, what it answers and when are functions."""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Self, TypeVar

from prefpipe.engines.base import EngineSettings, Request, Sample, ScoreRequest
from prefpipe.engines.fake import FakeEngine

Work = TypeVar("Work", Request, ScoreRequest)


@dataclass
class ScriptedEngine:
    """Samples and scores by functions. Up to `in_flight` requests are inside before the first of them leaves; with a
    seed they leave in random order, else in the order in which they entered.

    `admit` sees every request as it enters. It may raise, as an engine does whose kernel failed; False loses the
    request: it never leaves. `entered` keeps the ids that entered, a list for each call of `generate` or `score`.
    """

    sample: Callable[[Request], list[Sample]]
    value: Callable[[ScoreRequest, bool], list[float]]
    admit: Callable[[Request | ScoreRequest], bool] = lambda _work: True
    in_flight: int = 3
    seed: int | None = None
    scorer: str = "scripted"
    entered: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._source = None if self.seed is None else random.Random(self.seed)

    @property
    def taken(self) -> int:
        """How many requests entered so far."""
        return sum(map(len, self.entered))

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        for request in self._through(requests, lambda r: r.prompt_id):
            yield request, self.sample(request)

    def score(self, sequences: Iterable[ScoreRequest], *, adapter: bool) -> Iterator[tuple[str, list[float]]]:
        for sequence in self._through(sequences, lambda s: s.completion_id):
            yield sequence.completion_id, self.value(sequence, adapter)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def _through(self, arriving: Iterable[Work], key: Callable[[Work], str]) -> Iterator[Work]:
        entered: list[str] = []
        self.entered.append(entered)
        inside: list[Work] = []
        for work in arriving:
            entered.append(key(work))
            if self.admit(work):
                inside.append(work)
            if len(inside) == self.in_flight:
                yield self._leave(inside)
        while inside:
            yield self._leave(inside)

    def _leave(self, inside: list[Work]) -> Work:
        return inside.pop(self._source.randrange(len(inside)) if self._source else 0)


def over_fake(settings: EngineSettings) -> ScriptedEngine:
    """The samples and the log-probs of the fake engine; one request at a time."""
    fake = FakeEngine(settings)
    return ScriptedEngine(
        sample=lambda request: next(fake.generate([request]))[1],
        value=lambda sequence, adapter: next(fake.score([sequence], adapter=adapter))[1],
        in_flight=1,
        scorer=fake.scorer,
    )


def distance(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    """Largest difference of one token; the same completions with the same lengths."""
    assert a.keys() == b.keys()
    return max(abs(x - y) for key in a for x, y in zip(a[key], b[key], strict=True))
