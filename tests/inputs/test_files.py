"""Foreign files as streams of rows, with the place of every row."""

import json
import math
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


def test_what_datasets_keeps_beside_its_data_is_not_read(tmp_path: Path) -> None:
    """Its caches lie in the folder from which a dataset was loaded, and repeat its rows."""
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    loaded = datasets.load_from_disk(str(tmp_path / "saved"))
    assert len(loaded.filter(lambda row: row["n"] > 5)) == len(ROWS) - 6
    assert list(tmp_path.glob("saved/cache-*.arrow"))
    assert [row for _, row in files.rows(tmp_path / "saved")] == ROWS


def test_splits_that_were_saved_together_are_not_mixed(tmp_path: Path) -> None:
    """Rows to test on would be trained on."""
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS[:4]), test=datasets.Dataset.from_list(ROWS[4:6]))
    both.save_to_disk(tmp_path / "two")
    with pytest.raises(UsageError, match="two holds the splits test, train"):
        list(files.rows(tmp_path / "two"))
    assert [row for _, row in files.rows(tmp_path / "two" / "train")] == ROWS[:4]
    datasets.DatasetDict(train=both["train"]).save_to_disk(tmp_path / "one")
    assert [row for _, row in files.rows(tmp_path / "one")] == ROWS[:4]


def test_a_folder_says_what_of_it_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"):
        pl.DataFrame(ROWS[:2]).write_parquet(tmp_path / name)
    (tmp_path / "README.md").touch()
    files.digest(tmp_path)
    told = capsys.readouterr().err
    assert "holds test, train: all of them are read" in told
    assert "not read" not in told
    (tmp_path / "test-00000-of-00001.parquet").rename(tmp_path / "test.csv")
    files.digest(tmp_path)
    told = capsys.readouterr().err
    assert "not read, for want of a known ending: test.csv" in told
    assert "all of them" not in told


def test_json_files_are_the_data_of_a_folder_that_has_no_other(tmp_path: Path) -> None:
    """As Spark writes JSON."""
    (tmp_path / "part-0.json").write_text("\n".join(map(json.dumps, ROWS[:3])))
    (tmp_path / "part-1.JSON.GZ").write_bytes(packed(json.dumps(ROWS[3]), "gz"))
    assert [row for _, row in files.rows(tmp_path)] == ROWS[:4]


@pytest.mark.parametrize("text", [json.dumps(ROWS[:2]), json.dumps(ROWS[:2], indent=1), '{"n": 0, "text": ""}\r\n'])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert next(iter(files.rows(tmp_path / "a.json")))[1] == ROWS[0]


@pytest.mark.parametrize(("encoding", "words"), [("utf-16", "is UTF-16"), ("latin-1", "line 1: not valid JSON")])
def test_another_encoding_is_named(tmp_path: Path, encoding: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"n": "\u00e9"}\n'.encode(encoding))
    with pytest.raises(DataError, match=words) as error:
        list(files.rows(tmp_path / "a.jsonl"))
    assert error.value.hint == "save it as UTF-8"


def test_nan_is_no_value(tmp_path: Path) -> None:
    """pandas has it for what is missing, as text too: a system prompt would be "nan"."""
    (tmp_path / "a.jsonl").write_text('{"system": NaN, "x": [NaN, 1.5, Infinity]}')
    pl.DataFrame({"system": [math.nan], "x": [[math.nan, 1.5, math.inf]]}).write_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert [row for _, row in files.rows(tmp_path / name)] == [{"system": None, "x": [None, 1.5, math.inf]}]


@pytest.mark.parametrize(("column", "words"), [
    (pa.array([2**62], pa.timestamp("us")), r"row 0, or below: column 't' \(timestamp\[us\]\) cannot be read"),
    (pa.array([1], pa.timestamp("us", "Mars/Olympus")), r"column 't' .* cannot be read: 'Mars/Olympus'"),
    (pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), "column 't' .*duplicate"),
    (pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers()), "cannot read .*UTF8"),
])  # fmt: skip
def test_a_column_without_values_in_python_is_named(tmp_path: Path, column: pa.Array, words: str) -> None:
    pq.write_table(pa.table({"n": [1], "t": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=words):
        list(files.rows(tmp_path / "a.parquet"))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["n", "n"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="two columns 'n'"):
        list(files.rows(tmp_path / "a.parquet"))


def test_arrow_that_was_cut_or_changed_is_refused(tmp_path: Path) -> None:
    """A stream may be cut between two batches, and offsets that point anywhere end the process that follows them."""
    path = tmp_path / "a.arrow"
    table = pa.table({"text": [str(i) for i in range(200)]})
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table, max_chunksize=100)
    whole = path.read_bytes()
    assert len(list(files.rows(path))) == 200
    path.write_bytes(whole[:-8])
    with pytest.raises(DataError, match="the stream has no end"):
        list(files.rows(path))
    offsets = whole.index(b"".join(i.to_bytes(4, "little") for i in (0, 1, 2, 3)))
    path.write_bytes(whole[: offsets + 4] + b"\xff\xff\xff\x7f" + whole[offsets + 8 :])
    with pytest.raises(DataError, match=r"cannot read .*a\.arrow"):
        list(files.rows(path))


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


@pytest.mark.parametrize(("name", "separator"), [("a b.csv", ","), ("a.TSV", "\t")])
def test_a_table_of_text_has_the_command_that_writes_its_rows(tmp_path: Path, name: str, separator: str) -> None:
    path = tmp_path / name
    path.write_text(f'prompt{separator}chosen{separator}rejected\n"two\nlines"{separator}"a ""b"""{separator}c\n')
    with pytest.raises(UsageError, match="unknown kind of file") as caught:
        list(files.rows(path))
    exec(caught.value.hint.partition('python -c "')[2].removesuffix('"'))  # noqa: S102  (it is what a user runs)
    assert [row for _, row in files.rows(path.with_suffix(".jsonl"))] == [
        {"prompt": "two\nlines", "chosen": 'a "b"', "rejected": "c"}
    ]
