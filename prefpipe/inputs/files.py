"""Foreign files as a stream of rows: JSON, Parquet, Arrow, compressed or in folders, and datasets of the hub."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefpipe import log
from prefpipe.config.base import local_path
from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.ids import content_id
from prefpipe.inputs import hub, json_files
from prefpipe.inputs.messages import listed
from prefpipe.runs import store

ForeignRow = tuple[str, dict[str, Any]]  # where it stands (file and line), its columns
_STREAMED_ROWS = 256
_ARROW = (".arrow", ".feather")
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # the last bytes of an Arrow stream whose writer was closed
_OF_DATASETS = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_PIECE = re.compile(r"(.+)-\d{5}-of-\d{5}")  # a file of a split, as the hub names them
_KNOWN = "give .jsonl, .json, .parquet or .arrow (JSON may be .gz, .zst or .bz2), a folder of them, or hf:OWNER/NAME"


def rows(path: str | Path, columns: Mapping[str, str] | None = None) -> Iterator[ForeignRow]:
    """The rows of a file, a folder of files or a dataset of the hub (`hf:`, `hf://`), as a stream: never the whole
    dataset in memory.

    `columns` maps names of ours to columns of the file. Raises MissingInputError without the file, UsageError for
    another kind of file, DataError for a damaged one or a line that is not a JSON object.
    """
    stream = _hub_rows(str(path)) if hub.is_hub(path) else _local_rows(local_path(str(path)))
    yield from stream if not columns else _renamed(stream, columns)


def is_run(source: str | Path) -> bool:
    """Whether a source is a run directory of ours, and not a foreign file, folder or dataset of the hub."""
    if hub.is_hub(source):
        return False
    path = local_path(str(source))
    return path.is_dir() and any((path / name).exists() for name in ("manifest.json", "config.json"))


def digest(source: str | Path) -> str:
    """The identity of a source: of a run, a file or a folder by content, of a dataset of the hub by name and
    revision."""
    if hub.is_hub(source):
        if not hub.names_revision(str(source)):
            log.warn(f"{source} names no revision: it may change; write @REVISION behind its name")
        return str(source)
    path = local_path(str(source))
    if path.is_dir() and not is_run(path):
        files = parts(path)
        _warn_of_contents(path, files)
        return content_id([(str(p.relative_to(path)), store.input_digest(p)) for p in files])
    return store.input_digest(path)


def state(sources: Iterable[str | Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of change of every local file in these sources, to see that none changes while a command
    reads it. Of runs and of datasets of the hub nothing."""
    paths = [local_path(str(source)) for source in sources if not hub.is_hub(source) and not is_run(source)]
    found = [file for path in paths for file in (parts(path) if path.is_dir() else [path]) if file.is_file()]
    return [(str(f), status.st_size, status.st_mtime_ns) for f in found for status in [f.stat()]]


def changed(source: str | Path) -> DataError:
    """The error for a file that another program changed while a command read it."""
    return DataError(f"{source} changed while it was read", "run the same command again when nobody writes to it")


def renames(columns: Iterable[str]) -> dict[str, str]:
    """Settings such as prompt=question as a table: a name of ours to a column of the file. Raises UsageError for one
    without `=`."""
    table = {name: column for name, _, column in (setting.partition("=") for setting in columns)}
    wrong = [name for name, column in table.items() if not name or not column]
    if wrong:
        raise UsageError(f"--column {wrong[0]}: no '='", "write NAME=COLUMN, such as --column prompt=question")
    return table


def _hub_rows(source: str) -> Iterator[ForeignRow]:
    for number, row in enumerate(hub.rows(source)):
        yield f"{source}, row {number}", row


def _renamed(stream: Iterable[ForeignRow], columns: Mapping[str, str]) -> Iterator[ForeignRow]:
    """Rows with columns under other names. A column that had the name goes. Raises DataError when the first row lacks
    one of them."""
    old = {name: new for new, name in columns.items()}
    for number, (where, row) in enumerate(stream):
        missing = [name for name in old if name not in row] if number == 0 else []
        if missing:
            raise DataError(f"{where}: no column '{missing[0]}' (there are {listed(row)})", "check --column")
        yield where, {old.get(name, name): value for name, value in row.items() if name in old or name not in columns}


def _local_rows(path: Path) -> Iterator[ForeignRow]:
    if path.is_dir():
        for file in parts(path):
            yield from _local_rows(file)
        return
    if not path.is_file():
        raise MissingInputError(f"{path} does not exist", "check the path; it is relative to the current directory")
    if _suffix(path) in json_files.SUFFIXES:
        yield from _json_rows(path)
    elif path.suffix.lower() == ".parquet":
        yield from _numbered(path, _parquet_batches(path))
    elif path.suffix.lower() in _ARROW:
        yield from _numbered(path, _arrow_batches(path))
    else:
        raise UsageError(f"{path}: unknown kind of file '{path.suffix}'", _of_table(path) or _KNOWN)


