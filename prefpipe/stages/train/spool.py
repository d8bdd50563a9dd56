"""Rows of a source that are needed again: on disk in between, so that nothing is tokenised twice and nothing stays in
memory."""

import mmap
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from prefpipe.schemas import Dropped, Label, arrow_schema, from_table, to_table


class Spool:
    """Rows of one type in a file without a name in `folder`, which goes with this object. They are added inside `with`,
    and read behind it."""

    def __init__(self, row_type: type, folder: Path) -> None:
        self._row_type = row_type
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed on exit)
        self._stream = pa.ipc.new_file(self._file, arrow_schema(row_type))
        self._count = 0
        self.labels: list[LabelAt] = []
        self.read = 0  # rows of the source, also those that are not kept
        self.dropped: list[Dropped] = []  # its faulty rows

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_error: object) -> None:
        self._stream.close()
        self._file.flush()
        self._memory = mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ)
        self._file.close()

    def add(self, rows: list[Any]) -> None:
        """Append rows."""
        if rows:
            self._stream.write_batch(to_table(self._row_type, rows).combine_chunks().to_batches()[0])
            labels = (row for row in rows if isinstance(row, Label))
            self.labels += [LabelAt(r.completion_id, r.prompt_id, self._count, n, self) for n, r in enumerate(labels)]
            self._count += 1

    def chunks(self) -> Iterator[list[Any]]:
        """The rows, as they were added."""
        return (self._rows(self._batches.get_batch(number)) for number in range(self._count))

    def label(self, batch: int, place: int) -> Label:
        """One label."""
        return self._rows(self._batches.get_batch(batch).slice(place, 1))[0]

    def _rows(self, batch: pa.RecordBatch) -> list[Any]:
        return from_table(self._row_type, pa.Table.from_batches([batch]))

    @cached_property
    def _batches(self) -> Any:
        return pa.ipc.open_file(pa.py_buffer(self._memory))


@dataclass(frozen=True, slots=True)
class LabelAt:
    """A label of a spool: its ids, and its tokens when they are asked for."""

    completion_id: str
    prompt_id: str
    batch: int
    place: int
    spool: Spool

    @property
    def prompt_token_ids(self) -> list[int]:
        """Of the prompt."""
        return self.spool.label(self.batch, self.place).prompt_token_ids

    @property
    def token_ids(self) -> list[int]:
        """Of the completion."""
        return self.spool.label(self.batch, self.place).token_ids

    @property
    def loss_mask(self) -> list[bool] | None:
        """Which tokens of the completion are scored; None: all."""
        return self.spool.label(self.batch, self.place).loss_mask
