"""Metrics over steps, rounds side by side, alerts at their steps, parity."""

import json
from dataclasses import replace
from pathlib import Path

from prefpipe.runs import overview
from prefpipe.stages.report import training
from prefpipe.stages.report.subject import Subject, read
from tests.stages.report import cases


def test_seven_metrics_and_what_drove_them(subject: Subject) -> None:
    found = training.training(subject)
    assert found.runs == ["round 1", "round 2"]
    assert len(found.seven) == 7
    assert [chart.title for chart in found.others] == ["KL from the reference (nats)", "Gradient norm", "Learning rate"]
    margin = next(chart for chart in found.seven if chart.title == "Margin")
    assert "held-out" in margin.says
    assert "A1" in margin.svg
    assert "var(--s1)" in margin.svg
    assert found.note == ""
    assert dict(found.last)["step"] == "39"


def test_the_line_of_the_newest_round_begins_and_ends_where_its_log_does(subject: Subject) -> None:
    log = subject.metrics(subject.trained()[-1])
    loss = training.training(subject).seven[0].says
    first, last = (f"{log[i]['loss']:.3g}" for i in (0, -1))
    assert loss.startswith(f"{first} to {last}; held-out ")


def test_many_steps_are_thinned_and_it_is_said(subject: Subject) -> None:
    path = subject.trained()[-1].path
    long = [cases.metrics(step, 1000, 1) for step in range(1000)]
    found = training.training(replace(subject, logs={**subject.logs, path: long}))
    assert found.note == "Every point is a mean of up to 7 steps."


def test_steps_that_moved_nothing_are_named(subject: Subject) -> None:
    path = subject.trained()[-1].path
    log = [dict(line) for line in subject.logs[path]]
    for step in (3, 5):
        log[step]["skipped"] = ["row"]
    found = training.training(replace(subject, logs={path: log}))
    assert found.skipped == ["round 2: 2 steps moved no weight, at 3, 5"]


def test_parity(subject: Subject) -> None:
    one, _ = training.training(subject).parity
    assert (one.run, one.agrees) == ("round 1", True)
    assert one.chart is not None
    assert "384 tokens" in one.chart.says


def test_parity_that_was_not_checked_and_one_of_an_older_version(finished: Path, tmp_path: Path) -> None:
    run = cases.iterate_run(tmp_path / "run", cases.Shape(rounds=1))
    path = run / "round-1/generate/parity.json"
    report = json.loads(path.read_text())
    del report["histogram"]
    path.write_text(json.dumps(report))
    (older,) = training.training(read(run)).parity
    assert (older.agrees, older.chart) == (True, None)
    path.write_text(json.dumps({"rows": 0, "scorer": "x", "not_checked": "vllm is not installed"}))
    (unchecked,) = training.training(read(run)).parity
    assert (unchecked.agrees, unchecked.summary) == (None, "not checked: vllm is not installed")


def test_no_training_is_no_error(finished: Path) -> None:
    found = training.training(read(finished / "round-1/build-pairs"))
    assert (found.runs, found.seven, found.last) == ([], [], [])
    assert len(found.parity) == 1
    assert overview.alerts(read(finished / "round-1/build-pairs").root) == []


def test_one_evaluation_is_one_number_and_a_dot(subject: Subject) -> None:
    run = subject.runs[-2]
    steps = [{"step": 0, "loss": 0.7}, {"step": 1, "loss": 0.5, "eval_loss": 0.625}]
    chart = training.training(replace(subject, runs=[run], logs={run.path: steps})).seven[0]
    assert chart.says == "0.7 to 0.5; held-out 0.625"
    assert "mark-symbol role-mark" in chart.svg
