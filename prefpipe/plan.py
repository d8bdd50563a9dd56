"""`prefpipe plan RECIPE`: what a training run will cost, before it runs. Reads, probes one step, writes nothing."""

from collections.abc import Sequence

from prefpipe.config.train import TrainConfig
from prefpipe.train import loop, stage
from prefpipe.train.groups import TrainPair, global_batches, micro_batches
from prefpipe.train.memory import Footprint, budget, free_bytes, measure

_GIB = 2**30


def run(config: TrainConfig) -> list[str]:
    """Lines of a table: memory by part, tokens, steps, time, and what the cached reference saves."""
    job = stage.prepare(config)
    model = stage.load_policy(job.policy, config)
    pairs = stage.to_train_pairs(job.rows)
    stage.choose_rows(model, pairs, config.dtype)
    footprint = measure(model, [stage.tree_of(p) for p in pairs])
    device = next(model.parameters()).device
    tokens = config.max_tokens_per_micro_batch or budget(footprint, device, free_bytes(device), longest_tree(pairs))
    unique = unique_tokens(pairs, config, tokens)
    return _lines(config, pairs, footprint, unique, min(tokens, max(unique.values())))


def longest_tree(pairs: Sequence[TrainPair]) -> int:
    """Tokens of the longest pair as a tree: no micro-batch can be smaller."""
    return max(stage.tree_of(p).num_tokens for p in pairs)


def unique_tokens(pairs: Sequence[TrainPair], config: TrainConfig, tokens: int) -> dict[str, int]:
    """Tokens of one epoch: computed, logical (every row apart), and of the largest micro-batch."""
    computed = largest = 0
    prompts = [p.prompt for p in pairs]
    for rows in global_batches(prompts, config.train_batch_size, config.seed, 0, together=config.group_by_prompt):
        for micro in micro_batches([pairs[row] for row in rows], tokens):
            load = sum(tree.num_tokens for tree in micro.trees)
            computed, largest = computed + load, max(largest, load)
    logical = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
    return {"computed": computed, "logical": logical, "largest micro-batch": largest}


def _lines(
    config: TrainConfig, pairs: Sequence[TrainPair], footprint: Footprint, unique: dict[str, int], tokens: int
) -> list[str]:
    largest = unique["largest micro-batch"]
    epochs = config.num_train_epochs
    seconds = epochs * unique["computed"] * footprint.train_seconds_per_token
    reference = epochs * unique["computed"] * footprint.score_seconds_per_token
    rows = {
        "pairs, steps": f"{len(pairs)}, {loop.num_steps(len(pairs), config)} of {config.train_batch_size} pairs",
        "tokens per epoch": f"{unique['computed']:,} computed, {unique['logical']:,} as separate rows",
        "micro-batch": f"at most {tokens:,} tokens; the largest one holds {largest:,}",
        "weights": f"{footprint.weights / _GIB:.3f} GiB ({config.dtype})",
        "adapter, gradients": f"{footprint.adapter / _GIB:.3f} GiB",
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