def _of_table(path: Path) -> str:
    """The command that writes a table of text as JSON lines; empty for any other file."""
    separator = {".csv": "", ".tsv": ", separator=chr(9)"}.get(path.suffix.lower())
    if separator is None:
        return ""
    read, written = f"read_csv({str(path)!r}{separator})", str(path.with_suffix(".jsonl"))
    return f'write it as JSON lines first: python -c "import polars; polars.{read}.write_ndjson({written!r})"'


def _suffix(path: Path) -> str:
    """The ending of a name that says the kind of a file: `.jsonl` of `A.JSONL.gz`."""
    known = [suffix for suffix in map(str.lower, path.suffixes[-2:]) if suffix not in json_files.COMPRESSED]
    return known[-1] if known else ""


def parts(folder: Path) -> list[Path]:
    """The data files in a folder and its folders, by name: those of JSON arrays only where there are no others. What
    the package `datasets` keeps beside its data is none. Raises MissingInputError when there is none, UsageError for
    the splits that it saved together."""
    files = _visible(folder)
    for saved in (p.parent for p in files if p.name == "dataset_dict.json"):
        splits = sorted(p.name for p in saved.iterdir() if p.is_dir())
        if len(splits) > 1:
            raise UsageError(f"{saved} holds the splits {', '.join(splits)}", f"name one, such as {saved / splits[0]}")
    found = [p for p in files if _suffix(p) in (".parquet", ".jsonl", ".ndjson", *_ARROW)]
    found = found or [p for p in files if _suffix(p) == ".json" and p.name not in _OF_DATASETS]
    if not found:
        raise MissingInputError(f"{folder} holds no data files", _KNOWN)
    return found


def _visible(folder: Path) -> list[Path]:
    """The files in a folder and its folders by name, without hidden ones and without the caches of `datasets`."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith((".", "_"))]
    saved = {p.parent for p in files if p.name == "state.json"}
    return [p for p in files if not (p.parent in saved and p.name.startswith("cache-"))]


def _warn_of_contents(folder: Path, files: list[Path]) -> None:
    """Say which files of a folder are not read, and that several splits are."""
    described = ("README", "LICENSE", *_OF_DATASETS)
    read = set(files)
    others = [p for p in _visible(folder) if p not in read and not p.name.startswith(described)]
    if others:
        log.warn(f"{folder}: not read, for want of a known ending: {listed([p.name for p in others])}")
    splits = sorted({piece[1] for p in files if (piece := _PIECE.match(p.name))})
    if len(splits) > 1:
        log.warn(f"{folder} holds {', '.join(splits)}: all of them are read; name a file to read less")


def values(path: Path) -> Iterator[tuple[str, Any]]:
    """What a local file or folder holds, of any kind, and where: `rows` without the check that JSON is an object."""
    return json_files.values(path) if _suffix(path) in json_files.SUFFIXES and path.is_file() else _local_rows(path)


def _json_rows(path: Path) -> Iterator[ForeignRow]:
    for where, row in json_files.values(path):
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object", "every line is one JSON object")
        yield where, row


def _parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with path.open("rb") as opened, pq.ParquetFile(opened, page_checksum_verification=True) as file:
        yield from file.iter_batches(batch_size=_STREAMED_ROWS, use_threads=False)


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow file; those of the package `datasets` are streams without an index."""
    with path.open("rb") as opened, pa.PythonFile(opened, "r") as file:
        is_stream = file.read(6) != b"ARROW1"
        if is_stream:
            file.seek(max(file.size() - len(_END_OF_STREAM), 0))
            whole = file.read() == _END_OF_STREAM
            file.seek(0)
            yield from pa.ipc.open_stream(file)
            if not whole:
                raise pa.ArrowInvalid("the stream has no end: the file was cut, or its writer did not close it")
            return
        file.seek(0)
        reader = pa.ipc.open_file(file)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))


def _numbered(path: Path, batches: Iterator[pa.RecordBatch]) -> Iterator[ForeignRow]:
    number = 0
    try:
        for batch in batches:
            batch.validate(full=True)  # offsets and bytes that nobody checked may end the process
            for start in range(0, batch.num_rows, _STREAMED_ROWS):
                for row in _to_rows(batch.slice(start, _STREAMED_ROWS), f"{path}, row {number}"):
                    yield f"{path}, row {number}", hub.without_nulls(row)
                    number += 1
    except (OSError, MemoryError, UnicodeError, pa.ArrowException) as error:
        what = str(error) or "it asks for more memory than there is"
        raise DataError(f"cannot read {path}: {what}", "the file is damaged or of another kind") from error


def _to_rows(batch: pa.RecordBatch, where: str) -> list[dict[str, Any]]:
    """A batch as Python values. Raises DataError for a column that has none, such as a date after the year 9999, and
    for two columns of one name."""
    names: list[str] = batch.schema.names
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise DataError(f"{where}: there are two columns '{twice}'", "rename one of them")
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, LookupError) as error:
        hint = "leave that column out of the file, or make it text"
        raise DataError(f"{where}, or below: {_unreadable(batch)} cannot be read: {error}", hint) from error


def _unreadable(batch: pa.RecordBatch) -> str:
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.to_pylist()
        except (ValueError, OverflowError, LookupError):
            return f"column '{name}' ({column.type})"
    return "a column"
