"""Stage 3, `prefpipe train`: rows with cached reference log-probs -> a LoRA adapter. One model is in memory."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from prefpipe import fingerprint, fsio, log, models, store
from prefpipe.config.train import TrainConfig
from prefpipe.forward import load
from prefpipe.forward.logps import TreeModel, score, settle_rows
from prefpipe.models import Policy
from prefpipe.schemas import Dropped, to_table
from prefpipe.store import Manifest, Run
from prefpipe.train import audit, checkpoint, diagnostics, loop, memory, parallel, references, trackers
from prefpipe.train.checkpoint import Checkpoint
from prefpipe.train.diagnostics import Alert, Facts, State
from prefpipe.train.groups import tree_of
from prefpipe.train.inputs import Job, prepare
from prefpipe.train.loop import StepMetrics, Trainer
from prefpipe.train.losses import LOSSES
from prefpipe.train.optimizer import MasterAdamW, warmup_steps
from prefpipe.train.parallel import World
from prefpipe.train.rows import TrainLabel, TrainRow
from prefpipe.train.rules import RULES
from prefpipe.train.targets import targets
from prefpipe.train.watch import note, watching


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
    for row in (*job.rows, *job.bank):
        audit.check_cached(row)
    warned = _say_targets(config, job)
    model = load_policy(job.policy, config)
    choose_rows(model, job.rows, config.dtype)
    rows, bank, found = job.rows, job.bank, None
    if any(LOSSES[name].needs_reference for name in config.loss_type):
        rows, bank, found = _referenced(run_, world, job, model, config)
    tokens = world.tell(config.max_tokens_per_micro_batch or fitting_tokens(model, rows))
    wrapped = parallel.wrap(model, world, config.distributed)
    optimizer = MasterAdamW(wrapped, config.weight_decay)
    trainer = Trainer(model, wrapped, optimizer, config, world, tokens, on_reference=job.on_reference)
    last, alerts = _train(
        run_, trainer, rows, bank, diagnostics.at_start(RULES, warned), exact=_exact(job, config, found)
    )
    adapter = parallel.whole_adapter(model.policy)
    manifest = None
    if run_:
        results = {"last_step": last, "audit": found, "alerts": [asdict(alert) for alert in alerts]}
        manifest = _finish(run_, job, model, adapter, config, results)
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
) -> tuple[list[TrainRow], list[TrainLabel], dict[str, float]]:
    """Rows and bank with reference values, missing ones made now, and what the audit of them found."""
    every: list[TrainRow] = [*job.rows, *job.bank]
    # A new adapter changes nothing yet, but it costs time: it is off too while the base is scored.
    with load.adapter_off(model.policy, off=job.reference == job.policy.base_id):
        values = references.values_for(run_, world, every, model, config.dtype, job.reference or job.policy.id)
    scorers = job.scorers | ({load.scorer_name(config.dtype)} if values else set[str]())
    rows, bank = references.filled(job.rows, values), references.filled(job.bank, values)
    base_is_reference = job.reference == job.policy.base_id != job.policy.id
    found = _audit(model, [*rows, *bank], scorers, config, base_is_reference=base_is_reference)
    return rows, bank, found


def _finish(
    run_: Run, job: Job, model: TreeModel, adapter: dict[str, torch.Tensor], config: TrainConfig,
    results: dict[str, Any],
) -> Manifest:  # fmt: skip
    """Save the adapter and the manifest."""
    target, policy = run_.out / "adapter", job.policy
    if not target.exists():
        fsio.publish_dir(target, lambda into: _save(model, adapter, into, policy, config.model))
    trained = fingerprint.policy_id(policy.weights, fingerprint.adapter_digest(target))
    count = len(job.rows)
    totals = {job.kind: count, "steps": loop.num_steps(count, config), "dropped": len(job.dropped), **results}
    return run_.finish(totals, {"policy": trained, "initial": policy.id, "reference": job.reference})


def summary(manifest: Manifest, out: Path) -> list[str]:
    """What the command prints when it is done."""
    t = manifest["totals"]
    shown = ", ".join(
        f"{k} {v:.4g}" for k, v in t["last_step"].items() if k in ("loss", "rewards/margins", "grad_norm")
    )
    kind = next(kind for kind in ("pairs", "labels", "groups") if kind in t)
    return [f"trained on {t[kind]} {kind} in {t['steps']} steps: {out}/adapter", f"  last step: {shown}"]


def load_policy(policy: Policy, config: TrainConfig) -> TreeModel:
    """The one model of a run: the base with a new adapter, or with the one it continues."""
    log.info(f"loading {policy.directory.name} ({config.dtype})")
    base = load.load_model(policy.directory, config.dtype)
    if policy.adapter is not None:
        return TreeModel(load.load_adapter(base, policy.adapter, trainable=True))
    return TreeModel(
        load.add_lora(
            base, r=config.lora_r, alpha=config.lora_alpha, target_modules=config.lora_target_modules, seed=config.seed
        )
    )


def choose_rows(model: TreeModel, rows: Sequence[TrainRow], dtype: str) -> None:
    """Token trees against transformers' own forward on the shortest and the longest row: windows and length-dependent
    positions show in the longest. Separate rows, with a notice, where they fail."""
    shortest, *_, longest = sorted([*rows, rows[0]], key=lambda row: tree_of(row).num_tokens)
    reason = settle_rows(model, [tree_of(shortest), tree_of(longest)], dtype)
    if reason is not None:
        log.warn(f"every completion is computed in a row of its own, at up to twice the cost: {reason}")


def fitting_tokens(model: TreeModel, rows: Sequence[TrainRow]) -> int:
    """The token budget that the free memory allows, from a probe on the data."""
    trees = [tree_of(row) for row in rows]
    footprint = memory.measure(model, trees)
    device = next(model.parameters()).device
    tokens = memory.budget(footprint, device, memory.free_bytes(device), max(tree.num_tokens for tree in trees))
    log.info(f"micro-batches of up to {tokens} tokens ({footprint.activations_per_token / 1024:.0f} KiB per token)")
    return tokens


def _audit(
    model: TreeModel, rows: Sequence[TrainRow], scorers: set[str], config: TrainConfig, *, base_is_reference: bool
) -> dict[str, float]:
    with load.adapter_off(model.policy, off=base_is_reference):
        found = audit.audit(rows, config.audit_rows, lambda trees: list(score(model, trees)), config.beta)
    full = config.dtype == "float32" and all(s.endswith("/float32") for s in scorers)
    audit.check(found, exact=scorers == {load.scorer_name("float32")} and full, full_precision=full)
    log.info(
        f"audit: {found.rows} rows re-scored, {found.signed_mean:+.4f} signed and {found.absolute_mean:.4f} absolute "
        f"nats per token, -log sigmoid(beta h) {found.loss:.4f} (ln 2 = 0.6931): the cache belongs to this model"
    )
    return found.to_dict()


def _train(
    run_: Run | None, trainer: Trainer, rows: Sequence[TrainRow], bank: Sequence[TrainLabel], state: State, *,
    exact: bool,
) -> tuple[dict[str, float], Sequence[Alert]]:  # fmt: skip
    """Run the loop from the newest checkpoint; returns the metrics of the last step (rank 0) and all alerts."""
    world, config = trainer.world, trainer.config
    resumed = world.tell(checkpoint.newest(run_.out / "checkpoints", run_.fingerprint) if run_ else None)
    if resumed is not None:
        trainer.optimizer.load_state(resumed.tensors)
        state = State.from_json(resumed.diagnostics or state.to_json())
        log.info(f"resuming after step {resumed.step}")
    first = resumed.step if resumed else 0
    if run_:
        fsio.truncate(run_.out / "metrics.jsonl", resumed.metrics_bytes if resumed else 0)
    total = loop.num_steps(len(rows), config)
    facts = Facts(total, warmup_steps(total, config.warmup_ratio), config.beta, config.learning_rate, exact)
    with watching(run_, config, facts, state, first) as watch, log.progress("training", total, "steps") as advance:
        advance(first)
        for step in loop.steps(trainer, rows, first, bank):
            alerts = watch.after_step(step)
            done = step.step + 1
            keep = (done % config.save_steps == 0 or done == total) and watch.verdict is None
            tensors = trainer.optimizer.state() if keep else None  # every rank takes part
            if run_:
                _record(run_, step, tensors, watch.state)
            watch.tell(step, alerts)
            advance(1, note(step))
    if run_ is None:
        return {}, watch.state.alerts
    *_, last = (run_.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(last), watch.state.alerts


def _record(run_: Run, step: StepMetrics, tensors: dict[str, torch.Tensor] | None, state: State) -> None:
    """Append the metrics of a step and, with tensors, save a checkpoint that vouches for them."""
    metrics = run_.out / "metrics.jsonl"
    skipped = {"skipped": step.skipped} if step.skipped else {}
    fsio.append_line(metrics, json.dumps({"step": step.step, **step.values, **skipped}))
    if tensors is not None:
        fsio.sync_file(metrics)
        done = Checkpoint(step.step + 1, metrics.stat().st_size, tensors, state.to_json())
        checkpoint.save(run_.out / "checkpoints", done, run_.fingerprint)


def _save(model: TreeModel, adapter: dict[str, torch.Tensor], into: Path, policy: Policy, base_name: str) -> None:
    name = str(policy.directory) if base_name.startswith("embedded:") else base_name
    load.save_adapter(model.policy, adapter, into, name)
    (into / "prefpipe.json").write_text(models.adapter_base_record(policy.weights), encoding="utf-8")
