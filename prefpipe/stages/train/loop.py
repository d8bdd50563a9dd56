"""The training loop: the steps of a run one by one, from any step to the end. It computes; `fit` saves and logs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch

from prefpipe import log
from prefpipe.config.train import TrainConfig
from prefpipe.errors import PrefpipeError
from prefpipe.forward.layout import Layout
from prefpipe.forward.logps import TreeModel, completion_logps
from prefpipe.stages.train import mapped, mixing
from prefpipe.stages.train.examples import TrainLabel, TrainRow
from prefpipe.stages.train.loss_batches import scores_prompt, to_loss_batch
from prefpipe.stages.train.losses import metrics, registry
from prefpipe.stages.train.losses.batch import LabelBatch, LossBatch
from prefpipe.stages.train.losses.unpaired import reference_point
from prefpipe.stages.train.micro_batches import (
    MicroBatch,
    bank_rows,
    micro_batches,
    tree_of,
)
from prefpipe.stages.train.optimizer import MasterOptimizer, learning_rate
from prefpipe.stages.train.parallel import World, sum_over_ranks
from prefpipe.stages.train.tally import Summary, Tally, by_number, key_of, summarise

_SMALLEST_BUDGET = 64


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, numbered from 0; `values` are means over its rows under TRL's names, `margins` those of its
    pairs before it moves the weights, by the number of the row.

    When its loss or gradient is not finite, no weight moves: `skipped` then has the ids of its rows, and `values` the
    metrics that are finite.
    """

    step: int
    num_rows: int
    values: dict[str, float]
    skipped: tuple[str, ...] = ()
    margins: Mapping[int, float] = field(default_factory=dict[int, float])


@dataclass
class Trainer:
    """What a step needs."""

    model: TreeModel
    # The model as the ranks share it: DDP or FSDP2 around it, or the model itself in a world of one.
    wrapped: torch.nn.Module
    optimizer: MasterOptimizer
    config: TrainConfig
    world: World
    # Tokens of a micro-batch; it shrinks when the memory does not hold them.
    budget: int
    # The completions were sampled from the reference: the KL to it can be read off them and is reported.
    on_reference: bool = False
    # Noise in the log-prob of a token (nats) that step 0 may differ from the reference by; None: it is not compared.
    start_noise: float | None = None


@dataclass(frozen=True)
class Steps:
    """The steps of a run, each computed when it is asked for; `num_steps` counts those before the first one too."""

    num_steps: int
    metrics: Iterator[StepMetrics]

    def __iter__(self) -> Iterator[StepMetrics]:
        return self.metrics

    def __next__(self) -> StepMetrics:
        return next(self.metrics)


def num_steps(num_rows: int, config: TrainConfig) -> int:
    """Optimizer steps of the whole run."""
    return config.num_train_epochs * math.ceil(num_rows / config.train_batch_size)


def steps(
    trainer: Trainer,
    rows: Sequence[TrainRow],
    first: int,
    bank: Sequence[TrainLabel] = (),
    sft: Sequence[TrainLabel] = (),
) -> Steps:
    """The steps from number `first` to the end. One whose loss or gradient is not finite moves no weight and says so.

    `bank` holds the mismatched rows of KTO's reference point, with reference log-probs; `sft` the rows to imitate.
    """
    rows = mapped.all_or_none(rows)  # metrics of some rows would mislead
    total = num_steps(mixing.epoch_size(rows, trainer.config), trainer.config)
    return Steps(total, _steps(trainer, rows, first, total, bank, sft))


