"""The model of a training run: loaded, compared with the rows, and fitted into the free memory."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from prefpipe import log
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, IdentityError, PrefpipeError
from prefpipe.forward import load, lora_targets, on_meta, shards
from prefpipe.forward.balance import check_balance
from prefpipe.forward.logps import ROWS_IN_WORDS, TreeModel, causal_model, extremes, settle_rows
from prefpipe.forward.weights import DTYPES
from prefpipe.models import embedding, vocabulary
from prefpipe.models.policy import Policy
from prefpipe.stages.train import memory, parallel, process_memory
from prefpipe.stages.train.examples import TrainRow
from prefpipe.stages.train.mapped import column
from prefpipe.stages.train.micro_batches import tree_of
from prefpipe.stages.train.parallel import ALONE, World
from prefpipe.stages.train.record_batches import Batch


def load_policy(
    policy: Policy, config: TrainConfig, world: World = ALONE, base: PreTrainedModel | None = None
) -> TreeModel:
    """The model to train: with every weight trainable, with a new adapter, or with the adapter that is trained on.
    `base` is its base model, where it is loaded already. Where the ranks cut the model, each reads its rows of the
    files and nothing else; a collective call then.

    Raises UsageError where the settings ask for a load-balancing loss that the model does not have.
    """
    model = _trainable(policy, config, world, base)
    causal, coefficient = causal_model(model.policy), config.router_aux_loss_coef
    lora_targets.check_parameters(causal, lora_dropout=config.lora_dropout, distributed=config.distributed)
    if coefficient:
        check_balance(causal)
    if config.tuning == "full" and lora_targets.has_experts(causal):
        log.info(f"the routers of experts are trained too, with router_aux_loss_coef = {coefficient}")
    return model


def _trainable(policy: Policy, config: TrainConfig, world: World, base: PreTrainedModel | None) -> TreeModel:
    def adapted(base: PreTrainedModel) -> torch.nn.Module:
        if config.tuning == "full":
            load.train_all(base)
            return base
        if policy.adapter is not None:
            return load.load_adapter(base, policy.adapter, trainable=True)
        return load.add_lora(
            base,
            r=config.lora_r,
            alpha=config.lora_alpha,
            target_modules=config.lora_target_modules,
            target_parameters=config.lora_target_parameters,
            seed=config.seed,
            rslora=config.use_rslora,
        )

    return _load(policy, config, world, adapted, base)


def load_reference(reference: Policy, config: TrainConfig, world: World = ALONE) -> TreeModel:
    """A model that only computes log-probs; cut as `load_policy` says."""

    def adapted(base: PreTrainedModel) -> torch.nn.Module:
        return load.load_adapter(base, reference.adapter, trainable=False) if reference.adapter else base

    return _load(reference, config, world, adapted)


def _load(
    policy: Policy,
    config: TrainConfig,
    world: World,
    adapted: Callable[[PreTrainedModel], torch.nn.Module],
    base: PreTrainedModel | None = None,
) -> TreeModel:
    """A model from its directory, with what `adapted` puts on it, on the ranks as the settings say. `base` is there
    where it is loaded already and not cut."""
    if base is not None:
        return TreeModel(adapted(base))
    log.info(f"loading {policy.directory.name} ({config.dtype}{', 4 bits' if config.load_in_4bit else ''})")
    if parallel.cuts(world, config.distributed):
        model = world.together(lambda: _in_shards(policy, config, world, adapted))
    else:
        model = TreeModel(adapted(load.load_model(policy.directory, config.dtype, in_4bit=config.load_in_4bit)))
    local = ((name, shards.local(p)) for name, p in causal_model(model.policy).named_parameters())
    broken = [on_meta.plain_name(name) for name, p in local if p.is_floating_point() and not bool(p.isfinite().all())]
    broken = sorted({name for names in world.gather(broken) for name in names})
    if broken:
        raise DataError(
            f"{policy.directory}: {len(broken)} weights are not finite numbers in {config.dtype} (first {broken[0]})",
            "the model is damaged, or its weights need another --dtype",
        )
    return model


def _in_shards(
    policy: Policy, config: TrainConfig, world: World, adapted: Callable[[PreTrainedModel], torch.nn.Module]
) -> TreeModel:
    """As `_load`, cut over the ranks before a weight is read. Where every weight is trained, the shards are float32:
    they are the optimizer's masters, and `config.dtype` is what layers are gathered and computed in."""
    process_memory.return_blocks_at_once()  # ranks share a model where memory is short
    base = load.empty_model(policy.directory, "float32" if config.tuning == "full" else config.dtype)
    where = on_meta.sources(policy.directory, base)
    model = TreeModel(adapted(base))
    parallel.cut(model, world, DTYPES[config.dtype])
    on_meta.read((*base.named_parameters(), *base.named_buffers()), where)
    process_memory.return_free_memory()  # the whole adapter, in many small pieces, which the heap would keep
    return model


