"""Rewards from regular expressions, by the package `regex`: it can stop a search that backtracks without end."""

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
    """1 if the pattern is found, or with `match` off if it is not found; else 0 with status wrong.

    A search that takes too long says nothing about the answer: no reward, status timeout.
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
    """1 if the last match of `pattern` (without a pattern the whole text) equals the prompt's `answer`, else 0.

    Any white space equals one space; the settings say whether case and punctuation count. Status unparsable: no match
    (reward 0), or a prompt without `answer` (no reward).
    """
    pattern = _compiled(settings.pattern) if settings.pattern else None

    def rate(answer: Answer) -> Scored:
        if answer.answer is None:
            return Scored(None, "unparsable", "the prompt has no answer to compare with")
        try:
            said = answer.text if pattern is None else _last(pattern, answer.text, settings.timeout_seconds)
        except TimeoutError:
            return _timed_out(settings.timeout_seconds)
        if said is None:
            return Scored(0.0, "unparsable", "the pattern is not found")
        if _normal(said, settings) == _normal(answer.answer, settings):
            return Scored(1.0)
        return Scored(0.0, "wrong", f"{said.strip()[:_SHOWN]!r} is not {answer.answer!r}")

    return one_by_one(rate)


def _compiled(pattern: str) -> Any:
    try:
        return regex_package.compile(pattern)
    except regex_package.error as error:
        raise UsageError(f"pattern {pattern!r} is no regular expression: {error}", "fix the pattern") from error


def _last(pattern: Any, text: str, timeout: float) -> str | None:
    """The last match, or its group 1 if the pattern has groups; None without a match."""
    last = None
    for match in pattern.finditer(text, timeout=timeout):
        last = match[1 if pattern.groups else 0]
    return last


def _normal(text: str, settings: ExactMatch) -> str:
    text = " ".join(text.split())
    if settings.ignore_punctuation:
        text = text.strip(string.punctuation + string.whitespace)
    return text.casefold() if settings.ignore_case else text


def _timed_out(seconds: float) -> Scored:
    return Scored(None, "timeout", f"the pattern searched for more than {seconds:g} s")
