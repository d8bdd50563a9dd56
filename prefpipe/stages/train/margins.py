"""The newest margin of every pair: of a training pair that of the step that read it last, of a held-out pair that of an
evaluation. The values exist in every step, so that keeping them costs no forward pass.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from prefpipe.forward.shards import whole
from prefpipe.forward.tensor_files import Stored
from prefpipe.schemas import Margin, arrow_schema
from prefpipe.stages.train import mapped
from prefpipe.stages.train.examples import TrainRow
from prefpipe.stages.train.record_batches import Batch, numbers_of

_VALUES, _STEPS = "margins/values", "margins/steps"  # among the tensors of a checkpoint


class Margins:
    """The margins of a run so far, in the order of its rows: 8 bytes a row. Where the step is 0, none is known."""

    def __init__(self, rows: Sequence[TrainRow], held_out: Sequence[TrainRow]) -> None:
        self._training, self._held_out = rows, held_out
        self._values = torch.zeros(len(rows) + len(held_out))
        self._steps = torch.zeros(len(self._values), dtype=torch.int32)

    def note(self, step: int, margins: Mapping[int, float], *, held_out: bool) -> None:
        """Keep the margins, by the number of the row, that a step (from 1), or the evaluation after it, gave; those
        that are not finite say nothing."""
        finite = {number: margin for number, margin in margins.items() if math.isfinite(margin)}
        places = torch.tensor(list(finite), dtype=torch.long) + (len(self._training) if held_out else 0)
        self._values[places] = torch.tensor(list(finite.values()))
        self._steps[places] = step

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that a checkpoint holds."""
        return {_VALUES: self._values, _STEPS: self._steps}

    def load_state(self, tensors: Mapping[str, torch.Tensor | Stored]) -> None:
        """Go on from a `state`. The checkpoint of an older version has none, or one that counts rows of one id once:
        then only later steps are known."""
        if _VALUES in tensors and tuple(tensors[_VALUES].shape) == tuple(self._values.shape):
            self._values, self._steps = whole(tensors[_VALUES]).clone(), whole(tensors[_STEPS]).clone()

    def table(self) -> pa.Table:
        """The rows of the dataset `margins`: of every pair whose margin is known, in the order of the run's rows. Of
        rows of one id in one source, those of the last one that was read."""
        steps, values = self._steps.numpy(), self._values.numpy()
        known = np.flatnonzero(steps)
        held_out = known >= len(self._training)
        sides = ((self._training, known[~held_out]), (self._held_out, known[held_out] - len(self._training)))
        ids = pa.concat_arrays([mapped.ids(rows, places) for rows, places in sides])
        of_sides = [mapped.column(rows, Batch.sources)[places] for rows, places in sides]
        sources, steps = np.concatenate(of_sides).astype(np.int32), steps[known]
        newest = _newest(ids, np.stack([sources, held_out]), steps)
        columns = [ids, *map(pa.array, (sources, held_out, steps, values[known]))]
        return pa.Table.from_arrays(columns, schema=arrow_schema(Margin)).take(pa.array(newest))


def _newest(ids: pa.Array, others: np.ndarray[Any, Any], steps: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The places, ascending, of the rows with the largest step, and the last of those, among rows with the same id and
    the same `others` [keys, rows]."""
    keys = np.stack([numbers_of(ids.dictionary_encode().indices, np.int32), *others])
    order = np.lexsort((steps, *keys))
    differs = (keys[:, order[1:]] != keys[:, order[:-1]]).any(axis=0)
    return np.sort(order[np.append(differs, True)[: len(order)]])
