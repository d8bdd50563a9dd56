"""A run of the loop: from the newest checkpoint to the end or a stop, with evaluations, alerts and checkpoints."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch

from prefpipe import log
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, Interrupted
from prefpipe.forward import load
from prefpipe.ids import sample_seed
from prefpipe.runs import fsio
from prefpipe.runs.store import Run
from prefpipe.stages.train import checkpoint, evaluation, interrupts, loop
from prefpipe.stages.train.checkpoint import Checkpoint
from prefpipe.stages.train.inputs import Job
from prefpipe.stages.train.loop import StepMetrics, Trainer
from prefpipe.stages.train.monitor.diagnostics import Alert, Facts, State
from prefpipe.stages.train.monitor.watch import Watch, note, watching
from prefpipe.stages.train.optimizer import warmup_length


def fit(
    output: Run | None,
    trainer: Trainer,
    job: Job,
    state: State,
    *,
    exact: bool = False,
    audit_seconds: float | None = None,
) -> tuple[dict[str, Any], Sequence[Alert]]:
    """Run the loop; leaves the model with the weights to save.

    `state` is what the alert rules know before step 0, `exact` whether every log-ratio must be 0 there,
    `audit_seconds` how long the audit took (for timing.jsonl). Returns the number of steps, the metrics of the last one
    (rank 0), which evaluation was the best; and all alerts.
    """
    world, config = trainer.world, trainer.config
    resumed = world.tell(checkpoint.newest(output.out / "checkpoints", output.fingerprint) if output else None)
    if resumed is not None:
        trainer.optimizer.load_state(resumed.tensors)
        state = State.from_json(resumed.diagnostics or state.to_json())
        log.info(f"resuming after step {resumed.step}")
    first = resumed.step if resumed else 0
    if output:
        fsio.truncate(output.out / "metrics.jsonl", resumed.metrics_bytes if resumed else 0)
    history = world.tell([line for line in _lines(output) if "eval_loss" in line] if output else [])
    total = loop.num_steps(len(job.rows), config)
    facts = Facts(total, _warmup(total, config), config.beta, config.learning_rate, exact)
    watched = watching(output, config, facts, state, first, audit_seconds)
    with watched as watch, log.progress("training", total, "steps") as advance:
        advance(first)
        _run_steps(output, trainer, job, watch, first, history, advance)
    results: dict[str, Any] = {"steps": total, "last_step": {}}
    if output:
        *_, last = _lines(output)
        results = {"steps": last["step"] + 1, "last_step": last}
    return results | _best(output, trainer, history), watch.state.alerts


def _run_steps(
    output: Run | None,
    trainer: Trainer,
    job: Job,
    watch: Watch,
    first: int,
    history: list[dict[str, float]],
    advance: log.Advance,
) -> None:
    world, config = trainer.world, trainer.config
    total = loop.num_steps(len(job.rows), config)
    with interrupts.noted() as stopped:
        for step in _steps(trainer, job, first, history):
            alerts = watch.after_step(step)
            done = step.step + 1
            line: dict[str, Any] = {"step": step.step, **step.values}
            line |= {"skipped": step.skipped} if step.skipped else {}
            if job.eval_rows and (done % config.eval_steps == 0 or done == total):
                found = evaluation.evaluate(trainer, job.eval_rows, job.eval_bank)
                history.append(line | found)
                line |= found
                watch.after_eval(step.step, found)
            signal_number = max(world.gather(stopped()))
            due = done % config.save_steps == 0 or done == total or signal_number
            best = evaluation.records(history, config.metric_for_best_model) if config.load_best_model_at_end else []
            keep = (due or best[-1:] == [done] or _stops(history, config)) and watch.verdict is None
            tensors = trainer.optimizer.state() if keep else None  # every rank takes part
            if output:
                _record(output, line, tensors, watch.state, config, best)
            watch.tell(step, alerts)
            advance(1, note(step))
            if signal_number:
                world.tell(None)  # no rank leaves before rank 0 has saved: torchrun would end it
                raise Interrupted(signal_number)


def _warmup(total: int, config: TrainConfig) -> int:
    return warmup_length(total, config.warmup_ratio, config.warmup_steps, config.lr_scheduler_type)


def _steps(trainer: Trainer, job: Job, first: int, history: Sequence[dict[str, float]]) -> Iterator[StepMetrics]:
    """Steps until the end or an early stop. Dropout is drawn from (seed, step, rank), so that nothing of a random
    state has to be kept, and is on inside of steps only."""
    config, running = trainer.config, loop.steps(trainer, job.rows, first, job.training_bank)
    number: int = first
    while number < loop.num_steps(len(job.rows), config) and not _stops(history, config):
        torch.manual_seed(sample_seed(config.seed, f"dropout/{trainer.world.rank}", number))
        with load.lora_dropout(trainer.model.policy, config.lora_dropout):
            step = next(running)
        number = step.step + 1
        yield step


def _stops(history: Sequence[dict[str, float]], config: TrainConfig) -> bool:
    return evaluation.is_stale(history, config.metric_for_best_model, config.early_stopping_patience)


def _best(output: Run | None, trainer: Trainer, history: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Put the weights of the best evaluation into the model, where that is asked for; says which it was."""
    config, metric = trainer.config, trainer.config.metric_for_best_model
    if not history or not (config.load_best_model_at_end or config.early_stopping_patience):
        return {}
    best = evaluation.records(history, metric)
    if not best:
        raise DataError(f"no evaluation gave a finite {metric}", "lower learning_rate, or look at the rows")
    value = next(line[metric] for line in history if line["step"] + 1 == best[-1])
    if config.load_best_model_at_end and best[-1] != history[-1]["step"] + 1:
        state = trainer.world.tell(checkpoint.at_step(output.out / "checkpoints", best[-1]) if output else None)
        trainer.optimizer.load_state(cast(Checkpoint, state).tensors)
        log.info(f"the best evaluation was after step {best[-1]}: its weights are kept")
    return {"best": {"step": best[-1], "metric": metric, "value": value}}


def _lines(output: Run) -> list[dict[str, float]]:
    """What metrics.jsonl holds."""
    path = output.out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _record(
    output: Run,
    line: dict[str, Any],
    tensors: dict[str, torch.Tensor] | None,
    state: State,
    config: TrainConfig,
    best: Sequence[int],
) -> None:
    """Append the metrics of a step and, with tensors, save a checkpoint that vouches for them."""
    metrics = output.out / "metrics.jsonl"
    fsio.append_line(metrics, json.dumps(line))
    if tensors is not None:
        fsio.sync_file(metrics)
        done = Checkpoint(int(line["step"]) + 1, metrics.stat().st_size, tensors, state.to_json())
        checkpoint.save(output.out / "checkpoints", done, output.fingerprint, config.save_total_limit, best)
