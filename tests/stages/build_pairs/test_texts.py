"""What is read from texts, by hand and against plain Python."""

import sys
from unicodedata import normalize

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefpipe.config.rewards import Refusal, Repetition
from prefpipe.errors import MissingInputError, UsageError
from prefpipe.rewards import text_rules
from prefpipe.rewards.base import Answer
from prefpipe.stages.build_pairs import texts


@given(st.text(alphabet="ae\u0301\u00e9 \n\tz", max_size=8))
def test_normal_form_is_nfc_without_spaces_around(text: str) -> None:
    found = pl.DataFrame({"t": [text]}).select(texts.normal("t")).item()
    assert found == normalize("NFC", text).strip()


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True), ("I\u2019m sorry, but no", True),
        ("Unfortunately, I can't help you.", True), ("I can help.", False),
        ("The sorry state of it: I'm sorry was all he said.", False), ("x" * 200 + " I cannot do that.", False),
    ],
)  # fmt: skip
def test_a_refusal_is_what_the_reward_calls_one(text: str, refuses: bool) -> None:
    rate = text_rules.refusal(Refusal())
    (scored,) = rate([Answer([], text, None)])
    assert texts.is_refusal(text) is refuses is (scored.reward == 0)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("done<|im_end|>", True), ("<|start_header_id|>user", True), ("[INST] hi", True), ("x [/INST]", True),
        ("<<SYS>>", True), ("<end_of_turn>", True), ("<s>begins", True), ("ends</s> ", True),
        ("a <s>struck</s> word", False),
        ("a || b <| c", False), ("x[i] < y", False), ("[INSTALL]", False),
    ],
)  # fmt: skip
def test_control_tokens(text: str, found: bool) -> None:
    assert pl.Series([text]).str.contains(texts.CONTROL_TOKENS).item() is found


def test_repetition_by_hand() -> None:
    """'a b c d' four times: 13 4-grams, 4 different; six different words: none; three words have no 4-gram."""
    assert texts.repetition("a b c d " * 4) == pytest.approx(9 / 13)
    assert texts.repetition("one two three four five six") == 0.0
    assert texts.repetition("one one one") == 0.0
    assert texts.repetition("") == 0.0


@given(st.lists(st.sampled_from("abA"), max_size=12).map(" ".join))
def test_repetition_is_what_the_reward_of_four_words_takes_off(text: str) -> None:
    (scored,) = text_rules.repetition(Repetition(n=4))([Answer([], text, None)])
    assert texts.repetition(text) == pytest.approx(1 - (scored.reward or 0.0))


def test_ngrams_of_a_short_text_are_the_text() -> None:
    assert texts.ngrams(texts.words("To be, or not!"), 2) == {"to be", "be or", "or not"}
    assert texts.ngrams(["a", "b"], 2) == texts.ngrams(["a", "b"], 9) == {"a b"}
    assert texts.ngrams([], 3) == set()


def test_an_unknown_language_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="language 'xx' is not known"):
        texts.language_in(["en", "xx"])
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(MissingInputError, match="needs the package 'py3langid'"):
        texts.language_in(["en"])


TOKENS = st.lists(st.integers(0, 3), max_size=7)


@given(TOKENS, TOKENS)
def test_token_edits_is_the_edit_distance(one: list[int], other: list[int]) -> None:
    rows = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        before, rows[0] = rows[0], i
        for j, b in enumerate(other, start=1):
            before, rows[j] = rows[j], min(rows[j] + 1, rows[j - 1] + 1, before + (a != b))
    assert texts.token_edits(one, other) == rows[-1]


def test_jaccard() -> None:
    assert texts.jaccard([1, 1, 2], [2, 3]) == pytest.approx(1 / 3)
    assert texts.jaccard([], []) == 1.0


def test_a_conversation_names_its_roles_and_folds() -> None:
    messages = [[{"role": "system", "content": "Be  kind"}, {"role": "user", "content": "HI \u00c9"}]]
    frame = pl.DataFrame({"m": messages})
    assert frame.select(texts.conversation("m")).item() == "system: Be  kind\nuser: HI \u00c9"
    assert frame.select(texts.folded(texts.conversation("m"))).item() == "system: be kind user: hi \u00e9"
