"""The training loop: a generator of step metrics, from any step to the end. Saving and logging are its caller's."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError
from prefpipe.forward.layout import flatten
from prefpipe.forward.logps import completion_logps, tree_logps
from prefpipe.train import losses
from prefpipe.train.groups import MicroBatch, TrainPair, global_batches, micro_batches
from prefpipe.train.losses import LossBatch
from prefpipe.train.optimizer import MasterAdamW, learning_rate


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step; `values` are means over its pairs under TRL's names."""

    step: int
    num_steps: int
    num_pairs: int
    values: dict[str, float]


def num_steps(num_pairs: int, config: TrainConfig) -> int:
    """Optimizer steps of the whole run."""
    return config.num_train_epochs * math.ceil(num_pairs / config.train_batch_size)


def steps(
    model: torch.nn.Module, optimizer: MasterAdamW, pairs: Sequence[TrainPair], config: TrainConfig, first: int
) -> Iterator[StepMetrics]:
    """Run steps `first`.. to the end. Raises DataError when loss or gradient is not finite."""
    total = num_steps(len(pairs), config)
    per_epoch = total // config.num_train_epochs
    for step in range(first, total):
        epoch, within = divmod(step, per_epoch)
        rows = global_batches(len(pairs), config.train_batch_size, config.seed, epoch)[within]
        values = _accumulate(model, optimizer, [pairs[row] for row in rows], config)
        rate = learning_rate(
            step, total, peak=config.learning_rate, warmup_ratio=config.warmup_ratio, schedule=config.lr_scheduler_type
        )
        values["grad_norm"] = optimizer.step(rate, config.max_grad_norm)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise DataError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}, pairs "
                + ", ".join(pairs[row].pair_id for row in rows),
                "look at these pairs, or lower learning_rate; the last checkpoint is intact",
            )
        values["learning_rate"] = rate
        values["epoch"] = (step + 1) / per_epoch
        yield StepMetrics(step, total, len(rows), values)


def _accumulate(
    model: torch.nn.Module, optimizer: MasterAdamW, batch: Sequence[TrainPair], config: TrainConfig
) -> dict[str, float]:
    """Gradients of one global batch; every micro-batch adds its sum over G, so its cut does not matter."""
    sums: dict[str, float] = {}
    for micro in micro_batches(batch, config.max_tokens_per_micro_batch):
        loss_batch, weights = _forward(model, micro)
        per_pair = losses.combine(config.loss_type, config.loss_weights, loss_batch, config.beta)
        loss = (weights * per_pair).sum() / len(batch)
        loss.backward()
        optimizer.gather_gradients()
        sums["loss"] = sums.get("loss", 0.0) + float(loss.detach())
        for name, values in losses.metrics(loss_batch, config.beta).items():
            sums[name] = sums.get(name, 0.0) + float(values.sum()) / len(batch)
    return sums


def _forward(model: torch.nn.Module, micro: MicroBatch) -> tuple[LossBatch, torch.Tensor]:
    layout = flatten(micro.trees)
    logps = completion_logps(tree_logps(model, layout), layout)
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
