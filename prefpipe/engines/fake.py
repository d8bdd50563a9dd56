"""An engine without a model: canned text from the seed, invented log-probs. Public, for tests and dry runs."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Self

from prefpipe.engines.base import Draw, EngineSettings, Query, Request, Response, Sample, ScoreRequest
from prefpipe.models import dialogue
from prefpipe.models.chat import Chat
from prefpipe.models.encoding import encode, render
from prefpipe.models.policy import Policy

_WORDS = (
    *("a", "the", "small", "large", "old", "new", "quiet", "bright", "tool", "animal"),
    *("plant", "place", "makes", "keeps", "likes", "water", "food", "light"),
)
_MOST_WORDS = 14


class FakeEngine:
    """Deterministic: a sample depends on its seed alone, a log-prob on the token and its place alone."""

    scorer = "fake-1"

    def __init__(self, settings: EngineSettings) -> None:
        chat = settings.chat
        self._chat = chat
        self._max_tokens = settings.max_tokens
        self._end = _end_of_answer(chat)
        # Words are encoded once: a sample costs look-ups only, and a test never waits for this engine.
        self._first = [encode(chat, word.capitalize()) for word in _WORDS]
        self._later = [encode(chat, f" {word}") for word in _WORDS]
        self._stop = encode(chat, ".")
        self._logps: dict[tuple[int, int], float] = {}

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
        """One to fourteen words and a full stop per draw, cut at max_tokens as by any engine."""
        for request in requests:
            yield request, [self._sample(draw) for draw in request.draws]

    def score(self, sequences: Iterable[ScoreRequest], *, adapter: bool) -> Iterator[tuple[str, list[float]]]:
        """The log-probs that sampling gives, shifted when the adapter is off."""
        for sequence in sequences:
            values = self._score(sequence.token_ids, 0.0 if adapter else -0.125)
            yield sequence.completion_id, sequence.scored(values)

    def respond(self, queries: Iterable[Query]) -> Iterator[tuple[Query, Response]]:
        """The text that sampling would give; for a schema, JSON that follows it and depends on the prompt's ids."""
        for query in queries:
            if query.schema is None:
                sample = self._sample(Draw(0, query.seed, query.temperature))
                yield query, Response(sample.token_ids, sample.finish_reason)
                continue
            ids = encode(self._chat, json.dumps(_instance(query.schema, str(query.prompt_token_ids))))
            stops = len(ids) < self._max_tokens
            yield query, Response([*ids, self._end][: self._max_tokens], "stop" if stops else "length")

    def take(self, policy: Policy) -> bool:  # noqa: ARG002  (nothing here depends on the policy)
        """Any policy."""
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def _sample(self, draw: Draw) -> Sample:
        seed = draw.seed if draw.temperature > 0 else 0
        source = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=_MOST_WORDS + 1).digest()
        first, *later = source[1 : 2 + source[0] % _MOST_WORDS]
        ids = list(self._first[first % len(_WORDS)])
        for byte in later:
            ids += self._later[byte % len(_WORDS)]
        ids += self._stop
        stops = len(ids) < self._max_tokens
        ids = [*ids, self._end] if stops else ids[: self._max_tokens]
        return Sample(draw.sample_index, ids, self._score(ids, 0.0), "stop" if stops else "length")

    def _score(self, token_ids: list[int], shift: float) -> list[float]:
        known = self._logps
        for place in enumerate(token_ids):
            if place not in known:
                known[place] = math.log((_byte(f"{place[0]}/{place[1]}") + 1) / 257)
        return [known[place] + shift for place in enumerate(token_ids)]


def _end_of_answer(chat: Chat) -> int:
    """The end-of-sequence token that the template writes behind an answer, which a trained model learns to end with;
    any where it writes none."""
    tail = dialogue.after_answer(partial(render, chat)) or ""
    return next((i for i in encode(chat, tail) if i in chat.eos_token_ids), min(chat.eos_token_ids))


def _instance(schema: dict[str, Any], text: str) -> Any:
    """A value that fits a schema of objects, enums and texts, chosen by a digest of `text`."""
    if "enum" in schema:
        return schema["enum"][_byte(text) % len(schema["enum"])]
    if schema["type"] == "string":
        return _WORDS[_byte(text) % len(_WORDS)]
    return {name: _instance(inner, f"{name} {text}") for name, inner in schema.get("properties", {}).items()}


def _byte(text: str) -> int:
    return hashlib.blake2b(text.encode(), digest_size=1).digest()[0]
