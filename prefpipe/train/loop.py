"""The training loop: a generator of step metrics, from any step to the end. Saving and logging are its caller's."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from prefpipe import log
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, PrefpipeError
from prefpipe.forward.logps import TreeModel
from prefpipe.train import losses
from prefpipe.train.batches import scores_prompt, settings_of, to_loss_batch
from prefpipe.train.groups import MicroBatch, balanced_batches, bank_rows, global_batches, micro_batches
from prefpipe.train.lossbatch import LabelBatch
from prefpipe.train.optimizer import MasterOptimizer, learning_rate
from prefpipe.train.parallel import World, sum_over_ranks
from prefpipe.train.rows import TrainLabel, TrainRow, has_references
from prefpipe.train.unpaired import reference_point

_SMALLEST_BUDGET = 64
_COUNT = "count/"


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step; `values` are means over its rows under TRL's names."""

    step: int
    num_steps: int
    num_rows: int
    values: dict[str, float]


@dataclass
class Trainer:
    """What a step needs. `wrapped` is the model as the ranks share it; the budget is in tokens and may shrink."""

    model: TreeModel
    wrapped: torch.nn.Module
    optimizer: MasterOptimizer
    config: TrainConfig
    world: World
    budget: int


def num_steps(num_rows: int, config: TrainConfig) -> int:
    """Optimizer steps of the whole run."""
    return config.num_train_epochs * math.ceil(num_rows / config.train_batch_size)


def epoch_batches(rows: Sequence[TrainRow], config: TrainConfig, epoch: int) -> list[list[int]]:
    """Row numbers of every step of an epoch: shuffled, and for labels balanced by class."""
    if isinstance(rows[0], TrainLabel):
        labels = [bool(row.desirable) for row in cast("Sequence[TrainLabel]", rows)]
        return balanced_batches(labels, config.train_batch_size, config.seed, epoch)
    prompts = [row.prompt for row in rows]
    return global_batches(prompts, config.train_batch_size, config.seed, epoch, together=config.group_by_prompt)


def steps(
    trainer: Trainer, rows: Sequence[TrainRow], first: int, bank: Sequence[TrainLabel] = ()
) -> Iterator[StepMetrics]:  # fmt: skip
    """Run steps `first`.. to the end. Raises DataError when loss or gradient is not finite.

    `bank` holds the mismatched rows of KTO's reference point, with reference values.
    """
    config = trainer.config
    if not all(map(has_references, rows)):
        rows = [row.with_references(None) for row in rows]  # metrics of some rows would mislead
    total = num_steps(len(rows), config)
    per_epoch = total // config.num_train_epochs
    batches: list[list[int]] = []
    for step in range(first, total):
        epoch, within = divmod(step, per_epoch)
        if step == first or within == 0:
            batches = epoch_batches(rows, config, epoch)
        batch = [rows[row] for row in batches[within]]
        drawn = [bank[i] for i in bank_rows(len(bank), config.kl_rows, config.seed, step)]
        values = _accumulate(trainer, batch, drawn)
        rate = learning_rate(
            step, total, peak=config.learning_rate, warmup_ratio=config.warmup_ratio,
            warmup_steps=config.warmup_steps, schedule=config.lr_scheduler_type,
        )  # fmt: skip
        values["grad_norm"] = trainer.optimizer.step(rate, config.max_grad_norm)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise DataError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}, rows "
                + ", ".join(row.row_id for row in batch),
                "look at these rows, or lower learning_rate; the last checkpoint is intact",
            )
        values["learning_rate"] = rate
        values["epoch"] = (step + 1) / per_epoch
        yield StepMetrics(step, total, len(batch), values)


