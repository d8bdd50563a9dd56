"""The verdict in the answer of a judge: a JSON object, often with prose around it. Time is linear in the text."""

import json
import re
from collections.abc import Sequence
from typing import Any

_SHOWN = 200
_DEEPEST = 8  # objects in one another: each character is read at most so often by each of two readers
_MARKS = re.compile(r'[{}"]|\\.?', re.DOTALL)
Span = tuple[int, int]


def find_verdict(text: str, name: str, allowed: Sequence[Any]) -> tuple[Any, str] | None:
    """(value, reason) of the last JSON object in a text that has the key `name`; None unless its value is allowed."""
    decoder = json.JSONDecoder(strict=False)  # models and grammars leave line breaks inside strings
    for start, end in sorted(objects(text), reverse=True):
        try:
            verdict = decoder.decode(text[start:end])
        except (ValueError, RecursionError):  # brackets of lists may be deep
            continue
        if name in verdict:
            value = verdict[name]
            is_allowed = type(value) in {type(a) for a in allowed} and value in allowed
            reason = str(verdict.get("reason", ""))[:_SHOWN].encode(errors="replace").decode()  # no lone surrogates
            return (value, reason) if is_allowed else None
    return None


def objects(text: str) -> list[Span]:
    """(start, end) of whatever may be a JSON object with at most `_DEEPEST` levels of objects.

    A quote in the prose before an object must not hide it, so that two readings go on side by side: `outside` has the
    open braces of the one for which this place is outside of a string, `inside` those of the other. An object may begin
    wherever there is a brace, and every quote swaps the two. An open brace is its place and the levels inside of it.
    """
    spans: list[Span] = []
    outside: list[list[int]] = []
    inside: list[list[int]] = []
    for mark in _MARKS.finditer(text):
        place, character = mark.start(), mark[0][0]
        if character == '"':
            outside, inside = inside, outside
        elif character == "\\":  # with the character behind it: part of a string, a mistake outside of one
            outside = [[place + 1, 1]] if mark[0] == "\\{" else []
        elif character == "{":
            outside.append([place, 1])
        elif outside:
            start, levels = outside.pop()
            if levels <= _DEEPEST:
                spans.append((start, place + 1))
            if outside:
                outside[-1][1] = max(outside[-1][1], levels + 1)
    return spans
