"""A verifier of mathematical answers, through `math-verify`."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import math_verify

from prefpipe.config.rewards import Math
from prefpipe.rewards.base import Answer, RewardFunction, Scored
from prefpipe.rewards.isolation import Outcome, isolated

VERSION = 1  # raise it when the reward can change: a run never mixes two versions
_SHOWN = 100


def inputs(_settings: Math) -> dict[str, str]:
    """The version of the checker."""
    return {"math_verify": version("math-verify")}


def math(settings: Math) -> RewardFunction:
    r"""1 if the last expression of the completion (in \boxed{}, LaTeX or plain) equals the prompt's `answer`, else 0.

    An `answer` that ends in `#### 42` (GSM8K) counts as 42. Status wrong: another value. unparsable: no expression in
    the completion (reward 0) or in `answer` (no reward). timeout, crash (no reward): the checker hung or failed.

    A check runs in a forked process that a time limit kills. The alarm of math-verify is off: it fails in threads and
    does not always fire.
    """
    check_all = isolated(
        f"{__name__}:check", timeout_seconds=settings.timeout_seconds, num_workers=settings.num_workers
    )

    def rate(answers: Sequence[Answer]) -> list[Scored]:
        known = [a for a in answers if a.answer]
        outcomes = iter(check_all([[a.answer, a.text, settings.precision] for a in known]))
        missing = Scored(None, "unparsable", "the prompt has no answer to compare with")
        return [_scored(next(outcomes)) if a.answer else missing for a in answers]

    return rate


def check(gold: str, text: str, precision: int) -> tuple[str, str]:
    """(verdict, detail). Verdicts: ok, wrong, unparsable (the completion), no_gold (the expected answer is none)."""
    expected = _parse_gold(gold)
    if not expected:
        return "no_gold", gold
    found = _parse(text)
    if not found:
        return "unparsable", ""
    right = math_verify.verify(expected, found, float_rounding=precision, timeout_seconds=None)
    return ("ok" if right else "wrong"), str(found[-1])


def warm_up() -> None:
    """Build the parser's tables once, before the forks."""
    check("\\frac{1}{2}", "so x = $\\frac{3}{4}$, or \\boxed{0.5}", 6)
    check("7", "7", 6)


def _parse_gold(gold: str) -> list[Any]:
    """The expected answer, read as LaTeX without dollar signs, or as it is."""
    gold = gold.rsplit("####", 1)[-1].strip()
    bare = not any(sign in gold for sign in ("$", "\\boxed", "\\[", "\\("))
    found = _parse(f"${gold}$") if bare else []
    return found or _parse(gold)


def _parse(text: str) -> list[Any]:
    no_alarm: Any = None
    return math_verify.parse(text, parsing_timeout=no_alarm)


def _scored(outcome: Outcome) -> Scored:
    if outcome.status != "ok":
        return Scored(None, outcome.status, outcome.detail)
    verdict, detail = outcome.value
    if verdict == "no_gold":
        return Scored(None, "unparsable", f"the answer of the prompt is no mathematics: {detail[:_SHOWN]!r}")
    if verdict == "unparsable":
        return Scored(0.0, "unparsable", "no mathematical expression found")
    return Scored(1.0 if verdict == "ok" else 0.0, verdict, None if verdict == "ok" else f"found {detail[:_SHOWN]}")
