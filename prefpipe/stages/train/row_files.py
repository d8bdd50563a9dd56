"""The rows of a run as one memory-mapped file of a node, whatever the number of its ranks.

    CACHE/rows/KEY/.lock           who reads the inputs; the other processes of the node wait, then map what it wrote
    CACHE/rows/KEY/rows/           NAME.arrow (uncompressed Arrow IPC) and facts.json, complete or not there

CACHE is the user's cache (XDG_CACHE_HOME moves it to a disk of the node). KEY covers whatever can change a row: the
settings, the inputs by content, and the code of this package. A complete run removes its directory; one that was killed
finds it again, and those that nobody opened for a day go when the next one is written.
"""

import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import platformdirs
import pyarrow as pa

import prefpipe
from prefpipe import clock, log, reading
from prefpipe.errors import StorageError
from prefpipe.ids import content_id
from prefpipe.runs import fsio
from prefpipe.stages.train import process_memory
from prefpipe.stages.train.mapped import Rows
from prefpipe.stages.train.record_batches import SCHEMA, Batch
from prefpipe.stages.train.token_logps import TokenLogpsById

KEPT_S = 24 * 3600  # how long rows stay that no run opens
_FACTS, _REFS = "facts.json", "refs.arrow"
Facts = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Files:
    """Rows by name, and what else is known of them."""

    rows: Mapping[str, Rows]
    facts: Facts


class Writer:
    """Appends batches to a file, which exists from the start."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._stream = pa.ipc.new_file(self._file, SCHEMA)
        self.count = 0

    def add(self, batch: Batch) -> None:
        """Append the rows of a batch."""
        self._stream.write_batch(batch.batch)
        self.count += batch.size

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_error: object) -> None:
        self._stream.close()
        self._file.close()


def place(identity: Mapping[str, Any]) -> Path:
    """The directory of rows with this identity."""
    return platformdirs.user_cache_path("prefpipe") / "rows" / content_id(identity, _code())


def opened(directory: Path, write: Callable[[Path], Facts]) -> Files:
    """The rows in a directory of `place`; where none are, `write` fills a folder with them and returns facts."""

    def fill(folder: Path) -> None:
        (folder / _FACTS).write_text(json.dumps(write(folder)), encoding="utf-8")

    def load(folder: Path) -> Files:
        rows = {path.stem: Rows(list(map(Batch, _batches(path)))) for path in sorted(folder.glob("*.arrow"))}
        return Files(rows, json.loads((folder / _FACTS).read_text(encoding="utf-8")))

    return _shared(directory, fill, load)


def with_refs(rows: Rows, values: TokenLogpsById, directory: Path) -> Rows:
    """Rows of a directory of `place` with `values` in place of missing reference log-probs, as a file beside them."""
    key = content_id(values.digest, [batch.row_id(0) for batch in rows.batches])

    def fill(folder: Path) -> None:
        with (
            pa.OSFile(str(folder / _REFS), "wb") as file,
            pa.ipc.new_file(file, pa.schema([SCHEMA.field("refs")])) as out,
        ):
            for batch in rows.batches:
                out.write_batch(pa.record_batch([batch.refs_with(values.lists, values.places)], names=["refs"]))

    found = _shared(directory / "refs" / key, fill, lambda folder: _batches(folder / _REFS))
    return rows.on([batch.with_refs(refs["refs"]) for batch, refs in zip(rows.batches, found, strict=True)])


def _shared(directory: Path, fill: Callable[[Path], object], load: Callable[[Path], T]) -> T:
    """What `load` makes of a folder that `fill` filled. One process of the node fills it, the others wait for it. Where
    the user's cache cannot be written, every process has a copy of its own."""
    try:
        fsio.make_dirs(directory)
        writable = os.access(directory, os.W_OK)
    except StorageError:
        writable = False
    if not writable:
        log.warn(f"{directory} cannot be written: every rank keeps its own copy of the rows; XDG_CACHE_HOME moves it")
        with tempfile.TemporaryDirectory() as folder:
            fill(Path(folder))
            return load(Path(folder))  # what is mapped stays until the process ends
    with fsio.lock(directory, wait=True):
        fsio.remove_leftovers(directory)
        if not (directory / "rows").is_dir():
            _expire(platformdirs.user_cache_path("prefpipe") / "rows")
            fsio.publish_dir(directory / "rows", fill)
            process_memory.return_free_memory()
        return load(directory / "rows")


def remove(directory: Path) -> None:
    """Remove the rows of a run that needs them no more. Processes that have them mapped keep them."""
    with suppress(StorageError), fsio.lock(directory, wait=True):
        for folder in ("rows", "refs"):
            shutil.rmtree(directory / folder, ignore_errors=True)


def _batches(path: Path) -> list[pa.RecordBatch]:
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    stream = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(memory)))
    return [stream.get_batch(number) for number in range(stream.num_record_batches)]


def _expire(folder: Path) -> None:
    """Remove the rows that nobody opened for a day: opening them takes their lock, which renews a file. Every run of
    the day leaves a directory, so that there may be thousands: most are seen to be young by one look."""
    with os.scandir(folder) as others:
        for other in others:
            if _unused(other.stat) and _unused(Path(other, ".owner").stat):
                shutil.rmtree(other, ignore_errors=True)


def _unused(stat: Callable[[], os.stat_result]) -> bool:
    """Whether a file is older than a day, or is not there: another process may expire the same rows."""
    try:
        return clock.age(stat().st_mtime) > KEPT_S
    except FileNotFoundError:
        return True


@cache
def _code() -> str:
    """The digest of this package: another version may make other rows of the same inputs."""
    hasher = blake2b(digest_size=16)
    root = Path(prefpipe.__file__).parent
    for path in sorted(root.rglob("*.py")):
        hasher.update(f"{path.relative_to(root)}\0".encode() + reading.read_bytes(path))
    return hasher.hexdigest()
