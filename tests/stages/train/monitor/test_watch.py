"""What is told about a run: rates, alerts in the log, skipped rows, and the note for the terminal."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from prefpipe import clock
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, StrictError
from prefpipe.runs import store
from prefpipe.runs.store import Run
from prefpipe.stages.train.loop import StepMetrics
from prefpipe.stages.train.monitor import watch
from prefpipe.stages.train.monitor.diagnostics import Alert, Facts, State
from prefpipe.stages.train.monitor.watch import Pace, note, watching

FACTS = Facts(num_steps=200, warmup_steps=0, beta=0.1, learning_rate=1e-5, exact=True)
CONFIG = TrainConfig()
VALUES = {"loss": 0.5, "grad_norm": 1.0, "tokens/unique": 60.0, "tokens/logical": 90.0}


def step(number: int, skipped: tuple[str, ...] = (), **values: float) -> StepMetrics:
    return StepMetrics(number, 4, {**VALUES, **values}, skipped)


class Clock:
    """Time that goes on when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(clock, "monotonic", lambda: self.now)


def opened(out: Path):
    return store.open_run(out, "train", CONFIG, {}, force=False)


def timing(run_: Run) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_.out / "timing.jsonl").read_text().splitlines()]


def test_rates_are_tokens_over_seconds_and_stand_in_timing_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Steps of 4 s with 60 unique and 90 logical tokens: 15 and 22.5 per second; a line after 12 s, one at the end."""
    clock = Clock(monkeypatch)
    with opened(tmp_path / "t") as run_, watching(run_, CONFIG, FACTS, State(), 0, 1.25) as seen:
        for number in range(4):
            clock.now += 4
            seen.tell(step(number), seen.after_step(step(number)))
    rates = {"tokens_unique_per_second": 15.0, "tokens_logical_per_second": 22.5}
    lines = [
        {key: value for key, value in line.items() if key not in ("at", "peak_memory_gib")} for line in timing(run_)
    ]
    assert lines == [
        {"event": "training", "step": 2, "steps": 3, "seconds": 12.0, **rates},
        {"event": "trained", "steps": 4, "seconds": 16.0, **rates, "audit_seconds": 1.25},
    ]


def test_trackers_get_metrics_and_the_rates_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock, tracked = Clock(monkeypatch), list[tuple[int, Mapping[str, float]]]()
    with opened(tmp_path / "t") as run_, watching(run_, CONFIG, FACTS, State(), 0) as seen:
        seen.track = lambda number, values: tracked.append((number, values))
        clock.now += 2
        seen.tell(step(7), [])
        seen.after_eval(7, {"eval_loss": 0.6})
    assert [number for number, _ in tracked] == [7, 7]
    assert tracked[0][1]["train/loss"] == 0.5
    assert tracked[0][1]["train/rates/tokens_unique_per_second"] == 30.0
    assert tracked[1][1] == {"eval/loss": 0.6}


def test_alerts_are_in_the_log_by_their_level(capfd: pytest.CaptureFixture[str]):
    watch.say_alerts([Alert("A1", "NOTICE", 3, "it falls", "watch"), Alert("A2", "WARN", 4, "it fell", "mend")])
    assert capfd.readouterr().err.splitlines() == [
        "NOTICE A1 at step 3: it falls; watch",
        "warning: WARN A2 at step 4: it fell; mend",
    ]


def test_skipped_rows_are_named_and_three_end_the_run(capfd: pytest.CaptureFixture[str]):
    rows = tuple(f"row{n}" for n in range(10))
    with watching(None, CONFIG, FACTS, State(), 0) as seen:
        for number in range(3):
            now = step(number, rows if number else ())
            seen.tell(now, seen.after_step(now))
        assert seen.verdict is None
        alerts = seen.after_step(step(3, rows))
        with pytest.raises(DataError, match="steps 1, 2, 3"):
            seen.tell(step(3, rows), alerts)
    err = capfd.readouterr().err
    assert "step 1 is skipped, its loss or gradient is not finite: rows row0, row1" in err
    assert "row7 and 2 more (metrics.jsonl has all)" in err


@pytest.mark.parametrize("strict", [True, False])
def test_a_stop_rule_with_and_without_strict(strict: bool, capfd: pytest.CaptureFixture[str]):
    """Step 0 with |h| of 1 nat where it must be 0."""
    config = TrainConfig(strict=strict)
    with watching(None, config, FACTS, State(), 0) as seen:
        bad = step(0, **{"rewards/abs_margins": 0.1})
        alerts = seen.after_step(bad)
        if strict:
            with pytest.raises(StrictError, match="A0"):
                seen.tell(bad, alerts)
        else:
            seen.tell(bad, alerts)
    assert "STOP A0 at step 0" in capfd.readouterr().err


def test_strict_from_a_checkpoint_in_which_a_stop_rule_fires_does_not_start():
    """The state was saved without strict: nothing new would fire, for the episode has begun already."""
    state = State(active=("A3",), alerts=(Alert("A3", "STOP", 40, "both fall", "go back"),))
    with pytest.raises(StrictError, match="step 40"), watching(None, TrainConfig(strict=True), FACTS, state, 50):
        pass
    with watching(None, CONFIG, FACTS, state, 50):
        pass


def test_the_note_shows_what_there_is():
    assert note(step(0, **{"rewards/accuracies": 0.75, "rewards/margins": 0.12345})) == (
        "loss 0.5, accuracy 0.75, margin 0.1235"
    )
    assert note(step(0)) == "loss 0.5"


def test_a_pace_without_time_does_not_divide_by_zero():
    pace = Pace(1.0)
    pace.add(step(0))
    assert pace.summary(1.0)["steps"] == 1
