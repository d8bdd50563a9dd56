"""Rules that end the rounds: pure functions of what evaluate and build-pairs of every round have counted.

A rule looks at one evaluated round at a time, by its place among the evaluations, and says what it sees, or None. It
fires when it saw something in each of the last rounds of its window.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prefpipe.config.stops import StopSettings
from prefpipe.stages.iterate.best import Totals, best_place, guard_failed, value

_Z = 1.959964  # half the width of a 95 % interval in standard errors


@dataclass(frozen=True)
class Series:
    """What the rounds have counted: totals of evaluate, from round 0 on; totals of build-pairs by round, from 1."""

    evaluations: Sequence[Totals]
    built: Sequence[Totals]
    metric: str

    def round(self, place: int) -> int:
        """The round of an evaluation."""
        return int(self.evaluations[place]["round"])


@dataclass(frozen=True)
class Stop:
    """The rule that fired after a round, what it saw in each round of its window, and what to do next."""

    rule: str
    round: int
    why: list[str]
    advice: str


_Seen = Callable[[Series, int, StopSettings], str | None]


def check(series: Series, settings: StopSettings) -> Stop | None:
    """The first rule that fires after the last round of the series; None while rounds may go on."""
    last = len(series.evaluations) - 1
    for name in settings.rules:
        window: int = getattr(settings, f"{name}_rounds")
        places = range(max(1, last - window + 1), last + 1)
        seen = [(series.round(place), _RULES[name](series, place, settings)) for place in places]
        why = [f"round {number}: {what}" for number, what in seen if what is not None]
        if len(why) == window:
            return Stop(name, series.round(last), why, _ADVICE[name])
    return None


def without_pairs(number: int, reasons: Mapping[str, int]) -> Stop:
    """The rounds end before round `number`, which had nothing to train on; `reasons` count the prompts."""
    counted = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items()))
    return Stop(
        "mixed", number - 1, [f"round {number}: no prompt has outcomes that differ ({counted})"], _ADVICE["mixed"]
    )


def gain(series: Series, place: int, settings: StopSettings) -> str | None:
    """A round that gains less over the best round before it than so many standard errors of the difference."""
    before = best_place(series.evaluations[:place], series.metric)
    difference = value(series.evaluations[place], series.metric) - value(series.evaluations[before], series.metric)
    error = _standard_error(series, place, before)
    if error is None or difference >= settings.gain_errors * error:
        return None
    return (
        f"{series.metric} {difference:+.4g} over round {series.round(before)}, standard error of the difference "
        f"{error:.2g}"
    )


def mixed(series: Series, place: int, settings: StopSettings) -> str | None:
    """Too few prompts whose completions differ in what the pair rule goes by, in the rounds since the evaluation
    before."""
    share = mixed_share(series.built[series.round(place - 1) : series.round(place)])
    if share is None or share >= settings.mixed_share:
        return None
    return f"{share:.1%} of the prompts have outcomes that differ, under {settings.mixed_share:.0%}"


def kl(series: Series, place: int, settings: StopSettings) -> str | None:
    """A KL divergence above the cap."""
    measured = [(k["to"], k["per_sequence"]["k1"]) for k in series.evaluations[place].get("kl") or []]
    above = [f"{nats:.2f} nats from {to}" for to, nats in measured if nats > settings.kl_cap]
    return f"KL {', '.join(above)}, cap {settings.kl_cap:g}" if above else None


def length(series: Series, place: int, settings: StopSettings) -> str | None:
    """Sampled answers that became much longer, or much shorter, than those before training."""
    words, start = (float(series.evaluations[n]["sampled"]["mean_words"]) for n in (place, 0))
    if settings.length_loss * start <= words <= settings.length_growth * start:
        return None
    return f"sampled answers have {words:.1f} words, before training {start:.1f}"


def degenerate(series: Series, place: int, settings: StopSettings) -> str | None:
    """Answers that repeat themselves, are cut or empty, at a share much above that before training."""
    for decoding in ("greedy", "sampled"):
        share, start = (float(series.evaluations[n][decoding]["degenerate"]) for n in (place, 0))
        if share - start > settings.degenerate_rise:
            return f"{share:.1%} of the {decoding} answers are degenerate, before training {start:.1%}"
    return None


def guard(series: Series, place: int, _settings: StopSettings) -> str | None:
    """A guard that failed."""
    failed = guard_failed(series.evaluations[place])
    return f"{', '.join(failed)} fell below what is allowed" if failed else None


def mixed_share(built: Sequence[Totals]) -> float | None:
    """Of the prompts of some runs of build-pairs, the share from which the rule made pairs or a group, or labels of
    both classes; None without prompts. Labels of an older version count none."""
    counted = [counts for counts in map(_mixed, built) if counts is not None]
    prompts = sum(count for _, count in counted)
    return sum(mixed for mixed, _ in counted) / prompts if prompts else None


def _mixed(built: Totals) -> tuple[int, int] | None:
    """How many prompts are mixed, and of how many."""
    if prompts := built.get("levels", {}).get("prompts"):
        return prompts["out"], prompts["in"]
    mixed = built.get("mixed_prompts", built.get("groups"))
    return None if mixed is None else (mixed, built["prompts"])


def _standard_error(series: Series, place: int, before: int) -> float | None:
    """The standard error of the difference of two rounds: of the paired comparison where the evaluation made it, else
    from the intervals of both as if they were independent, which is more. None for a metric without an interval."""
    decoding, _, name = series.metric.partition(".")
    difference, bounds = ("difference", "") if name == "pass" else ("mean_reward_difference", "mean_reward_")
    for comparison in series.evaluations[place].get("comparisons") or []:
        # A comparison of an older version has no round, and the directory in place of the digest.
        directory = f"round-{series.round(before)}/evaluate"
        if comparison.get("round") == series.round(before) or str(comparison["baseline"]).endswith(directory):
            return _error(comparison.get(decoding, {}), f"{difference}_")
    errors = [_error(series.evaluations[n][decoding], bounds) for n in (place, before)]
    return None if None in errors else math.hypot(*(error for error in errors if error is not None))


def _error(totals: Totals, prefix: str) -> float | None:
    """The standard error that belongs to a 95 % interval in totals; None where there is none."""
    low, high = (totals.get(f"{prefix}{end}") for end in ("low", "high"))
    return None if low is None or high is None else (high - low) / (2 * _Z)


_RULES: dict[str, _Seen] = {
    "gain": gain,
    "mixed": mixed,
    "kl": kl,
    "length": length,
    "degenerate": degenerate,
    "guard": guard,
}
_ADVICE = {
    "gain": "take the best round; for more, give new prompts (prompts_per_round), a lower learning rate, or more "
    "held-out prompts, which make a small gain visible",
    "mixed": "most prompts are solved or out of reach: give other prompts, raise the temperature, or sample more "
    "completions (generate.num_samples)",
    "kl": "branch from an earlier round (--from-run, --from-round) with a higher beta or a lower learning rate",
    "length": "read the answers; branch from an earlier round with build_pairs.length_penalty, or a loss that counts "
    "length",
    "degenerate": "branch from an earlier round with a lower learning rate, a higher beta, or the loss nll beside "
    "yours; check that the reward refuses such answers",
    "guard": "branch from the round before with a lower learning rate or a higher beta, or mix in other data "
    "(train.sft)",
}
