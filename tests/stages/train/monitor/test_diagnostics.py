"""The machinery of alerts: blocks and windows, episodes, state that survives JSON, what ends a run."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from prefpipe.errors import DataError, StrictError
from prefpipe.stages.train.monitor.alerts import RULES
from prefpipe.stages.train.monitor.diagnostics import (
    Alert,
    Facts,
    Rule,
    State,
    View,
    after_eval,
    after_step,
    at_start,
    running_median,
    slope,
    verdict,
)

FACTS = Facts(num_steps=200, warmup_steps=0, beta=0.1, learning_rate=1e-5)  # W = 50, blocks of 12


def run(
    series: Sequence[dict[str, float]], rules: dict[str, Rule], facts: Facts = FACTS, state: State | None = None
) -> tuple[State, list[Alert]]:  # fmt: skip
    state, alerts = state or State(), list[Alert]()
    for step, values in enumerate(series):
        state, begun = after_step(state, facts, rules, step, values, skipped=False)
        alerts += begun
    return state, alerts


def rule(check: object, when: str = "block", level: str = "WARN") -> Rule:
    return Rule(when, level, "c", "advice", "s", check)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_steps", "block"), [(1, 1), (6, 1), (16, 1), (40, 2), (100, 6), (200, 12), (1000, 12), (10_000, 125)]
)
def test_the_window_is_scaled_to_the_run(num_steps: int, block: int):
    """W is a quarter of a short run, 50 steps of a usual one, 5 % of a long one; a block is a quarter of W."""
    assert replace(FACTS, num_steps=num_steps).block == block


def test_blocks_are_means_and_eight_are_kept():
    """Against a list of everything: the newest eight means of 12 steps each."""
    source = random.Random(0)
    losses = [source.random() for _ in range(150)]
    state, _ = run([{"loss": value} for value in losses], {})
    means = [sum(losses[i : i + 12]) / 12 for i in range(0, 144, 12)]
    assert state.blocks["loss"] == pytest.approx(means[-8:])
    assert state.in_block == 6
    assert state.sums["loss"] == pytest.approx((sum(losses[144:]), 6))


def test_windows_are_empty_until_they_are_full_and_where_a_block_lacks_the_metric():
    state, _ = run([{"loss": 1.0}] * 36, {})
    view = View(FACTS, 36, {}, state)
    assert list(view.window("loss")) == []
    state, _ = run([{"loss": 1.0}] * 48, {})
    assert list(View(FACTS, 48, {}, state).window("loss")) == [1.0] * 4
    series = [{"loss": 1.0, **({"rewards/margins": 2.0} if step >= 24 else {})} for step in range(96)]
    view = View(FACTS, 96, {}, run(series, {})[0])
    assert list(view.window("rewards/margins")) == [2.0] * 4
    assert list(view.two_windows("rewards/margins")) == []
    assert view.slope("rewards/margins") == 0
    assert list(view.two_windows("loss")) == [1.0] * 8


def test_the_slope_is_that_of_least_squares():
    source = random.Random(2)
    for count in (4, 8):
        values = [source.gauss(0, 1) for _ in range(count)]
        assert slope(values) == pytest.approx(float(np.polyfit(range(count), values, 1)[0]))


def test_an_alert_is_given_once_per_episode():
    """Above 1 in blocks 2-3 and 6: two alerts, at the ends of blocks 2 and 6."""
    series = [{"loss": 2.0 if step // 12 in (2, 3, 6) else 0.0} for step in range(96)]
    rules = {"X": rule(lambda view: "seen" if view.state.blocks["loss"][-1] > 1 else None)}
    state, alerts = run(series, rules)
    assert [(a.rule, a.step, a.message, a.advice) for a in alerts] == [
        ("X", 35, "seen", "advice"), ("X", 83, "seen", "advice"),
    ]  # fmt: skip
    assert state.alerts == tuple(alerts)
    assert state.active == ()


def test_step_rules_see_every_step_and_block_rules_the_ends_of_blocks():
    seen: dict[str, list[int]] = {"step": [], "block": []}
    rules = {when: rule(lambda view, when=when: seen[when].append(view.step), when) for when in seen}  # type: ignore[misc]
    run([{"loss": 0.0}] * 30, rules)
    assert seen == {"step": list(range(30)), "block": [11, 23]}


@pytest.mark.parametrize("cut", [1, 11, 12, 50, 119])
def test_a_resumed_run_gives_the_same_alerts(cut: int):
    """Through JSON at any step, a collapse with gradient spikes and a skipped step: state and alerts are equal."""
    source = random.Random(3)

    def values(step: int) -> dict[str, float]:
        return {
            "loss": source.random(), "deltas/chosen": -0.004 * step, "rewards/chosen": -0.01 * step,
            "rewards/margins": 0.01 * step, "rewards/both_fall": 0.9, "rewards/accuracies": 0.8,
            "grad_norm": 50.0 if step % 37 == 36 else 1.0, "learning_rate": 1e-5,
            "kl/ref_policy": 0.05 * 2.5 ** (step / 20),
        }  # fmt: skip

    series = [values(step) for step in range(120)]

    def go(state: State, first: int, last: int) -> State:
        for step in range(first, last):
            state, _ = after_step(state, FACTS, RULES, step, series[step], skipped=step == 40)
        return state

    whole = go(State(), 0, 120)
    resumed = State.from_json(json.loads(json.dumps(go(State(), 0, cut).to_json())))
    assert go(resumed, cut, 120) == whole
    assert {alert.rule for alert in whole.alerts} >= {"A1", "A2", "A3", "A9b", "A13"}


def test_the_state_stays_small():
    """However long the run is: under 20 kB as JSON."""
    facts = replace(FACTS, num_steps=10**6)
    names = ["loss", "learning_rate", "rewards/margins", "deltas/chosen", "grad_norm"]
    state, _ = run([dict.fromkeys(names, 1 / 3)] * 3000, RULES, replace(facts, num_steps=1000))
    assert len(json.dumps(state.to_json())) < 20_000


def test_evaluations_above_the_minimum_are_counted():
    state = State()
    for step, loss in enumerate([0.60, 0.50, 0.52, 0.53, 0.54, 0.50]):
        state, _ = after_eval(state, FACTS, {}, step, {"eval_loss": loss})
        assert state.evals_above == [0, 0, 0, 1, 2, 0][step]
    assert state.lowest_eval_loss == 0.50


def test_warnings_before_step_0_are_alerts():
    state = at_start(RULES, [("A16", "beta 0.001 is small")])
    assert [(a.rule, a.level, a.step, a.message) for a in state.alerts] == [("A16", "WARN", 0, "beta 0.001 is small")]
    assert verdict(state, RULES, strict=True) is None


def test_a_stop_rule_ends_the_run_only_when_strict_and_only_while_it_fires():
    rules = {"X": rule(lambda view: "bad" if view.values["loss"] > 1 else None, "step", "STOP")}
    state, _ = run([{"loss": 2.0}], rules)
    assert verdict(state, rules, strict=False) is None
    found = verdict(state, rules, strict=True)
    assert isinstance(found, StrictError)
    assert found.exit_code == 3
    assert found.message == "[X] step 0: bad"
    assert "advice" in found.hint
    assert "--no-strict" in found.hint
    state, _ = after_step(state, FACTS, rules, 1, {"loss": 0.0}, skipped=False)
    assert verdict(state, rules, strict=True) is None


@pytest.mark.parametrize(("skips", "stops"), [((10, 50, 109), True), ((10, 50, 110), False), ((10, 11), False)])
def test_three_skipped_steps_in_a_hundred_end_the_run(skips: tuple[int, ...], stops: bool):
    state = State()
    for step in range(max(skips) + 1):
        state, _ = after_step(state, FACTS, RULES, step, {"loss": 1.0}, skipped=step in skips)
    found = verdict(state, RULES, strict=False)
    assert isinstance(found, DataError) == stops
    if found is not None:
        assert found.exit_code == 65
        assert ", ".join(map(str, skips)) in found.message


def test_the_running_median_needs_ten_norms():
    assert running_median([1.0] * 9) is None
    assert running_median([*range(1, 11)]) == 5.5
