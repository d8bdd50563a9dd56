"""Rewards from regular expressions. The `regex` package stops a search that backtracks without end."""

import string
from typing import Any

import regex as regex_package

from prefpipe.config.rewards import ExactMatch, Regex
from prefpipe.errors import UsageError
from prefpipe.rewards.base import Answer, RewardFunction, Scored, one_by_one

VERSION = 1  # raise it when a reward below can change: a run never mixes two versions
_SHOWN = 80


def inputs(_settings: object) -> dict[str, str]:
    """No reward here reads a file."""
    return {}


def regex(settings: Regex) -> RewardFunction:
    """1 if the pattern is found (`match`; else if it is not), 0 otherwise. Status wrong for 0.

    A search that runs into the timeout says nothing about the answer: no reward, status timeout.
    """
    pattern = _compiled(settings.pattern)

    def rate(answer: Answer) -> Scored:
        try:
            found = pattern.search(answer.text, timeout=settings.timeout_seconds) is not None
        except TimeoutError:
            return _timed_out(settings.timeout_seconds)
        if found == settings.match:
            return Scored(1.0)
        return Scored(0.0, "wrong", "the pattern is found" if found else "the pattern is not found")

    return one_by_one(rate)


def exact_match(settings: ExactMatch) -> RewardFunction:
    """1 if what the last match of `pattern` gives (the whole text without one) equals the prompt's `answer`, else 0.

    White space counts as one space, case and punctuation as the settings say. Without a match the status is unparsable
    and the reward 0; without an `answer` there is no reward.
    """
    pattern = _compiled(settings.pattern) if settings.pattern else None

    def rate(answer: Answer) -> Scored:
        if answer.answer is None:
            return Scored(None, "unparsable", "the prompt has no answer to compare with")
        try:
            given = answer.text if pattern is None else _last(pattern, answer.text, settings.timeout_seconds)
        except TimeoutError:
            return _timed_out(settings.timeout_seconds)
        if given is None:
            return Scored(0.0, "unparsable", "the pattern is not found")
        if _normal(given, settings) == _normal(answer.answer, settings):
            return Scored(1.0)
        return Scored(0.0, "wrong", f"{given.strip()[:_SHOWN]!r} is not {answer.answer!r}")

    return one_by_one(rate)


def _compiled(pattern: str) -> Any:
    try:
        return regex_package.compile(pattern)
    except regex_package.error as error:
        raise UsageError(f"pattern {pattern!r} is no regular expression: {error}", "fix the pattern") from error


def _last(pattern: Any, text: str, timeout: float) -> str | None:
    """What the last match says: group 1 if the pattern has one."""
    found = None
    for match in pattern.finditer(text, timeout=timeout):
        found = match[1 if pattern.groups else 0]
    return found


def _normal(text: str, settings: ExactMatch) -> str:
    text = " ".join(text.split())
    if settings.ignore_punctuation:
        text = text.strip(string.punctuation + string.whitespace)
    return text.casefold() if settings.ignore_case else text


def _timed_out(seconds: float) -> Scored:
    return Scored(None, "timeout", f"the pattern searched for more than {seconds:g} s")
