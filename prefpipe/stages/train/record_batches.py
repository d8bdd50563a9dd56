"""Rows to train on as an Arrow record batch: a row is made when it is asked for, numbers about all rows are computed
from its buffers, which are read-only where they lie in a file.

C = completions of a batch, counted through its rows.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from prefpipe.stages.train.examples import (
    Ids,
    TokenLogps,
    TrainCompletion,
    TrainGroup,
    TrainLabel,
    TrainPair,
    TrainRow,
)

LARGEST_LOGP = 1e-3  # nats: how far above 0 rounding moves a log-prob
KINDS = (TrainPair, TrainLabel, TrainGroup)
Array = np.ndarray[Any, np.dtype[Any]]
SCHEMA = pa.schema(
    [
        ("kind", pa.int8()),  # the place in KINDS
        ("row_id", pa.string()),
        ("prompt", pa.list_(pa.int32())),
        ("ids", pa.list_(pa.string())),
        ("tokens", pa.list_(pa.list_(pa.int32()))),
        ("masks", pa.list_(pa.list_(pa.bool_()))),
        ("refs", pa.list_(pa.list_(pa.float32()))),
        ("weight", pa.float64()),
        ("source", pa.int32()),
        ("desirable", pa.bool_()),
        ("preference_prob", pa.float64()),
        ("reward_gap", pa.float64()),
    ]
)
_DTYPES = {pa.int8(): np.int8, pa.int32(): np.int32, pa.float32(): np.float32, pa.float64(): np.float64}
_SCALARS = ("kind", "row_id", "weight", "source", "desirable", "preference_prob", "reward_gap")


def encode(rows: Sequence[TrainRow]) -> pa.RecordBatch:
    """Rows of any kind as a record batch of SCHEMA."""
    completions = [row.completions for row in rows]
    values: dict[str, list[Any]] = {
        "kind": [KINDS.index(type(row)) for row in rows],  # type: ignore[arg-type]  # TrainRow has these three
        "row_id": [row.row_id for row in rows],
        "prompt": [row.prompt_ids for row in rows],
        "ids": [[c.completion_id for c in of_row] for of_row in completions],
        "tokens": [[c.token_ids for c in of_row] for of_row in completions],
        "masks": [[c.mask for c in of_row] for of_row in completions],
        "refs": [[c.ref_logps for c in of_row] for of_row in completions],
        "weight": [row.weight for row in rows],
        "source": [row.source for row in rows],
        **{name: [getattr(row, name, None) for row in rows] for name in SCHEMA.names[9:]},
    }
    return pa.record_batch([pa.array(values[f.name], f.type) for f in SCHEMA], schema=SCHEMA)


class _Lists:
    """A list array as numpy views: `values` between `offsets`; `known` [lists] is None where no list is null."""

    def __init__(self, array: Any) -> None:
        self.offsets = numbers_of(array.offsets, np.int32)
        self.values = array.values
        kind = _DTYPES.get(self.values.type)
        self.flat: Array | None = None if kind is None else numbers_of(self.values, kind)
        self.known: Array | None = _booleans(array.is_valid()) if array.null_count else None

    def __getitem__(self, place: int) -> list[Any] | None:
        if self.known is not None and not self.known[place]:
            return None
        start, end = self.offsets[place], self.offsets[place + 1]
        if self.flat is None:
            return self.values.slice(start, end - start).to_pylist()
        return self.flat[start:end].tolist()

    def view(self, place: int) -> memoryview:
        """The numbers of a list, without a copy."""
        assert self.flat is not None
        return self.flat[self.offsets[place] : self.offsets[place + 1]].data

    @property
    def lengths(self) -> Array:
        return np.diff(self.offsets)


class Batch:
    """The rows of one record batch, and numbers about each of them: every method gives an array [rows]."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self.size = batch.num_rows
        self._columns: dict[str, Any] = dict(zip(batch.schema.names, batch.columns, strict=True))
        self.prompts, self.tokens = _Lists(batch["prompt"]), _Lists(batch["tokens"].values)
        self.starts = numbers_of(batch["tokens"].offsets, np.int32)  # [rows + 1]: the first completion of every row
        self.masks, self._refs = _Lists(batch["masks"].values), _Lists(batch["refs"].values)

    def row(self, place: int, *, with_refs: bool) -> TrainRow:
        """The row at a place."""
        values = {name: self._columns[name][place].as_py() for name in _SCALARS}
        prompt, row_id, weight, source = tuple(self.prompts[place] or ()), *(values[n] for n in _SCALARS[1:4])
        found = [self._completion(c, with_refs) for c in range(self.starts[place], self.starts[place + 1])]
        kind = KINDS[values["kind"]]
        if kind is TrainLabel:
            return TrainLabel(row_id, prompt, found[0], values["desirable"], weight, source)
        if kind is TrainGroup:
            return TrainGroup(row_id, prompt, tuple(found), weight, source)
        chosen, rejected = found
        return TrainPair(
            row_id,
            chosen.completion_id,
            rejected.completion_id,
            prompt,
            chosen.token_ids,
            rejected.token_ids,
            chosen.ref_logps,
            rejected.ref_logps,
            weight,
            values["preference_prob"],
            values["reward_gap"],
            source,
            chosen.mask,
            rejected.mask,
        )

    def _completion(self, c: int, with_refs: bool) -> TrainCompletion:  # noqa: FBT001  (internal)
        mask, refs = self.masks[c], self._refs[c] if with_refs else None
        ids: Ids = tuple(self.tokens[c] or ())
        known: TokenLogps | None = None if refs is None else tuple(refs)
        return TrainCompletion(self.id_of(c), ids, known, None if mask is None else tuple[bool, ...](mask))

    @cached_property
    def _ids(self) -> Any:
        return self.batch["ids"].values

    @property
    def has_masks(self) -> bool:
        """Whether some completion has a mask of the tokens that are scored."""
        return self.masks.known is None or bool(self.masks.known.any())

    def refs_with(self, lists: Any, places: Mapping[str, int]) -> Any:
        """The column of reference log-probs with those of `lists` where a completion has none, found by its id."""
        known, flat = self._refs.known, self.batch["refs"].values
        ids = self._ids.to_pylist()
        chosen = [n if known is None or known[n] else len(ids) + places[key] for n, key in enumerate(ids)]
        filled = pa.concat_arrays([flat, lists]).take(pa.array(chosen, pa.int64()))
        return pa.ListArray.from_arrays(pa.array(self.starts), filled)

    def with_refs(self, refs: Any) -> "Batch":
        """The same rows with another column of reference log-probs."""
        return Batch(self.batch.set_column(SCHEMA.names.index("refs"), SCHEMA.field("refs"), refs))

    def id_of(self, c: int) -> str:
        """The id of a completion."""
        return self._ids[c].as_py()

    def row_id(self, place: int) -> str:
        """The id of a row."""
        return self._columns["row_id"][place].as_py()

    def numbers(self, name: str) -> Array:
        """A column of numbers; NaN where one has no value."""
        column = self.batch[name]
        found = numbers_of(column, _DTYPES[column.type])
        return np.where(_booleans(column.is_valid()), found, math.nan) if column.null_count else found

    def sources(self) -> Array:
        """The number of the source."""
        return self.numbers("source")

    def prompt_bytes(self) -> memoryview:
        """The token ids of all prompts, the high byte first: as bytes, the order of prompts is that of the ids."""
        assert self.prompts.flat is not None
        return self.prompts.flat[self.prompts.offsets[0] : self.prompts.offsets[-1]].astype(">u4").data

    def desirable(self) -> Array:
        """Whether a label is desirable; False where it has none."""
        column = self.batch["desirable"]
        return _booleans(column) & _booleans(column.is_valid())

    def gaps(self) -> Array:
        """The reward_gap."""
        return self.numbers("reward_gap")

    def num_completions(self) -> Array:
        """Completions."""
        return np.diff(self.starts)

    def completion_tokens(self) -> Array:
        """Tokens of all completions together."""
        return self._sum(self.tokens.lengths)

    def longest_sequence(self) -> Array:
        """Tokens of the prompt and the longest completion."""
        return self.prompts.lengths + _maxima(self.tokens.lengths, self.starts)

    def num_scored(self) -> Array:
        """Scored tokens of all completions together."""
        return self._sum(self._scored())

    def largest_id(self) -> Array:
        """The largest token id."""
        assert self.prompts.flat is not None
        assert self.tokens.flat is not None
        of_prompts = _maxima(self.prompts.flat, self.prompts.offsets)
        return np.maximum(of_prompts, _maxima(self.tokens.flat, self.tokens.offsets[self.starts]))

    def num_tokens(self) -> Array:
        """Tokens that a row computes, as `Tree.num_tokens`: what completions share at their start counts once."""
        return self.prompts.lengths + self.completion_tokens() - self._shared() * (self.num_completions() - 1)

    def has_refs(self) -> Array:
        """Whether every completion has reference log-probs."""
        if self._refs.known is None:
            return np.ones(self.size, dtype=bool)
        return self._sum(~self._refs.known) == 0

    def suspicious(self) -> Array:
        """Whether `audit.check_cached` may refuse the row."""
        refs = self._refs
        assert refs.flat is not None
        scored = self._scored()
        wrong = (scored == 0) | ((refs.lengths != scored) if refs.known is None else False)
        if refs.known is not None:
            wrong |= refs.known & (refs.lengths != scored)
        bad = ~np.isfinite(refs.flat) | (refs.flat > LARGEST_LOGP)
        if bad.any():
            wrong |= _maxima(bad, refs.offsets) > 0
        return (self._sum(wrong) > 0) | (self.prompts.lengths == 0)

    def _scored(self) -> Array:
        """[C]: scored tokens of every completion."""
        masks = self.masks
        if not self.has_masks:
            return self.tokens.lengths
        counts = np.concatenate([[0], np.cumsum(_booleans(masks.values))])
        scored = counts[masks.offsets[1:]] - counts[masks.offsets[:-1]]
        return scored if masks.known is None else np.where(masks.known, scored, self.tokens.lengths)

    def _shared(self) -> Array:
        """Tokens at the start that all completions of a row share; 0 for one completion."""
        assert self.tokens.flat is not None
        shared = np.zeros(self.size, dtype=np.int64)
        begin, counts = self.tokens.offsets[:-1], self.num_completions()
        shortest = -_maxima(-self.tokens.lengths.astype(np.int64), self.starts)
        alike, depth = np.flatnonzero(counts > 1), 0
        while (alike := alike[shortest[alike] > depth]).size:
            owner = np.repeat(np.arange(alike.size), counts[alike])
            first = self.starts[alike][owner]
            completions = (
                first
                + np.arange(owner.size)
                - np.repeat(np.concatenate([[0], np.cumsum(counts[alike])[:-1]]), counts[alike])
            )
            differs = self.tokens.flat[begin[completions] + depth] != self.tokens.flat[begin[first] + depth]
            alike = alike[np.bincount(owner, weights=differs, minlength=alike.size) == 0]
            depth += 1
            shared[alike] = depth
        return shared

    def _sum(self, values: Array) -> Array:
        """Sums [rows] of values [C]."""
        counts = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return counts[self.starts[1:]] - counts[self.starts[:-1]]


def numbers_of(array: Any, kind: type) -> Array:
    """A view of an array of numbers; anything where one is null. pyarrow's `to_numpy`, and whatever makes Arrow values
    of Python's, import pandas where it is installed: 30 MB and a second on every rank."""
    if not len(array):
        return np.zeros(0, kind)
    return np.frombuffer(array.buffers()[1], kind, len(array), array.offset * np.dtype(kind).itemsize)


def _booleans(array: Any) -> Array:
    """Arrow's bits as an array of booleans."""
    return numbers_of(array.cast(pa.uint8()), np.bool_)


def _maxima(values: Array, offsets: Array) -> Array:
    """The maximum of the values between each two offsets; 0 where there are none."""
    found = np.zeros(len(offsets) - 1, dtype=values.dtype)
    filled = offsets[1:] > offsets[:-1]
    if filled.any():
        found[filled] = np.maximum.reduceat(values[: offsets[-1]], offsets[:-1][filled])
    return found
