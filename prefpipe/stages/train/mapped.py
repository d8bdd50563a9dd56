"""Rows to train on as views of record batches, which may lie in a memory-mapped file: a node then holds one copy of the
token ids, masks and reference log-probs, whatever the number of its ranks. Functions here take lists of rows as well.
"""

import mmap
import operator
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefpipe.stages.train.examples import TrainRow
from prefpipe.stages.train.record_batches import Array, Batch, encode, numbers_of


class Rows(Sequence[TrainRow]):
    """Rows of batches, all of them in their order, or those of `numbers`."""

    def __init__(self, batches: Sequence[Batch], numbers: Array | None = None, *, with_refs: bool = True) -> None:
        self.batches, self._numbers, self._with_refs = batches, numbers, with_refs
        self._ends = np.cumsum([batch.size for batch in batches], dtype=np.int64).tolist()

    def __len__(self) -> int:
        if self._numbers is not None:
            return len(self._numbers)
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> TrainRow: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index: int | slice) -> "TrainRow | Rows":
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        batch, within = self._found(range(len(self))[index])
        return batch.row(within, with_refs=self._with_refs)

    def _found(self, place: int) -> tuple[Batch, int]:
        """The batch of a row, and its place there."""
        number = place if self._numbers is None else int(self._numbers[place])
        batch = bisect_right(self._ends, number)
        return self.batches[batch], number - self._ends[batch] + self.batches[batch].size

    def __eq__(self, other: object) -> bool:
        """Whether the other sequence has the same rows."""
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # as a list has none

    def ids(self, places: Array) -> pa.Array:
        """The ids of the rows at these places."""
        numbers = np.asarray(places if self._numbers is None else self._numbers[places], np.int64)
        ids = pa.chunked_array([batch.batch["row_id"] for batch in self.batches], pa.string())
        found = ids.take(pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(numbers)]))
        return found.combine_chunks()

    def select(self, places: Iterable[int]) -> "Rows":
        """The rows at these places, as a view."""
        if isinstance(places, range) and places == range(len(self)):
            return self
        chosen = np.asarray(places, np.int32) if isinstance(places, np.ndarray) else np.fromiter(places, np.int32)
        return Rows(self.batches, chosen if self._numbers is None else self._numbers[chosen], with_refs=self._with_refs)

    def on(self, batches: Sequence[Batch]) -> "Rows":
        """The same rows of other batches, which are as large."""
        return Rows(batches, self._numbers, with_refs=self._with_refs)

    def without_refs(self) -> "Rows":
        """The same rows, all without reference log-probs."""
        return Rows(self.batches, self._numbers, with_refs=False)

    def numbers_among(self, starts: Mapping[int, int]) -> Array:
        """Where the rows stand among the rows of batches that begin at `starts`, by the id() of the batch."""
        own = np.arange(len(self)) if self._numbers is None else self._numbers
        shifts = [starts[id(b)] - (end - b.size) for b, end in zip(self.batches, self._ends, strict=True)]
        return own + np.array(shifts)[np.searchsorted(self._ends, own, side="right")]

    def prompt_numbers(self) -> Array:
        """The place of the prompt of every row among the distinct prompts in the order of their token ids."""
        ends = np.cumsum(np.concatenate([[0], *(batch.prompts.lengths for batch in self.batches)]), dtype=np.int64) * 4
        with tempfile.TemporaryFile() as file:  # the prompts of all rows may be more than memory should hold
            for batch in self.batches:
                file.write(batch.prompt_bytes())
            file.flush()
            prompts = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if ends[-1] else b""
        buffers = [None, pa.py_buffer(ends), pa.py_buffer(prompts)]
        keys = pa.Array.from_buffers(pa.large_binary(), len(ends) - 1, buffers)
        ranks = pc.call_function("rank", [keys], pc.RankOptions(tiebreaker="dense"))
        found = numbers_of(ranks, np.uint64)
        chosen = found if self._numbers is None else found[self._numbers]
        return np.unique(chosen, return_inverse=True)[1].astype(np.int32)

    def column(self, of: Callable[[Batch], Array]) -> Array:
        """A number of every row."""
        parts = [of(batch) for batch in self.batches]
        found = parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0)
        return found if self._numbers is None else found[self._numbers]


def column(rows: Sequence[TrainRow], of: Callable[[Batch], Array]) -> Array:
    """A number of every row, such as `Batch.num_tokens`: an array [rows]."""
    view = rows if isinstance(rows, Rows) else Rows([Batch(encode(rows))])
    return view.column(of)


def select(rows: Sequence[TrainRow], places: Iterable[int]) -> Sequence[TrainRow]:
    """The rows at these places; views stay views."""
    return rows.select(places) if isinstance(rows, Rows) else [rows[place] for place in places]


def ids(rows: Sequence[TrainRow], places: Array) -> pa.Array:
    """The ids of the rows at these places, as Arrow's strings."""
    return rows.ids(places) if isinstance(rows, Rows) else pa.array([rows[i].row_id for i in places], pa.string())


def keys(rows: Sequence[TrainRow]) -> Iterator[tuple[str, int]]:
    """The ids of all rows, and the numbers of their sources."""
    return zip(ids(rows, np.arange(len(rows))).to_pylist(), column(rows, Batch.sources).tolist(), strict=True)


def in_order_of_ids(rows: Sequence[TrainRow], places: Array) -> Array:
    """The places in the order of the ids of their rows."""
    return places[numbers_of(pc.call_function("array_sort_indices", [ids(rows, places)]), np.uint64)]


def all_or_none(rows: Sequence[TrainRow]) -> Sequence[TrainRow]:
    """The rows, without any reference log-probs where some lack them."""
    if column(rows, Batch.has_refs).all():
        return rows
    return rows.without_refs() if isinstance(rows, Rows) else [row.with_ref_logps(None) for row in rows]


def prompt_numbers(rows: Sequence[TrainRow]) -> Array:
    """The place of the prompt of every row among the distinct prompts in the order of their token ids."""
    if isinstance(rows, Rows):
        return rows.prompt_numbers()
    numbers = {prompt: number for number, prompt in enumerate(sorted({row.prompt_ids for row in rows}))}
    return np.array([numbers[row.prompt_ids] for row in rows], np.int32)


def chain(*parts: Sequence[TrainRow]) -> Sequence[TrainRow]:
    """The rows of all parts, one after the other; views stay views, without a copy."""
    filled = [part for part in parts if len(part)]
    if len(filled) == 1:
        return filled[0]
    if not all(isinstance(part, Rows) for part in filled):
        return [row for part in filled for row in part]
    batches = list({id(batch): batch for part in filled if isinstance(part, Rows) for batch in part.batches}.values())
    starts = dict(zip(map(id, batches), np.cumsum([0, *(batch.size for batch in batches)]).tolist(), strict=False))
    numbers = [part.numbers_among(starts) for part in filled if isinstance(part, Rows)]
    return Rows(batches, np.concatenate(numbers) if numbers else None)
