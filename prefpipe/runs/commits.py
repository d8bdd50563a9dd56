"""Which files of a run directory count, and whether they are intact.

A shard counts when its commit record does: `part-00000.ok.json` beside `part-00000.parquet`. A directory that `train`
publishes counts when it exists, because it is renamed into place whole.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefpipe import reading
from prefpipe.errors import DataError, MissingInputError
from prefpipe.runs import fsio, links, tables

_PUBLISHED = ("adapter", "model", "merged")
_OTHER = {"input_rows": "its rows are other ones in the input now", "input_before": "rows before it changed"}
_REPORTS = ("metrics.jsonl", "parity.json", "data_report.json")


@dataclass(frozen=True)
class File:
    """Rows that are to be a file of a run. `owner` says whose it is: the `fingerprint` of the run, and the `name` of
    the file in it; digests of the rows may stand beside them."""

    part: Path
    row_type: type
    table: tables.Content
    owner: Mapping[str, str]

    def writer(self, record: dict[str, Any]) -> fsio.Writer:
        """What writes the file, and then puts what its commit record says into `record`."""
        write = tables.writer(self.part, self.row_type, self.table)

        def call(temporary: Path) -> None:
            write(temporary)
            rows = self.table.num_rows
            record.update({"dataset": self.row_type.__name__, **describe(temporary), "rows": rows, **self.owner})

        return call


def commit(files: Iterable[File]) -> None:
    """Write files and behind them their commit records, with which they count. They wait for the disk together."""
    data, records = dict[Path, fsio.Writer](), dict[Path, fsio.Writer]()
    for file in files:
        record = dict[str, Any]()
        data[file.part] = file.writer(record)
        records[record_path(file.part)] = partial(_write_json, record)
    fsio.write_in_order([data, records])


def amend(part: Path, values: Mapping[str, str]) -> None:
    """Change values in the commit record of a file."""
    fsio.write_atomic(record_path(part), partial(_write_json, {**_record(part), **values}))


def adopt(source: Path, part: Path, digest: str, owner: Mapping[str, str]) -> None:
    """Let `part` be the committed file `source` of another run, and commit it for `owner` with what its record says of
    its rows. Raises DataError where the file has not this digest or not this record."""
    wrong = record_mismatch(source, {}, digest)
    if wrong is not None or not matches(source, digest):
        raise DataError(
            f"{source}: {wrong or 'it does not match its digest'}", "run the command of its directory again"
        )
    links.share(source, part)
    fsio.write_atomic(record_path(part), partial(_write_json, {**_record(source), **owner}))


def rows_of(part: Path) -> dict[str, str]:
    """The digests of rows in the commit record of a file."""
    return {key: value for key in _OTHER if (value := recorded_value(part, key)) is not None}


def record_path(part: Path) -> Path:
    """The commit record of a Parquet file."""
    return part.with_name(part.name.removesuffix(".parquet") + ".ok.json")


def describe(path: Path) -> dict[str, Any]:
    """Size in bytes and blake3 of a file."""
    with reading.reading(path):
        return {"bytes": path.stat().st_size, "blake3": reading.file_digest(path)}


def matches(path: Path, digest: str) -> bool:
    """Whether a file is there and has this digest. Raises StorageError where it cannot be read."""
    try:
        return reading.file_digest(path) == digest
    except (MissingInputError, DataError):
        return False


def mismatch(part: Path, owner: Mapping[str, str]) -> str | None:
    """In what a file is not the one that its commit record and `owner` (see `commit`) describe; None where it is."""
    wrong = record_mismatch(part, owner)
    if wrong is None and not matches(part, str(reading.read_json(record_path(part))["blake3"])):
        return "it does not match its commit record"
    return wrong


def record_mismatch(part: Path, owner: Mapping[str, str], digest: str | None = None) -> str | None:
    """As `mismatch`, by the record alone and, where the caller knows it, by the digest of the file.

    A damaged record describes no file. One of an older version has no name.
    """
    record = _record(part)
    if "blake3" not in record:
        return "its commit record is damaged"
    others = [key for key, value in owner.items() if record.get(key, value) != value]
    if others:
        return _OTHER.get(others[0], f"its commit record has another {others[0]}")
    return None if digest in (None, record["blake3"]) else "it does not match its commit record"


def _write_json(record: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")


def _record(part: Path) -> dict[str, Any]:
    """The commit record of a file; empty where it is damaged or lost."""
    try:
        record = reading.read_json(record_path(part))
    except (ValueError, MissingInputError, DataError):
        return {}
    return record if isinstance(record, dict) else {}


def committed(out: Path) -> list[Path]:
    """Every file that belongs into the manifest: shards with a record, published directories, reports."""
    files = list(_files(out, frozenset()))
    published = [f for f in files if f.relative_to(out).parts[0] in _PUBLISHED]
    return sorted({*_parts(files), *published, *(f for f in files if str(f.relative_to(out)) in _REPORTS)})


def recorded(out: Path) -> list[Path]:
    """Every file with a commit record, but for those of runs inside this one."""
    return [part for part in _parts(_files(out, frozenset())) if not is_nested(out, part)]


def shards(out: Path) -> set[Path]:
    """Every file of a shard, with a commit record or without, but for those of runs inside this one."""
    files = (f for f in _files(out, frozenset()) if f.name.startswith("part-") and f.suffix == ".parquet")
    return {*(part for part in recorded(out) if part.parent != out), *(f for f in files if not is_nested(out, f))}


def recorded_values(out: Path, key: str) -> dict[int, set[str | None]]:
    """By the number of a shard, the texts that the commit records of its files have under `key`; None where one has
    none."""
    found: dict[int, set[str | None]] = {}
    for part in recorded(out):
        number = part.stem.removeprefix("part-")
        if number.isdigit():
            found.setdefault(int(number), set()).add(recorded_value(part, key))
    return found


def recorded_value(part: Path, key: str) -> str | None:
    """The text that the commit record of a file has under `key`; None where it has none."""
    value = _record(part).get(key)
    return value if isinstance(value, str) else None


def is_nested(out: Path, path: Path) -> bool:
    """Whether a file belongs to a run inside the run `out`, such as a step of a round."""
    return any((out / folder / "config.json").exists() for folder in list(path.relative_to(out).parents)[:-1])


def _parts(files: Iterable[Path]) -> list[Path]:
    return [f.with_name(f.name.removesuffix(".ok.json") + ".parquet") for f in files if f.name.endswith(".ok.json")]


def _files(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    """The files of a run directory, those behind links to folders too: a dataset may live on another disk. `above` are
    the folders that lead here: a link to one of them leads nowhere."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with reading.reading(folder), os.scandir(folder) as found:
        entries = [Path(entry.path) for entry in found]
    for path in entries:
        if not path.is_dir():
            yield path
        elif path.name != "quarantine":
            yield from _files(path, above | {real})


def remade_with(name: str) -> list[str]:
    """What must be made again with a damaged file.

    A shard alone, a published directory whole, metrics with everything that the training made.
    """
    if name.endswith(".parquet"):
        return [name]
    if name != "metrics.jsonl":
        return [name.split("/")[0]]
    return [name, *_PUBLISHED, "checkpoints"]
