"""Stage 3, `prefpipe train`: rows with cached reference log-probs -> an adapter or a model. One model is in memory."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch

from prefpipe import log, store
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, IdentityError
from prefpipe.forward import load
from prefpipe.forward.logps import SCORER_VERSION, TreeModel, causal_model, score, settle_rows
from prefpipe.models import Policy
from prefpipe.schemas import Dropped, to_table
from prefpipe.store import Manifest, Run
from prefpipe.train import audit, diagnostics, memory, outputs, parallel, references, trackers
from prefpipe.train.fit import fit
from prefpipe.train.groups import tree_of
from prefpipe.train.inputs import Job, prepare
from prefpipe.train.loop import Trainer
from prefpipe.train.losses import LOSSES
from prefpipe.train.optimizer import MasterOptimizer
from prefpipe.train.parallel import World
from prefpipe.train.rows import TrainRow
from prefpipe.train.rules import RULES
from prefpipe.train.targets import targets


def run(config: TrainConfig, out: Path, *, force: bool) -> Manifest:
    """Read rows, prove that the cache belongs to the model, train from the newest checkpoint, save the adapter."""
    world = parallel.start()
    trackers.check_installed(config.report_to)
    job = prepare(config)
    opened = store.open_run(out, "train", config, job.inputs, force=force) if world.leads else nullcontext(None)
    with opened as run_:
        manifest = world.tell(run_.manifest() if run_ else None)
        if manifest is not None:
            log.info(f"{out} is complete already")
        else:
            manifest = _run(run_, world, job, config)
    parallel.stop(world)  # after an error the process just ends: leaving the group would wait for the other ranks
    return manifest


def _run(run_: Run | None, world: World, job: Job, config: TrainConfig) -> Manifest:
    """`run_` is the output directory, held by rank 0 only."""
    if run_:
        run_.write_dropped(Dropped, to_table(Dropped, job.dropped))
    for row in (*job.rows, *job.eval_rows, *job.bank):
        audit.check_cached(row)
    audit.check_scorers(job.scorers, SCORER_VERSION)
    warned = _say_targets(config, job)
    model = load_policy(job.policy, config)
    _check_vocabulary(model, [*job.rows, *job.eval_rows, *job.bank])
    choose_rows(model, job.rows, config.dtype)
    found = None
    if any(LOSSES[name].needs_reference for name in config.loss_type):
        job, found = _referenced(run_, world, job, model, config)
    tokens = world.tell(fitting_tokens(model, job.rows, config))
    wrapped = parallel.wrap(model, world, config.distributed)
    optimizer = MasterOptimizer(wrapped, config.weight_decay, config.optim)
    trainer = Trainer(model, wrapped, optimizer, config, world, tokens, on_reference=job.on_reference)
    state = diagnostics.at_start(RULES, warned)
    trained, alerts = fit(run_, trainer, job, state, exact=_exact(job, config, found))
    results = {"audit": found, **trained, "alerts": [asdict(alert) for alert in alerts]}
    tensors = outputs.tensors_of(model, config)
    manifest = _finish(run_, job, model, tensors, config, results) if run_ else None
    return cast(Manifest, world.tell(manifest))


def _say_targets(config: TrainConfig, job: Job) -> list[tuple[str, str]]:
    """Say what the losses aim at; returns the warnings under the names of their rules."""
    found = targets(config, job.rows)
    for line in found.lines:
        log.info(line)
    for line in (*found.warnings, *found.class_warnings):
        log.warn(line)
    return [*(("A16", line) for line in found.warnings), *(("A15c", line) for line in found.class_warnings)]


def _exact(job: Job, config: TrainConfig, audited: dict[str, float] | None) -> bool:
    """Whether every log-ratio must be 0 before step 0: the reference is the initial policy, scored by this forward."""
    own = load.scorer_name("float32")
    return audited is not None and job.reference == job.policy.id and config.dtype == "float32" and job.scorers <= {own}


def _referenced(
    run_: Run | None, world: World, job: Job, model: TreeModel, config: TrainConfig
) -> tuple[Job, dict[str, float]]:
    """The job with reference values in all rows, missing ones made now, and what the audit of them found."""
    every: list[TrainRow] = [*job.rows, *job.eval_rows, *job.bank]
    scorer = load.scorer_name(config.dtype, in_4bit=config.load_in_4bit)
    # A new adapter changes nothing yet, but it costs time: it is off too while the base is scored.
    with load.adapter_off(model.policy, off=job.reference == job.policy.base_id):
        values = references.values_for(run_, world, every, model, scorer, job.reference or job.policy.id)
    scorers = job.scorers | ({scorer} if values else set[str]())
    job = replace(
        job,
        rows=references.filled(job.rows, values),
        eval_rows=references.filled(job.eval_rows, values),
        bank=references.filled(job.bank, values),
    )
    base_is_reference = job.reference == job.policy.base_id != job.policy.id
    checked = [*job.rows, *job.eval_rows, *job.bank]
    return job, _audit(model, checked, scorers, config, base_is_reference=base_is_reference)


def _finish(
    run_: Run, job: Job, model: TreeModel, tensors: dict[str, torch.Tensor], config: TrainConfig,
    results: dict[str, Any],
) -> Manifest:  # fmt: skip
    """Save the trained policy and the manifest."""
    policy, count = job.policy, len(job.rows)
    identity = {"initial": policy.id, "reference": job.reference}
    facts = {**results, **identity, "count": count, "kind": job.kind, "inputs": job.inputs}
    trained = outputs.save(run_.out, model, tensors, policy, config, facts)
    totals = {job.kind: count, "dropped": len(job.dropped), **results}
    if job.eval_rows:
        totals[f"eval_{job.kind}"] = len(job.eval_rows)
    return run_.finish(totals, {"policy": trained, **identity})


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
    """The one model of a run: every weight of it, the base with a new adapter, or with the one it continues."""
    log.info(f"loading {policy.directory.name} ({config.dtype}{', 4 bits' if config.load_in_4bit else ''})")
    base = load.load_model(policy.directory, config.dtype, in_4bit=config.load_in_4bit)
    broken = [name for name, p in base.named_parameters() if p.is_floating_point() and not bool(p.isfinite().all())]
    if broken:
        raise DataError(
            f"{policy.directory}: {len(broken)} weights are not finite numbers in {config.dtype} (first {broken[0]})",
            "the model is damaged, or its weights need another --dtype",
        )
    if config.tuning == "full":
        base.requires_grad_(requires_grad=True)
        return TreeModel(base)
    if policy.adapter is not None:
        return TreeModel(load.load_adapter(base, policy.adapter, trainable=True))
    return TreeModel(
        load.add_lora(
            base, r=config.lora_r, alpha=config.lora_alpha, target_modules=config.lora_target_modules,
            seed=config.seed, rslora=config.use_rslora,
        )
    )  # fmt: skip


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


def _audit(
    model: TreeModel, rows: Sequence[TrainRow], scorers: set[str], config: TrainConfig, *, base_is_reference: bool
) -> dict[str, float]:
    with load.adapter_off(model.policy, off=base_is_reference):
        found = audit.audit(rows, config.audit_rows, lambda trees: list(score(model, trees)), config.beta)
    full = config.dtype == "float32" and all(s.endswith("/float32") for s in scorers) and not config.load_in_4bit
    audit.check(found, exact=scorers == {load.scorer_name("float32")} and full, full_precision=full)
    log.info(
        f"audit: {found.rows} rows re-scored, {found.signed_mean:+.4f} signed and {found.absolute_mean:.4f} absolute "
        f"nats per token, -log sigmoid(beta h) {found.loss:.4f} (ln 2 = 0.6931): the cache belongs to this model"
    )
    return found.to_dict()
