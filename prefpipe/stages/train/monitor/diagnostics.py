"""Alerts over the series of step metrics: what goes wrong in preference training, and what to do about it.

A window W is 50 steps or 5 % of the run, whichever is larger, and never more than a quarter of the run. Metrics are
averaged over blocks of W/4 steps, and the newest eight block means (2W) are kept. They are saved with every checkpoint,
so that a resumed run gives the same alerts. "For W" means in each of the last four blocks; a slope is that of least
squares over block means. A rule alerts when its condition begins to hold, and again only after the condition has ceased
to hold. The rules are in `alerts`, their conditions in `conditions`.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from prefpipe.errors import DataError, PrefpipeError, StrictError

Level = Literal["INFO", "NOTICE", "WARN", "STOP"]
When = Literal["start", "step", "block", "eval"]
_BLOCKS = 4  # in a window
_SHORTEST, _SHARE, _LARGEST_SHARE = 50, 0.05, 0.25  # steps of a window, and shares of the run
_NORMS = 50  # gradient norms that a running median is taken over
_SKIPS_WITHIN = 100  # steps in which skipped ones are counted
_EVAL_RISE = 0.05  # above the minimum, as a share of it
TOO_MANY_SKIPS = "A13b"  # the STOP rule that ends a run even without strict
# The metrics whose block means the rules read.
_FOLLOWED = (
    "loss",
    "learning_rate",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/abs_margins",
    "rewards/saturated",
    "rewards/both_fall",
    "deltas/chosen",
    "kl/ref_policy",
    "kl/ref_policy_per_token",
)


@dataclass(frozen=True)
class Facts:
    """What the rules know of a run. `exact`: the policy starts as the reference, scored by the same fp32 forward, so
    that every log-ratio is 0 before step 0."""

    num_steps: int
    warmup_steps: int
    beta: float
    learning_rate: float
    exact: bool = False

    @property
    def block(self) -> int:
        """Steps in a block, a quarter of a window."""
        window = max(_SHARE * self.num_steps, min(_SHORTEST, _LARGEST_SHARE * self.num_steps))
        return max(1, round(window / _BLOCKS))


@dataclass(frozen=True)
class Alert:
    """A rule whose condition began to hold at a step: the message says what it sees, the advice what to do."""

    rule: str
    level: Level
    step: int
    message: str
    advice: str

    def __str__(self) -> str:
        return f"{self.level} {self.rule} at step {self.step}: {self.message}; {self.advice}"


@dataclass(frozen=True)
class State:
    """Everything that is remembered between steps; plain JSON in a checkpoint."""

    # By metric: the sum and the count in the block that is not full yet, and the means of the blocks before it.
    sums: Mapping[str, tuple[float, int]] = field(default_factory=dict[str, tuple[float, int]])
    blocks: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict[str, tuple[float | None, ...]])
    # Steps in the block that is not full yet.
    in_block: int = 0
    # The newest gradient norms, and the newest steps that moved no weight.
    norms: tuple[float, ...] = ()
    skipped: tuple[int, ...] = ()
    # The minimum of the eval loss, and how many evaluations in a row are above it.
    lowest_eval_loss: float | None = None
    evals_above: int = 0
    # The rules whose condition holds, and every alert of the run.
    active: tuple[str, ...] = ()
    alerts: tuple[Alert, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The state as plain JSON, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "State":
        """The state of `to_json`, whose tuples JSON has turned into lists."""
        return cls(
            sums={name: (total, count) for name, (total, count) in record["sums"].items()},
            blocks={name: tuple(means) for name, means in record["blocks"].items()},
            in_block=record["in_block"],
            norms=tuple(record["norms"]),
            skipped=tuple(record["skipped"]),
            lowest_eval_loss=record["lowest_eval_loss"],
            evals_above=record["evals_above"],
            active=tuple(record["active"]),
            alerts=tuple(Alert(**alert) for alert in record["alerts"]),
        )


@dataclass(frozen=True)
class View:
    """What a rule looks at: facts of the run, the metrics of this step or evaluation, and the state."""

    facts: Facts
    step: int
    values: Mapping[str, float]
    state: State
    last_skipped: bool = False

    def window(self, name: str) -> Sequence[float]:
        """Block means over W, oldest first; empty while there are fewer, or when a block lacks the metric."""
        return self._newest(name, _BLOCKS)

    def two_windows(self, name: str) -> Sequence[float]:
        """Block means over 2W, as `window`."""
        return self._newest(name, 2 * _BLOCKS)

    def all_in_window(self, name: str, holds: Callable[[float], bool]) -> bool:
        """Whether `holds` is true of every block mean of W."""
        means = self.window(name)
        return bool(means) and all(map(holds, means))

    def slope(self, name: str) -> float:
        """Slope per block over 2W, or over W while there are fewer blocks; NaN while there are fewer than that."""
        means = self.two_windows(name) or self.window(name)
        return slope(means) if means else math.nan

    def after_warmup(self, blocks: int) -> bool:
        """Whether the last `blocks` blocks lie after the warmup of the learning rate."""
        return self.step + 1 - blocks * self.facts.block >= self.facts.warmup_steps

    def _newest(self, name: str, count: int) -> Sequence[float]:
        means = self.state.blocks.get(name, ())[-count:]
        known = [mean for mean in means if mean is not None]
        return known if len(known) == count else ()


@dataclass(frozen=True)
class Rule:
    """When a rule is checked, how grave it is, and `check(view)`, which returns what it sees, or None. `condition` and
    `source` are for the documentation."""

    when: When
    level: Level
    condition: str
    advice: str
    source: str
    check: Callable[[View], str | None]


def slope(values: Sequence[float]) -> float:
    """Slope of the least-squares line through (0, values[0]), (1, values[1]), ..."""
    middle = (len(values) - 1) / 2
    mean = math.fsum(values) / len(values)
    return sum((i - middle) * (v - mean) for i, v in enumerate(values)) / sum(
        (i - middle) ** 2 for i in range(len(values))
    )


def after_step(
    state: State, facts: Facts, rules: Mapping[str, Rule], step: int, values: Mapping[str, float], *, skipped: bool
) -> tuple[State, list[Alert]]:
    """The state after a step, and the alerts that begin with it."""
    recent = tuple(s for s in state.skipped if s > step - _SKIPS_WITHIN)
    if skipped:
        known = replace(state, skipped=(*recent, step))
    else:
        known = replace(state, sums=_summed(state, values), skipped=recent)
    known, alerts = _judge(View(facts, step, values, known, skipped), rules, "step")
    if "grad_norm" in values:  # added after the rule that compares it with earlier ones
        known = replace(known, norms=(*known.norms, values["grad_norm"])[-_NORMS:])
    if known.in_block + 1 < facts.block:
        return replace(known, in_block=known.in_block + 1), alerts
    known, more = _judge(View(facts, step, values, _closed(known)), rules, "block")
    return known, alerts + more


def after_eval(
    state: State, facts: Facts, rules: Mapping[str, Rule], step: int, values: Mapping[str, float]
) -> tuple[State, list[Alert]]:
    """The state after an evaluation (`values` under eval_ names), and the alerts that begin with it."""
    loss, lowest = values["eval_loss"], state.lowest_eval_loss
    above = lowest is not None and loss > lowest + _EVAL_RISE * abs(lowest)
    known = replace(
        state,
        lowest_eval_loss=loss if lowest is None else min(lowest, loss),
        evals_above=state.evals_above + 1 if above else 0,
    )
    return _judge(View(facts, step, values, known), rules, "eval")


def at_start(rules: Mapping[str, Rule], warnings: Sequence[tuple[str, str]]) -> State:
    """The state before step 0; `warnings` are (rule, message) about the settings and the data."""
    alerts = tuple(Alert(name, rules[name].level, 0, message, rules[name].advice) for name, message in warnings)
    return State(active=tuple(name for name, _ in warnings), alerts=alerts)


def verdict(state: State, rules: Mapping[str, Rule], *, strict: bool) -> PrefpipeError | None:
    """The error that must end the run, or None: a DataError when too many steps were skipped; with `strict`, a
    StrictError when the condition of another STOP rule holds."""
    for alert in reversed(state.alerts):
        if alert.rule not in state.active or rules[alert.rule].level != "STOP":
            continue
        message = f"[{alert.rule}] step {alert.step}: {alert.message}"
        if alert.rule == TOO_MANY_SKIPS:
            return DataError(message, alert.advice)
        if strict:
            return StrictError(message, f"{alert.advice}; the last checkpoint is intact, --no-strict goes on from it")
    return None


def running_median(norms: Sequence[float]) -> float | None:
    """Median of the newest gradient norms; None while there are too few to say what is usual."""
    return statistics.median(norms) if len(norms) >= 10 else None


def _judge(view: View, rules: Mapping[str, Rule], when: When) -> tuple[State, list[Alert]]:
    """Check the rules of `when`: the state after it, and alerts for the conditions that begin to hold."""
    checked = {name: rule for name, rule in rules.items() if rule.when == when}
    messages = {name: text for name, rule in checked.items() if (text := rule.check(view)) is not None}
    active = view.state.active
    begun = [
        Alert(name, checked[name].level, view.step, text, checked[name].advice)
        for name, text in messages.items()
        if name not in active
    ]
    others = tuple(name for name in active if name not in checked)
    return replace(view.state, active=(*others, *messages), alerts=(*view.state.alerts, *begun)), begun


def _summed(state: State, values: Mapping[str, float]) -> dict[str, tuple[float, int]]:
    sums = dict(state.sums)
    for name, value in _followed(values).items():
        total, count = sums.get(name, (0.0, 0))
        sums[name] = (total + value, count + 1)
    return sums


def _followed(values: Mapping[str, float]) -> dict[str, float]:
    """The metrics whose block means the rules read; of z0 the share of steps at which it is 0."""
    followed = {name: values[name] for name in _FOLLOWED if name in values}
    return followed | ({"kto/z0_is_0": float(values["kto/z0"] == 0)} if "kto/z0" in values else {})


def _closed(state: State) -> State:
    """The state after a block that is full: its means are added, and those older than 2W dropped."""
    names = sorted({*state.blocks, *state.sums})
    # A metric that first appears now lacks the blocks before.
    past = max((len(means) for means in state.blocks.values()), default=0)
    blocks: dict[str, tuple[float | None, ...]] = {}
    for name in names:
        total, count = state.sums.get(name, (0.0, 0))
        before = state.blocks.get(name, (None,) * past)
        blocks[name] = (*before, total / count if count else None)[-2 * _BLOCKS :]
    return replace(state, sums={}, blocks=blocks, in_block=0)
