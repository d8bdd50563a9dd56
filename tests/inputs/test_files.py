"""Foreign files as streams of rows, with the place of every row."""

import json
from pathlib import Path

import polars as pl
import pytest

from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.inputs import files

ROWS = [{"n": i, "text": "x" * i} for i in range(600)]  # more than are read at once


def test_jsonl_and_parquet_give_the_same_rows_with_their_places(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    pl.DataFrame(ROWS).write_parquet(tmp_path / "a.parquet")
    lines = list(files.rows(tmp_path / "a.jsonl"))
    assert [row for _, row in lines] == ROWS == [row for _, row in files.rows(tmp_path / "a.parquet")]
    assert lines[2][0] == f"{tmp_path}/a.jsonl, line 3"
    assert next(iter(files.rows(tmp_path / "a.parquet")))[0] == f"{tmp_path}/a.parquet, row 0"


@pytest.mark.parametrize(("line", "what"), [("{", "not valid JSON"), ("[1]", "not a JSON object")])
def test_a_bad_line_is_named(tmp_path: Path, line: str, what: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n\n' + line + "\n")
    with pytest.raises(DataError, match=f"a.jsonl, line 3: {what}"):
        list(files.rows(tmp_path / "a.jsonl"))


def test_a_line_is_what_ends_with_a_newline_and_may_hold_any_value(tmp_path: Path) -> None:
    """U+2028 and U+0085 end a line for str.splitlines, not in JSON Lines."""
    values = ["one\u2028line", {"a": "two\u0085halves"}, [1]]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(v, ensure_ascii=False) for v in values))
    assert list(files.json_lines(tmp_path / "a.jsonl")) == [
        (f"{tmp_path}/a.jsonl, line {number}", value) for number, value in enumerate(values, start=1)
    ]


def test_damage_to_a_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet"):
        list(files.rows(tmp_path / "a.parquet"))


def test_what_is_not_there_and_what_is_not_a_table(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="does not exist"):
        list(files.rows(tmp_path / "a.jsonl"))
    (tmp_path / "a.csv").write_text("n\n1\n")
    with pytest.raises(UsageError, match=r"unknown kind of file '\.csv'"):
        list(files.rows(tmp_path / "a.csv"))
