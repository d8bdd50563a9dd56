"""An engine without a model: canned text from the seed, made-up log-probs. Public, for tests and dry runs."""

import hashlib
import math
import random
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from prefpipe import chat as chats
from prefpipe.engines.base import Draw, EngineSettings, Request, Sample, Sequence

_WORDS = (
    *("a", "the", "small", "large", "old", "new", "quiet", "bright", "tool", "animal"),
    *("plant", "place", "makes", "keeps", "likes", "water", "food", "light"),
)


class FakeEngine:
    """Deterministic: a sample depends on its seed only, a log-prob on the token and its place only."""

    scorer = "fake-1"

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        """One to fourteen words and a full stop per draw; cut, as a real engine cuts, at max_tokens."""
        for request in requests:
            yield request, [self._sample(draw) for draw in request.draws]

    def score(self, sequences: Iterable[Sequence], *, adapter: bool) -> Iterator[tuple[str, list[float]]]:
        """The same made-up log-probs that sampling gives, shifted when the adapter is off."""
        for sequence in sequences:
            yield sequence.completion_id, _logps(sequence.token_ids, 0.0 if adapter else -0.125)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def _sample(self, draw: Draw) -> Sample:
        source = random.Random(draw.seed if draw.temperature > 0 else 0)
        text = " ".join(source.choices(_WORDS, k=source.randint(1, 14))).capitalize() + "."
        ids = chats.encode(self._settings.chat, text)
        limit = self._settings.max_tokens
        stops = len(ids) < limit
        ids = [*ids, min(self._settings.chat.eos_token_ids)] if stops else ids[:limit]
        return Sample(draw.sample_index, ids, _logps(ids, 0.0), "stop" if stops else "length")


def _logps(token_ids: list[int], shift: float) -> list[float]:
    return [shift + math.log((_byte(f"{i}/{t}") + 1) / 257) for i, t in enumerate(token_ids)]


def _byte(text: str) -> int:
    return hashlib.blake2b(text.encode(), digest_size=1).digest()[0]
