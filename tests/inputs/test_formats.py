"""Every public format as one thing; what is wrong with a row is said with its field."""

from decimal import Decimal
from typing import Any

import pytest

from prefpipe.errors import DataError, RowFault
from prefpipe.inputs import formats

U, A = ({"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Yes")))
T, V = {"role": "tool", "content": "4"}, {"role": "user", "content": "Hm"}
B = {"role": "assistant", "content": "No"}
PAIR = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Sure?\n\nAssistant: "
ANNOTATED = {
    "model": "m",
    "response": "Yes",
    "overall_score": 8.5,
    "fine-grained_score": 4.75,
    "custom_system_prompt": "",
}
ROWS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "TRL standard": ({"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, "preference", False),
    "TRL conversational": ({"prompt": [U], "chosen": [A], "rejected": [B]}, "preference", False),
    "TRL implicit prompt": ({"chosen": [U, A], "rejected": [U, B]}, "preference", False),
    "UltraFeedback binarised": (
        {"prompt": "Hi", "prompt_id": "x", "messages": [U, A], "chosen": [U, A], "rejected": [U, B],
         "score_chosen": 8.0, "score_rejected": 3.5}, "preference", True),
    "HH": ({"chosen": TRANSCRIPT + "Yes", "rejected": TRANSCRIPT + "No"}, "preference", False),
    "TRL unpaired": ({"prompt": "Hi", "completion": "Yes", "label": True}, "label", False),
    "TRL prompt-completion": ({"prompt": [U], "completion": [A]}, "completion", False),
    "UltraFeedback raw": (
        {"source": "s", "instruction": "Hi", "models": ["m", "n"],
         "completions": [ANNOTATED, {"model": "n", "response": "No", "overall_score": 2.0}]}, "list", True),
    "distilabel": (
        {"instruction": "Hi", "generations": ["Yes", "No"], "ratings": [5, 1], "generation_models": ["m", "n"]},
        "list", True),
    "list of texts": ({"prompt": "Hi", "responses": ["Yes", "No"]}, "list", False),
    "one message a side": ({"prompt": "Hi", "chosen": A, "rejected": B}, "preference", False),
    "numbers": ({"prompt": "Hi", "chosen": "Yes", "rejected": "No", "answer": 7}, "preference", False),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Yes"},
         "rejected": {"from": "gpt", "value": "No"}}, "preference", False),
    "Alpaca": ({"instruction": "Hi", "input": "", "chosen": "Yes", "rejected": "No"}, "preference", False),
    "Alpaca answer": ({"instruction": "Hi", "input": "", "output": "Yes"}, "completion", False),
    "HH with a prompt": (
        {"prompt": TRANSCRIPT, "chosen": "Yes", "rejected": "No"}, "preference", False),
    "messages": ({"messages": [U, A]}, "completion", False),
    "parts": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "chosen": [A], "rejected": [B]},
        "preference", False),
    "list of conversations": ({"prompt": [U], "completions": [[A], [B]], "scores": ["4", None]}, "list", True),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_recognised_and_gives_the_same_turns(name: str) -> None:
    row, kind, rated = ROWS[name]
    assert formats.recognise(row, "f, line 1") == kind
    assert formats.has_ratings([row], kind) is rated
    found = formats.parse(row, kind)
    assert found.prompt[-1]["role"] == "user"
    expected = ["Yes"] if kind in ("completion", "label") else ["Yes", "No"]
    assert [turns[-1]["content"] for turns in found.answers] == expected
    assert all([t["role"] for t in turns] == ["assistant"] for turns in found.answers)
    assert (found.ratings is not None) is rated or kind == "list"
    assert len(found.writers) == len(found.answers)


@pytest.mark.parametrize(("name", "ratings", "writers"), [
    ("UltraFeedback binarised", [8.0, 3.5], ["", ""]), ("UltraFeedback raw", [8.5, 2.0], ["m", "n"]),
    ("distilabel", [5.0, 1.0], ["m", "n"]), ("list of texts", [None, None], ["", ""]),
    ("list of conversations", [4.0, None], ["", ""]),
])  # fmt: skip
def test_ratings_and_writers(name: str, ratings: list[float | None], writers: list[str]) -> None:
    row, kind, _ = ROWS[name]
    found = formats.parse(row, kind)
    assert (found.ratings, found.writers) == (ratings, writers)