def _steps(
    trainer: Trainer,
    rows: Sequence[TrainRow],
    first: int,
    total: int,
    bank: Sequence[TrainLabel],
    sft: Sequence[TrainLabel],
) -> Iterator[StepMetrics]:
    config = trainer.config
    per_epoch = total // config.num_train_epochs
    batches: Sequence[list[int]] = []
    for step in range(first, total):
        epoch, within = divmod(step, per_epoch)
        if step == first or within == 0:
            batches = mixing.epoch_batches(rows, config, epoch)
        numbers = batches[within]
        batch = [rows[number] for number in numbers]
        drawn = [bank[i] for i in bank_rows(len(bank), config.kl_rows, config.seed, step)]
        imitated = [sft[i] for i in mixing.sft_rows(len(sft), config.sft_batch_size, config.seed, step)]
        found = _accumulate(trainer, batch, drawn, imitated, trainer.start_noise if step == 0 else None)
        values = found.values
        rate = learning_rate(
            step,
            total,
            peak=config.learning_rate,
            warmup_ratio=config.warmup_ratio,
            warmup_steps=config.warmup_steps,
            schedule=config.lr_scheduler_type,
        )
        finite = math.isfinite(values["loss"])
        if not finite:
            trainer.optimizer.drop_gradients()
        values["grad_norm"] = trainer.optimizer.step(rate, config.max_grad_norm) if finite else math.nan
        finite = math.isfinite(values["grad_norm"])
        values |= {"learning_rate": rate, "epoch": (step + 1) / per_epoch}
        shown = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no NaN
        skipped = () if finite else tuple(row.row_id for row in (*batch, *imitated))
        margins = by_number(found.margins, map(key_of, batch), numbers)
        yield StepMetrics(step, len(batch), shown, skipped, margins)