def check_vocabulary(model: TreeModel, rows: Sequence[TrainRow]) -> None:
    """Raise IdentityError for token ids that the model does not have, DataError where its tokenizer has them."""
    causal = causal_model(model.policy)
    size = cast(torch.nn.Embedding, causal.get_input_embeddings()).num_embeddings
    of_rows = column(rows, Batch.largest_id)
    for place in (of_rows >= size).nonzero()[0][:1].tolist():
        row, largest = rows[place], int(of_rows[place])
        if _has_token(Path(str(causal.name_or_path)), largest):
            raise DataError(
                f"{causal.name_or_path}: row {row.row_id} holds the token id {largest}, which the tokenizer of the "
                f"model has, but the model has {size} tokens: the others have no embedding",
                embedding.ADVICE,
            )
        raise IdentityError(
            f"row {row.row_id} holds the token id {largest}, but the model has {size} tokens: the rows were "
            "made with another tokenizer",
            "train on the model that the rows were made for, or make the rows again with this model",
        )


def _has_token(directory: Path, number: int) -> bool:
    try:
        return any(number == other for other, _ in vocabulary.read(directory))
    except PrefpipeError:
        return False  # no tokenizer: rows of runs need none


def choose_rows(model: TreeModel, rows: Sequence[TrainRow], dtype: str) -> None:
    """Compare token trees with transformers' own forward pass on rows of extreme lengths. Where they differ, every
    completion is computed in a row of its own from now on, with a warning."""
    ends = sorted({int(column(rows, Batch.num_tokens).argmin()), int(column(rows, Batch.longest_sequence).argmax())})
    reason = settle_rows(model, extremes([tree_of(rows[place]) for place in ends]), dtype)
    if reason is not None:
        words = ROWS_IN_WORDS[model.rows]
        log.warn(f"every completion is computed {words}; a pair costs up to twice its shared row: {reason}")


def fitting_tokens(model: TreeModel, rows: Sequence[TrainRow], config: TrainConfig, world: World = ALONE) -> int:
    """Tokens of a micro-batch: the budget of the settings, or what the free memory allows, by a probe on the rows; the
    least of all ranks.

    Turns gradient checkpointing on where the settings ask for it, or where the longest row would not fit without it.
    """
    budget, checkpointing = config.max_tokens_per_micro_batch, config.gradient_checkpointing
    if budget and checkpointing != "auto":  # a probe has nothing to decide
        memory.checkpoint_if(model, on=checkpointing == "on")
        return budget
    trees = memory.probe_trees(rows)
    fitting = memory.fitting(model, trees, checkpointing, budget, lambda number: min(world.gather(number)))
    if checkpointing == "auto" and fitting.checkpointing:
        log.warn(
            f"a row of {fitting.longest} tokens does not fit the free memory: gradient checkpointing is on, at half "
            "the speed"
        )
    if not budget:
        per_token = fitting.footprint.activations_per_token / 1024
        log.info(f"micro-batches of up to {fitting.tokens} tokens ({per_token:.0f} KiB per token)")
    return fitting.tokens
