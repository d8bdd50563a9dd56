"""Which rows an epoch draws from its sources, in which order, and which rows to imitate a step has. No tensors.

With source_weights an epoch of t rows draws t * w_i / sum(w) rows of source i. Where these are no whole numbers, all
are rounded down, and what is missing to t (rounded down) goes to the largest remainders, the earlier source first. A
source is read in passes of all its rows, each shuffled by (seed, source, pass), and an epoch goes on where the epoch
before ended: over a run, two rows of a source are drawn equally often, or one of them once more.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from prefpipe.config.train import TrainConfig
from prefpipe.errors import UsageError
from prefpipe.stages.train.examples import TrainLabel, TrainRow
from prefpipe.stages.train.mapped import column, prompt_numbers, select
from prefpipe.stages.train.micro_batches import Batches, balanced_batches, global_batches, shuffled
from prefpipe.stages.train.record_batches import Array, Batch


def counts(sizes: Sequence[int], weights: Sequence[float], epoch_length: str) -> list[int]:
    """Rows of every source in an epoch, from the sizes of the sources (above 0), their weights, and the setting."""
    exact = [Fraction(str(weight)) for weight in weights]  # 0.6 as it was written, not as a float
    shares = [weight / sum(exact) for weight in exact]
    used_up = [size / share for size, share in zip(sizes, shares, strict=True)]
    rows = {"all_rows": Fraction(sum(sizes)), "first_exhausted": min(used_up), "all_exhausted": max(used_up)}
    parts = [rows[epoch_length] * share for share in shares]
    found = [int(part) for part in parts]
    missing = int(rows[epoch_length]) - sum(found)
    for source in sorted(range(len(parts)), key=lambda i: found[i] - parts[i])[:missing]:
        found[source] += 1
    return found


def epoch_counts(rows: Sequence[TrainRow], config: TrainConfig) -> list[int]:
    """Rows of every source in an epoch. Raises UsageError for a source that gets none."""
    sizes = [len(numbers) for numbers in _by_source(rows, config)]
    found = counts(sizes, config.source_weights, config.epoch_length) if all(sizes) else sizes
    for source, count in enumerate(found):
        if not count:
            raise UsageError(
                f"source_weights: {config.objective.kind}.{source} gets no row of an epoch of {sum(found)} rows; it "
                f"has {sizes[source]} rows to train on",
                "raise its weight, set epoch_length = all_exhausted, or leave the source out",
            )
    return found


def epoch_size(rows: Sequence[TrainRow], config: TrainConfig) -> int:
    """Rows of an epoch."""
    return sum(epoch_counts(rows, config)) if config.source_weights else len(rows)


def epoch_rows(rows: Sequence[TrainRow], config: TrainConfig, epoch: int) -> Array | range:
    """Row numbers of an epoch, ascending; a row that is drawn several times stands there as often."""
    if not config.source_weights:
        return range(len(rows))
    drawn = [
        numbers[_walk(len(numbers), epoch * count, count, f"source {source}/{config.seed}")]
        for source, (numbers, count) in enumerate(
            zip(_by_source(rows, config), epoch_counts(rows, config), strict=True)
        )
    ]
    return np.sort(np.concatenate(drawn))


def epoch_batches(rows: Sequence[TrainRow], config: TrainConfig, epoch: int) -> Batches:
    """Row numbers of every step of an epoch, in the order that the settings name. Shuffled labels are in the proportion
    of their classes in every step; equal reward gaps keep the order of the rows. With source_weights these are the rows
    that the epoch draws."""
    numbers = epoch_rows(rows, config, epoch)
    if isinstance(numbers, range):
        return _batches(rows, config, epoch)
    return Batches(numbers[_batches(select(rows, numbers), config, epoch).order], config.train_batch_size)


def _batches(rows: Sequence[TrainRow], config: TrainConfig, epoch: int) -> Batches:
    order: Iterable[int] | None = None
    if config.train_order == "given":
        order = range(len(rows))
    elif config.train_order == "hardness":
        order = np.argsort(-np.nan_to_num(column(rows, Batch.gaps)), kind="stable")
    elif isinstance(rows[0], TrainLabel):
        labels = column(rows, Batch.desirable)
        return balanced_batches(labels, config.train_batch_size, config.seed, epoch)
    together = config.group_by_prompt
    prompts: Sequence[int] = prompt_numbers(rows).tolist() if together else range(len(rows))
    return global_batches(prompts, config.train_batch_size, config.seed, epoch, together=together, fixed=order)


def explain(rows: Sequence[TrainRow], sft: Sequence[TrainRow], config: TrainConfig) -> list[str]:
    """What an epoch draws from each source, and a step of the rows to imitate, in words."""
    lines: list[str] = []
    if config.source_weights:
        kind, by_source = config.objective.kind, _by_source(rows, config)
        drawn = zip(getattr(config, kind), by_source, epoch_counts(rows, config), strict=True)
        for number, (name, numbers, count) in enumerate(drawn):
            times = f"each {count / len(numbers):.3g} times"
            lines.append(f"{kind}.{number}: an epoch draws {count} of {len(numbers)} rows, {times} ({name})")
    if sft:
        lines.append(
            f"sft: every step adds {config.sft_weight:g} x the NLL of a token of {config.sft_batch_size} of {len(sft)} "
            "rows"
        )
    return lines


def row_counts(batch: Sequence[TrainRow], config: TrainConfig) -> dict[str, float]:
    """Rows of every source in a step, as `pairs.0/rows`."""
    drawn = Counter(row.source for row in batch)
    return {f"{config.objective.kind}.{i}/rows": float(drawn[i]) for i in range(len(config.source_weights))}


def sft_rows(size: int, count: int, seed: int, step: int) -> list[int]:
    """Which of `size` rows to imitate a step has: the next `count` of a walk in passes of all of them."""
    return _walk(size, step * count, count, f"sft/{seed}").tolist() if size else []


def _by_source(rows: Sequence[TrainRow], config: TrainConfig) -> list[Array]:
    if not config.source_weights:
        return []
    sources = column(rows, Batch.sources)
    return [np.flatnonzero(sources == source).astype(np.int32) for source in range(len(config.source_weights))]


def _walk(size: int, start: int, count: int, name: str) -> Array:
    """Places start to start + count, at least one, of an endless walk over range(size) in shuffled passes."""
    first = start // size
    passes = [_pass(size, name, number) for number in range(first, (start + count - 1) // size + 1)]
    return (passes[0] if len(passes) == 1 else np.concatenate(passes))[start - first * size :][:count]


@lru_cache(maxsize=8)
def _pass(size: int, name: str, number: int) -> Array:
    return shuffled(range(size), random.Random(f"{name}/{number}"))
