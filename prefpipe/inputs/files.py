"""Foreign files as a stream of rows: JSONL, Parquet, hf:// paths."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefpipe.config.shared import JSON_SUFFIXES
from prefpipe.errors import DataError, MissingInputError, UsageError

ForeignRow = tuple[str, dict[str, Any]]  # where it stands (file and line), its columns
_STREAMED_ROWS = 256


def rows(path: str | Path) -> Iterator[ForeignRow]:
    """The rows of a JSONL or Parquet file, or of an hf:// path, as a stream: never the whole file in memory.

    Raises MissingInputError without the file, UsageError for another kind of file, DataError for a damaged one or a
    line that is not a JSON object.
    """
    if str(path).startswith("hf://"):
        for number, row in enumerate(remote_rows(str(path))):
            yield f"{path}, row {number}", row
        return
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(f"{path} does not exist", "check the path; it is relative to the current directory")
    if path.suffix == ".parquet":
        for number, row in enumerate(parquet_rows(path)):
            yield f"{path}, row {number}", row
    elif path.suffix in JSON_SUFFIXES:
        yield from _json_rows(path)
    else:
        raise UsageError(f"{path}: unknown kind of file '{path.suffix}'", "give .jsonl or .parquet")


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(file and line, value) of every line that is not blank. Raises DataError for a line that is not JSON."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: not valid JSON: {error}", "every line is one JSON object") from error
            yield where, value


def _json_rows(path: Path) -> Iterator[ForeignRow]:
    for where, row in json_lines(path):
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object", "every line is one JSON object")
        yield where, row


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a foreign Parquet file, a few at a time, page checksums verified where it has them."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=_STREAMED_ROWS, use_threads=False):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}", "the file is damaged or is not Parquet") from error


def remote_rows(url: str) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet or JSONL file at an hf:// path, a few at a time, through polars."""
    import polars as pl

    scan = pl.scan_parquet if url.endswith(".parquet") else pl.scan_ndjson
    try:
        for frame in scan(url).collect_batches(chunk_size=_STREAMED_ROWS):
            yield from frame.iter_rows(named=True)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise MissingInputError(
            f"cannot read {url}: {error}", "check path, revision and network; a private dataset needs HF_TOKEN"
        ) from error
