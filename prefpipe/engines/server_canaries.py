"""Canaries: fixed sequences whose log-probs tell one set of weights from another.

A server can say anything about its weights; the log-probs that it gives cannot lie as easily. What a policy gave on the
canaries is kept in the user's cache, by policy and scorer: computed here where the model fits, else as a server gave it
the first time (docs/decisions/0014-servers.md).
"""

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import platformdirs

from prefpipe import engines, log, machine, reading
from prefpipe.engines.base import EngineSettings, ScoreRequest
from prefpipe.errors import PrefpipeError, StorageError
from prefpipe.forward.agreement import absolute_limit, signed_limit
from prefpipe.ids import content_id
from prefpipe.models.encoding import encode, render
from prefpipe.models.policy import weights_bytes
from prefpipe.runs import fsio
from prefpipe.schemas import Message

Values = list[float]  # log-probs (nats) of all scored tokens, sequence after sequence

SERVER = "server:"  # the names of scorers behind a URL begin with it
_FAMILIAR = (
    ("What is the capital of France?", "The capital of France is Paris, which lies on the river Seine."),
    ("Write a haiku about rain.", "Soft rain on the roof,\nthe garden drinks in silence;\na lamp burns till dawn."),
    ("What is 17 times 23?", "17 times 23 is 391, since 17 x 20 = 340 and 17 x 3 = 51, and 340 + 51 = 391."),
    (
        "How do I reverse a list in Python?",
        "Use `items[::-1]` for a reversed copy, or `items.reverse()` to reverse the list in place.",
    ),
)
_DAY = "2026-01-01"  # for templates that print one: canaries are the same every day
_FITS = 4  # a model is loaded here when so many times its size is free


@dataclass(frozen=True)
class Difference:
    """Found minus expected, in nats per token, and whether that is noise between kernels."""

    signed: float
    absolute: float
    is_equal: bool
    agrees: bool


def sequences(settings: EngineSettings) -> list[ScoreRequest]:
    """Conversations in the template of the model, no longer than what the engine takes."""
    chat, longest = replace(settings.chat, date=_DAY), settings.max_model_len
    found: list[ScoreRequest] = []
    for number, (question, answer) in enumerate(_FAMILIAR):
        asked = render(chat, [Message(role="user", content=question)], add_generation_prompt=True)
        prompt, ids = encode(chat, asked)[: max(1, longest // 2)], encode(chat, answer)
        found.append(ScoreRequest(f"canary-{number}", prompt, ids[: max(1, longest - len(prompt))]))
    return found


def compare(found: Values, expected: Values, *, full_precision: bool) -> Difference:
    """How far two scorers are apart, by the limits of the audit before step 0."""
    deltas = [new - old for new, old in zip(found, expected, strict=True)]
    signed = sum(deltas) / len(deltas)
    absolute = sum(map(abs, deltas)) / len(deltas)
    is_near = absolute <= absolute_limit(full_precision=full_precision)
    return Difference(signed, absolute, not any(deltas), is_near and abs(signed) <= signed_limit(len(deltas)))


def both_full(*scorers: str) -> bool:
    """Whether all scorers compute in float32."""
    return all(name.endswith("/float32") for name in scorers)


@dataclass(frozen=True)
class Shelf:
    """The kept values of one list of canaries: a file for each policy."""

    folder: Path

    @classmethod
    def of(cls, canaries: Sequence[ScoreRequest]) -> "Shelf":
        """The place of these canaries in the user's cache."""
        name = content_id([(c.prompt_token_ids, c.token_ids) for c in canaries])
        return cls(platformdirs.user_cache_path("prefpipe") / "canaries" / name)

    def file(self, policy: str) -> Path:
        """The file of a policy."""
        return self.folder / f"{content_id(policy)}.json"

    def values(self, policy: str) -> dict[str, Values]:
        """What is known of a policy, by scorer. A damaged file is none."""
        return _read(self.file(policy)).get("values", {})

    def policy_with(self, scorer: str, found: Values, other_than: str) -> str | None:
        """Another policy that a scorer gave just these values for."""
        for record in map(_read, self._files()):
            if record.get("policy") not in (None, other_than) and record["values"].get(scorer) == found:
                return str(record["policy"])
        return None

    def keep(self, policy: str, scorer: str, found: Values) -> None:
        """Keep what a scorer gave for a policy. Where nothing can be written, the next run begins without."""
        record = {"policy": policy, "values": {**self.values(policy), scorer: found}}
        try:
            fsio.write_text(self.file(policy), json.dumps(record))
        except StorageError as error:
            log.warn(f"{error.message}: the canaries of this policy are not kept")

    def _files(self) -> Iterator[Path]:
        return iter(sorted(self.folder.glob("*.json")))


def _read(path: Path) -> Mapping[str, Any]:
    try:
        record = reading.read_json(path)
        return record if isinstance(record.get("values"), dict) else {}
    except (PrefpipeError, ValueError, AttributeError):
        return {}


def computed_here(
    canaries: Sequence[ScoreRequest], settings: EngineSettings, *, adapter: bool
) -> tuple[str, Values] | None:
    """(scorer, values) of the policy by a forward pass on this machine; None where that is not possible."""
    directory = settings.policy.directory
    size = weights_bytes(directory)
    if importlib.util.find_spec("transformers") is None or _FITS * size > machine.available_memory():
        return None
    log.info(f"scoring {len(canaries)} canaries here, once, to know {directory.name} by its values")
    try:
        with engines.load("transformers", settings) as engine:
            scored = dict(engine.score(canaries, adapter=adapter))
            return engine.scorer, in_order(canaries, scored)
    except Exception as error:
        log.warn(f"the canaries cannot be scored here: {type(error).__name__}: {error}")
        return None


def in_order(canaries: Sequence[ScoreRequest], scored: Mapping[str, Values]) -> Values:
    """The values of all canaries in a row."""
    return [value for canary in canaries for value in scored[canary.completion_id]]
