"""Stage 3: rows with cached reference log-probs -> an adapter or a model.

    prefpipe train stages/train/dpo.toml --pairs runs/pairs --out runs/train

1. Read the rows, and check what can be checked without a model.
2. Hold the run directory. A complete run stays as it is.
3. Check the cached reference log-probs by themselves, and say what the losses aim at.
4. Compute the reference log-probs that are missing and audit those that are cached. A reference that is neither the
   initial policy nor its base is loaded for this, and freed before step 5: one model is in memory at any time. The
   initial policy, or its base, does it as soon as it is loaded.
5. Load the policy, and choose how it computes the rows.
6. Find out how many tokens of a micro-batch fit into the free memory.
7. Train from the newest checkpoint.
8. Save the policy and the manifest.

Under torchrun every rank takes every step; rank 0 alone reads and writes the run directory (`session`).
"""

import gc
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch

from prefpipe import log
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError
from prefpipe.forward import load
from prefpipe.forward.logps import SCORER_VERSION, TreeModel
from prefpipe.models.policy import Policy
from prefpipe.rows import what_helps, why_dropped
from prefpipe.runs import page, store
from prefpipe.runs.settled import settled
from prefpipe.runs.store import Manifest, Run
from prefpipe.schemas import Dropped, Margin, to_table
from prefpipe.stages.train import loading, mapped, mixing, outputs, parallel, shared_files
from prefpipe.stages.train.fit import fit
from prefpipe.stages.train.inputs import TrainingData
from prefpipe.stages.train.loop import Trainer
from prefpipe.stages.train.margins import Margins
from prefpipe.stages.train.monitor import diagnostics, trackers
from prefpipe.stages.train.monitor.alerts import RULES
from prefpipe.stages.train.optimizer import MasterOptimizer
from prefpipe.stages.train.reference import audit, values
from prefpipe.stages.train.reference.values import AuditResult
from prefpipe.stages.train.session import Session
from prefpipe.stages.train.sharing import Shared
from prefpipe.stages.train.start import start_of
from prefpipe.stages.train.targets import targets


def run(config: TrainConfig, out: Path, *, force: bool, shared: Shared | None = None, until: int = 0) -> Manifest:
    """Train a policy into `out` and return the manifest. `shared` is what it has in common with runs before it in this
    process; after `until` steps (0: never) it pauses with a checkpoint, and raises Paused."""
    shared = shared or Shared()
    world = parallel.start()
    trackers.check_installed(config.report_to)
    if config.report:
        page.check_installed()
    if not config.learning_rate:
        config = config.resolved
        log.info(f"learning_rate = {config.learning_rate:g}: the default of tuning = {config.tuning}")
    config = settled(config, out)
    data = shared.rows_for(config)  # 1
    opened = store.open_run(out, "train", config, data.inputs, force=force) if world.leads else nullcontext(None)
    with opened as output:  # 2
        session = Session(world, output, until)
        shared_files.check_directory(session)
        manifest = session.lead(Run.manifest)
        if manifest is None:
            manifest = _train(session, data, config, shared)
            if config.report and world.leads:
                page.write(out)
    shared.leave(data)
    parallel.stop(world)  # after an error the process just ends: leaving the group would wait for the other ranks
    return manifest


def _train(session: Session, data: TrainingData, config: TrainConfig, shared: Shared) -> Manifest:
    session.lead(lambda run: run.write_dropped(Dropped, to_table(Dropped, data.dropped)))
    if not data.rows:
        hint = what_helps(data.dropped) or "dropped.parquet in --out has every row and its reason"
        sources = ", ".join(getattr(config, data.kind))
        raise DataError(f"no row of {sources} can be trained on: {why_dropped(data.dropped)}", hint)
    _check_cache(data)  # 3
    warnings = _say_targets(data, config)
    audited = AuditResult()
    if data.reference and data.reference.model:
        data, audited = _reference_first(session, data, data.reference.model, config, shared)  # 4
    with shared.policy(data.policy, config, session.world) as model:  # 5
        shared.settle(model, data, config)
        if data.reference and not data.reference.model:
            data, audited = _with_ref_logps(session, data, model, config, shared.reference)  # 4
        return _train_policy(session, data, model, config, shared, audited, warnings)


def _train_policy(
    session: Session,
    data: TrainingData,
    model: TreeModel,
    config: TrainConfig,
    shared: Shared,
    audited: AuditResult,
    warnings: list[tuple[str, str]],
) -> Manifest:
    if data.reference and data.reference.id != data.policy.id:
        log.info(
            "the reference is not the initial policy: log-ratios are not 0 before step 0, and the loss of step 0 is "
            "not its value at the reference (ln 2 for sigmoid)"
        )
    tokens = shared.fitting_tokens(model, data, config, session.world)  # 6
    start = start_of(data, config, audited)
    trainer = _trainer(session, model, data, config, tokens, start.noise)
    state = diagnostics.at_start(RULES, warnings)
    results, alerts, margins = fit(session, trainer, data, state, exact=start.exact, audit_seconds=audited.seconds)  # 7
    results = {"audit": audited.report, **results, "alerts": [asdict(alert) for alert in alerts]}
    return _finish(session, data, model, config, (results, margins))  # 8


