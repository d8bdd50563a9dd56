"""`prefpipe plan RECIPE`: what a training run will cost. Reads the rows, probes one step, writes nothing."""

from collections.abc import Sequence

from prefpipe.config.train import TrainConfig
from prefpipe.runs.settled import settled
from prefpipe.stages.train import loading, loop, mapped, memory, mixing
from prefpipe.stages.train.examples import TrainRow
from prefpipe.stages.train.inputs import prepare
from prefpipe.stages.train.loss_batches import scores_prompt
from prefpipe.stages.train.memory import Fitting
from prefpipe.stages.train.micro_batches import micro_batches, tree_of

_GIB = 2**30


def run(config: TrainConfig) -> list[str]:
    """Lines of a table: memory by part, tokens, steps, time, and the saving of the cached reference."""
    config = settled(config)
    data = prepare(config)
    model = loading.load_policy(data.policy, config)
    loading.choose_rows(model, data.computed_rows, config.dtype)
    trees = memory.probe_trees(mapped.chain(data.rows, data.sft))
    fitting = memory.fitting(model, trees, config.gradient_checkpointing, config.max_tokens_per_micro_batch)
    unique = unique_tokens(data.rows, config, fitting.tokens, data.sft)
    return _lines(config, data.kind, mixing.epoch_size(data.rows, config), len(data.sft), fitting, unique)


def unique_tokens(
    rows: Sequence[TrainRow], config: TrainConfig, tokens: int, sft: Sequence[TrainRow] = ()
) -> dict[str, int]:
    """Tokens of the first epoch, rows to imitate included: those that are computed, those that rows computed apart
    would need ("logical"), and those of the largest micro-batch."""
    computed = logical = largest = 0
    for step, numbers in enumerate(mixing.epoch_batches(rows, config, 0)):
        batch = [rows[n] for n in numbers]
        imitated = [sft[n] for n in mixing.sft_rows(len(sft), config.sft_batch_size, config.seed, step)]
        cut = micro_batches(batch, tokens, score_prompt=scores_prompt(config.objective.settings))
        for micro in (*cut, *micro_batches(imitated, tokens)):
            load = sum(tree.num_tokens for tree in micro.trees)
            computed, largest = computed + load, max(largest, load)
        logical += sum(tree_of(row).num_logical_tokens for row in (*batch, *imitated))
    return {"computed": computed, "logical": logical, "largest micro-batch": largest}


def _lines(
    config: TrainConfig, kind: str, count: int, num_sft: int, fitting: Fitting, unique: dict[str, int]
) -> list[str]:
    footprint, largest = fitting.footprint, unique["largest micro-batch"]
    tokens = min(fitting.tokens, max(unique.values()))
    epochs = config.num_train_epochs
    seconds = epochs * unique["computed"] * footprint.train_seconds_per_token
    reference = epochs * unique["computed"] * footprint.score_seconds_per_token
    rows = {
        f"{kind}, steps": f"{count}, {loop.num_steps(count, config)} of {config.train_batch_size} {kind}",
        **({"sft": f"{num_sft} rows, {config.sft_batch_size} in every step"} if num_sft else {}),
        "tokens per epoch": f"{unique['computed']:,} computed, {unique['logical']:,} as separate rows",
        "micro-batch": f"at most {tokens:,} tokens; the largest one holds {largest:,}",
        "weights": f"{footprint.weights / _GIB:.3f} GiB ({config.dtype})",
        "trained, gradients": f"{footprint.adapter / _GIB:.3f} GiB",
        "optimizer": f"{footprint.optimizer / _GIB:.3f} GiB (moments; fp32 masters of 16-bit weights)",
        "activations": f"{footprint.activations(largest) / _GIB:.3f} GiB "
        f"({footprint.activations_per_token / 1024:.0f} KiB per token)",
        "checkpointing": _checkpointing(config, fitting),
        "head chunk": f"{footprint.head / _GIB:.3f} GiB",
        "peak": f"{footprint.peak(largest) / _GIB:.3f} GiB",
        "time": f"{seconds / 60:.1f} min ({1 / footprint.train_seconds_per_token:.0f} tokens/s in the probe)",
        "cache saves": f"{footprint.weights / _GIB:.3f} GiB of a second model, or {reference / 60:.1f} min of "
        "reference passes with the adapter off",
    }
    width = max(map(len, rows))
    return [f"{name:<{width}}  {text}" for name, text in rows.items()]


def _checkpointing(config: TrainConfig, fitting: Fitting) -> str:
    """Whether `train` would compute activations again in backward (gradient checkpointing), and why."""
    if config.gradient_checkpointing != "auto":
        return f"{config.gradient_checkpointing}, as asked for"
    if fitting.checkpointing:
        return f"on: a row of {fitting.longest:,} tokens does not fit the free memory without it"
    return f"off: a row of {fitting.longest:,} tokens, the longest, fits the free memory"
