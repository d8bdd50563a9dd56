"""Rewards that are computed from the text alone. build-pairs uses `refusal_phrase` and `distinct_ngrams` too."""

import re
from collections.abc import Sequence

from prefpipe.config.rewards import Keyword, Length, Refusal, Repetition, ShortSentence
from prefpipe.rewards.base import Answer, RewardFunction, Scored, one_by_one

VERSION = 1  # raise it when a reward below can change: a run never mixes two versions
FEWEST_WORDS, MOST_WORDS = 5, 10
_LONG_WORD = 5
_OPENING = 200  # characters; a refusal stands at the beginning
_REFUSALS = (
    "i can't",
    "i cannot",
    "i can not",
    "i won't",
    "i will not",
    "i am unable",
    "i'm unable",
    "i am not able",
    "i'm not able",
    "i must decline",
    "i have to decline",
    "i must refuse",
    "i'm sorry, but",
    "i am sorry, but",
    "i apologize, but",
    "i apologise, but",
    "sorry, but i",
    "sorry, i can",
    "as an ai",
    "as a language model",
    "i do not feel comfortable",
    "i don't feel comfortable",
    "i'm not comfortable",
    "it would not be appropriate",
    "it is not appropriate for me",
    "it's not appropriate for me",
)
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")


def inputs(_settings: object) -> dict[str, str]:
    """No reward here reads a file."""
    return {}


def short_sentence(_settings: ShortSentence) -> RewardFunction:
    """How far an answer is one new sentence of 5 to 10 words about the topic (`answer`), 0 to 1.

    reward = (2 * length + sentence + topic + new) / 5. length = min(1, words/5, 10/words), so that a word too few costs
    much and "A falcon." never beats a good sentence. sentence: one sentence that ends with a full stop; topic: it names
    the topic; new: it does not echo the instruction ("A river in one short sentence."), which is how the first policies
    won. These three are 0 or 1.
    """
    return one_by_one(lambda a: _short_sentence(a.text.strip(), a.answer or "", a.messages[-1]["content"]))


def length(settings: Length) -> RewardFunction:
    """min(1, count/min, max/count), 0 for an empty text: 1 inside the window, falling in proportion outside.

    Tokens are the sampled ones, with the end-of-sequence token. A completion without token ids has no reward, status
    unparsable.
    """

    def rate(answer: Answer) -> Scored:
        words, characters = num_words(answer.text), len(answer.text.strip())
        count = {"words": words, "characters": characters, "tokens": answer.num_tokens}[settings.unit]
        if count is None:
            return Scored(None, "unparsable", "this completion has no token ids")
        reward = window(count, settings.min, settings.max)
        return Scored(reward, "ok", None if reward == 1 else f"{count} {settings.unit}")

    return one_by_one(rate)


def keyword(settings: Keyword) -> RewardFunction:
    """The share of conditions that hold: each word of `all` is in the text, at least one word of `any` is, each word of
    `none` is not. A word or phrase counts where it stands alone, not inside another word.

    With no words in the settings the prompt's `answer` must be in the text; without an `answer` there is no reward,
    status unparsable.
    """
    has_words = bool(settings.all or settings.any or settings.none)

    def rate(answer: Answer) -> Scored:
        if not has_words and not answer.answer:
            return Scored(None, "unparsable", "no keywords are set and the prompt has no answer")

        def there(word: str) -> bool:
            return stands_in(word, answer.text, ignore_case=settings.ignore_case)

        holds = {f"{word!r} missing": there(word) for word in (settings.all if has_words else (answer.answer or "",))}
        if settings.any:
            holds[f"none of {', '.join(map(repr, settings.any))}"] = any(map(there, settings.any))
        holds |= {f"{word!r} found": not there(word) for word in settings.none}
        missing = [problem for problem, fine in holds.items() if not fine]
        return Scored(sum(holds.values()) / len(holds), "ok", ", ".join(missing) or None)

    return one_by_one(rate)