def _accumulate(
    trainer: Trainer,
    batch: Sequence[TrainRow],
    bank: Sequence[TrainLabel],
    sft: Sequence[TrainLabel],
    noise: float | None,
) -> Summary:
    """Gradients of one global batch. When memory runs out, the budget falls to half of the largest micro-batch, and the
    same batch is computed again."""
    while True:
        try:
            return _try_batch(trainer, batch, bank, sft, noise)
        except (torch.OutOfMemoryError, MemoryError) as error:
            trainer.optimizer.drop_gradients()
            tried = min(trainer.budget, max(_largest_load(trainer, rows) for rows in (batch, bank, sft) if rows))
            smaller = max(_SMALLEST_BUDGET, tried // 2)
            if trainer.world.size > 1 or smaller >= tried:
                raise PrefpipeError(
                    f"out of memory with {tried} tokens in a micro-batch",
                    "lower --max-tokens-per-micro-batch and run the same command again: it resumes",
                ) from error
        trainer.budget = smaller
        log.warn(f"out of memory: micro-batches now hold {smaller} tokens; the step is computed again")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _largest_load(trainer: Trainer, rows: Sequence[TrainRow]) -> int:
    """Tokens of the largest micro-batch of a step under the budget."""
    cut = micro_batches(rows, trainer.budget, score_prompt=scores_prompt(trainer.config.objective.settings))
    return max(sum(tree.num_tokens for tree in micro.trees) for micro in cut)


def _try_batch(
    trainer: Trainer,
    batch: Sequence[TrainRow],
    bank: Sequence[TrainLabel],
    sft: Sequence[TrainLabel],
    noise: float | None,
) -> Summary:
    """Gradients and metrics of one global batch of G rows, and of T tokens to imitate. Every micro-batch adds its sum
    of losses divided by G, or its NLL divided by T, so that neither the cut into micro-batches nor the number of ranks
    changes the result."""
    z0 = z0_of(trainer, bank) if bank else 0.0
    tally = Tally()
    cut = micro_batches(batch, trainer.budget, score_prompt=scores_prompt(trainer.config.objective.settings))
    work = [partial(_micro_batch, trainer, micro, len(batch), z0, noise) for micro in cut]
    sft_tokens = sum(row.completion.num_scored for row in sft)
    work += [partial(_sft_micro_batch, trainer, micro, sft_tokens) for micro in micro_batches(sft, trainer.budget)]
    for add_gradients, counts in trainer.world.deal(work):
        # A micro-batch that a rank repeats to keep step with the others goes into a tally that nobody reads.
        add_gradients(counts=counts, tally=tally if counts else Tally())
    found = summarise(tally, trainer.world)
    values = found.values | mixing.row_counts(batch, trainer.config)
    values["tokens/scored_share"] = values.pop("tokens/scored") / values["tokens/unique"]
    return Summary({**values, "kto/z0": z0} if bank else values, found.margins)


def _micro_batch(
    trainer: Trainer, micro: MicroBatch, size: int, z0: float, noise: float | None, *, counts: bool, tally: Tally
) -> None:
    """Add the gradients of a micro-batch of a global batch of `size` rows, and its share of the step's metrics; with
    `noise` also how far its loss is from its value at the reference, and ties within the noise.

    No tensor of its graph may outlive this call: one that stays between freed activations keeps the heap from joining
    them, and the next micro-batch then takes half as much again.
    """
    found = row_losses(trainer, micro, z0, noise)
    _backward(trainer, found.per_row.sum() / size * float(counts), found.layout, micro, tally)
    tally.add_rows(found.metrics, micro.rows)
    if noise is not None:
        start = registry.departure(trainer.config.objective, found.batch, noise)
        shares = found.weights / size
        for name in ("loss", "at_reference", "shift"):
            tally.add_total(f"start/{name}", float((shares * getattr(start, name)).sum()))
        tally.add_total("start/variance", float((shares * start.deviation).square().sum()))


def _sft_micro_batch(trainer: Trainer, micro: MicroBatch, size: int, *, counts: bool, tally: Tally) -> None:
    """As `_micro_batch`, for rows to imitate of a step whose completions have `size` tokens: sft_weight times the mean
    NLL of a token. That is the loss `sft` of TRL's DPOTrainer (1.16), over the rows of a step."""
    layout = trainer.model.layout(micro.trees)
    logps = completion_logps(trainer.wrapped(layout, collisions=False), layout)
    nll = -logps[[place for (place,) in micro.places]].sum() / size
    _backward(trainer, trainer.config.sft_weight * nll * float(counts), layout, micro, tally)
    tally.add_total("sft/nll", float(nll.detach()))
    tally.add_total("sft/tokens", float(sum(row.completions[0].num_scored for row in micro.rows)))


def _backward(trainer: Trainer, loss: torch.Tensor, layout: Layout, micro: MicroBatch, tally: Tally) -> None:
    """Add the gradients of a loss, and the loss and the tokens to the totals of the step."""
    (loss * trainer.world.size).backward()  # DDP and FSDP2 average over ranks; a step is a sum
    trainer.optimizer.gather_gradients()
    tally.add_total("loss", float(loss.detach()))
    tally.add_total("tokens/unique", float(layout.input_ids.numel()))
    tally.add_total("tokens/scored", float(layout.targets.numel()))
    tally.add_total("tokens/logical", float(sum(tree_of(row).num_logical_tokens for row in micro.rows)))


@dataclass(frozen=True)
class RowLosses:
    """What a forward pass makes of the rows [B] of a micro-batch: its layout, the batch of the losses, the weights [B],
    the loss of every row [B], weighted and with its load-balancing loss, and the metrics."""

    layout: Layout
    batch: LossBatch
    weights: torch.Tensor
    per_row: torch.Tensor
    metrics: Mapping[str, metrics.Counted]


def row_losses(trainer: Trainer, micro: MicroBatch, z0: float, noise: float | None = None) -> RowLosses:
    """Forward of a micro-batch, for a step and for an evaluation; `noise` as in `metrics`."""
    objective = trainer.config.objective
    layout = trainer.model.layout(micro.trees)
    coefficient = trainer.config.router_aux_loss_coef
    found = trainer.wrapped(layout, collisions=objective.settings.use_weighting, balance=coefficient > 0)
    token_logps, balance = found if coefficient else (found, None)
    batch, weights = to_loss_batch(token_logps, layout, micro, objective.settings, z0)
    shown = metrics.metrics(batch, objective.settings.beta, on_reference=trainer.on_reference, noise=noise)
    per_row = weights * registry.combine(objective, batch)
    if balance is not None:
        of_rows = torch.stack([balance[list(place)].mean() for place in micro.places])
        per_row = per_row + coefficient * of_rows
        shown = {**shown, "aux_loss": (of_rows.detach(), torch.ones_like(of_rows))}
    if trainer.config.source_weights:
        shown = {**shown, **metrics.by_source(shown, per_row, objective.kind, [row.source for row in micro.rows])}
    return RowLosses(layout, batch, weights, per_row, shown)


def z0_of(trainer: Trainer, bank: Sequence[TrainLabel]) -> float:
    """KTO's reference point at the policy of this step, without gradient: one value for the whole global batch."""
    world, total = trainer.world, 0.0
    with torch.no_grad():
        for micro, counts in world.deal(micro_batches(bank, trainer.budget)):
            layout = trainer.model.layout(micro.trees)
            batch, _ = to_loss_batch(trainer.wrapped(layout), layout, micro, trainer.config.objective.settings)
            if counts:
                total += float(cast(LabelBatch, batch).completion.log_ratios.sum())
    return reference_point(sum_over_ranks({"total": total}, world)["total"], len(bank))
