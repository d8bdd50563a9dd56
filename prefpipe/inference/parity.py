"""The difference of two scorers on the same completions: parity.json, which comes with every cache of log-probs."""

import hashlib
import heapq
import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefpipe import engines, log
from prefpipe.engines.base import EngineSettings, ScoreRequest
from prefpipe.forward.agreement import LENGTH_BUCKETS, absolute_limit, signed_limit

OTHER = {"vllm": "transformers", "transformers": "vllm", "server": "transformers", "fake": "fake"}
_BETA = 0.1
_DECADES = ("1e-5", "1e-4", "1e-3", "0.01", "0.1", "1")  # nats


@dataclass(frozen=True)
class CachedLogps:
    """A completion with its cached log-probs: nats, one per scored token."""

    request: ScoreRequest
    token_logps: Sequence[float]


def pick(completion_ids: Iterable[str], count: int, seed: int) -> set[str]:
    """`count` random ids, or all ids if there are fewer. Their hashes decide, not their order or their shards."""
    return set(heapq.nsmallest(count, completion_ids, key=lambda name: _hash(f"{seed}/{name}")))


def check(
    cached: Sequence[CachedLogps], engine: str, scorer: str, settings: EngineSettings, *, adapter: bool
) -> dict[str, Any]:
    """Score completions again with the other engine and compare: the report for parity.json.

    If the second engine is missing or fails, the report says why and the run continues: no result depends on parity.
    `engine` and `scorer` name what computed the cache; `adapter` says whether the adapter was on.
    """
    other = OTHER[engine]
    if not cached:
        return _not_checked(scorer, "no row was scored")
    if other != "fake" and importlib.util.find_spec(other) is None:
        return _not_checked(scorer, f"the other scorer, {other}, is not installed")
    log.info(f"checking {len(cached)} rows with the other scorer, {other}")
    requests = sorted((c.request for c in cached), key=lambda request: request.prompt_token_ids)
    try:
        with engines.load(other, settings) as second:
            fresh = dict(second.score(requests, adapter=adapter))
            names = {"scorer": scorer, "other": second.scorer}
    except Exception as error:
        return _not_checked(scorer, f"the other scorer, {other}, failed: {type(error).__name__}: {error}")
    report = {**names, **compare(cached, fresh, settings.dtype)}
    if not report["agrees"]:
        log.warn(f"{scorer} and {names['other']} disagree: {report['summary']}")
    return report


def _not_checked(scorer: str, reason: str) -> dict[str, Any]:
    log.warn(f"parity was not checked: {reason}")
    return {"rows": 0, "scorer": scorer, "not_checked": reason}


def compare(cached: Sequence[CachedLogps], fresh: Mapping[str, Sequence[float]], dtype: str) -> dict[str, Any]:
    """Differences (fresh minus cached, nats) per token and per completion, in all and by length, and by how much they
    move a margin. `fresh` has the log-probs of the second engine by completion_id.

    A pair's implicit margin is beta * ((logp_c - ref_c) - (logp_r - ref_r)): with independent errors of standard
    deviation s per completion it moves by beta * s * sqrt(2). Thresholds per token are those of the step-0 audit.
    """
    deltas = [
        [new - old for old, new in zip(c.token_logps, fresh[c.request.completion_id], strict=True)] for c in cached
    ]
    tokens = _moments([delta for completion in deltas for delta in completion])
    sums = _moments([sum(completion) for completion in deltas])
    shift = _BETA * sums["sd"] * math.sqrt(2)
    absolute = absolute_limit(full_precision=dtype == "float32")
    agrees = abs(tokens["mean"]) <= signed_limit(tokens["count"]) and tokens["mean_absolute"] <= absolute
    summary = (
        f"{tokens['mean']:+.5f} nats per token on average (mean absolute {tokens['mean_absolute']:.5f}, largest "
        f"{tokens['largest']:.4f}); at beta {_BETA} a pair's margin moves by about {shift:.4f}"
    )
    return {
        "rows": len(cached),
        "agrees": agrees,
        "summary": summary,
        "per_token": tokens,
        "per_completion": sums,
        "by_length": _by_length(deltas),
        "histogram": _by_size(deltas),
        "beta": _BETA,
        "margin_shift": shift,
    }


def table(report: Mapping[str, Any]) -> list[str]:
    """The report as lines for the terminal."""
    if "not_checked" in report:
        return [f"  parity: not checked, {report['not_checked']}"]
    buckets = [
        f"    {b['tokens']:>9} tokens, {b['count']:>3} rows: mean {b['mean']:+.4f}, sd {b['sd']:.4f}, "
        f"largest {b['largest']:.4f} nats per completion"
        for b in report["by_length"]
    ]
    return [f"  parity with {report['other']}: {report['summary']}", *buckets]


def _by_length(deltas: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Moments of the differences per completion, for each range of lengths with a completion in it."""
    buckets: list[dict[str, Any]] = []
    for low, high in LENGTH_BUCKETS:
        sums = [sum(completion) for completion in deltas if low < len(completion) <= high]
        if sums:
            name = f"{low + 1}-{high}" if high < math.inf else f"over {low}"
            buckets.append({"tokens": name, **_moments(sums)})
    return buckets


def _by_size(deltas: Sequence[Sequence[float]]) -> dict[str, int]:
    """Tokens by the absolute difference of their log-probs, in decades of nats."""
    found = dict.fromkeys(("0", *(f"<{limit}" for limit in _DECADES), f">={_DECADES[-1]}"), 0)
    for delta in (abs(delta) for completion in deltas for delta in completion):
        limit = next((f"<{limit}" for limit in _DECADES if delta < float(limit)), f">={_DECADES[-1]}")
        found[limit if delta else "0"] += 1
    return found


def _moments(values: Sequence[float]) -> dict[str, Any]:
    count = len(values)
    mean = sum(values) / count if count else 0.0
    return {
        "count": count,
        "mean": mean,
        "sd": math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1)) if count > 1 else 0.0,
        "mean_absolute": sum(map(abs, values)) / count if count else 0.0,
        "largest": max(map(abs, values), default=0.0),
    }


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
