"""Text of others: bounded, nothing hidden in it, and compared word by word without a loss."""

from hypothesis import given
from hypothesis import strategies as st

from prefpipe.stages.report.texts import LONGEST, conversation, difference, shown


def test_what_would_be_invisible_is_written_out() -> None:
    assert shown("a\x1b[31m\u202eb\nc") == "a\\x1b[31m\\u202eb\nc"


def test_a_long_text_says_what_is_missing() -> None:
    assert shown("x" * (LONGEST + 1500)) == "x" * LONGEST + " [… 1,500 more characters]"
    assert shown(12) == "12"


def test_turns_of_a_conversation() -> None:
    assert conversation([{"role": "user", "content": "Hi"}]) == "Hi"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert conversation(turns) == "system: Be brief.\nuser: Hi"
    assert conversation("no list") == ""


def test_words_that_differ() -> None:
    before, after = difference("A river runs.", "A lake runs far.")
    assert [(span.kind, span.text) for span in before] == [
        ("same", "A "), ("changed", "river"), ("same", " runs"), ("same", "."),
    ]  # fmt: skip
    assert [(span.kind, span.text) for span in after] == [
        ("same", "A "), ("changed", "lake"), ("same", " runs"), ("changed", " far"), ("same", "."),
    ]  # fmt: skip


@given(st.text(max_size=60), st.text(max_size=60))
def test_nothing_is_lost_in_a_comparison(before: str, after: str) -> None:
    left, right = difference(before, after)
    assert "".join(span.text for span in left) == before
    assert "".join(span.text for span in right) == after
    assert [s.text for s in left if s.kind == "same"] == [s.text for s in right if s.kind == "same"]


def test_very_long_answers_are_not_compared() -> None:
    left, right = difference("a " * 900, "b " * 900)
    assert [span.kind for span in (*left, *right)] == ["same", "same"]