def test_a_transcript_becomes_turns() -> None:
    row, kind, _ = ROWS["HH"]
    found = formats.parse(row, kind)
    assert [(m["role"], m["content"]) for m in found.prompt] == [
        ("user", "Hi"),
        ("assistant", "Hello!"),
        ("user", "Sure?"),
    ]


def test_a_system_prompt_of_its_own_column_comes_first() -> None:
    row = {"system_prompt": "Be brief.", "instruction": "Hi", "generations": ["Yes"], "ratings": None}
    found = formats.parse(row, "list")
    assert [m["role"] for m in found.prompt] == ["system", "user"]
    assert found.ratings == [None]


def test_the_expected_answer_travels_with_the_prompt() -> None:
    assert formats.parse({"prompt": "1+1", "completion": "2", "answer": "2"}, "completion").answer == "2"


@pytest.mark.parametrize(("row", "reason"), [
    ({"chosen": [U, A, U, A], "rejected": [U, B, U, B]}, "several_turns"),
    ({"chosen": [U, A, T, A], "rejected": [V, A, T, A]}, "several_turns"),
    ({"prompt": "Hi", "chosen": [U], "rejected": [B]}, "empty"),
    ({"prompt": "Ho", "chosen": [U], "rejected": [B]}, "bad_roles"),
    ({"prompt": "Hi", "chosen": [A, T], "rejected": [B]}, "bad_roles"),
    ({"prompt": "Hi", "chosen": [A, {"role": "system", "content": "x"}, A], "rejected": [B]}, "bad_roles"),
    ({"prompt": "Hi", "chosen": [A, T, {"role": "assistant", "content": " "}], "rejected": [B]}, "empty"),
])  # fmt: skip
def test_answers_that_hold_more_than_the_answer_are_left_out(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowFault) as fault:
        formats.parse(row, "preference")
    assert fault.value.reason == reason


@pytest.mark.parametrize(("row", "prompt"), [
    ({"prompt": "Hi", "chosen": [A, U, A], "rejected": [B]}, [U]),
    ({"prompt": "Hi", "chosen": [U, A, T, A], "rejected": [U, B, T, T, B]}, [U]),
    ({"chosen": [U, A, T, A], "rejected": [U, B]}, [U]),
    ({"chosen": [U, A, U, A, T, A], "rejected": [U, A, U, B, T, A]}, [U, A, U]),
    ({"chosen": [U, A, T, A], "rejected": [U, A, {"role": "tool", "content": "5"}, B]}, [U]),
])  # fmt: skip
def test_answers_may_hold_what_tools_say_between_their_turns(row: dict[str, Any], prompt: list[Any]) -> None:
    """The prompt ends where the sides part, in front of a turn of the assistant: what a tool says is never the answer
    to it. What of an answer is scored is decided with the template."""
    found = formats.parse(row, "preference")
    given = [formats.messages(row[side], side, "assistant") for side in ("chosen", "rejected")]
    assert found.prompt == formats.messages(prompt, "prompt", "user")
    assert [turns[-len(answer) :] for turns, answer in zip(given, found.answers, strict=True)] == found.answers
    assert all(answer[0]["role"] == "assistant" for answer in found.answers)
    assert max(map(len, found.answers)) > 1


def test_messages_go_on_behind_the_prompt_or_end_with_the_answer() -> None:
    behind = formats.parse({"prompt": "Hi", "messages": [U, A, T, B]}, "completion")
    assert (behind.prompt, behind.answers) == ([U], [[A, T, B]])
    alone = formats.parse({"messages": [U, A, T, B]}, "completion")
    assert (alone.prompt, alone.answers) == ([U, A, T], [[B]])


