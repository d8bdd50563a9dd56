"""Stage 3, `prefpipe train`: rows with cached reference log-probs -> an adapter or a model. One model is in memory.

A reference that is not the initial policy is loaded before it, to check its values and make missing ones, and freed.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from prefpipe import log
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, IdentityError
from prefpipe.forward import load
from prefpipe.forward.logps import SCORER_VERSION, TreeModel, causal_model, settle_rows
from prefpipe.models.policy import Policy
from prefpipe.runs import store
from prefpipe.runs.store import Manifest, Run
from prefpipe.schemas import Dropped, to_table
from prefpipe.stages.train import memory, outputs, parallel
from prefpipe.stages.train.examples import TrainRow
from prefpipe.stages.train.fit import fit
from prefpipe.stages.train.inputs import Job, prepare
from prefpipe.stages.train.loop import Trainer
from prefpipe.stages.train.micro_batches import tree_of
from prefpipe.stages.train.monitor import diagnostics, trackers
from prefpipe.stages.train.monitor.alerts import RULES
from prefpipe.stages.train.optimizer import MasterOptimizer
from prefpipe.stages.train.parallel import World
from prefpipe.stages.train.reference import audit
from prefpipe.stages.train.reference.identity import Reference
from prefpipe.stages.train.reference.values import Audited, audited, filled, not_audited, values_for
from prefpipe.stages.train.targets import targets


def run(config: TrainConfig, out: Path, *, force: bool) -> Manifest:
    """Read rows, prove that the cache belongs to the model, train from the newest checkpoint, save the adapter."""
    world = parallel.start()
    trackers.check_installed(config.report_to)
    job = prepare(config)
    opened = store.open_run(out, "train", config, job.inputs, force=force) if world.leads else nullcontext(None)
    with opened as output:
        manifest = world.tell(output.manifest() if output else None)
        if manifest is None:
            manifest = _run(output, world, job, config)
    parallel.stop(world)  # after an error the process just ends: leaving the group would wait for the other ranks
    return manifest


def _run(output: Run | None, world: World, job: Job, config: TrainConfig) -> Manifest:
    """`output` is the output directory, held by rank 0 only."""
    if output:
        output.write_dropped(Dropped, to_table(Dropped, job.dropped))
    for row in (*job.rows, *job.eval_rows, *job.bank):
        audit.check_cached(row)
    audit.check_scorers(job.scorers, SCORER_VERSION)
    warned = _say_targets(config, job)
    audited = Audited()
    if job.reference and job.reference.model:
        job, audited = _by_reference(output, world, job, job.reference.model, config)
    model = load_policy(job.policy, config)
    _check_vocabulary(model, [*job.rows, *job.eval_rows, *job.bank])
    choose_rows(model, job.rows, config.dtype)
    if job.reference and not job.reference.model:
        job, audited = _referenced(output, world, job, job.reference, model, config)
    if job.reference and job.reference.id != job.policy.id:
        log.info(
            "the reference is not the initial policy: log-ratios are not 0 before step 0, and the loss of step 0 is "
            "not its value at the reference (ln 2 for sigmoid)"
        )
    tokens = world.tell(fitting_tokens(model, job.rows, config))
    wrapped = parallel.wrap(model, world, config.distributed)
    optimizer = MasterOptimizer(wrapped, config.weight_decay, config.optim)
    trainer = Trainer(
        model,
        wrapped,
        optimizer,
        config,
        world,
        tokens,
        on_reference=job.on_reference,
        start_noise=_start_noise(job, config, audited),
    )
    state = diagnostics.at_start(RULES, warned)
    trained, alerts = fit(output, trainer, job, state, exact=_exact(job, config), audit_seconds=audited.seconds)
    results = {"audit": audited.found, **trained, "alerts": [asdict(alert) for alert in alerts]}
    tensors = outputs.tensors_of(model, config)
    manifest = _finish(output, job, model, tensors, config, results) if output else None
    return cast(Manifest, world.tell(manifest))


def _say_targets(config: TrainConfig, job: Job) -> list[tuple[str, str]]:
    """Say what the losses aim at; returns the warnings under the names of their rules."""
    found = targets(config.objective, job.rows)
    for line in found.lines:
        log.info(line)
    for line in (*found.warnings, *found.class_warnings):
        log.warn(line)
    return [*(("A16", line) for line in found.warnings), *(("A15c", line) for line in found.class_warnings)]


def _starts_as_reference(job: Job, config: TrainConfig) -> bool:
    """Whether the initial policy is the reference, and computes as it does: dropout in front of an adapter that is
    trained on moves step 0 (a new adapter does nothing yet)."""
    dropped = config.lora_dropout > 0 and job.policy.adapter is not None
    return job.reference is not None and job.reference.id == job.policy.id and not dropped


def _exact(job: Job, config: TrainConfig) -> bool:
    """Whether every log-ratio must be 0 before step 0: the policy starts as the reference, scored by this forward."""
    own = {load.scorer_name("float32")}
    full = config.dtype == "float32" and not config.load_in_4bit
    return _starts_as_reference(job, config) and full and job.scorers <= own


def _start_noise(job: Job, config: TrainConfig, audited: Audited) -> float | None:
    """Noise in a token's log-prob (nats) up to which the policy starts as the reference; None where it does not."""
    if not _starts_as_reference(job, config) or audited.found is None:
        return None
    if _exact(job, config):
        return 0.0
    full = config.dtype == "float32" and not config.load_in_4bit
    return audit.noise_between_kernels(audited.found["deviation"], full_precision=full)


