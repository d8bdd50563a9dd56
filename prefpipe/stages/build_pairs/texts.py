"""Measures of texts and token ids: normal form, refusals, control tokens, repetition, edit distance, n-grams."""

import importlib
import re
from collections.abc import Callable, Sequence

import polars as pl
from rapidfuzz.distance import Levenshtein

from prefpipe import extras
from prefpipe.errors import MissingInputError, UsageError
from prefpipe.rewards import text_rules

CONTROL_TOKENS = (
    r"<\|[A-Za-z0-9_ \-]{1,40}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|^\s*<s>|</s>\s*$"
)
_WORD = re.compile(r"\w+")
_REPEATED_NGRAM = 4


def normal(column: str) -> pl.Expr:
    """Normal form: NFC, no space at either end. A reader cannot tell apart texts that have the same one."""
    return pl.col(column).str.normalize("NFC").str.strip_chars()


def conversation(column: str) -> pl.Expr:
    """Messages as one text: a line `role: content` for each."""
    turn = pl.format("{}: {}", pl.element().struct.field("role"), pl.element().struct.field("content"))
    return pl.col(column).list.eval(turn).list.join("\n")


def folded(text: pl.Expr) -> pl.Expr:
    """Text in lower case, NFC, with one space for any white space."""
    return text.str.normalize("NFC").str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], n: int) -> set[str]:
    """The n-grams of a text; the whole text when it is shorter."""
    if len(tokens) <= n:
        return {" ".join(tokens)} if tokens else set()
    return {" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def is_refusal(text: str) -> bool:
    """Whether a completion refuses, by the phrases of the reward `refusal`."""
    return text_rules.refusal_phrase(text) is not None


def repetition(text: str) -> float:
    """Share of word 4-grams that repeat an earlier one: 1 minus the reward `repetition`, 0 for shorter texts."""
    distinct, total = text_rules.distinct_ngrams(text, _REPEATED_NGRAM)
    return 1 - distinct / total if total else 0.0


def language_in(languages: Sequence[str]) -> Callable[[str], bool]:
    """A function that says whether a text is in one of the languages; a text without letters counts as being in each.

    Raises MissingInputError without the package, UsageError for a code that it does not know.
    """
    try:
        langid = importlib.import_module("py3langid.langid")
    except ModuleNotFoundError as error:
        raise MissingInputError(
            "the filter by language needs the package 'py3langid'", extras.hint("rewards")
        ) from error
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=False)
    unknown = sorted(set(languages) - set(identifier.labels))
    if unknown:
        raise UsageError(f"language '{unknown[0]}' is not known", f"one of {', '.join(identifier.labels)}")
    return lambda text: not any(c.isalpha() for c in text) or identifier.classify(text)[0] in languages


def token_edits(one: Sequence[int], other: Sequence[int]) -> int:
    """Edit distance: insertions, deletions and replacements of tokens that turn one completion into the other."""
    return Levenshtein.distance(one, other)


def jaccard(one: Sequence[int], other: Sequence[int]) -> float:
    """Jaccard similarity of the sets of tokens, from 0 to 1."""
    a, b = set(one), set(other)
    return len(a & b) / len(a | b) if a or b else 1.0
