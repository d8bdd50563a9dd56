"""Which round is the best, by the metric that decides."""

from collections.abc import Mapping, Sequence
from typing import Any

Totals = Mapping[str, Any]  # of a run of evaluate


def value(totals: Totals, metric: str) -> float:
    """The metric, such as sampled.pass, of one evaluation."""
    decoding, _, name = metric.partition(".")
    return float(totals[decoding][name])


def guard_failed(totals: Totals) -> list[str]:
    """The guards of an evaluation that failed, by name: prompts, or a text for the perplexity."""
    guards = [(guard.get("prompts", "guard"), guard) for guard in totals.get("guards") or []]
    perplexity = totals.get("perplexity")
    if perplexity:
        guards.append((f"perplexity of {perplexity.get('text', 'the text')}", perplexity))
    return [str(name) for name, guard in guards if any(drop.get("failed") for drop in guard.get("drops") or [])]


def best_place(evaluations: Sequence[Totals], metric: str) -> int:
    """The place of the evaluation (0: before training) with the highest value among those that passed their guards; the
    earliest of equal ones."""
    passed = [place for place, totals in enumerate(evaluations) if not guard_failed(totals)] or [0]
    return max(passed, key=lambda place: (value(evaluations[place], metric), -place))