def _by_reference(
    output: Run | None, world: World, job: Job, reference: Policy, config: TrainConfig
) -> tuple[Job, Audited]:
    """As `_referenced`, by a reference that is not the initial policy: loaded for this alone, and freed."""
    log.info("the reference is a model of its own: it is loaded first, to check its log-probs")
    base = _load_base(reference, config)
    model = TreeModel(load.load_adapter(base, reference.adapter, trainable=False) if reference.adapter else base)
    _check_vocabulary(model, [*job.rows, *job.eval_rows, *job.bank])
    choose_rows(model, job.rows, config.dtype)
    job, audited = _referenced(output, world, job, cast(Reference, job.reference), model, config)
    del base, model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return job, audited


def _referenced(
    output: Run | None, world: World, job: Job, reference: Reference, model: TreeModel, config: TrainConfig
) -> tuple[Job, Audited]:
    """The job with reference values in all rows, missing ones made now, and what the audit of them found."""
    if not reference.at_hand:
        return job, not_audited(reference)
    every: list[TrainRow] = [*job.rows, *job.eval_rows, *job.bank]
    scorer = load.scorer_name(config.dtype, in_4bit=config.load_in_4bit)
    # A new adapter changes nothing yet, but it costs time: it is off too while the base is scored.
    with load.adapter_off(model.policy, off=reference.id == job.policy.base_id):
        values = values_for(output, world, every, model, scorer, reference.id)
    scorers = job.scorers | ({scorer} if values else set[str]())
    job = replace(
        job,
        rows=filled(job.rows, values),
        eval_rows=filled(job.eval_rows, values),
        bank=filled(job.bank, values),
    )
    base_is_reference = reference.id == job.policy.base_id != job.policy.id
    checked = [*job.rows, *job.eval_rows, *job.bank]
    return job, audited(world, model, checked, scorers, config, base_is_reference=base_is_reference)


def _finish(
    output: Run,
    job: Job,
    model: TreeModel,
    tensors: dict[str, torch.Tensor],
    config: TrainConfig,
    results: dict[str, Any],
) -> Manifest:
    """Save the trained policy and the manifest."""
    policy, count = job.policy, len(job.rows)
    identity = {"initial": policy.id, "reference": job.reference.id if job.reference else None}
    facts = {**results, **identity, "count": count, "kind": job.kind, "inputs": job.inputs}
    trained = outputs.save(output.out, model, tensors, policy, config, facts)
    totals = {job.kind: count, "dropped": len(job.dropped), **results}
    if job.eval_rows:
        totals[f"eval_{job.kind}"] = len(job.eval_rows)
    return output.finish(totals, {"policy": trained, **identity})


