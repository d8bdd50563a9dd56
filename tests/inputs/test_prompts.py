"""The prompts of a file: what is kept, in which order, and what is said of the rest."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.ids import content_id
from prefpipe.inputs import hub
from prefpipe.inputs.prompts import Prompts, read_prompts
from tests.conftest import ROOT, Write


def test_messages_and_plain_text_are_the_same_prompt(write: Write) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    path = write({"messages": messages}, {"prompt": "Hi"}, {"prompt": messages}, {"messages": None, "prompt": "Hi"})
    prompts, dropped = read_prompts(path, "train", 0)
    assert [p.messages for p in prompts] == [messages]
    (prompt,) = prompts
    assert prompt.prompt_id == content_id(messages, None)
    assert [(d.reason, d.detail) for d in dropped] == [
        ("duplicate", f"{path}, line {n} repeats an earlier prompt") for n in (2, 3, 4)
    ]
    assert {d.id for d in dropped} == {prompt.prompt_id}


def test_a_prompt_keeps_all_its_columns(write: Write) -> None:
    row = {"prompt": "Hi", "answer": "hi", "source": "us", "level": 3, "tags": ["é"], "prompt_id": "foreign"}
    ((prompt,), _) = read_prompts(write(row), "train", 0)
    assert (prompt.answer, prompt.source, prompt.split) == ("hi", "us", "train")
    assert json.loads(prompt.meta) == {"level": 3, "tags": ["é"]}
    assert prompt.prompt_id == content_id(prompt.messages, "hi") != content_id(prompt.messages, None)


def test_parquet_and_jsonl_give_the_same_prompts(write: Write, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": c}], "answer": c, "split": "train"} for c in "abc"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (parquet, _), (jsonl, _) = (
        read_prompts(tmp_path / "rows.parquet", "train", 0),
        read_prompts(write(*rows), "train", 0),
    )
    assert list(parquet) == list(jsonl)
    assert len(jsonl) == 3


def test_splits_and_limit(write: Write) -> None:
    """Rows 0, 2, 4 are held out; a row without a split belongs to train."""
    rows = [{"prompt": str(i), **({"split": "heldout"} if i % 2 == 0 else {})} for i in range(6)]
    path = write(*rows)

    def texts(split: str, limit: int) -> list[str]:
        return [p.messages[0]["content"] for p in read_prompts(path, split, limit)[0]]

    assert texts("train", 0) == ["1", "3", "5"]
    assert texts("heldout", 0) == ["0", "2", "4"]
    assert texts("all", 0) == list("012345")
    assert texts("heldout", 2) == ["0", "2"]
    assert texts("all", 99) == list("012345")


def test_a_duplicate_counts_within_its_split_only(write: Write) -> None:
    path = write({"prompt": "a"}, {"prompt": "a", "split": "heldout"}, {"prompt": "a"})
    prompts, dropped = read_prompts(path, "train", 0)
    assert (len(prompts), len(dropped)) == (1, 1)
    assert "line 3" in dropped[0].detail


def test_a_split_that_is_not_there_lists_those_that_are(write: Write) -> None:
    with pytest.raises(DataError, match=r"no prompt with split 'test' \(splits there: heldout, train\)") as caught:
        read_prompts(write({"prompt": "a"}, {"prompt": "b", "split": "heldout"}), "test", 0)
    assert "--split" in caught.value.hint
    with pytest.raises(DataError, match="no usable prompt: it has no rows"):
        read_prompts(write(), "train", 0)
    with pytest.raises(DataError, match=r"no usable prompt: 1 bad_content, 1 null, 1 missing \(first: .*line 1"):
        read_prompts(
            write({"prompt": None, "messages": [None]}, {"messages": [{"role": "user"}]}, {"a": 1}), "train", 0
        )


@pytest.mark.parametrize(("row", "error"), [("{", "line 2: not valid JSON"), ("[1]", "line 2: not a JSON object")])
def test_an_error_of_a_file_names_file_and_line(write: Write, row: Any, error: str) -> None:
    path = write({"prompt": "fine"}, row)
    with pytest.raises(DataError, match=f"^{path}, {error}") as caught:
        read_prompts(path, "train", 0)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"text": "x"}, "missing", r"no field holds the prompt \(fields: text\)"),
        ({"prompt": True}, "bad_content", "field 'prompt' is bool"),
        ({"messages": [{"role": "user"}]}, "null", r"the content of messages\[0\] is null"),
        ({"messages": [{"content": "x"}]}, "bad_content", "no role"),
        ({"messages": ["x"]}, "bad_content", "not a message"),
        ({"prompt": "x", "answer": [3]}, "bad_content", "field 'answer' is list"),
        ({"prompt": "x", "images": ["a.png"]}, "not_carried", "column 'images'"),
        ({"prompt": "x", "tools": "no JSON"}, "bad_template_input", "'tools'"),
        ({"prompt": "x", "tools": {"a": 1}}, "bad_template_input", "'tools' is dict"),
    ],
)
def test_a_faulty_row_is_a_row_of_the_ledger(write: Write, row: Any, reason: str, detail: str) -> None:
    path = write({"prompt": "fine"}, row)
    prompts, dropped = read_prompts(path, "train", 0)
    assert len(prompts) == 1
    assert [(d.id, d.reason) for d in dropped] == [(f"{path}, line 2", reason)]
    assert re.search(detail, dropped[0].detail)


def test_a_number_is_a_text(write: Write) -> None:
    ((prompt,), dropped) = read_prompts(write({"prompt": 3, "answer": 4.5}), "train", 0)
    assert (prompt.messages[0]["content"], prompt.answer, dropped) == ("3", "4.5", [])


def test_columns_under_other_names(write: Write) -> None:
    path = write({"q": "a", "prompt": "unused"}, {"q": "b", "prompt": "unused"})
    prompts, _ = read_prompts(path, "train", 0, {"prompt": "q"})
    assert [p.messages[0]["content"] for p in prompts] == ["a", "b"]
    with pytest.raises(DataError, match="line 1: no column 'x'"):
        read_prompts(path, "train", 0, {"prompt": "x"})


def test_tools_are_a_part_of_the_prompt(write: Write) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    prompts, _ = read_prompts(write({"prompt": "a"}, {"prompt": "a", "tools": json.dumps(tools)}), "train", 0)
    plain, with_tools = prompts
    assert plain.prompt_id != with_tools.prompt_id
    assert json.loads(with_tools.template_inputs or "") == {"tools": tools}
    assert json.loads(with_tools.meta) == {}


def test_text_that_is_no_unicode_is_told_with_its_place(write: Write, tmp_path: Path) -> None:
    r"""Half of a surrogate pair ("\ud800") is legal JSON but can be neither hashed nor stored as UTF-8."""
    path = write({"prompt": "fine"}, r'{"prompt": "half \ud800"}')
    prompts, dropped = read_prompts(path, "train", 0)
    assert len(prompts) == 1
    assert [(d.id, d.reason) for d in dropped] == [(f"{path}, line 2", "not_unicode")]
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl, line 1"):
        read_prompts(latin, "train", 0)


def test_a_faulty_parquet_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": pa.array(["a", None])}), path)
    _, dropped = read_prompts(path, "train", 0)
    assert [(d.id, d.reason) for d in dropped] == [(f"{path}, row 1", "missing")]


def test_blank_lines_do_not_count_but_keep_line_numbers_right(write: Write) -> None:
    path = write({"prompt": "a"}, "", "  ", {"answer": "b"})
    _, dropped = read_prompts(path, "train", 0)
    assert [d.id for d in dropped] == [f"{path}, line 4"]


def test_files_that_are_not_there_or_of_another_kind(write: Write, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"nowhere\.jsonl does not exist"):
        read_prompts(tmp_path / "nowhere.jsonl", "train", 0)
    with pytest.raises(UsageError, match=r"unknown kind of file '\.csv'"):
        read_prompts(write(name="rows.csv"), "train", 0)
    with pytest.raises(DataError, match="cannot read"):
        read_prompts(write("no parquet", name="rows.parquet"), "train", 0)


def test_the_shipped_prompts_load_completely() -> None:
    path = ROOT / "data" / "prompts.jsonl"
    lines = path.read_text().splitlines()
    prompts, dropped = read_prompts(path, "all", 0)
    assert not dropped
    assert len(prompts) == len(lines)
    assert {p.split for p in prompts} == {"train", "heldout"}
    assert all(p.answer and p.answer in p.messages[-1]["content"] for p in prompts)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_part_is_every_nth_of_the_prompts_that_are_kept(write: Write, number: int) -> None:
    """Rows 0 to 6 without the repeated row 2 and the held-out row 4."""
    rows = [{"prompt": str(i if i != 2 else 0), "split": "heldout" if i == 4 else "train"} for i in range(7)]
    prompts, _ = read_prompts(write(*rows), "train", 0)
    part = prompts.part(number, 3)
    assert [p.messages[0]["content"] for p in part] == ["0", "1", "3", "5", "6"][number - 1 :: 3]
    assert len(part) == len(list(part)) == len(list(part))


def test_a_stream_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompts are read again from a copy, as often as a run asks for them, and by parts."""
    content = [{"prompt": f"Name {i}. ½", "answer": str(i), "level": i} for i in range(5)]
    content[1:1] = [{"prompt": None}, {"prompt": "Other", "split": "test"}, content[0]]
    asked: list[str] = []

    def stream(source: str) -> Iterator[dict[str, Any]]:
        asked.append(source)
        return iter(content)

    monkeypatch.setattr(hub, "rows", stream)
    prompts, dropped = read_prompts("hf:o/n@v1", "train", 4)
    assert [d.reason for d in dropped] == ["missing", "duplicate"]
    first = list(prompts)
    assert [(p.messages[0]["content"], p.answer, json.loads(p.meta)) for p in first] == [
        (f"Name {i}. ½", str(i), {"level": i}) for i in range(4)
    ]
    assert list(zip(prompts, prompts, strict=True)) == list(zip(first, first, strict=True))
    assert list(prompts.part(2, 2)) == first[1::2]
    assert asked == ["hf:o/n@v1"]


