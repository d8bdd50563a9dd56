"""The red flags and the common mistakes of the course page on DPO, each green or red for every round of training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefpipe.runs.overview import Overview, Record
from prefpipe.stages.report.charts import is_number
from prefpipe.stages.report.subject import Subject, label, number, percent

State = Literal["green", "red", "unknown"]
_FEW_PAIRS = 1000
_LOW_BETA = 0.01  # per nat of a sequence


@dataclass(frozen=True)
class Finding:
    """What a flag says of one run of training."""

    run: str
    state: State
    found: str


@dataclass(frozen=True)
class Flag:
    """A flag, what it means and what helps; what it says of the newest round, and of those before it that differ."""

    name: str
    advice: str
    newest: Finding
    earlier: Sequence[Finding]


@dataclass(frozen=True)
class Trained:
    """A run of training as the flags see it: its metrics, its settings, and the totals of the runs of its pairs."""

    run: Overview
    first: Record
    last: Record
    pairs: Record


Check = Callable[[Trained], tuple[State, str]]


def flags(subject: Subject) -> list[Flag]:
    """Every flag over the runs of training; empty without one."""
    runs = [_trained(subject, run) for run in subject.trained()]
    return [_flag(name, advice, check, runs) for name, advice, check in (_CHECKS if runs else ())]


def _flag(name: str, advice: str, check: Check, runs: Sequence[Trained]) -> Flag:
    *before, newest = (Finding(label(one.run), *check(one)) for one in runs)
    return Flag(name, advice, newest, [finding for finding in before if finding.state != newest.state])


def _trained(subject: Subject, run: Overview) -> Trained:
    """Means of the metrics over the first and the last tenth of the steps so far."""
    steps = subject.metrics(run)
    size = max(1, len(steps) // 10)
    built = [one for one in subject.of("build-pairs") if one.round == run.round]
    return Trained(run, _means(steps[:size]), _means(steps[-size:]), built[-1].totals if built else {})


def _means(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(name for step in steps for name in step)
    known = {name: [step[name] for step in steps if is_number(step.get(name))] for name in names}
    return {name: sum(values) / len(values) for name, values in known.items() if values}


def _chosen_falls(one: Trained) -> tuple[State, str]:
    now = one.last.get("deltas/chosen")
    if now is not None:
        return _state(now < -0.02), f"{number(now)} nats per token against the reference"
    before, now = one.first.get("logps/chosen"), one.last.get("logps/chosen")
    if before is None or now is None:
        return _UNKNOWN
    return _state(now < before - 1), f"{number(before)} to {number(now)} nats"


def _at_chance(one: Trained) -> tuple[State, str]:
    accuracy = one.last.get("rewards/accuracies", one.last.get("logps/accuracies"))
    return _UNKNOWN if accuracy is None else (_state(accuracy < 0.55), percent(accuracy))


def _margin_stands(one: Trained) -> tuple[State, str]:
    before, now = one.first.get("rewards/margins"), one.last.get("rewards/margins")
    if before is None or now is None:
        return _UNKNOWN
    return _state(now <= max(before, 0.0)), f"{number(before)} to {number(now)}"


def _overfits(one: Trained) -> tuple[State, str]:
    accuracy, loss = one.last.get("rewards/accuracies"), one.last.get("loss")
    if accuracy is None or loss is None:
        return _UNKNOWN
    return _state(accuracy > 0.99 and loss < 0.05), f"accuracy {percent(accuracy)}, loss {number(loss)}"


def _low_beta(one: Trained) -> tuple[State, str]:
    beta = one.run.config.get("beta")
    return (_state(beta < _LOW_BETA), f"beta {number(beta)}") if isinstance(beta, float) else _UNKNOWN


def _equal_pairs(one: Trained) -> tuple[State, str]:
    gap = _numbers(one.pairs, "D1")
    mean, least = gap.get("mean"), gap.get("min")
    if not isinstance(mean, float) or not isinstance(least, int | float):
        return _UNKNOWN
    return _state(least < 0.05 * abs(mean)), f"smallest gap {number(least)}, mean {number(mean)}"


def _few_pairs(one: Trained) -> tuple[State, str]:
    count = one.run.totals.get("pairs", one.pairs.get("pairs"))
    return (_state(count < _FEW_PAIRS), f"{number(count)} pairs") if isinstance(count, int) else _UNKNOWN


def _length(one: Trained) -> tuple[State, str]:
    longer = _numbers(one.pairs, "D7").get("chosen_longer")
    if not isinstance(longer, float):
        return _UNKNOWN
    return _state(longer > 0.6), f"chosen is longer in {percent(longer)}"


def _numbers(totals: Record, name: str) -> Record:
    """The numbers of a check of the data report."""
    checks = totals.get("data_report")
    for check in checks if isinstance(checks, list) else ():
        if isinstance(check, dict) and check.get("id") == name and isinstance(check.get("numbers"), dict):
            return check["numbers"]
    return {}


def _state(red: bool) -> State:  # noqa: FBT001  (a flag is red or green)
    return "red" if red else "green"


_UNKNOWN: tuple[State, str] = ("unknown", "not measured")
_CHECKS: tuple[tuple[str, str, Check], ...] = (
    (
        "Chosen answers lose probability",
        "The model learns not to write them: raise beta, choose IPO, or add an nll loss.",
        _chosen_falls,
    ),
    ("Accuracy stays near one half", "Nothing is learnt: check learning rate, beta and the pairs.", _at_chance),
    ("The margin does not grow", "The model does not tell the sides apart.", _margin_stands),
    ("Accuracy above 99 % with a loss near 0", "Overfitting: fewer epochs, or label smoothing.", _overfits),
    ("Beta is very low", "The model may drift far from the reference: start with 0.1.", _low_beta),
    ("Pairs of nearly equal answers", "They teach contradictions: leave out small gaps.", _equal_pairs),
    ("Few pairs", "It overfits to them: several thousand are usual.", _few_pairs),
    ("Chosen answers are longer", "The model may learn length: see check D7 below.", _length),
)
