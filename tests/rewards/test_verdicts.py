"""The verdict in what a judge says: the last object that has the name, whatever prose is around it, in linear time."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.rewards.verdicts import find_verdict

RATINGS = range(1, 11)


def by_trying(text: str) -> tuple[object, str] | None:
    """The definition: of the objects that begin at some brace, the last one that has the name."""
    for start in reversed([i for i, c in enumerate(text) if c == "{"]):
        try:
            verdict, _ = json.JSONDecoder(strict=False).raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if "rating" in verdict:
            value = verdict["rating"]
            return (value, str(verdict.get("reason", ""))) if type(value) is int and value in RATINGS else None
    return None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"better": "first"} then {"better": "tie"}', ("tie", "")),
        ('{"better": "both"}', None),
        ('{"better": "first"} {"better": "both"}', None),
        ('He said "no and {"better": "first", "reason": "a\nb"}', ("first", "a\nb")),
        (r'\"hi\" \{"better": "first"}', ("first", "")),
        ('{"better": "first", "of": {"a": {"b": 1}}}', ("first", "")),
        ('{"of": {"better": "first"}}', ("first", "")),
        ('{"reason": "say {\\"better\\": \\"tie\\"}", "better": "first"}', ("first", 'say {"better": "tie"}')),
        ('{"better": "first", "reason": "\\ud800"}', ("first", "?")),
        ("```json\n```json\n" * 9 + '{"better": "first"}\n```', ("first", "")),
        ('{"better": ["first"]}', None),
        ('{"better": NaN}', None),
        ("", None),
    ],
)
def test_find_verdict(text: str, found: object) -> None:
    assert find_verdict(text, "better", ["first", "tie"]) == found


PARTS = ["{", "}", '"', "\\", "[", "]", ":", ",", " ", "x", '"rating"', '"rating": 7', '{"rating": 3}', '"reason": "a"']


@settings(max_examples=600)
@given(st.lists(st.sampled_from(PARTS), max_size=24).map("".join))
def test_it_finds_what_trying_every_brace_finds(text: str) -> None:
    assert find_verdict(text, "rating", RATINGS) == by_trying(text)


HOSTILE = {  # what is repeated until the text is as long as asked for, and what ends it
    "open": ("{", ""),
    "closed": ("{", "}" * 20_000),
    "unclosed": ('{"a":', ""),
    "lists": ('{"a":' + "[" * 500, ""),
    "wide": ('{"a":[' + "1," * 200, ""),
    "quotes": ('"', ""),
    "quoted": ('{"', ""),
    "odd": ('{""" ', ""),
    "backslashes": ("\\", ""),
    "escaped": ('{"\\', ""),
    "fences": ("```json\n{", "```" * 2_000),
    "digits": ("9", "}"),
    "levels": ('{"a":' * 8 + "1" + "}" * 8, ""),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_ten_times_the_text_takes_ten_times_as_long(kind: str) -> None:
    """Processor time, the least of three; a quadratic reader would take a hundred times as long."""

    def seconds(size: int) -> float:
        unit, end = HOSTILE[kind]
        text, spent = '{"rating":' + (unit * size)[:size] + end, []
        for _ in range(3):
            start = time.process_time()
            assert find_verdict(text, "rating", RATINGS) is None
            spent.append(time.process_time() - start)
        return min(spent)

    assert seconds(40_000) < 40 * max(seconds(4_000), 0.001)
