"""What a training run reports while it goes on: alerts, times and rates, metrics for trackers, a line for the terminal.

Nothing here changes a result. Times and rates go to timing.jsonl and to the trackers, never to metrics.jsonl, which is
the same to the bit whenever the run is repeated.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from prefpipe import clock, log
from prefpipe.config.base import dump
from prefpipe.config.train import TrainConfig
from prefpipe.errors import PrefpipeError
from prefpipe.runs.store import Run
from prefpipe.stages.train.loop import StepMetrics
from prefpipe.stages.train.monitor import diagnostics
from prefpipe.stages.train.monitor.alerts import RULES
from prefpipe.stages.train.monitor.diagnostics import Alert, Facts, State
from prefpipe.stages.train.monitor.trackers import Track, tracking

_TIMING_EVERY_S = 10.0
_SHOWN_ROWS = 8
_NOTE = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}


@dataclass
class Pace:
    """Steps and tokens since a moment. A token that completions share is one unique token, and a logical token of each
    of them."""

    since: float
    steps: int = 0
    unique: float = 0.0
    logical: float = 0.0

    def add(self, step: StepMetrics) -> None:
        """Count a step."""
        self.steps += 1
        self.unique += step.values["tokens/unique"]
        self.logical += step.values["tokens/logical"]

    def rates(self, now: float) -> dict[str, float]:
        """Tokens per second."""
        seconds = max(now - self.since, 1e-9)
        return {"tokens_unique_per_second": self.unique / seconds, "tokens_logical_per_second": self.logical / seconds}

    def summary(self, now: float) -> dict[str, float]:
        """Steps, seconds and rates, for timing.jsonl."""
        rates = {name: round(value, 1) for name, value in self.rates(now).items()}
        return {"steps": self.steps, "seconds": round(now - self.since, 3), **rates}


@dataclass
class Watch:
    """The state of the alert rules, and the pace. Every rank has one; rank 0 alone has an `output` to write to."""

    output: Run | None
    facts: Facts
    strict: bool
    state: State
    track: Track
    # The pace since the start, and since the last line of timing.jsonl.
    whole: Pace
    recent: Pace
    # When the last step was reported.
    last: float

    @property
    def verdict(self) -> PrefpipeError | None:
        """The error that must end the run now."""
        return diagnostics.verdict(self.state, RULES, strict=self.strict)

    def after_step(self, step: StepMetrics) -> list[Alert]:
        """Apply the rules to a step. Before its checkpoint is saved: that holds the state after the step."""
        self.state, alerts = diagnostics.after_step(
            self.state, self.facts, RULES, step.step, step.values, skipped=bool(step.skipped)
        )
        return alerts

    def after_eval(self, step: int, values: Mapping[str, float]) -> None:
        """Apply the rules to an evaluation, whose `values` have eval_ names, and report it."""
        self.state, alerts = diagnostics.after_eval(self.state, self.facts, RULES, step, values)
        self.track(step, {f"eval/{name.removeprefix('eval_')}": value for name, value in values.items()})
        say_alerts(alerts)

    def tell(self, step: StepMetrics, alerts: Sequence[Alert]) -> None:
        """Report a step: alerts, trackers, rates. Raises the error that ends the run: a STOP rule with `strict`, or too
        many skipped steps."""
        now = clock.monotonic()
        single = Pace(self.last)
        for pace in (single, self.whole, self.recent):
            pace.add(step)
        self.last = now
        if self.output:
            rates = {f"rates/{name}": value for name, value in single.rates(now).items()}
            self.track(step.step, {f"train/{name}": value for name, value in {**step.values, **rates}.items()})
            if now - self.recent.since >= _TIMING_EVERY_S:
                self.output.log_timing(event="training", step=step.step, **self.recent.summary(now))
                self.recent = Pace(now)
        if step.skipped:
            log.warn(f"step {step.step} is skipped, its loss or gradient is not finite: rows {_listed(step.skipped)}")
        say_alerts(alerts)
        if self.verdict is not None:
            raise self.verdict


@contextmanager
def watching(
    output: Run | None, config: TrainConfig, facts: Facts, state: State, first: int, audit_seconds: float | None = None
) -> Generator[Watch]:
    """Watch a run from step `first` on; at its end timing.jsonl gets how long it and its audit took. Raises at once
    when the state ends the run before its first step."""
    open_trackers = (
        tracking(config.report_to, output.out, output.fingerprint, dump(config), first)
        if output
        else nullcontext(_nothing)
    )
    now = clock.monotonic()
    with open_trackers as track:
        watch = Watch(output, facts, config.strict, state, track, Pace(now), Pace(now), now)
        if watch.verdict is not None:
            raise watch.verdict
        yield watch
        if output:
            audited = {} if audit_seconds is None else {"audit_seconds": round(audit_seconds, 3)}
            output.log_timing(event="trained", **watch.whole.summary(clock.monotonic()), **audited)


def say_alerts(alerts: Sequence[Alert]) -> None:
    """Log INFO and NOTICE as information, WARN and STOP as warnings."""
    for alert in alerts:
        say = log.warn if alert.level in ("WARN", "STOP") else log.info
        say(str(alert))


def note(step: StepMetrics) -> str:
    """Loss, accuracy and margin of a step, as far as its losses have them."""
    return ", ".join(f"{shown} {step.values[name]:.4g}" for name, shown in _NOTE.items() if name in step.values)


def _nothing(step: int, values: Mapping[str, float]) -> None:
    """Ranks other than 0 track nothing."""


def _listed(rows: Sequence[str]) -> str:
    more = f" and {len(rows) - _SHOWN_ROWS} more (metrics.jsonl has all)" if len(rows) > _SHOWN_ROWS else ""
    return ", ".join(rows[:_SHOWN_ROWS]) + more
