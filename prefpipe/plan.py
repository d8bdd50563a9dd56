"""`prefpipe plan RECIPE`: what a training run will cost, before it runs. Reads, probes one step, writes nothing."""

from collections.abc import Sequence

from prefpipe.config.train import TrainConfig
from prefpipe.forward import load
from prefpipe.train import loop, stage
from prefpipe.train.batches import scores_prompt
from prefpipe.train.groups import micro_batches, tree_of
from prefpipe.train.inputs import prepare
from prefpipe.train.memory import Footprint, budget, free_bytes, measure
from prefpipe.train.rows import TrainRow

_GIB = 2**30


def run(config: TrainConfig) -> list[str]:
    """Lines of a table: memory by part, tokens, steps, time, and what the cached reference saves."""
    job = prepare(config)
    model = stage.load_policy(job.policy, config)
    stage.choose_rows(model, job.rows, config.dtype)
    if config.gradient_checkpointing == "on":
        load.checkpoint_layers(model.policy)
    footprint = measure(model, [tree_of(row) for row in job.rows])
    device = next(model.parameters()).device
    tokens = config.max_tokens_per_micro_batch or budget(footprint, device, free_bytes(device), longest_tree(job.rows))
    unique = unique_tokens(job.rows, config, tokens)
    return _lines(config, job.kind, len(job.rows), footprint, unique, min(tokens, max(unique.values())))


def longest_tree(rows: Sequence[TrainRow]) -> int:
    """Tokens of the longest row as a tree: no micro-batch can be smaller."""
    return max(tree_of(row).num_tokens for row in rows)


def unique_tokens(rows: Sequence[TrainRow], config: TrainConfig, tokens: int) -> dict[str, int]:
    """Tokens of one epoch: computed, logical (every row apart), and of the largest micro-batch."""
    computed = largest = 0
    for numbers in loop.epoch_batches(rows, config, 0):
        for micro in micro_batches([rows[n] for n in numbers], tokens, score_prompt=scores_prompt(config)):
            load = sum(tree.num_tokens for tree in micro.trees)
            computed, largest = computed + load, max(largest, load)
    logical = sum(tree_of(row).num_logical_tokens for row in rows)
    return {"computed": computed, "logical": logical, "largest micro-batch": largest}


def _lines(
    config: TrainConfig, kind: str, count: int, footprint: Footprint, unique: dict[str, int], tokens: int
) -> list[str]:
    largest = unique["largest micro-batch"]
    epochs = config.num_train_epochs
    seconds = epochs * unique["computed"] * footprint.train_seconds_per_token
    reference = epochs * unique["computed"] * footprint.score_seconds_per_token
    rows = {
        f"{kind}, steps": f"{count}, {loop.num_steps(count, config)} of {config.train_batch_size} {kind}",
        "tokens per epoch": f"{unique['computed']:,} computed, {unique['logical']:,} as separate rows",
        "micro-batch": f"at most {tokens:,} tokens; the largest one holds {largest:,}",
        "weights": f"{footprint.weights / _GIB:.3f} GiB ({config.dtype})",
        "trained, gradients": f"{footprint.adapter / _GIB:.3f} GiB",
        "optimizer": f"{footprint.optimizer / _GIB:.3f} GiB (fp32 masters, moments, gradients)",
        "activations": f"{footprint.activations(largest) / _GIB:.3f} GiB "
        f"({footprint.activations_per_token / 1024:.0f} KiB per token)",
        "head chunk": f"{footprint.head / _GIB:.3f} GiB",
        "peak": f"{footprint.peak(largest) / _GIB:.3f} GiB",
        "time": f"{seconds / 60:.1f} min ({1 / footprint.train_seconds_per_token:.0f} tokens/s in the probe)",
        "cache saves": f"{footprint.weights / _GIB:.3f} GiB of a second model, or {reference / 60:.1f} min of "
        "reference passes with the adapter off",
    }
    width = max(map(len, rows))
    return [f"{name:<{width}}  {text}" for name, text in rows.items()]