def test_a_faulty_row_holds_its_place(write: Write) -> None:
    """One of another split, one beyond the limit and one that repeats another have none."""
    rows = [{"prompt": "a"}, {"prompt": None}, {"prompt": None, "split": "test"}, {"prompt": "a"}, {"prompt": "b"}]
    path = write(*rows, {"prompt": None}, {"prompt": "c"})

    def places(prompts: Prompts) -> list[str | None]:
        return [p and p.messages[0]["content"] for p in prompts.places()]

    prompts, _ = read_prompts(path, "train", 0)
    assert places(prompts) == ["a", None, "b", None, "c"]
    assert (len(prompts), prompts.num_places) == (3, 5)
    assert [places(prompts.part(i, 2)) for i in (1, 2)] == [["a", "b", "c"], [None, None]]
    assert places(prompts.without_places()) == ["a", "b", "c"]
    assert places(read_prompts(path, "train", 2)[0]) == ["a", None, "b"]


@pytest.mark.parametrize("then", [[{"prompt": "a"}], [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}],
                                  [{"prompt": None}, {"prompt": "b"}]])  # fmt: skip
def test_a_file_that_changes_between_two_readings(write: Write, then: list[dict[str, Any]]) -> None:
    path = write({"prompt": "a"}, {"prompt": "b"})
    prompts, _ = read_prompts(path, "train", 0)
    write(*then)
    with pytest.raises(DataError, match="changed while it was read"):
        list(prompts)
