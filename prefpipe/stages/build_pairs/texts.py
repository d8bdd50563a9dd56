"""What is read from texts and token ids: normal form, refusals, control tokens, repetition, edit distance, n-grams."""

import importlib
import re
from collections.abc import Callable, Sequence

import polars as pl
from rapidfuzz.distance import Levenshtein

from prefpipe.errors import MissingInputError, UsageError

_CANNOT = "can ?not|can['\u2019]?t|won['\u2019]?t|will not|am (?:unable|not able) to"
_HELP = "help|assist|provide|comply|fulfill|answer|create|write|generate|support|engage|do that|discuss"
REFUSAL = (
    r"(?i)^\W*(?:(?:i['\u2019]?m|i am) (?:very |so |really |truly )?sorry\b|sorry, (?:but )?(?:i|as)\b|"
    r"(?:i apologi[sz]e|my apologies)\b|as an ai\b|"
    rf"(?:unfortunately, )?i(?: (?:{_CANNOT})|['\u2019]?m (?:unable|not able) to) (?:{_HELP})\b)"
)
CONTROL_TOKENS = (
    r"<\|[A-Za-z0-9_ \-]{1,40}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|^\s*<s>|</s>\s*$"
)
_WORD = re.compile(r"\w+")
_REPEATED_NGRAM = 4


def normal(column: str) -> pl.Expr:
    """Texts that a reader cannot tell apart are the same: NFC, no space at either end."""
    return pl.col(column).str.normalize("NFC").str.strip_chars()


def conversation(column: str) -> pl.Expr:
    """Messages as one text, roles included."""
    turn = pl.format("{}: {}", pl.element().struct.field("role"), pl.element().struct.field("content"))
    return pl.col(column).list.eval(turn).list.join("\n")


def folded(text: pl.Expr) -> pl.Expr:
    """Text without differences of case, spaces and composition of characters."""
    return text.str.normalize("NFC").str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], n: int) -> set[str]:
    """The n-grams of a text; the whole text when it is shorter."""
    if len(tokens) <= n:
        return {" ".join(tokens)} if tokens else set()
    return {" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def repetition(text: str) -> float:
    """Share of word 4-grams that repeat an earlier one; 0 for shorter texts."""
    tokens = words(text)
    total = len(tokens) - _REPEATED_NGRAM + 1
    return 1 - len(ngrams(tokens, _REPEATED_NGRAM)) / total if total > 1 else 0.0


def language_in(languages: Sequence[str]) -> Callable[[str], bool]:
    """Whether a text is in one of the languages; texts without letters are in all of them.

    Raises MissingInputError without the package, UsageError for a code that it does not know.
    """
    try:
        langid = importlib.import_module("py3langid.langid")
    except ModuleNotFoundError as error:
        raise MissingInputError(
            "the filter by language needs the package 'py3langid'", "install it with: pip install 'prefpipe[rewards]'"
        ) from error
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=False)
    unknown = sorted(set(languages) - set(identifier.labels))
    if unknown:
        raise UsageError(f"language '{unknown[0]}' is not known", f"one of {', '.join(identifier.labels)}")
    return lambda text: not any(c.isalpha() for c in text) or identifier.classify(text)[0] in languages


def token_edits(one: Sequence[int], other: Sequence[int]) -> int:
    """Insertions, deletions and replacements of tokens that turn one completion into the other."""
    return Levenshtein.distance(one, other)


def jaccard(one: Sequence[int], other: Sequence[int]) -> float:
    """Overlap of the sets of tokens, from 0 to 1."""
    a, b = set(one), set(other)
    return len(a & b) / len(a | b) if a or b else 1.0
