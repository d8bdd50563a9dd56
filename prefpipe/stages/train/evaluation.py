"""Rows that are held out of training: which they are, how the policy does on them, which evaluation is the best.

The history of evaluations is read back from metrics.jsonl, so that a resumed run decides as an uninterrupted one does.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch

from prefpipe.errors import DataError
from prefpipe.stages.train import loop, mapped
from prefpipe.stages.train.examples import TrainLabel, TrainRow
from prefpipe.stages.train.loop import Trainer
from prefpipe.stages.train.loss_batches import scores_prompt
from prefpipe.stages.train.micro_batches import micro_batches
from prefpipe.stages.train.tally import Tally, by_number, summarise

LOWER_IS_BETTER = ("eval_loss",)
_ROWS = 4096  # rows that are Python objects at a time


@dataclass(frozen=True)
class Evaluation:
    """The metrics of an evaluation under `eval_` names, and the margins of its pairs (or groups) by the number of the
    row, where there is a reference."""

    values: dict[str, float]
    margins: Mapping[int, float]


def split_by_prompt(rows: Sequence[TrainRow], share: float, seed: int) -> tuple[Sequence[TrainRow], Sequence[TrainRow]]:
    """Rows to train on and rows to evaluate on, by prompt: `share` of the prompts, rounded, drawn with `seed`.

    Raises DataError when that leaves no prompt to train on, or none to evaluate on.
    """
    prompts = mapped.prompt_numbers(rows)
    distinct = int(prompts.max()) + 1
    size = round(share * distinct)
    if not 0 < size < distinct:
        side = "to evaluate on" if size == 0 else "to train on"
        raise DataError(
            f"eval_split = {share} of {distinct} prompts leaves no prompt {side}",
            "change eval_split, or give the rows to evaluate on with --eval-pairs, --eval-labels or --eval-groups",
        )
    drawn = random.Random(f"eval/{seed}").sample(range(distinct), size)
    held_out = np.isin(prompts, drawn)
    return mapped.select(rows, np.flatnonzero(~held_out)), mapped.select(rows, np.flatnonzero(held_out))


@torch.no_grad()
def evaluate(trainer: Trainer, rows: Sequence[TrainRow], bank: Sequence[TrainLabel]) -> Evaluation:
    """Loss and metrics of a training step over all `rows`, under `eval_` names, and their margins; the same on every
    rank. Rows are Python objects some at a time; those of one prompt that are far apart compute it again.

    `bank` holds the mismatched rows of KTO's reference point. An evaluation reads every one of them, where a step draws
    some: two evaluations should differ by the policy alone.
    """
    rows = mapped.all_or_none(rows)
    settings, world = trainer.config.objective.settings, trainer.world
    z0 = loop.z0_of(trainer, bank) if bank else 0.0
    tally = Tally()
    for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS]
        for micro, counts in world.deal(micro_batches(some, trainer.budget, score_prompt=scores_prompt(settings))):
            losses = loop.row_losses(trainer, micro, z0)
            if counts:
                per_row = (losses.per_row, torch.ones_like(losses.per_row))
                tally.add_rows({"loss": per_row, **losses.metrics}, micro.rows)
    found = summarise(tally, world)
    values = found.values | ({"kto/z0": z0} if bank else {})
    margins = by_number(found.margins, mapped.keys(rows), count())
    return Evaluation({f"eval_{name}": value for name, value in values.items()}, margins)


def records(history: Sequence[Mapping[str, float]], metric: str) -> list[int]:
    """How many steps were done at each new best evaluation, in order; a tie and a NaN are no new best.

    `history` holds the lines of metrics.jsonl with an evaluation; their steps count from 0. Raises DataError when no
    line has the metric.
    """
    if history and not any(metric in line for line in history):
        raise DataError(f"metric_for_best_model = {metric} is not among the metrics of this loss", "choose eval_loss")
    steps_done: list[int] = []
    best = -math.inf
    for line in history:
        value = line.get(metric, math.nan) * (-1 if metric in LOWER_IS_BETTER else 1)
        if value > best:
            best = value
            steps_done.append(int(line["step"]) + 1)
    return steps_done


def is_stale(history: Sequence[Mapping[str, float]], metric: str, patience: int) -> bool:
    """Whether the last `patience` evaluations brought no new best; never when `patience` is 0."""
    best = records(history, metric)
    since = [line for line in history if not best or int(line["step"]) + 1 > best[-1]]
    return 0 < patience <= len(since)
