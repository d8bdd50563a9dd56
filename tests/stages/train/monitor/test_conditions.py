"""Every rule on two recorded series: one that must make it fire, and one close to it that must not.

Runs have 200 steps (W = 50, blocks of 12), beta 0.1, warmup of 10 steps.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest

from prefpipe.stages.train.monitor.alerts import RULES
from prefpipe.stages.train.monitor.diagnostics import Alert, Facts, State, after_eval, after_step

FACTS = Facts(num_steps=200, warmup_steps=10, beta=0.1, learning_rate=1e-5)
Series = Callable[[int], dict[str, float]]


def healthy(step: int) -> dict[str, float]:
    """Nothing is wrong: margins grow slowly, the chosen side rises, gradients are steady."""
    return {
        "loss": 0.69 - 0.001 * step, "learning_rate": 1e-5, "grad_norm": 1.0 + 0.1 * (step % 3),
        "rewards/chosen": 0.002 * step, "rewards/rejected": -0.002 * step, "rewards/margins": 0.004 * step,
        "rewards/accuracies": min(0.5 + 0.01 * step, 0.8), "rewards/abs_margins": 0.004 * step,
        "rewards/saturated": 0.0, "rewards/both_fall": 0.2, "deltas/chosen": 0.0002 * step,
        "kl/ref_policy": 0.01 * step, "kl/ref_policy_per_token": 0.0003 * step,
    }  # fmt: skip


def fired(changes: Series, steps: int = 200, *, facts: Facts = FACTS, skipped: tuple[int, ...] = ()) -> list[Alert]:
    state, alerts = State(), list[Alert]()
    for step in range(steps):
        values = {**healthy(step), **changes(step)}
        state, begun = after_step(state, facts, RULES, step, values, skipped=step in skipped)
        alerts += begun
    return alerts


def names(alerts: list[Alert]) -> set[str]:
    return {alert.rule for alert in alerts}


def test_a_healthy_run_is_silent():
    assert fired(lambda step: {}) == []


def constant(**values: float) -> Series:
    return lambda step: {name.replace("__", "/"): value for name, value in values.items()}


def growing(factor: float, at_150: float, name: str = "kl/ref_policy") -> Series:
    """A KL that grows by `factor` per 20 steps."""
    return lambda step: {name: at_150 * factor ** ((step - 150) / 20)}


POSITIVE_AND_NEGATIVE: list[tuple[str, Series, Series]] = [
    # falls slowly and goes on falling; a fall to the same depth that has ended
    ("A1", lambda s: {"deltas/chosen": -0.0004 * s}, lambda s: {"deltas/chosen": -0.03 if s < 60 else -0.01}),
    ("A2", constant(deltas__chosen=-0.11), constant(deltas__chosen=-0.09)),
    # by nats per completion alone: rewards/chosen = beta x nats
    ("A2", constant(rewards__chosen=-2.1), constant(rewards__chosen=-1.9)),
    # for less than W
    ("A2", constant(deltas__chosen=-0.11), lambda s: {"deltas/chosen": -0.11 if s % 48 < 36 else -0.05}),
    ("A3", constant(deltas__chosen=-0.31), constant(deltas__chosen=-0.29)),
    ("A3", constant(deltas__chosen=-0.03, rewards__both_fall=0.8), constant(deltas__chosen=-0.03)),
    # both sides at 0, give or take rounding, is no displacement
    (
        "A3",
        constant(deltas__chosen=-0.03, rewards__both_fall=0.8),
        constant(deltas__chosen=-1e-6, rewards__both_fall=1),
    ),
    # both fall, but the margin does not grow
    (
        "A3",
        constant(deltas__chosen=-0.03, rewards__both_fall=0.8),
        lambda s: {"deltas/chosen": -0.03, "rewards/both_fall": 0.8, "rewards/margins": 0.5 - 0.001 * s},
    ),
    ("A4", constant(rewards__accuracies=0.53), constant(rewards__accuracies=0.57)),
    # 2W are needed: it leaves the band in time
    ("A4", constant(rewards__accuracies=0.50), lambda s: {"rewards/accuracies": 0.5 if s < 90 else 0.7}),
    ("A4b", constant(rewards__accuracies=0.30), constant(rewards__accuracies=0.46)),
    ("A5", constant(rewards__margins=0.1), lambda s: {"rewards/margins": 0.1 + 1e-4 * s}),
    # the learning rate has decayed below a tenth of its peak
    ("A5", constant(rewards__margins=0.1), constant(rewards__margins=0.1, learning_rate=0.9e-6)),
    ("A6", constant(rewards__accuracies=1.0, loss=0.04), constant(rewards__accuracies=1.0, loss=0.06)),
    ("A6", constant(rewards__accuracies=1.0, loss=0.04), constant(rewards__accuracies=0.98, loss=0.04)),
    ("A8", constant(rewards__abs_margins=5.1), constant(rewards__abs_margins=4.9)),
    ("A8", constant(rewards__saturated=0.51), constant(rewards__saturated=0.49)),
    ("A9", constant(kl__ref_policy=10.1), constant(kl__ref_policy=9.9)),
    ("A9", constant(kl__ref_policy_per_token=0.11), constant(kl__ref_policy_per_token=0.09)),
    # 2.5-fold per 20 steps, a tenth of the run, through 5 nats; 1.8-fold, and 2.5-fold that ends below 5 nats
    ("A9b", growing(2.5, at_150=8.0), growing(1.8, at_150=8.0)),
    ("A9b", growing(2.5, at_150=8.0), lambda s: growing(2.5, at_150=8.0)(min(s, 138))),
    ("A9b", growing(2.5, at_150=0.08, name="kl/ref_policy_per_token"), growing(1.8, 0.08, "kl/ref_policy_per_token")),
    # from nothing: as the square of the steps, to 9 nats at the end
    ("A9b", growing(2.5, at_150=8.0), lambda s: {"kl/ref_policy": 9.0 * (s / 200) ** 2}),
    ("A13", lambda s: {"grad_norm": 11.0 if s == 60 else 1.0}, lambda s: {"grad_norm": 9.0 if s == 60 else 1.0}),
    # nothing is usual yet
    ("A13", lambda s: {"grad_norm": 11.0 if s == 60 else 1.0}, lambda s: {"grad_norm": 11.0 if s == 5 else 1.0}),
    (
        "A15",
        lambda s: {"kto/z0": 0.1, "rewards/chosen": -0.001 * s, "rewards/rejected": -0.002 * s},
        lambda s: {"kto/z0": 0.1, "rewards/chosen": 0.001 * s, "rewards/rejected": -0.002 * s},
    ),
    # the same series of pairs says nothing about KTO
    (
        "A15",
        lambda s: {"kto/z0": 0.1, "rewards/chosen": -0.001 * s, "rewards/rejected": -0.002 * s},
        lambda s: {"rewards/chosen": -0.001 * s, "rewards/rejected": -0.002 * s},
    ),
    ("A15b", constant(kto__z0=0.0), lambda s: {"kto/z0": 0.0 if s % 4 else 0.01}),
]


@pytest.mark.parametrize(("rule", "positive", "negative"), POSITIVE_AND_NEGATIVE)
def test_a_rule_fires_on_one_series_and_not_on_the_other(rule: str, positive: Series, negative: Series):
    (alert, *_) = [alert for alert in fired(positive) if alert.rule == rule]
    assert alert.level == RULES[rule].level
    assert alert.advice
    assert "nan" not in alert.message
    assert rule not in names(fired(negative))


def test_falling_chosen_log_probs_alone_are_a_notice():
    """-0.08 nats per token at the end, steadily falling, and nothing else: A1 and no warning."""
    assert [(a.rule, a.level) for a in fired(lambda s: {"deltas/chosen": -0.0004 * s})] == [("A1", "NOTICE")]


def test_a_cache_of_another_model_shows_at_step_0_and_only_where_h_must_be_0():
    """Mean |h| of 0.06 nats at beta 0.1 is 0.006 of margin."""
    exact = replace(FACTS, exact=True)

    def first(margin: float) -> Series:
        return lambda s: {"rewards/abs_margins": margin if s == 0 else 0.5}

    assert names(fired(first(0.006), facts=exact)) == {"A0"}
    assert fired(first(0.004), facts=exact) == []
    assert fired(first(0.006)) == []  # another reference, or 16 bits: h need not be 0


def started(loss: float, there: float, shift: float = 0.0, variance: float = 0.0) -> Series:
    """Step 0 of a policy that starts as the reference: its loss, the one it should have, what noise does to that."""
    values = {"loss": loss, "at_reference": there, "shift": shift, "variance": variance}
    return lambda step: {f"start/{name}": value for name, value in values.items()} if step == 0 else {}


@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        # ln 2 and 1 % of it: 0.6931 +- 0.0069
        (started(0.7001, 0.6931), started(0.6999, 0.6931)),
        (started(0.6861, 0.6931), started(0.6863, 0.6931)),
        # in 16 bits four deviations of 0.01 are added, and the shift of a loss with a corner
        (started(0.7402, 0.6931, variance=1e-4), started(0.7399, 0.6931, variance=1e-4)),
        (started(0.7202, 0.6931, shift=0.02), started(0.7199, 0.6931, shift=0.02)),
        (started(0.7202, 0.6931, shift=-0.02), started(0.7199, 0.6931, shift=-0.02)),
        # ipo at beta 0.1 starts at 25; a loss that starts at 0 (sppo with P = 1/2), and one that is negative
        (started(25.3, 25.0), started(25.2, 25.0)),
        (started(0.0011, 0.0), started(0.0009, 0.0)),
        (started(-0.52, -0.5), started(-0.504, -0.5)),
    ],
)  # fmt: skip
def test_a_loss_that_does_not_start_at_its_value_at_the_reference(positive: Series, negative: Series):
    (alert,) = fired(positive)
    assert (alert.rule, alert.level, alert.step) == ("A0", "STOP", 0)
    assert "before anything was learned" in alert.message
    assert fired(negative) == []
    assert fired(lambda s: {**negative(s), **({"start/loss": 9.0} if s == 3 else {})}) == []  # at step 0 only


def test_chance_during_the_warmup_is_nothing():
    """A warmup of 150 steps: 2W after it do not exist in this run."""
    at_chance = constant(rewards__accuracies=0.5)
    assert "A4" in names(fired(at_chance))
    assert "A4" not in names(fired(at_chance, facts=replace(FACTS, warmup_steps=150)))


def test_skipped_steps():
    """One is a warning, three in a hundred are a stop, and so are all of fewer: nothing was trained."""
    one = fired(lambda s: {}, skipped=(30,))
    assert [(a.rule, a.level, a.step) for a in one] == [("A13", "WARN", 30)]
    three = fired(lambda s: {}, skipped=(30, 60, 90))
    assert [(a.rule, a.step) for a in three if a.level == "STOP"] == [("A13b", 90)]
    assert "30, 60, 90" in next(a for a in three if a.rule == "A13b").message
    assert "A13b" not in names(fired(lambda s: {}, skipped=(0, 60, 101)))
    short = replace(FACTS, num_steps=2)
    assert "A13b" in names(fired(lambda s: {}, 2, facts=short, skipped=(0, 1)))
    assert "A13b" not in names(fired(lambda s: {}, 2, facts=short, skipped=(0,)))


def after_evals(*evals: dict[str, float]) -> set[str]:
    """Evaluations after 60 steps of training at an accuracy of 0.8."""
    state, alerts = State(), list[Alert]()
    for step in range(60):
        values = {**healthy(step), "rewards/accuracies": 0.8}
        state, _ = after_step(state, FACTS, RULES, step, values, skipped=False)
    for number, values in enumerate(evals):
        state, begun = after_eval(state, FACTS, RULES, 60 + number, values)
        alerts += begun
    return names(alerts)


def test_eval_loss_above_its_minimum_twice():
    assert after_evals(*({"eval_loss": v} for v in (0.60, 0.64, 0.64))) == {"A7"}
    assert after_evals(*({"eval_loss": v} for v in (0.60, 0.62, 0.62))) == set()
    assert after_evals(*({"eval_loss": v} for v in (0.60, 0.64, 0.60, 0.64))) == set()


def test_held_out_accuracy_far_below_that_of_training():
    assert after_evals({"eval_loss": 0.6, "eval_rewards/accuracies": 0.64}) == {"A6b"}
    assert after_evals({"eval_loss": 0.6, "eval_rewards/accuracies": 0.66}) == set()


def test_a_metric_that_is_missing_fires_nothing():
    """A loss without reference has no rewards."""
    state = State()
    for step in range(200):
        state, begun = after_step(state, FACTS, RULES, step, {"loss": 0.01, "grad_norm": 1.0}, skipped=False)
        assert begun == []


def test_every_rule_has_a_series():
    tested = {rule for rule, _, _ in POSITIVE_AND_NEGATIVE} | {"A0", "A6b", "A7", "A13b", "A15c", "A16"}
    assert tested == set(RULES)
