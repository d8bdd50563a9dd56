"""The reward that ranks completions: one reward by name, or a weighted sum of several, `0.7*helpful + 0.3*math`.

sum    = [sign] term (sign term)*        sign = + or -
term   = factor (* factor)*              at most one factor is a reward; a term of numbers is a constant
factor = number | name | "name"          quotes for names with a minus sign or other signs
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefpipe.config.base import suggestion
from prefpipe.errors import UsageError

LARGEST_REWARD = 1e30  # limit of the absolute value: float32 holds it, and float64 holds the square of a difference
_TOKEN = re.compile(
    r'\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[^\W\d][\w.:]*)|"(?P<quoted>[^"]+)"|(?P<sign>[-+*])'
    r"|(?P<other>\S))"
)
_HOW = "a sum is written as 0.7*helpful + 0.3*math, with a name that has a minus sign in double quotes"


@dataclass(frozen=True)
class RewardSum:
    """A weighted sum of rewards. `weights` are by name, in the order in which they are written; `constant` is added."""

    weights: Mapping[str, float]
    constant: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether the sum is a single reward with weight 1."""
        return list(self.weights.values()) == [1.0] and self.constant == 0


def parse(
    text: str, known: Sequence[str], holder: str = "the inputs", how: str = "pass --reward NAME or a sum"
) -> RewardSum:
    """The reward or sum that `text` describes.

    known: names of the rewards that exist; a known name is taken as it is, even where it looks like a sum
    holder: what has these rewards, for error messages
    how: how a user names the reward, for error messages

    Raises UsageError for an empty text, an unknown name, and a mistake in a sum, with its place.
    """
    choices = f"{holder} hold {', '.join(known)}" if known else f"{holder} hold none: name some when you rate them"
    if not text.strip():
        raise UsageError("no reward given: nothing says which completion is better", f"{how}: {choices}")
    if text.strip() in known:
        return RewardSum({text.strip(): 1.0})
    found = _Parser(text).sum()
    for name in found.weights:
        if name not in known:
            raise UsageError(f"{holder} hold no reward '{name}'{suggestion(name, list(known))}", f"{choices}; {_HOW}")
    return found


@dataclass(frozen=True)
class _Token:
    """A word of a sum. `kind` is a group of _TOKEN, or "end"; `place` counts characters from 1."""

    kind: str
    text: str
    place: int


class _Parser:
    """Parser of one sum, from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = [
            _Token(str(m.lastgroup), m[str(m.lastgroup)], m.start(str(m.lastgroup)) + 1) for m in _TOKEN.finditer(text)
        ]
        self._tokens.append(_Token("end", "", len(text.rstrip()) + 1))
        self._next = 0

    def sum(self) -> RewardSum:
        weights: dict[str, float] = {}
        constant = 0.0
        while self._token.kind != "end":
            name, weight = self._term(-1.0 if self._sign(first=self._next == 0) == "-" else 1.0)
            if name is None:
                constant += weight
            else:
                weights[name] = weights.get(name, 0.0) + weight
        if not weights or not abs(constant) <= LARGEST_REWARD:
            raise self._error(f"a sum needs a reward, and numbers up to {LARGEST_REWARD:g}", self._token)
        for name, weight in weights.items():
            if not 0 < abs(weight) <= LARGEST_REWARD:
                raise UsageError(
                    f"reward {self._text!r}: {name} has the weight {weight:g}",
                    f"a weight is a number but 0, and at most {LARGEST_REWARD:g}",
                )
        return RewardSum(weights, constant)

    @property
    def _token(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        self._next += 1
        return self._tokens[self._next - 1]

    def _sees(self, signs: str) -> bool:
        return self._token.kind == "sign" and self._token.text in signs

    def _sign(self, *, first: bool) -> str:
        """The sign before a term; the first term may have none."""
        if self._sees("+-"):
            return self._take().text
        if first:
            return "+"
        raise self._error("expected + or - or *", self._token)

    def _term(self, weight: float) -> tuple[str | None, float]:
        name = None
        while True:
            token = self._take()
            if token.kind == "number":
                weight *= float(token.text)
            elif token.kind in ("name", "quoted") and name is None:
                name = token.text
            elif token.kind in ("name", "quoted"):
                raise self._error(f"{name} and {token.text} are multiplied: only sums of rewards are known", token)
            else:
                raise self._error("expected a reward or a number", token)
            if not self._sees("*"):
                return name, weight
            self._take()

    def _error(self, problem: str, token: _Token) -> UsageError:
        seen = "the end" if token.kind == "end" else f"'{token.text}'"
        return UsageError(f"reward {self._text!r}, character {token.place} ({seen}): {problem}", _HOW)
