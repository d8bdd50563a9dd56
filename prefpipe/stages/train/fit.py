"""The loop over a whole run: from the newest checkpoint to the end or a stop, with evaluations, alerts, checkpoints."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from prefpipe import log, reading
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, Interrupted
from prefpipe.forward import load
from prefpipe.forward.shards import Copied
from prefpipe.forward.tensor_files import Stored
from prefpipe.ids import sample_seed
from prefpipe.runs import fsio, page
from prefpipe.runs.store import Run
from prefpipe.stages.train import checkpoint, evaluation, interrupts, loop, moments
from prefpipe.stages.train.background import Background, background
from prefpipe.stages.train.checkpoint import Checkpoint
from prefpipe.stages.train.inputs import TrainingData
from prefpipe.stages.train.loop import StepMetrics, Steps, Trainer
from prefpipe.stages.train.margins import Margins
from prefpipe.stages.train.monitor.diagnostics import Alert, Facts, State
from prefpipe.stages.train.monitor.watch import Watch, note, watching
from prefpipe.stages.train.optimizer import warmup_length
from prefpipe.stages.train.parallel import World
from prefpipe.stages.train.session import Paused, Session

_METRICS = "metrics.jsonl"
Line = dict[str, Any]  # of metrics.jsonl: the metrics of a step by name, those of an evaluation under eval_ names


def fit(
    session: Session,
    trainer: Trainer,
    data: TrainingData,
    state: State,
    *,
    exact: bool = False,
    audit_seconds: float | None = None,
) -> tuple[dict[str, Any], Sequence[Alert], Margins]:
    """Run the loop; the model is left with the weights to save.

    `state` is what the alert rules know before step 0, `exact` whether every log-ratio must be 0 there, `audit_seconds`
    how long the audit took (for timing.jsonl). Returns facts for the manifest (the number of steps, the metrics of the
    last one where a run directory holds them, the best evaluation where the settings ask for it), the alerts of the
    run, and the margins of its pairs. Raises Paused where the session ends before the run.
    """
    config = trainer.config
    resumed = _resumed(session)
    margins = Margins(data.rows, data.eval_rows)
    first, metrics_bytes = (resumed.step, resumed.metrics_bytes) if resumed else (0, 0)
    if resumed is not None:
        _load(trainer, resumed)
        margins.load_state(resumed.tensors)
        state = State.from_json(resumed.diagnostics or state.to_json())
        log.info(f"resuming after step {first}")
    else:
        moments.take(data.optimizer, trainer.optimizer, data.policy.id, trainer.world)
    session.lead(lambda run: fsio.truncate(run.out / _METRICS, metrics_bytes))
    evaluations = session.lead(lambda run: [line for line in _lines(run) if "eval_loss" in line]) or []
    steps = loop.steps(trainer, data.rows, first, data.training_bank, data.sft)
    warmup = warmup_length(steps.num_steps, config.warmup_ratio, config.warmup_steps, config.lr_scheduler_type)
    if warmup >= steps.num_steps:
        highest = config.learning_rate * steps.num_steps / (warmup + 1)
        log.warn(
            f"a warmup of {warmup} steps in a run of {steps.num_steps}: the learning rate rises to {highest:.2g}, and "
            f"never to its peak of {config.learning_rate:g} (without a warmup it begins there)"
        )
    facts = Facts(steps.num_steps, warmup, config.beta, config.learning_rate, exact)
    watched = watching(session.output, config, facts, state, first, audit_seconds)
    with watched as watch, log.progress("training", steps.num_steps, "steps") as advance:
        advance(first)
        running = _until_stop(trainer, steps, first, evaluations)
        _run_steps(session, trainer, data, watch, running, (evaluations, margins), advance)
    last = session.lead(lambda run: _lines(run)[-1])
    results = {"steps": last["step"] + 1, "last_step": last} if last else {"steps": steps.num_steps, "last_step": {}}
    return results | _take_best(session, trainer, evaluations), watch.state.alerts, margins


def _run_steps(
    session: Session,
    trainer: Trainer,
    data: TrainingData,
    watch: Watch,
    running: Iterator[StepMetrics],
    history: tuple[list[Line], Margins],
    advance: log.Advance,
) -> None:
    """Take every step; evaluate, save and report where it is due. Evaluations and margins are added to `history`."""
    evaluations, margins = history
    world, config, total = trainer.world, trainer.config, watch.facts.num_steps
    with interrupts.noted() as signal_seen, background(world) as saving:
        for step in running:
            saving.after_step()
            alerts = watch.after_step(step)
            done = step.step + 1
            line: Line = {"step": step.step, **step.values}
            line |= {"skipped": step.skipped} if step.skipped else {}
            margins.note(done, step.margins, held_out=False)
            held_out: Mapping[int, float] = {}
            if data.eval_rows and (done % config.eval_steps == 0 or done == total):
                evaluated = evaluation.evaluate(trainer, data.eval_rows, data.eval_bank)
                line |= evaluated.values
                held_out = evaluated.margins
                evaluations.append(dict(line))
                watch.after_eval(step.step, evaluated.values)
            signal_number = max(world.gather(signal_seen()))
            pauses = done == session.until and done < total
            over = _is_over(evaluations, config)
            last = done == total or pauses or signal_number > 0 or over
            best = _records(evaluations, config)
            if not config.load_best_model_at_end or best[-1:] == [done]:  # those of the weights that are saved
                margins.note(done, held_out, held_out=True)
            _note(session, line)
            if last or done % config.save_steps == 0 or best[-1:] == [done] or watch.verdict is not None:
                tensors = trainer.optimizer.state() | margins.state()
                _save(session, saving, done, tensors, watch, config, best, last=last)
            if session.output and config.report and "eval_loss" in line:
                page.renew(session.output.out)
            watch.tell(step, alerts)
            advance(1, note(step))
            if signal_number:
                world.tell(None)  # no rank leaves before rank 0 has saved: torchrun would end it
                raise Interrupted(signal_number)
            if pauses and not over:
                raise Paused


def _note(session: Session, line: Line) -> None:
    """Append the metrics of a step."""
    if session.output:
        fsio.append_line(session.output.out / _METRICS, json.dumps(line))


def _records(evaluations: Sequence[Line], config: TrainConfig) -> list[int]:
    """The steps whose evaluation was the best so far, where the run asks for the best weights."""
    return evaluation.records(evaluations, config.metric_for_best_model) if config.load_best_model_at_end else []


def _until_stop(trainer: Trainer, steps: Steps, first: int, evaluations: Sequence[Line]) -> Iterator[StepMetrics]:
    """Steps until the end, or until `evaluations`, which grow in between, show no progress.

    Dropout is seeded by (seed, step, rank), so that checkpoints store no random state. It is off during evaluation.
    """
    config, number = trainer.config, first
    while number < steps.num_steps and not _is_over(evaluations, config):
        torch.manual_seed(sample_seed(config.seed, f"dropout/{trainer.world.rank}", number))
        with load.lora_dropout(trainer.model.policy, config.lora_dropout):
            step = next(steps)
        number = step.step + 1
        yield step


def _is_over(evaluations: Sequence[Line], config: TrainConfig) -> bool:
    return evaluation.is_stale(evaluations, config.metric_for_best_model, config.early_stopping_patience)


def _take_best(session: Session, trainer: Trainer, evaluations: Sequence[Line]) -> dict[str, Any]:
    """Put the weights of the best evaluation into the model, where the settings ask for them. Returns, for the
    manifest, which evaluation it was."""
    config, metric = trainer.config, trainer.config.metric_for_best_model
    if not evaluations or not (config.load_best_model_at_end or config.early_stopping_patience):
        return {}
    best = evaluation.records(evaluations, metric)
    if not best:
        raise DataError(f"no evaluation gave a finite {metric}", "lower learning_rate, or look at the rows")
    step = best[-1]
    value = next(line[metric] for line in evaluations if line["step"] + 1 == step)
    if config.load_best_model_at_end and step != evaluations[-1]["step"] + 1:
        folder = cast(Path, session.lead(_checkpoints))
        _load(trainer, checkpoint.at_step(folder, step, session.world))
        log.info(f"the best evaluation was after step {step}: its weights are kept")
    return {"best": {"step": step, "metric": metric, "value": value}}


def _resumed(session: Session) -> Checkpoint[Stored] | None:
    """The checkpoint to go on from; a collective call."""
    place = session.lead(_place)
    return None if place is None else checkpoint.newest(*place, session.world)


def _load(trainer: Trainer, saved: Checkpoint[Stored]) -> None:
    """Take over weights and moments; each rank reads its rows."""
    trainer.world.together(lambda: trainer.optimizer.load_state(saved.tensors))


def _place(run: Run) -> tuple[Path, str, Path]:
    if reading.is_there(run.out / _METRICS) and not (run.out / _METRICS).is_file():
        log.warn(f"{run.out / _METRICS} is not a file: it moves to quarantine/")
        fsio.move_aside(run.out / _METRICS, run.out / "quarantine")
    return _checkpoints(run), run.fingerprint, run.out / _METRICS


def _checkpoints(run: Run) -> Path:
    return run.out.absolute() / "checkpoints"


def _lines(run: Run) -> list[Line]:
    """The lines of metrics.jsonl, which the checkpoint of the resume vouches for."""
    path = run.out / _METRICS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _save(
    session: Session,
    saving: Background,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    watch: Watch,
    config: TrainConfig,
    best: Sequence[int],
    *,
    last: bool,
) -> None:
    """Save a checkpoint that vouches for the metrics of all steps before it, in the background unless it is the `last`.
    A step whose verdict ends the run has none; the one before is waited for. A collective call."""

    def describe(run: Run) -> tuple[Path, int, str, str]:
        metrics = run.out / _METRICS
        fsio.sync_file(metrics)
        return _checkpoints(run), metrics.stat().st_size, reading.file_digest(metrics), run.fingerprint

    saving.wait()
    described = session.lead(describe) if watch.verdict is None else None
    if described is None:
        return
    folder, size, digest, fingerprint = described
    remembered = watch.state.to_json()

    def write(tensors: Mapping[str, torch.Tensor | Copied], world: World) -> None:
        done = Checkpoint(step, size, digest, tensors, remembered)
        checkpoint.save(folder, done, fingerprint, config.save_total_limit, best, world)

    saving.save(step, tensors, write, last=last)
