"""`prefpipe plan RECIPE`: what a training run will cost. Reads the rows and probes one step on this machine, or
predicts the memory of a rank for other machines from config.json. Writes nothing."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from prefpipe import log, machine
from prefpipe.config.plan import PlanConfig
from prefpipe.config.train import TrainConfig
from prefpipe.errors import UsageError
from prefpipe.forward.layout import Tree
from prefpipe.models import policy as models
from prefpipe.runs.settled import settled
from prefpipe.stages.train import host_copies, loading, loop, mapped, memory, mixing
from prefpipe.stages.train.examples import TrainRow
from prefpipe.stages.train.forecast import RANKS, Forecast, Setting, host_copy
from prefpipe.stages.train.inputs import TrainingData, prepare
from prefpipe.stages.train.loss_batches import scores_prompt
from prefpipe.stages.train.memory import Fitting
from prefpipe.stages.train.micro_batches import micro_batches, tree_of
from prefpipe.stages.train.record_batches import Batch

_GIB = 2**30
_CARD = 80.0  # GiB of a GPU, where none is at hand
_GPUS_OF_A_NODE = 8
_COMPLETIONS = {"pairs": 2, "labels": 1}  # of a row


@dataclass(frozen=True)
class _Rows:
    """What a forecast needs of the rows: the longest tree in words and ids, and bytes of their file, 0 if none."""

    words: str
    longest: Tree
    nbytes: int = 0


def run(config: PlanConfig) -> list[str]:
    """Lines of a table: what a step takes on this machine, or on others.

    Measured: memory by part, tokens, steps, time, and the saving of the cached reference. Predicted: memory of a rank
    by part and number of GPUs, and what makes a step fit where it does not.
    """
    directory = models.find(config.model, weights=not config.gpus)
    weights = models.weights_bytes(directory)
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.gpus or not weights or weights > memory.free_bytes(here):
        if not config.gpus:
            log.info(f"this machine {'does not hold' if weights else 'has not got'} the weights: nothing is measured")
        return _predicted(config, directory, rows_at_hand=bool(weights))
    return _measured(settled(config.training))


def _measured(config: TrainConfig) -> list[str]:
    data = prepare(config)
    model = loading.load_policy(data.policy, config)
    loading.choose_rows(model, data.computed_rows, config.dtype)
    trees = memory.probe_trees(mapped.chain(data.rows, data.sft))
    fitting = memory.fitting(model, trees, config.gradient_checkpointing, config.max_tokens_per_micro_batch)
    unique = unique_tokens(data.rows, config, fitting.tokens, data.sft)
    count = mixing.epoch_size(data.rows, config)
    lines = _lines(config, data.kind, count, len(data.sft), fitting, unique)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_gpu = any(parameter.device.type != "cpu" for parameter in trained)
    copy = host_copy(trained, config.optim, 1, pinned=on_gpu)
    # What a step on a CPU takes beside the weights, which are there, is memory of the host.
    beside = 0 if on_gpu else fitting.footprint.peak(unique["largest micro-batch"]) - fitting.footprint.weights
    return _table(lines | {"saving": _saving(copy, fits=host_copies.fit(copy, beside_gpu=on_gpu, taken=beside))})


def _saving(copy: float, *, fits: bool) -> str:
    if fits:
        return f"while training goes on, from copies of {copy / _GIB:.3f} GiB on the host"
    return f"while training waits: the host has no room for copies of {copy / _GIB:.3f} GiB beside it"


def _predicted(config: PlanConfig, directory: Path, *, rows_at_hand: bool) -> list[str]:
    training = config.training
    if config.dtype == "auto" and not machine.has_gpu():
        training = training.model_copy(update={"dtype": "bfloat16"})  # of the GPUs that are asked about
    training = settled(training)
    given = training.pairs or training.labels or training.groups
    rows = _rows(prepare(training)) if rows_at_hand and given else _stand_in(training, directory)
    adapter = None if training.adapter == "none" else Path(training.adapter)
    forecast = Forecast(training, directory, adapter, rows.longest)
    room = config.gpu_memory * _GIB or (torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else _CARD * _GIB)
    most = config.gpus or RANKS[-1]
    settings = [_setting(forecast, ranks, room) for ranks in sorted({*(n for n in RANKS if n < most), most})]
    return _table(dict(_forecast_lines(forecast, rows, settings, room)))


def _setting(forecast: Forecast, ranks: int, room: float) -> Setting:
    """The settings of a run on so many ranks; checkpointing is on where it is asked for, or where a step would not fit
    without it."""
    config, tokens = forecast.config, forecast.tree.num_tokens
    trees = max(1, config.max_tokens_per_micro_batch // tokens)
    off = Setting(
        ranks, trees, config.distributed, checkpointing=False, tuning=config.tuning, in_4bit=config.load_in_4bit
    )
    on = replace(off, checkpointing=True)
    if config.gradient_checkpointing != "auto":
        return on if config.gradient_checkpointing == "on" else off
    return off if forecast.need(off).fits(room) else on


def _rows(data: TrainingData) -> _Rows:
    rows = mapped.chain(data.rows, data.sft)
    tree = tree_of(rows[int(mapped.column(rows, Batch.num_tokens).argmax())])
    files = data.stored.rglob("*.arrow") if data.stored else ()
    return _Rows("the longest row", tree, sum(file.stat().st_size for file in files))


def _stand_in(config: TrainConfig, directory: Path) -> _Rows:
    """A row as long as the settings and the context of the model allow: the longest prompt, and completions that fill
    max_length behind it."""
    kind = config.objective.kind
    if kind not in _COMPLETIONS:
        raise UsageError(
            "the settings do not say how many completions a group has",
            f"give --{kind} beside a model with its weights, or plan for pairs",
        )
    longest = min(config.max_length, models.context_length(directory) or config.max_length)
    prompt = min(config.max_prompt_length, longest - 1)
    completion, count = longest - prompt, _COMPLETIONS[kind]
    tree = Tree([0] * prompt, tuple([n + 1] * completion for n in range(count)))
    return _Rows(
        f"a prompt of {prompt:,} and {count} x {completion:,} behind it, the most that settings and model allow", tree
    )


def _forecast_lines(
    forecast: Forecast, rows: _Rows, settings: Sequence[Setting], room: float
) -> Iterator[tuple[str, str]]:
    config, tokens = forecast.config, rows.longest.num_tokens
    model, needs = forecast.model(config.tuning), [forecast.need(setting) for setting in settings]
    total, trained = (sum(p.numel() for p in part) for part in ([*model.frozen, *model.trained], model.trained))
    yield (
        "figures",
        "predicted from config.json for GPUs: parameters are counted, a step runs on tensors without memory",
    )
    yield "model", f"{model.name} in {config.dtype}, {total:,} parameters, {trained:,} of them trained"
    yield "micro-batch", f"{settings[0].trees * tokens:,} tokens: {rows.words}"
    yield "GiB a rank of", _columns(f"{setting.ranks} GPU{'s' * (setting.ranks > 1)}" for setting in settings)
    for name, part in _PARTS.items():
        yield name, _columns(f"{getattr(need, part) / _GIB:.2f}" for need in needs)
    yield "checkpointing", _columns("on" if setting.checkpointing else "off" for setting in settings)
    fitting = [need.fits(room) for need in needs]
    yield f"fits {room / _GIB:.0f} GiB", _columns("yes" if fits else "no" for fits in fitting)
    for setting, fits in zip(settings, fitting, strict=True):
        if not fits:
            yield f"fits {setting.ranks} with", forecast.remedy(setting, room)
    yield "head chunk", f"{model.head_chunk / _GIB:.2f} GiB of the passes"
    yield (
        "host",
        (
            f"{rows.nbytes / _GIB:.3f} GiB for the rows of a node, whatever its number of GPUs"
            if rows.nbytes
            else "no rows were read: about 6.3 bytes a token on a node, whatever its number of GPUs"
        ),
    )
    copies = max(n.host_copy * min(s.cut, _GPUS_OF_A_NODE) for s, n in zip(settings, needs, strict=True))
    if machine.has_gpu():
        yield "saving", _saving(copies, fits=host_copies.fit(copies, beside_gpu=True))
    else:
        yield (
            "saving",
            f"while training goes on, where half of the free memory of a node holds {copies / _GIB:.2f} GiB of copies; "
            "else training waits",
        )


_PARTS = {
    "weights": "weights",
    "trained, gradients": "trained",
    "optimizer": "optimizer",
    "gathered": "gathered",
    "kept activations": "kept",
    "the passes": "passing",
    "peak": "peak",
    "in a checkpoint": "checkpoint",
    "copy on the host": "host_copy",
}


def _columns(cells: Iterable[str]) -> str:
    return "".join(f"{cell:>9}" for cell in cells)


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
) -> dict[str, str]:
    footprint, largest = fitting.footprint, unique["largest micro-batch"]
    tokens = min(fitting.tokens, max(unique.values()))
    epochs = config.num_train_epochs
    seconds = epochs * unique["computed"] * footprint.train_seconds_per_token
    reference = epochs * unique["computed"] * footprint.score_seconds_per_token
    return {
        "figures": "measured by a probe on this machine: activations, time; weights and optimizer are counted",
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


def _table(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"{name:<{width}}  {text}" for name, text in rows.items()]


def _checkpointing(config: TrainConfig, fitting: Fitting) -> str:
    """Whether `train` would compute activations again in backward (gradient checkpointing), and why."""
    if config.gradient_checkpointing != "auto":
        return f"{config.gradient_checkpointing}, as asked for"
    if fitting.checkpointing:
        return f"on: a row of {fitting.longest:,} tokens does not fit the free memory without it"
    return f"off: a row of {fitting.longest:,} tokens, the longest, fits the free memory"
