"""Each red flag of the course page turns red where it should, and is green on a run that goes well."""

from dataclasses import replace
from typing import Any

import pytest

from prefpipe.stages.report.flags import flags
from prefpipe.stages.report.subject import Subject


def states(subject: Subject) -> dict[str, str]:
    return {flag.name: flag.newest.state for flag in flags(subject)}


def with_last(subject: Subject, **values: float) -> Subject:
    """The same runs whose newest training ends with these metrics (slashes as two underscores)."""
    path = subject.trained()[-1].path
    changes = {name.replace("__", "/"): value for name, value in values.items()}
    lines = [dict(line) for line in subject.logs[path]]
    for line in lines[-4:]:
        line |= changes
    return replace(subject, logs={**subject.logs, path: lines})


def without(subject: Subject, prefix: str) -> Subject:
    logs = {p: [{k: v for k, v in line.items() if not k.startswith(prefix)} for line in lines]
            for p, lines in subject.logs.items()}  # fmt: skip
    return replace(subject, logs=logs)


def test_a_run_that_goes_well_has_one_red_flag_its_size(subject: Subject) -> None:
    assert [name for name, state in states(subject).items() if state == "red"] == ["Few pairs"]
    assert "unknown" not in states(subject).values()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Chosen answers lose probability", {"deltas__chosen": -0.2}),
        ("Accuracy stays near one half", {"rewards__accuracies": 0.51}),
        ("The margin does not grow", {"rewards__margins": -0.3}),
        ("Accuracy above 99 % with a loss near 0", {"rewards__accuracies": 1.0, "loss": 0.01}),
    ],
)
def test_metrics_that_go_wrong(subject: Subject, name: str, values: dict[str, float]) -> None:
    bad = with_last(subject, **values)
    assert states(bad)[name] == "red"
    (flag,) = (flag for flag in flags(bad) if flag.name == name)
    assert [(finding.run, finding.state) for finding in flag.earlier] == [("round 1", "green")]


def test_log_probs_stand_in_where_there_is_no_reference(subject: Subject) -> None:
    bare = without(without(subject, "deltas/"), "rewards/")
    assert states(bare)["Chosen answers lose probability"] == "green"
    fallen = with_last(bare, logps__chosen=-90.0)
    assert states(fallen)["Chosen answers lose probability"] == "red"
    assert states(bare)["The margin does not grow"] == "unknown"


def test_a_beta_and_pairs_that_go_wrong(subject: Subject) -> None:
    runs = list(subject.runs)
    place = max(i for i, run in enumerate(runs) if run.command == "train")
    runs[place] = replace(runs[place], config={**runs[place].config, "beta": 0.001})
    assert states(replace(subject, runs=runs))["Beta is very low"] == "red"

    def with_check(name: str, **numbers: Any) -> Subject:
        built = max(i for i, run in enumerate(subject.runs) if run.command == "build-pairs")
        checks = [{"id": name, "numbers": numbers}]
        manifest = {"totals": {**subject.runs[built].totals, "data_report": checks}}
        changed = [*subject.runs]
        changed[built] = replace(changed[built], manifest=manifest)
        return replace(subject, runs=changed)

    assert states(with_check("D1", mean=0.5, min=0.0))["Pairs of nearly equal answers"] == "red"
    assert states(with_check("D7", chosen_longer=0.8))["Chosen answers are longer"] == "red"
    assert states(with_check("D2"))["Chosen answers are longer"] == "unknown"


def test_no_training_no_flags(subject: Subject) -> None:
    assert flags(replace(subject, runs=[run for run in subject.runs if run.command != "train"])) == []