@pytest.mark.parametrize(("kind", "row", "words"), [
    ("list", {"prompt": "Hi", "completions": ["a", "b"], "ratings": [1]}, "'ratings' has 1 entries for 2 answers"),
    ("list", {"prompt": "Hi", "completions": ["a"], "ratings": ["good"]}, "rating 0 of completions is 'good'"),
    ("list", {"prompt": "Hi", "completions": ["a"], "ratings": [True]}, "rating 0 of completions is 'True'"),
    ("list", {"prompt": "Hi", "completions": [None]}, r"field 'completions\[0\]' is null"),
    ("list", {"completions": ["a"]}, "the file began with rows of format 'list'"),
    ("list", {"prompt": None, "completions": ["a"]}, "no field holds the prompt"),
    ("preference", {"chosen": "a", "rejected": "b"}, "no field holds the prompt"),
    ("preference", {**PAIR, "score_chosen": "x", "score_rejected": 1}, "score_chosen is 'x'"),
    ("preference", {**PAIR, "score_chosen": 10**400, "score_rejected": 1}, "score_chosen is '1000"),
    ("preference", {**PAIR, "chosen": None}, "field 'chosen' is null"),
    ("preference", {"prompt": "Hi", "chosen": "a"}, "field 'rejected' is missing"),
    ("label", {"prompt": "Hi", "completion": "a", "label": "perhaps"}, "field 'label' is 'perhaps'"),
    ("label", {"prompt": "Hi", "completion": "a", "label": None}, "field 'label' is null"),
    ("label", {"prompt": "Hi", "completion": "a"}, "the file began with rows of format 'label'"),
    ("completion", {"prompt": "Hi", "completion": "a", "label": True}, "began with rows of format 'completion'"),
])  # fmt: skip
def test_what_is_wrong_is_named(kind: str, row: dict[str, Any], words: str) -> None:
    with pytest.raises(RowFault, match=words):
        formats.parse(row, kind)


def test_unknown_columns_are_listed() -> None:
    with pytest.raises(DataError, match="f, line 1: no known format has the columns title, text"):
        formats.recognise({"title": "a", "text": "b"}, "f, line 1")
    with pytest.raises(DataError, match="f, line 1: a column 'chosen' or 'rejected' is missing"):
        formats.recognise({"prompt": "a", "chosen": "b"}, "f, line 1")


S = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("row", [
    {"system": "Be brief.", "chosen": [U, A], "rejected": [U, B]},
    {"system": "Be brief.", "prompt": "Hi", "chosen": [U, A], "rejected": [U, B]},
    {"system": " Be brief.", "prompt": [S, U], "chosen": [A], "rejected": [B]},
    {"prompt": [S, U], "chosen": [U, A], "rejected": [U, B]},
    {"prompt": "Hi", "chosen": [S, U, A], "rejected": [S, U, B]},
    {"prompt": [], "chosen": [S, U, A], "rejected": [S, U, B]},
])  # fmt: skip
def test_no_system_message_is_lost_where_the_sides_repeat_the_prompt(row: dict[str, Any]) -> None:
    found = formats.parse(row, "preference")
    assert (found.prompt, found.answers) == ([S, U], [[A], [B]])


def test_a_prompt_may_be_the_end_of_what_both_sides_answer() -> None:
    found = formats.parse({"prompt": "Hm", "chosen": [U, A, V, A], "rejected": [U, A, V, B]}, "preference")
    assert (found.prompt, found.answers) == ([U, A, V], [[A], [B]])


def test_a_system_message_that_differs_from_its_column_is_a_fault() -> None:
    with pytest.raises(RowFault, match="another system message than field 'system'"):
        formats.parse({**PAIR, "prompt": [S, U], "system": "Be long."}, "preference")


@pytest.mark.parametrize("turns", [
    [U, A], [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}], [["Hi", "Yes"]],
])  # fmt: skip
def test_history_is_turns_or_pairs_of_texts(turns: list[Any]) -> None:
    row = {**PAIR, "prompt": "Hm", "history": turns}
    assert formats.parse(row, "preference").prompt == [U, A, V]
    assert "history" not in formats.others(row)


def test_a_list_of_thousands_of_columns_is_cut() -> None:
    with pytest.raises(DataError, match=r"c0, .*, c29 and 4970 more$"):
        formats.recognise([f"c{i}" for i in range(5000)], "f")


def test_a_first_row_without_a_rating_is_still_of_a_rated_file() -> None:
    assert formats.has_ratings([{"prompt": "Hi", "completions": ["a"], "ratings": None}], "list")
    assert formats.has_ratings([{"prompt": "Hi", "completions": [{"response": "a", "overall_score": None}]}], "list")
    assert not formats.has_ratings([{"prompt": "Hi", "completions": [{"response": "a"}]}], "list")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "N/A", "", None])
