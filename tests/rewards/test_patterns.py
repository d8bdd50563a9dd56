"""Regular expressions: found or not, exact answers, and patterns that would search for ever."""

import pytest

from prefpipe.config.rewards import ExactMatch, Regex
from prefpipe.errors import UsageError
from prefpipe.rewards import patterns
from prefpipe.rewards.base import Answer, RewardFunction, Scored
from prefpipe.schemas import Message

ENDLESS = r"^(a|aa)+$"  # exponential in the number of a's when the text ends with something else


def rate(reward: RewardFunction, text: str, answer: str | None = None) -> Scored:
    (scored,) = reward([Answer([Message(role="user", content="?")], text, answer)])
    return scored


@pytest.mark.parametrize(
    ("settings", "text", "scored"),
    [
        (Regex(), "A sentence. ", Scored(1.0)),
        (Regex(), "No end", Scored(0.0, "wrong", "the pattern is not found")),
        (Regex(pattern=r"\d+", match=False), "none", Scored(1.0)),
        (Regex(pattern=r"\d+", match=False), "some 7", Scored(0.0, "wrong", "the pattern is found")),
        (Regex(pattern=r"^\p{Lu}"), "Ärger", Scored(1.0)),
    ],
)
def test_regex(settings: Regex, text: str, scored: Scored) -> None:
    assert rate(patterns.regex(settings), text) == scored


def test_a_pattern_that_backtracks_without_end_is_stopped() -> None:
    scored = rate(patterns.regex(Regex(pattern=ENDLESS, timeout_seconds=0.2)), "a" * 60 + "b")
    assert scored == Scored(None, "timeout", "the pattern searched for more than 0.2 s")
    extracting = ExactMatch(pattern=ENDLESS, timeout_seconds=0.2)
    assert rate(patterns.exact_match(extracting), "a" * 60 + "b", "a").status == "timeout"


@pytest.mark.parametrize("settings", [Regex(pattern="("), ExactMatch(pattern="(")])
def test_a_pattern_that_is_none_is_an_error_of_the_user(settings: Regex | ExactMatch) -> None:
    with pytest.raises(UsageError, match="pattern '\\('"):
        getattr(patterns, settings.kind)(settings)


@pytest.mark.parametrize(
    ("settings", "text", "answer", "scored"),
    [
        (ExactMatch(), " Forty  two. ", "forty two", Scored(1.0)),
        (ExactMatch(), "41", "42", Scored(0.0, "wrong", "'41' is not '42'")),
        (ExactMatch(ignore_case=False), "Owl", "owl", Scored(0.0, "wrong", "'Owl' is not 'owl'")),
        (ExactMatch(ignore_punctuation=False), "owl.", "owl", Scored(0.0, "wrong", "'owl.' is not 'owl'")),
        (ExactMatch(pattern=r"answer is (\w+)"), "The answer is no. The answer is yes.", "yes", Scored(1.0)),
        (ExactMatch(pattern=r"\d+"), "2 and 3", "3", Scored(1.0)),
        (ExactMatch(pattern=r"\d+"), "none", "3", Scored(0.0, "unparsable", "the pattern is not found")),
        (ExactMatch(), "x", None, Scored(None, "unparsable", "the prompt has no answer to compare with")),
    ],
)
def test_exact_match(settings: ExactMatch, text: str, answer: str | None, scored: Scored) -> None:
    assert rate(patterns.exact_match(settings), text, answer) == scored
