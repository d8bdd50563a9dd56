"""From the columns of pairs and labels to record batches of rows to train on, without a Python object for a token."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from prefpipe.ids import ids_digest, ids_digests
from prefpipe.rows import ids_of_another_digest
from prefpipe.schemas import Dropped, Label, Pair
from prefpipe.stages.train import lengths
from prefpipe.stages.train.examples import TrainLabel, TrainPair
from prefpipe.stages.train.record_batches import KINDS, SCHEMA, Batch

_SIDES: dict[type, dict[str, tuple[str, ...]]] = {
    Pair: {
        "ids": ("chosen_completion_id", "rejected_completion_id"),
        "tokens": ("chosen_token_ids", "rejected_token_ids"),
        "masks": ("chosen_loss_mask", "rejected_loss_mask"),
        "refs": ("ref_chosen_token_logps", "ref_rejected_token_logps"),
        "digests": ("chosen_ids_digest", "rejected_ids_digest"),
    },
    Label: {
        "ids": ("completion_id",),
        "tokens": ("token_ids",),
        "masks": ("loss_mask",),
        "refs": ("ref_token_logps",),
        "digests": ("ids_digest",),
    },
}
_OTHERS: dict[type, dict[str, str]] = {
    Pair: {"row_id": "pair_id", "preference_prob": "preference_prob", "reward_gap": "reward_gap"},
    Label: {"row_id": "completion_id", "desirable": "label"},
}
_NAMES = ("reference", "scorer")


def columns(row_type: type[Pair] | type[Label]) -> list[str]:
    """The columns of a dataset that training reads."""
    sides = [name for names in _SIDES[row_type].values() for name in names]
    return list(dict.fromkeys(["prompt_token_ids", "weight", *_NAMES, *_OTHERS[row_type].values(), *sides]))


def encode_columns(
    row_type: type[Pair] | type[Label], rows: pa.RecordBatch, source: int, context: int | None, dropped: list[Dropped]
) -> tuple[Batch, dict[str, set[str]]]:
    """The rows that `context` tokens hold, of source number `source`; the others go to `dropped`. Beside them the names
    of references and scorers. Raises IdentityError when token ids have another digest than the row says."""
    names = {name: {value for value in rows[name].unique().to_pylist() if value is not None} for name in _NAMES}
    batch, digests = _encoded(row_type, rows, source)
    longest = batch.longest_sequence()
    if context is not None and (longest > context).any():
        overlong = np.flatnonzero(longest > context).tolist()
        dropped += [lengths.too_long(batch.row_id(place), int(longest[place]), context) for place in overlong]
        rows = rows.filter(pa.array(longest <= context))
        batch, digests = _encoded(row_type, rows, source)
    _check_digests(batch, digests.to_pylist())
    return batch, names


def _encoded(row_type: type[Pair] | type[Label], rows: pa.RecordBatch, source: int) -> tuple[Batch, Any]:
    """The batch, and the digests of its completions."""
    size, sides = rows.num_rows, _SIDES[row_type]
    values: dict[str, Any] = {name: rows[column] for name, column in _OTHERS[row_type].items()}
    values |= {name: _together([rows[side] for side in of_sides]) for name, of_sides in sides.items()}
    kind = KINDS.index(TrainPair if row_type is Pair else TrainLabel)
    values |= {"prompt": rows["prompt_token_ids"], "weight": rows["weight"]}
    values |= {"kind": pa.array(np.full(size, kind, np.int8)), "source": pa.array(np.full(size, source, np.int32))}
    arrays = [values[f.name].cast(f.type) if f.name in values else pa.nulls(size, f.type) for f in SCHEMA]
    return Batch(pa.record_batch(arrays, schema=SCHEMA)), values["digests"].values


def _together(sides: Sequence[Any]) -> pa.ListArray:
    """Columns of one value per row as one column of lists: the first of every column, the second of every column ..."""
    size = len(sides[0])
    places = np.arange(size * len(sides)).reshape(len(sides), size).T.ravel()
    values = pa.concat_arrays(sides).take(pa.array(places))
    return pa.ListArray.from_arrays(pa.array(np.arange(size + 1, dtype=np.int32) * len(sides)), values)


def _check_digests(batch: Batch, digests: Sequence[str]) -> None:
    """Compare the digest of every completion with the token ids; masks must be as long as they are."""
    for place, (start, end) in enumerate(zip(batch.starts[:-1].tolist(), batch.starts[1:].tolist(), strict=True)):
        prompt, completions = batch.prompts.view(place), [batch.tokens.view(c) for c in range(start, end)]
        masks = [batch.masks[c] for c in range(start, end)] if batch.has_masks else [None] * (end - start)
        found = list(ids_digests(prompt, completions))
        for number, (mask, ids) in enumerate(zip(masks, completions, strict=True)):
            digest = found[number] if mask is None else ids_digest(prompt, ids, mask)
            if digest != digests[start + number] or (mask is not None and len(mask) != len(ids)):
                raise ids_of_another_digest(batch.id_of(start + number), f"row {batch.row_id(place)}")
