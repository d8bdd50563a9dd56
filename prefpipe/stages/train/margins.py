"""The newest margin of every pair: of a training pair that of the step that read it last, of a held-out pair that of an
evaluation. The values exist in every step, so that keeping them costs no forward pass.
"""

import math
from collections.abc import Mapping, Sequence

import pyarrow as pa
import torch

from prefpipe.forward.shards import whole
from prefpipe.forward.tensor_files import Stored
from prefpipe.schemas import Margin, to_table
from prefpipe.stages.train import mapped
from prefpipe.stages.train.examples import TrainRow
from prefpipe.stages.train.tally import Key

_VALUES, _STEPS = "margins/values", "margins/steps"  # among the tensors of a checkpoint


class Margins:
    """The margins of a run so far, in the order of its rows; NaN where none is known."""

    def __init__(self, rows: Sequence[TrainRow], held_out: Sequence[TrainRow]) -> None:
        sides = ((False, rows), (True, held_out))
        keys = dict.fromkeys((key, is_held_out) for is_held_out, side in sides if side for key in mapped.keys(side))
        self._places = {key: place for place, key in enumerate(keys)}
        self._values = torch.full((len(keys),), math.nan)
        self._steps = torch.zeros(len(keys), dtype=torch.int32)

    def note(self, step: int, margins: Mapping[Key, float], *, held_out: bool) -> None:
        """Keep the margins that a step, or the evaluation after it, gave; those that are not finite say nothing."""
        finite = {key: margin for key, margin in margins.items() if math.isfinite(margin)}
        places = torch.tensor([self._places[key, held_out] for key in finite], dtype=torch.long)
        self._values[places] = torch.tensor(list(finite.values()))
        self._steps[places] = step

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that a checkpoint holds."""
        return {_VALUES: self._values, _STEPS: self._steps}

    def load_state(self, tensors: Mapping[str, torch.Tensor | Stored]) -> None:
        """Go on from a `state`. The checkpoint of an older version has none: then only later steps are known."""
        if _VALUES in tensors:
            self._values, self._steps = whole(tensors[_VALUES]).clone(), whole(tensors[_STEPS]).clone()

    def table(self) -> pa.Table:
        """The rows of the dataset `margins`: of every pair whose margin is known, in the order of the run's rows."""
        values, steps = self._values.tolist(), self._steps.tolist()
        return to_table(
            Margin,
            [
                Margin(row_id, source, held_out, steps[place], values[place])
                for ((row_id, source), held_out), place in self._places.items()
                if not math.isnan(values[place])
            ],
        )
