"""Rewards computed from the text alone."""

import re
from collections.abc import Sequence

from prefpipe.rewards.base import Answer, Scored

FEWEST_WORDS, MOST_WORDS = 5, 10
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")


def short_sentence(answers: Sequence[Answer]) -> list[Scored]:
    """One sentence of 5 to 10 words that ends with a full stop and names the topic, graded from 0 to 1.

    reward = (2 * length + sentence + topic) / 4 with length = min(1, words/5, 10/words), so that one word too few
    costs as clearly as some too many and "A falcon." never beats a good sentence; sentence and topic are 0 or 1.
    """
    return [_short_sentence(a.text.strip(), a.answer or "") for a in answers]


def num_words(text: str) -> int:
    """Words separated by white space."""
    return len(text.split())


def is_one_sentence(text: str) -> bool:
    """One line, one sentence end, and that is a full stop."""
    return text.endswith(".") and "\n" not in text and len(_SENTENCE_END.findall(text)) == 1


def names(topic: str, text: str) -> bool:
    """Whether the topic stands in the text as words of its own, in the singular or with a plural s."""
    return bool(topic) and re.search(rf"\b{re.escape(topic)}(e?s)?\b", text, re.IGNORECASE) is not None


def _short_sentence(text: str, topic: str) -> Scored:
    words = num_words(text)
    length = min(1.0, words / FEWEST_WORDS, MOST_WORDS / words) if words else 0.0
    reward = (2 * length + is_one_sentence(text) + names(topic, text)) / 4
    missing = [
        *([f"{words} words"] if length < 1 else []),
        *([] if is_one_sentence(text) else ["not one sentence"]),
        *([] if names(topic, text) else ["topic missing"]),
    ]
    return Scored(reward, "ok", ", ".join(missing) or None)
