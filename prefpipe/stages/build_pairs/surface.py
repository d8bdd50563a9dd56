"""Marks of form that could tell chosen from rejected without reading: a small classifier over them, held out."""

import math
import re
from collections.abc import Callable, Sequence

_MOST = 2000  # pairs; the classifier has nine weights
_STEPS = 60
MARKS: dict[str, Callable[[str], float]] = {
    "eager opening": lambda t: float(bool(re.match(r"(?i)\s*(sure|certainly|of course|absolutely|great)\b", t))),
    "refusal opening": lambda t: float(bool(re.match(r"(?i)\s*(i'm sorry|i am sorry|i can'?t|as an ai)\b", t))),
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
    """Share of held-out pairs in which a linear score of the marks is higher for chosen (ties count half), and the
    mark with the largest weight.

    Logistic regression on differences of marks (a Bradley-Terry model of form), fitted on every other pair.
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
    """Gradient ascent on the mean of log sigmoid(w x), with a little decay so that separable marks stay finite."""
    weights = [0.0] * len(MARKS)
    for _ in range(_STEPS):
        slopes = [0.0] * len(MARKS)
        for row in rows:
            doubt = 1 / (1 + math.exp(min(sum(w * v for w, v in zip(weights, row, strict=True)), 500.0)))
            for i, value in enumerate(row):
                slopes[i] += doubt * value
        weights = [0.99 * w + 0.5 * s / len(rows) for w, s in zip(weights, slopes, strict=True)]
    return weights