def _check_cache(data: TrainingData) -> None:
    audit.check_all_cached(data.all_rows)
    audit.check_scorers(data.scorers, SCORER_VERSION)


def _say_targets(data: TrainingData, config: TrainConfig) -> list[tuple[str, str]]:
    """Say what the losses aim at; returns the warnings under the names of their alert rules."""
    aims = targets(config.objective, mapped.select(data.rows, mixing.epoch_rows(data.rows, config, 0)))
    for line in (*aims.lines, *mixing.explain(data.rows, data.sft, config)):
        log.info(line)
    for line in (*aims.warnings, *aims.class_warnings):
        log.warn(line)
    return [*(("A16", line) for line in aims.warnings), *(("A15c", line) for line in aims.class_warnings)]


def _reference_first(
    session: Session, data: TrainingData, reference: Policy, config: TrainConfig, shared: Shared
) -> tuple[TrainingData, AuditResult]:
    """As `_with_ref_logps`, by a reference that is loaded for this alone, and freed."""
    if shared.reference.audited is not None:
        return _with_ref_logps(session, data, None, config, shared.reference)
    log.info("the reference is a model of its own: it is loaded first, to check its log-probs")
    model = loading.load_reference(reference, config, session.world)
    loading.check_vocabulary(model, data.computed_rows)
    loading.choose_rows(model, data.computed_rows, config.dtype)
    data, audited = _with_ref_logps(session, data, model, config, shared.reference)
    del model
    gc.collect()  # FSDP2's modules hold each other in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return data, audited


def _with_ref_logps(
    session: Session, data: TrainingData, model: TreeModel | None, config: TrainConfig, kept: values.Kept
) -> tuple[TrainingData, AuditResult]:
    """The data with reference log-probs in every row, missing ones computed now by `model`, and the audit of them.
    None stands for a reference whose values are `kept`."""
    reference, policy = data.reference, data.policy
    assert reference is not None
    if not reference.at_hand:
        return data, values.not_audited(reference)
    scorer = load.scorer_name(config.dtype, in_4bit=config.load_in_4bit)
    # A new adapter changes nothing yet, but it costs time: it is off while the base is scored.
    with _adapter_off(model, off=reference.id == policy.base_id):
        ref_logps = values.missing_ref_logps(session, data.all_rows, model, scorer, reference.id, kept)
    data = replace(
        data,
        rows=values.fill_missing(data.rows, ref_logps, data.stored),
        eval_rows=values.fill_missing(data.eval_rows, ref_logps, data.stored),
        bank=values.fill_missing(data.bank, ref_logps, data.stored),
    )
    scorers = data.scorers | ({scorer} if ref_logps else set[str]())
    with _adapter_off(model, off=reference.id == policy.base_id != policy.id):
        audited = values.audit_rows(session.world, model, data.all_rows, scorers, config, kept)
    return data, audited


def _adapter_off(model: TreeModel | None, *, off: bool) -> AbstractContextManager[None]:
    return load.adapter_off(model.policy, off=off) if model is not None else nullcontext()


def _trainer(
    session: Session, model: TreeModel, data: TrainingData, config: TrainConfig, tokens: int, noise: float | None
) -> Trainer:
    wrapped = parallel.wrap(model, session.world, config.distributed)
    optimizer = MasterOptimizer(wrapped, config.weight_decay, config.optim)
    return Trainer(
        model,
        wrapped,
        optimizer,
        config,
        session.world,
        tokens,
        on_reference=data.on_reference,
        start_noise=noise,
    )


def _finish(
    session: Session,
    data: TrainingData,
    model: TreeModel,
    config: TrainConfig,
    fitted: tuple[dict[str, Any], Margins],
) -> Manifest:
    """Save the trained policy, the margins of its pairs, and the manifest; a collective call."""
    results, margins = fitted
    policy, count = data.policy, len(data.rows)
    identity = {"initial": policy.id, "reference": data.reference.id if data.reference else None}
    facts = {**results, **identity, "count": count, "kind": data.kind, "inputs": data.inputs}
    trained = outputs.save(session, model, policy, config, facts)
    totals = {data.kind: count, "dropped": len(data.dropped), **results}
    if data.eval_rows:
        totals[f"eval_{data.kind}"] = len(data.eval_rows)
    if data.sft:
        totals["sft"] = len(data.sft)

    def finish(run: Run) -> Manifest:
        table = margins.table()
        if table.num_rows:
            run.write_part("margins", Margin, 0, table)
        return run.finish(totals, {"policy": trained, **identity})

    return cast(Manifest, session.lead(finish))


def summary(manifest: Manifest, out: Path) -> list[str]:
    """The lines that the command prints when it is done."""
    totals = manifest["totals"]
    shown = ", ".join(
        f"{name} {value:.4g}"
        for name, value in totals["last_step"].items()
        if name in ("loss", "rewards/margins", "grad_norm")
    )
    kind = next(kind for kind in ("pairs", "labels", "groups") if kind in totals)
    (policy,) = {name.split("/")[0] for name in manifest["files"]} & {"adapter", "model"}
    lines = [
        f"trained on {totals[kind]} {kind} in {totals['steps']} steps: {out}/{policy}",
        f"  last step: {shown}",
    ]
    if "best" in totals:
        best = totals["best"]
        lines.append(f"  best: step {best['step']}, {best['metric']} {best['value']:.4g}")
    return lines
