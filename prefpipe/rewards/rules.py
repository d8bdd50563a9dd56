"""Rewards computed from the text alone."""

import re
from collections.abc import Sequence

from prefpipe.rewards.base import Answer, Scored

VERSION = 1  # raise it when a reward below can change: a run never mixes two versions
FEWEST_WORDS, MOST_WORDS = 5, 10
_LONG_WORD = 5
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")


def short_sentence(answers: Sequence[Answer]) -> list[Scored]:
    """One sentence of 5 to 10 words that ends with a full stop, names the topic and says something of its own, 0 to 1.

    reward = (2 * length + sentence + topic + own) / 5. length = min(1, words/5, 10/words): one word too few costs as
    clearly as some too many, so "A falcon." never beats a good sentence. sentence, topic and own are 0 or 1; own is 0
    for an answer that echoes the instruction ("A river in one short sentence."), which is how the first policies won.
    """
    return [_short_sentence(a.text.strip(), a.answer or "", a.messages[-1]["content"]) for a in answers]


def num_words(text: str) -> int:
    """Words separated by white space."""
    return len(text.split())


def is_one_sentence(text: str) -> bool:
    """One line, one sentence end, and that is a full stop."""
    return text.endswith(".") and "\n" not in text and len(_SENTENCE_END.findall(text)) == 1


def names(topic: str, text: str) -> bool:
    """Whether the topic stands in the text as words of its own, in the singular or with a plural s."""
    return bool(topic) and re.search(rf"(?<!\w){re.escape(topic)}(e?s)?(?!\w)", text, re.IGNORECASE) is not None


def echoes(prompt: str, topic: str, text: str) -> bool:
    """Whether a longer word of the prompt (five letters or more), the topic's own aside, comes back in the text."""
    instruction = _words(prompt) - _words(topic)
    return any(len(word) >= _LONG_WORD and word in instruction for word in _words(text))


def _short_sentence(text: str, topic: str, prompt: str) -> Scored:
    words = num_words(text)
    length = min(1.0, words / FEWEST_WORDS, MOST_WORDS / words) if words else 0.0
    holds = {
        "not one sentence": is_one_sentence(text),
        "topic missing": names(topic, text),
        "echoes the prompt": bool(words) and not echoes(prompt, topic, text),
    }
    missing = [*([f"{words} words"] if length < 1 else []), *(problem for problem, fine in holds.items() if not fine)]
    return Scored((2 * length + sum(holds.values())) / 5, "ok", ", ".join(missing) or None)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))