def summary(manifest: Manifest, out: Path) -> list[str]:
    """What the command prints when it is done."""
    t = manifest["totals"]
    shown = ", ".join(
        f"{k} {v:.4g}" for k, v in t["last_step"].items() if k in ("loss", "rewards/margins", "grad_norm")
    )
    kind = next(kind for kind in ("pairs", "labels", "groups") if kind in t)
    (policy,) = {name.split("/")[0] for name in manifest["files"]} & {"adapter", "model"}
    lines = [f"trained on {t[kind]} {kind} in {t['steps']} steps: {out}/{policy}", f"  last step: {shown}"]
    if "best" in t:
        lines.append(f"  best: step {t['best']['step']}, {t['best']['metric']} {t['best']['value']:.4g}")
    return lines


def load_policy(policy: Policy, config: TrainConfig) -> TreeModel:
    """The model to train: every weight of it, the base with a new adapter, or with the one it continues."""
    base = _load_base(policy, config)
    if config.tuning == "full":
        base.requires_grad_(requires_grad=True)
        return TreeModel(base)
    if policy.adapter is not None:
        return TreeModel(load.load_adapter(base, policy.adapter, trainable=True))
    return TreeModel(
        load.add_lora(
            base,
            r=config.lora_r,
            alpha=config.lora_alpha,
            target_modules=config.lora_target_modules,
            seed=config.seed,
            rslora=config.use_rslora,
        )
    )


def _load_base(policy: Policy, config: TrainConfig) -> PreTrainedModel:
    log.info(f"loading {policy.directory.name} ({config.dtype}{', 4 bits' if config.load_in_4bit else ''})")
    base = load.load_model(policy.directory, config.dtype, in_4bit=config.load_in_4bit)
    broken = [name for name, p in base.named_parameters() if p.is_floating_point() and not bool(p.isfinite().all())]
    if broken:
        raise DataError(
            f"{policy.directory}: {len(broken)} weights are not finite numbers in {config.dtype} (first {broken[0]})",
            "the model is damaged, or its weights need another --dtype",
        )
    return base


def _check_vocabulary(model: TreeModel, rows: Sequence[TrainRow]) -> None:
    """Raise IdentityError for token ids that the model does not have."""
    size = cast(torch.nn.Embedding, causal_model(model.policy).get_input_embeddings()).num_embeddings
    for row in rows:
        largest = max(max(row.prompt, default=0), *(max(answer.ids, default=0) for answer in row.answers))
        if largest >= size:
            raise IdentityError(
                f"row {row.row_id} holds the token id {largest}, but the model has {size} tokens: the rows were "
                "made with another tokenizer",
                "train on the model that the rows were made for, or make the rows again with this model",
            )


def choose_rows(model: TreeModel, rows: Sequence[TrainRow], dtype: str) -> None:
    """Token trees against transformers' own forward on the shortest and the longest row: windows and length-dependent
    positions show in the longest. Separate rows, with a notice, where they fail."""
    shortest, *_, longest = sorted([*rows, rows[0]], key=lambda row: tree_of(row).num_tokens)
    reason = settle_rows(model, [tree_of(shortest), tree_of(longest)], dtype)
    if reason is not None:
        log.warn(f"every completion is computed in a row of its own, at up to twice the cost: {reason}")


def fitting_tokens(model: TreeModel, rows: Sequence[TrainRow], config: TrainConfig) -> int:
    """The token budget that was asked for, or the one that the free memory allows, from a probe on the data.

    Turns gradient checkpointing on where it is asked for, or where the longest row would not fit without it.
    """
    given, checkpointing = config.max_tokens_per_micro_batch, config.gradient_checkpointing
    if given and checkpointing != "auto":  # nothing to find out
        memory.checkpoint_if(model, on=checkpointing == "on")
        return given
    found = memory.fitting(model, [tree_of(row) for row in rows], checkpointing, given)
    if checkpointing == "auto" and found.checkpointing:
        log.warn(
            f"a row of {found.longest} tokens does not fit the free memory: gradient checkpointing is on, at half the "
            "speed"
        )
    if not given:
        per_token = found.footprint.activations_per_token / 1024
        log.info(f"micro-batches of up to {found.tokens} tokens ({per_token:.0f} KiB per token)")
    return found.tokens
