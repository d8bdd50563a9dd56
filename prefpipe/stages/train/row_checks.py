"""Whether rows have the columns that their losses, and the order of training, read."""

from collections.abc import Callable, Sequence

import numpy as np

from prefpipe.config.losses import Objective, loss_of
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, UsageError
from prefpipe.stages.train import mapped, mixing
from prefpipe.stages.train.examples import TrainRow
from prefpipe.stages.train.record_batches import Array

_COLUMNS = ("preference_prob", "reward_gap")  # what a loss may need that a pair may lack


def columns(objective: Objective, rows: Sequence[TrainRow]) -> None:
    """Raise DataError when a loss reads a column that is null, or takes the logarithm of a value that has none."""
    for name in objective.names if objective.kind == "pairs" else ():
        for column in loss_of(name).needs:
            lacking = _places(rows, column, np.isnan) if column in _COLUMNS else []
            if len(lacking):
                raise DataError(
                    f"loss {name} reads {column}, which {len(lacking)} of {len(rows)} pairs lack (first "
                    f"{rows[lacking[0]].row_id})",
                    "build pairs that have it, or choose another loss: see docs/losses.md",
                )
        for column, advice in loss_of(name).logarithm_of.items():
            low = _places(rows, column, lambda values: ~(values > 0))
            if len(low):
                raise DataError(
                    f"loss {name} takes the logarithm of {column}, which is not above 0 in {len(low)} pairs (first "
                    f"{rows[low[0]].row_id})",
                    advice,
                )


def order(config: TrainConfig, rows: Sequence[TrainRow]) -> None:
    """Raise UsageError when rows are to be ordered by a reward_gap that they lack, or a source has no row to draw."""
    mixing.epoch_size(rows, config)
    lacking = _places(rows, "reward_gap", np.isnan) if config.train_order == "hardness" else []
    if len(lacking):
        raise UsageError(
            f"train_order = hardness: {len(lacking)} of {len(rows)} pairs have no reward_gap (first "
            f"{rows[lacking[0]].row_id})",
            "train on pairs of prefpipe build-pairs, which have rewards, or leave --train-order out",
        )


def _places(rows: Sequence[TrainRow], name: str, test: Callable[[Array], Array]) -> list[int]:
    """The places of the rows whose number in a column passes a test; a missing one is NaN."""
    return np.flatnonzero(test(mapped.column(rows, lambda batch: batch.numbers(name)))).tolist()