def repetition(settings: Repetition) -> RewardFunction:
    """Distinct n-grams / n-grams of lower-case words: 1 for a text that never repeats itself, near 0 for a loop.

    A text of fewer than n words repeats nothing: 1. distinct-n of Li et al. 2016 (1510.03055), which divides by tokens.
    """

    def rate(answer: Answer) -> Scored:
        distinct, total = distinct_ngrams(answer.text, settings.n)
        if distinct == total:
            return Scored(1.0)
        return Scored(distinct / total, "ok", f"{distinct} of {total} {settings.n}-grams are distinct")

    return one_by_one(rate)


def refusal(settings: Refusal) -> RewardFunction:
    """0 for a refusal, 1 for an answer; `prefer = "refusal"` swaps them. Status wrong for 0.

    `phrases` of the settings are searched as well as the English ones. The wording is judged, not whether the refusal
    was right.
    """
    phrases = tuple(p.lower() for p in settings.phrases)

    def rate(answer: Answer) -> Scored:
        phrase = refusal_phrase(answer.text, phrases)
        detail = None if phrase is None else f"says {phrase!r}"
        if (phrase is None) == (settings.prefer == "answer"):
            return Scored(1.0, "ok", detail)
        return Scored(0.0, "wrong", detail or "no refusal")

    return one_by_one(rate)


def refusal_phrase(text: str, further: Sequence[str] = ()) -> str | None:
    """The phrase of refusal in the first 200 characters of a completion, or None. Searched are English phrases and
    `further` ones, in lower case."""
    opening = " ".join(text[:_OPENING].lower().replace("\u2019", "'").split())
    return next((phrase for phrase in (*_REFUSALS, *further) if stands_in(phrase, opening)), None)


def distinct_ngrams(text: str, n: int) -> tuple[int, int]:
    """The number of different n-grams of lower-case words in a text, and of all; (0, 0) for fewer than n words."""
    words = text.lower().split()
    ngrams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return len(set(ngrams)), len(ngrams)


def window(count: int, shortest: int, longest: int) -> float:
    """min(1, count/shortest, longest/count), from 0 to 1; for a count of 0 it is 1 if shortest is 0, else 0."""
    if count == 0:
        return float(shortest == 0)
    return min(1.0, count / shortest if shortest else 1.0, longest / count)


def num_words(text: str) -> int:
    """The number of words, which white space separates."""
    return len(text.split())


def is_one_sentence(text: str) -> bool:
    """Whether a text is one line with a single end of a sentence, a full stop."""
    return text.endswith(".") and "\n" not in text and len(_SENTENCE_END.findall(text)) == 1


def names(topic: str, text: str) -> bool:
    """Whether the text names the topic, not inside another word, in the singular or with a plural s."""
    return bool(topic) and re.search(rf"(?<!\w){re.escape(topic)}(e?s)?(?!\w)", text, re.IGNORECASE) is not None


def stands_in(phrase: str, text: str, *, ignore_case: bool = True) -> bool:
    """Whether a word or phrase stands in the text, not inside another word."""
    flags = re.IGNORECASE if ignore_case else re.NOFLAG
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, flags) is not None


def echoes(prompt: str, topic: str, text: str) -> bool:
    """Whether the text repeats a word of five letters or more of the prompt that is no word of the topic."""
    instruction = _words(prompt) - _words(topic)
    return any(len(word) >= _LONG_WORD and word in instruction for word in _words(text))


def _short_sentence(text: str, topic: str, prompt: str) -> Scored:
    words = num_words(text)
    fit = window(words, FEWEST_WORDS, MOST_WORDS)
    holds = {
        "not one sentence": is_one_sentence(text),
        "topic missing": names(topic, text),
        "echoes the prompt": bool(words) and not echoes(prompt, topic, text),
    }
    missing = [*([f"{words} words"] if fit < 1 else []), *(problem for problem, fine in holds.items() if not fine)]
    return Scored((2 * fit + sum(holds.values())) / 5, "ok", ", ".join(missing) or None)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))