def _accumulate(trainer: Trainer, batch: Sequence[TrainRow], bank: Sequence[TrainLabel]) -> dict[str, float]:
    """Gradients of one global batch. Out of memory: the budget halves and the same batch is done again."""
    while True:
        try:
            return _try_batch(trainer, batch, bank)
        except (torch.OutOfMemoryError, MemoryError) as error:
            trainer.optimizer.drop_gradients()
            if trainer.world.size > 1 or trainer.budget <= _SMALLEST_BUDGET:
                raise PrefpipeError(
                    f"out of memory with {trainer.budget} tokens in a micro-batch",
                    "lower --max-tokens-per-micro-batch and run the same command again: it resumes",
                ) from error
        trainer.budget //= 2
        log.warn(f"out of memory: micro-batches now hold {trainer.budget} tokens; the step is done again")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _try_batch(trainer: Trainer, batch: Sequence[TrainRow], bank: Sequence[TrainLabel]) -> dict[str, float]:
    """Every micro-batch adds its sum over G, so its cut does not matter; the ranks' gradients add up likewise."""
    z0 = z0_of(trainer, bank) if bank else 0.0
    sums: dict[str, float] = {}
    cut = micro_batches(batch, trainer.budget, score_prompt=scores_prompt(trainer.config))
    for micro, counts in trainer.world.deal(cut):
        found = _micro_batch(trainer, micro, len(batch), z0, counts=counts)
        sums = {name: sums.get(name, 0.0) + value for name, value in found.items()} if counts else sums
    values = _means(sum_over_ranks(sums, trainer.world))
    return {**values, "kto/z0": z0} if bank else values


def _micro_batch(trainer: Trainer, micro: MicroBatch, size: int, z0: float, *, counts: bool) -> dict[str, float]:
    """Add the gradients of a micro-batch of a global batch of `size` rows; returns its share of the step's metrics.

    Nothing of its graph may outlive this call: nodes that stay between freed activations keep the heap from joining
    them, and the next micro-batch then takes half as much again.
    """
    config = trainer.config
    layout = trainer.model.layout(micro.trees)
    token_logps = trainer.wrapped(layout, collisions=config.use_weighting)
    loss_batch, weights = to_loss_batch(token_logps, layout, micro, config, z0)
    per_row = losses.combine(config.loss_type, config.loss_weights, loss_batch, settings_of(config))
    loss = (weights * per_row).sum() / size * float(counts)
    (loss * trainer.world.size).backward()  # DDP and FSDP2 average over ranks; a step is a sum
    trainer.optimizer.gather_gradients()
    found = {"loss": float(loss.detach()), "tokens/unique": float(layout.input_ids.numel())}
    found["tokens/logical"] = float(sum(map(logical_tokens, micro.rows)))
    for name, (values, counted) in losses.metrics(loss_batch, config.beta).items():
        found[name], found[f"{_COUNT}{name}"] = float((values * counted).sum()), float(counted.sum())
    return found


def z0_of(trainer: Trainer, bank: Sequence[TrainLabel]) -> float:
    """KTO's reference point at the policy of this step, without gradient: one value for the whole global batch."""
    world, total = trainer.world, 0.0
    with torch.no_grad():
        for micro, counts in world.deal(micro_batches(bank, trainer.budget)):
            layout = trainer.model.layout(micro.trees)
            batch, _ = to_loss_batch(trainer.wrapped(layout), layout, micro, trainer.config)
            if counts:
                total += float(cast(LabelBatch, batch).completion.ratios.sum())
    return reference_point(sum_over_ranks({"total": total}, world)["total"], len(bank))


def logical_tokens(row: TrainRow) -> int:
    """Tokens that separate rows compute: the prompt again for every completion."""
    return sum(len(row.prompt) + len(answer.ids) for answer in row.answers)


def _means(sums: dict[str, float]) -> dict[str, float]:
    """Sums over the rows that they count divided by their number; what counts no row of the step is left out."""
    counts = {name.removeprefix(_COUNT): n for name, n in sums.items() if name.startswith(_COUNT)}
    return {
        name: value / counts.get(name, 1.0)
        for name, value in sums.items()
        if not name.startswith(_COUNT) and counts.get(name, 1.0)
    }
