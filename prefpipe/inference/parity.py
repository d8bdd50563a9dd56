"""How far two scorers are apart on the same rows: every cache of log-probs carries such a report, parity.json."""

import hashlib
import heapq
import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefpipe import engines, log
from prefpipe.engines import base
from prefpipe.engines.base import EngineSettings
from prefpipe.forward.agreement import LENGTH_BUCKETS, absolute_limit, signed_limit

OTHER = {"vllm": "transformers", "transformers": "vllm", "fake": "fake"}
_BETA = 0.1


@dataclass(frozen=True)
class Checked:
    """A completion with the log-probs in the cache."""

    sequence: base.ScoreRequest
    token_logps: Sequence[float]


def pick(completion_ids: Iterable[str], count: int, seed: int) -> set[str]:
    """`count` random ids (all, if there are fewer): by hash, so that order and sharding do not matter."""
    return set(heapq.nsmallest(count, completion_ids, key=lambda name: _hash(f"{seed}/{name}")))


def check(
    rows: Sequence[Checked], engine: str, scorer: str, settings: EngineSettings, *, adapter: bool
) -> dict[str, Any]:
    """Score rows again with the other engine and compare; a report that says why not, where it is not installed or
    fails: the cache is whole without it, and a run of hours does not end with an error of a second engine."""
    other = OTHER[engine]
    missing = next((m for m in ((other,) if other != "fake" else ()) if importlib.util.find_spec(m) is None), None)
    if missing is not None or not rows:
        return _not_checked(scorer, f"the other scorer, {other}, is not installed" if rows else "no row was scored")
    log.info(f"checking {len(rows)} rows with the other scorer, {other}")
    ordered = sorted(rows, key=lambda r: r.sequence.prompt_token_ids)
    try:
        with engines.load(other, settings) as second:
            fresh = dict(second.score((r.sequence for r in ordered), adapter=adapter))
            names = {"scorer": scorer, "other": second.scorer}
    except Exception as error:
        return _not_checked(scorer, f"the other scorer, {other}, failed: {type(error).__name__}: {error}")
    report = {**names, **compare(rows, fresh, settings.dtype)}
    if not report["agrees"]:
        log.warn(f"{scorer} and {names['other']} disagree: {report['summary']}")
    return report


def _not_checked(scorer: str, reason: str) -> dict[str, Any]:
    log.warn(f"parity was not checked: {reason}")
    return {"rows": 0, "scorer": scorer, "not_checked": reason}


def compare(rows: Sequence[Checked], fresh: Mapping[str, Sequence[float]], dtype: str) -> dict[str, Any]:
    """Differences (fresh minus cached, nats) per token and per completion, overall and by length, and what they mean.

    A pair's implicit margin is beta * ((logp_c - ref_c) - (logp_r - ref_r)): with independent errors of standard
    deviation s per completion it moves by beta * s * sqrt(2). Thresholds per token are those of the step-0 audit.
    """
    deltas = [[b - a for a, b in zip(row.token_logps, fresh[row.sequence.completion_id], strict=True)] for row in rows]
    tokens = _moments([d for own in deltas for d in own])
    sums = _moments([sum(own) for own in deltas])
    shift = _BETA * sums["sd"] * math.sqrt(2)
    absolute = absolute_limit(full_precision=dtype == "float32")
    agrees = abs(tokens["mean"]) <= signed_limit(tokens["count"]) and tokens["mean_absolute"] <= absolute
    summary = (
        f"{tokens['mean']:+.5f} nats per token on average (mean absolute {tokens['mean_absolute']:.5f}, largest "
        f"{tokens['largest']:.4f}); at beta {_BETA} a pair's margin moves by about {shift:.4f}"
    )
    return {
        "rows": len(rows),
        "agrees": agrees,
        "summary": summary,
        "per_token": tokens,
        "per_completion": sums,
        "by_length": _by_length(deltas),
        "beta": _BETA,
        "margin_shift": shift,
    }


def table(report: Mapping[str, Any]) -> list[str]:
    """The report for people."""
    if "not_checked" in report:
        return [f"  parity: not checked, {report['not_checked']}"]
    buckets = [
        f"    {b['tokens']:>9} tokens, {b['count']:>3} rows: mean {b['mean']:+.4f}, sd {b['sd']:.4f}, "
        f"largest {b['largest']:.4f} nats per completion"
        for b in report["by_length"]
    ]
    return [f"  parity with {report['other']}: {report['summary']}", *buckets]


def _by_length(deltas: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for low, high in LENGTH_BUCKETS:
        own = [sum(d) for d in deltas if low < len(d) <= high]
        if own:
            name = f"{low + 1}-{high}" if high < math.inf else f"over {low}"
            found.append({"tokens": name, **_moments(own)})
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
