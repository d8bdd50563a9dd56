"""Marks of form (openings, lists, punctuation), and how well a small classifier tells chosen from rejected by them."""

import math
import re
from collections.abc import Callable, Sequence

from prefpipe.stages.build_pairs import texts

_MOST = 2000  # pairs; the classifier has nine weights
_STEPS = 60
MARKS: dict[str, Callable[[str], float]] = {
    "eager opening": lambda t: float(bool(re.match(r"(?i)\s*(sure|certainly|of course|absolutely|great)\b", t))),
    "refusal opening": lambda t: float(texts.is_refusal(t)),
    "list items": lambda t: float(len(re.findall(r"(?m)^\s*(?:[-*\u2022]|\d+[.)])\s", t))),
    "headings": lambda t: float(len(re.findall(r"(?m)^#+ ", t))),
    "bold": lambda t: float(t.count("**")),
    "code": lambda t: float(t.count("```")),
    "control tokens": lambda t: float("<|" in t),
    "exclamation marks": lambda t: float(t.count("!")),
    "ends like a sentence": lambda t: float(t.rstrip()[-1:] in ".!?"),
    "not ASCII": lambda t: float(not t.isascii()),
}


def shortcut(chosen: Sequence[str], rejected: Sequence[str]) -> tuple[float, str]:
    """Share of held-out pairs whose chosen side has the higher score (ties count half), and the mark with the largest
    weight; (0.5, "none") for fewer than two pairs.

    The score is linear in the marks: logistic regression on their differences, a Bradley-Terry model of form, fitted on
    every other pair of the first 2,000.
    """
    differences = [_difference(c, r) for c, r in zip(chosen[:_MOST], rejected[:_MOST], strict=True)]
    fitted, held_out = differences[::2], differences[1::2]
    if not fitted or not held_out:
        return 0.5, "none"
    scales = [math.sqrt(sum(d[i] ** 2 for d in fitted) / len(fitted)) or 1.0 for i in range(len(MARKS))]
    weights = _fit([[v / s for v, s in zip(d, scales, strict=True)] for d in fitted])
    scores = [sum(w * v / s for w, v, s in zip(weights, d, scales, strict=True)) for d in held_out]
    right = sum(1.0 if s > 0 else 0.5 if s == 0 else 0.0 for s in scores)
    strongest = max(zip(weights, MARKS, strict=True), key=lambda pair: abs(pair[0]))
    return right / len(scores), strongest[1] if strongest[0] else "none"


def _difference(chosen: str, rejected: str) -> list[float]:
    return [mark(chosen) - mark(rejected) for mark in MARKS.values()]


def _fit(rows: Sequence[Sequence[float]]) -> list[float]:
    """Weights w by gradient ascent on the mean of log sigmoid(w x), x a row. The decay keeps w finite for marks that
    separate the sides perfectly."""
    weights = [0.0] * len(MARKS)
    for _ in range(_STEPS):
        slopes = [0.0] * len(MARKS)
        for row in rows:
            doubt = 1 / (1 + math.exp(min(sum(w * v for w, v in zip(weights, row, strict=True)), 500.0)))
            for i, value in enumerate(row):
                slopes[i] += doubt * value
        weights = [0.99 * w + 0.5 * s / len(rows) for w, s in zip(weights, slopes, strict=True)]
    return weights
