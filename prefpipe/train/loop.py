"""The training loop: a generator of step metrics, from any step to the end. Saving and logging are its caller's."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from prefpipe import log
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, PrefpipeError
from prefpipe.forward.layout import Layout
from prefpipe.forward.logps import TreeModel, completion_logps
from prefpipe.train import losses
from prefpipe.train.groups import MicroBatch, TrainPair, global_batches, micro_batches
from prefpipe.train.losses import LossBatch
from prefpipe.train.optimizer import MasterAdamW, learning_rate
from prefpipe.train.parallel import World, sum_over_ranks

_SMALLEST_BUDGET = 64


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step; `values` are means over its pairs under TRL's names."""

    step: int
    num_steps: int
    num_pairs: int
    values: dict[str, float]


@dataclass
class Trainer:
    """What a step needs. `wrapped` is the model as the ranks share it; the budget is in tokens and may shrink."""

    model: TreeModel
    wrapped: torch.nn.Module
    optimizer: MasterAdamW
    config: TrainConfig
    world: World
    budget: int


def num_steps(num_pairs: int, config: TrainConfig) -> int:
    """Optimizer steps of the whole run."""
    return config.num_train_epochs * math.ceil(num_pairs / config.train_batch_size)


def steps(trainer: Trainer, pairs: Sequence[TrainPair], first: int) -> Iterator[StepMetrics]:
    """Run steps `first`.. to the end. Raises DataError when loss or gradient is not finite."""
    config = trainer.config
    if any(p.ref_chosen is None or p.ref_rejected is None for p in pairs):
        pairs = [replace(p, ref_chosen=None, ref_rejected=None) for p in pairs]  # metrics of some pairs would mislead
    total = num_steps(len(pairs), config)
    per_epoch = total // config.num_train_epochs
    prompts = [p.prompt for p in pairs]
    batches: list[list[int]] = []
    for step in range(first, total):
        epoch, within = divmod(step, per_epoch)
        if step == first or within == 0:
            batches = global_batches(
                prompts, config.train_batch_size, config.seed, epoch, together=config.group_by_prompt
            )
        batch = [pairs[row] for row in batches[within]]
        values = _accumulate(trainer, batch)
        rate = learning_rate(
            step, total, peak=config.learning_rate, warmup_ratio=config.warmup_ratio, schedule=config.lr_scheduler_type
        )
        values["grad_norm"] = trainer.optimizer.step(rate, config.max_grad_norm)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise DataError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}, pairs "
                + ", ".join(p.pair_id for p in batch),
                "look at these pairs, or lower learning_rate; the last checkpoint is intact",
            )
        values["learning_rate"] = rate
        values["epoch"] = (step + 1) / per_epoch
        yield StepMetrics(step, total, len(batch), values)


def _accumulate(trainer: Trainer, batch: Sequence[TrainPair]) -> dict[str, float]:
    """Gradients of one global batch. Out of memory: the budget halves and the same batch is done again."""
    while True:
        try:
            return _try_batch(trainer, batch)
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


def _try_batch(trainer: Trainer, batch: Sequence[TrainPair]) -> dict[str, float]:
    """Every micro-batch adds its sum over G, so its cut does not matter; the ranks' gradients add up likewise."""
    sums: dict[str, float] = {}
    for micro, counts in trainer.world.deal(micro_batches(batch, trainer.budget)):
        found = _micro_batch(trainer, micro, len(batch), counts=counts)
        sums = {name: sums.get(name, 0.0) + value for name, value in found.items()} if counts else sums
    return sum_over_ranks(sums, trainer.world)


def _micro_batch(trainer: Trainer, micro: MicroBatch, size: int, *, counts: bool) -> dict[str, float]:
    """Add the gradients of a micro-batch of a global batch of `size` pairs; returns its share of the step's metrics.

    Nothing of its graph may outlive this call: nodes that stay between freed activations keep the heap from joining
    them, and the next micro-batch then takes half as much again.
    """
    config = trainer.config
    layout = trainer.model.layout(micro.trees)
    loss_batch, weights = to_loss_batch(trainer.wrapped(layout), layout, micro)
    per_pair = losses.combine(config.loss_type, config.loss_weights, loss_batch, config.beta)
    loss = (weights * per_pair).sum() / size * float(counts)
    (loss * trainer.world.size).backward()  # DDP and FSDP2 average over ranks; a step is a sum
    trainer.optimizer.gather_gradients()
    found = {name: float(values.sum()) / size for name, values in losses.metrics(loss_batch, config.beta).items()}
    found |= {"loss": float(loss.detach()), "tokens/unique": float(layout.input_ids.numel())}
    found["tokens/logical"] = float(sum(len(p.prompt) * 2 + len(p.chosen) + len(p.rejected) for p in micro.pairs))
    return found


def to_loss_batch(token_logps: torch.Tensor, layout: Layout, micro: MicroBatch) -> tuple[LossBatch, torch.Tensor]:
    """Policy and reference log-probs of a micro-batch's pairs, and the pairs' weights."""
    logps = completion_logps(token_logps, layout)
    device = logps.device

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    def reference(rows: Sequence[tuple[float, ...] | None]) -> torch.Tensor | None:
        return None if any(r is None for r in rows) else column([math.fsum(r or ()) for r in rows])

    batch = LossBatch(
        chosen_logps=logps[list(micro.chosen)],
        rejected_logps=logps[list(micro.rejected)],
        ref_chosen_logps=reference([p.ref_chosen for p in micro.pairs]),
        ref_rejected_logps=reference([p.ref_rejected for p in micro.pairs]),
        chosen_lengths=column([len(p.chosen) for p in micro.pairs]),
        rejected_lengths=column([len(p.rejected) for p in micro.pairs]),
    )
    return batch, column([p.weight for p in micro.pairs])