def test_no_rating_is_none(value: Any) -> None:
    assert formats.parse({"prompt": "Hi", "completions": ["a"], "ratings": [value]}, "list").ratings == [None]


def test_one_answer_a_row_may_have_a_rating() -> None:
    row = {"prompt": "Hi", "completion": "Yes", "rating": "3.5", "score": "high"}
    assert formats.has_ratings([row], "completion")
    assert formats.parse(row, "completion").ratings == [3.5]
    assert formats.parse({**row, "rating": None}, "completion").ratings == [None]
    assert formats.parse({"prompt": "Hi", "completion": "Yes"}, "completion").ratings is None
    assert formats.parse({**row, "rating": "good", "label": 1}, "label").ratings is None
    assert not formats.has_ratings([{**row, "label": 1}], "label")


@pytest.mark.parametrize("value", [1.1e30, -1e308, "1e31"])
def test_a_rating_whose_square_is_no_number_is_a_fault(value: Any) -> None:
    with pytest.raises(RowFault, match="a rating is at most 1e\\+30"):
        formats.parse({"prompt": "Hi", "completions": ["a"], "ratings": [value]}, "list")


def test_a_decimal_is_a_rating() -> None:
    """Spark and DuckDB write them."""
    assert formats.parse({"prompt": "Hi", "completions": ["a"], "ratings": [Decimal("4.5")]}, "list").ratings == [4.5]


def test_the_kind_follows_from_names_and_not_from_values() -> None:
    assert formats.recognise({"prompt": "Hi", "completion": None, "label": None}, "f") == "label"
    assert formats.recognise({"prompt": None, "chosen": None, "rejected": None}, "f") == "preference"


@pytest.mark.parametrize(
    ("value", "label"), [(1, True), (0, False), (0.0, False), ("True", True), ("yes", True), (" NO ", False)]
)
def test_labels_in_other_words(value: Any, label: bool) -> None:
    assert formats.parse({"prompt": "Hi", "completion": "a", "label": value}, "label").label is label


def test_an_instruction_keeps_its_input_and_its_history() -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3", "history": [["Hi", "Yes"]], "system": "Be brief."}
    found = formats.parse(row, "completion")
    assert [m["content"] for m in found.prompt] == ["Be brief.", "Hi", "Yes", "Add.\n1 and 2"]
    assert formats.others(row) == {}


def test_columns_that_nothing_reads_stay_with_the_prompt() -> None:
    row = {**PAIR, "question": "q", "output": "o", "level": 3}
    assert formats.others(row) == {"question": "q", "output": "o", "level": 3}


def test_an_answer_without_text_is_empty_but_a_tool_call_is_an_answer() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    found = formats.parse({"prompt": "Hi", "chosen": [call], "rejected": "no"}, "preference")
    assert "tool_calls" in found.answers[0][0].get("extra", "")
    with pytest.raises(RowFault) as fault:
        formats.parse({"prompt": "Hi", "chosen": " ", "rejected": "no"}, "preference")
    assert fault.value.reason == "empty"


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (("Prompt", "Chosen", "Rejected"), "--column prompt=Prompt --column chosen=Chosen --column rejected=Rejected"),
        (("prompt", "chosen_text", "rejected_text"), "--column chosen=chosen_text --column rejected=rejected_text"),
        (("Messages", "id"), "--column messages=Messages"),
        (("prompt", "chosen_text"), "`prefpipe generate --prompts`"),
        (("question", "response_j"), "`prefpipe generate --prompts`"),
        (("title", "text"), "--column NAME=COLUMN renames"),
        ((), "--column NAME=COLUMN renames"),
    ],
)
def test_columns_of_no_format_have_a_way_out(columns: tuple[str, ...], hint: str) -> None:
    with pytest.raises(DataError) as caught:
        formats.recognise(columns, "f, line 1")
    assert hint in caught.value.hint


def test_a_file_of_another_format_is_told_what_reads_it() -> None:
    error = formats.other_kind("label", "preference", "f, line 1")
    assert error.message == "f, line 1: a row of format 'label', not 'preference'"
    assert "--labels of `prefpipe train`" in error.hint
