"""Foreign files as streams of rows, with the place of every row."""

import json
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
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
    assert list(files.values(tmp_path / "a.jsonl")) == [
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


def packed(text: str, suffix: str) -> bytes:
    codec = {"gz": "gzip", "zst": "zstd", "bz2": "bz2"}[suffix]
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(text.encode())
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2"])
def test_a_compressed_file_is_read_as_it_is(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(packed("\n".join(map(json.dumps, ROWS)), suffix))
    assert [row for _, row in files.rows(path)] == ROWS
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot read"):
        list(files.rows(path))


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_its_entries(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS[:3], indent=indent))
    assert list(files.rows(path)) == [(f"{path}, row {i}", row) for i, row in enumerate(ROWS[:3])]
    path.write_text("[1]")
    with pytest.raises(DataError, match="row 0: not a JSON object"):
        list(files.rows(path))
    path.write_text('[{"a": 1},')
    with pytest.raises(DataError, match="not valid JSON"):
        list(files.rows(path))


def test_a_folder_is_its_files_by_name(tmp_path: Path) -> None:
    """As Spark writes it, in partitions; and as `datasets` saves it, in streams without an index."""
    pl.DataFrame(ROWS[:200]).write_parquet(tmp_path / "part-0.parquet")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "x=1").mkdir()
    pl.DataFrame(ROWS[200:]).write_parquet(tmp_path / "x=1" / "part-1.parquet")
    assert [row for _, row in files.rows(tmp_path)] == ROWS
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    assert [row for _, row in files.rows(tmp_path / "saved")] == ROWS
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInputError, match="holds no data files"):
        list(files.rows(tmp_path / "empty"))


def table_of(messages: list[list[dict[str, Any]]]) -> pa.Table:
    return pa.table({"prompt": messages, "split": pa.array(["a"] * len(messages)).dictionary_encode()})


WRITERS = {
    "pyarrow": pq.write_table,
    "feather": feather.write_feather,
    "polars": lambda table, path: pl.DataFrame(table).write_parquet(path),
    "pandas": lambda table, path: table.to_pandas().to_parquet(path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_arrow_columns_of_any_writer(tmp_path: Path, writer: str) -> None:
    """Structs of one column have the fields of all: those that a message lacks come back as null, and are left out."""
    messages = [[{"role": "user", "content": "a"}], [{"role": "tool", "content": "b", "name": "f"}]]
    path = tmp_path / ("a.arrow" if writer == "feather" else "a.parquet")
    WRITERS[writer](table_of(messages), str(path))
    assert [row for _, row in files.rows(path)] == [{"prompt": m, "split": "a"} for m in messages]


def test_columns_get_other_names(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1, "prompt": "old", "q": "new"}')
    assert [row for _, row in files.rows(tmp_path / "a.jsonl", files.renames(["prompt=q"]))] == [
        {"n": 1, "prompt": "new"}
    ]
    with pytest.raises(UsageError, match="--column prompt"):
        files.renames(["prompt"])


def test_a_run_is_no_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert not files.is_run(tmp_path / "run")
    (tmp_path / "run" / "manifest.json").touch()
    assert files.is_run(tmp_path / "run")
    assert not files.is_run("hf:o/n")


def test_the_identity_of_a_folder_is_its_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text("{}")
    assert files.digest(tmp_path / "a") == files.digest(tmp_path / "b")
    (tmp_path / "b" / "x.jsonl").rename(tmp_path / "b" / "y.jsonl")
    assert files.digest(tmp_path / "a") != files.digest(tmp_path / "b")
