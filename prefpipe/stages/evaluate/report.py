"""The numbers of an evaluation as lines for the terminal, and as rows for Parquet."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefpipe import statistics
from prefpipe.schemas import Measure
from prefpipe.stages.evaluate.comparisons import JUDGED
from prefpipe.stages.evaluate.measures import DECODINGS

Totals = Mapping[str, Any]
_SHARES = ("degenerate", "truncated", "refusals")  # as percentages
_ROWS = (
    *("mean_reward", "mean_words", "mean_tokens", "degenerate", "truncated", "refusals", "repetition", "distinct_1"),
    *("distinct_2", "thinking"),
)
_OF_LOW_AND_HIGH = ("pass", "mean", "win_rate", "per_token", "difference")  # where nothing stands before low and high
_CELL = 26  # characters


def summary(totals: Totals, out: Path) -> list[str]:
    """What the command prints when it is done."""
    lines = [f"{totals['prompts']} prompts rated in {out}", *_table(totals)]
    for comparison in totals.get("comparisons", ()):
        lines += _comparison(comparison)
    for guard in totals.get("guards", ()):
        passed = _interval(guard, "pass", "low", "high", percent=True)
        lines += [f"  guard {guard['prompts']}: {guard['reward']} passes {passed}", *_drops(guard["drops"], "pass")]
    if text := totals.get("perplexity"):
        nats = _interval(text, "per_token", "low", "high")
        lines += [f"  {text['text']}: {nats} nats per token", *_drops(text["drops"], "nats per token")]
    for kl in totals.get("kl", ()):
        parts = [f"{unit.replace('_', ' ')} {_named(kl[unit], 'k3')}" for unit in ("per_token", "per_sequence")]
        lines.append(f"  KL to {kl['to']} (k3, nats): {'; '.join(parts)}")
    lines += [
        f"  {number['task']}: {number['metric']} {_interval(number, 'value', 'low', 'high')}"
        for number in totals.get("benchmarks", ())
    ]
    return lines


def nothing_passes(totals: Totals, pass_reward: float) -> str:
    """What to look at where answers have rewards above 0 and none of them passes; empty otherwise."""
    found = [totals[decoding] for decoding in DECODINGS if decoding in totals]
    best = max((values["mean_reward"] for values in found), default=0.0)
    if best <= 0 or any(values["pass"] for values in found):
        return ""
    return (
        f"no answer passes: pass_reward is {pass_reward:g}, the mean reward {best:.3g}; where the reward has another "
        "scale, --pass-reward says what passes"
    )


def notices(totals: Totals, pass_reward: float, places: Mapping[str, str]) -> list[str]:
    """What the user should look at; `places` as in `failures`."""
    worse = [f"the policy got worse: {failure}" for failure in failures(totals, places)]
    return [*filter(None, [nothing_passes(totals, pass_reward)]), *worse]


def failures(totals: Totals, places: Mapping[str, str]) -> list[str]:
    """The guards and the text on which the policy got worse than a baseline by more than the interval. `places`: the
    directories of the baselines by the texts that stand for them."""
    guarded = [(f"guard {guard['prompts']}:{guard['reward']}", guard["drops"]) for guard in totals.get("guards", ())]
    if text := totals.get("perplexity"):
        guarded.append((f"text {text['text']}", text["drops"]))
    return [
        f"{name} against {places.get(drop['baseline'], drop['baseline'])}"
        for name, drops in guarded
        for drop in drops
        if drop["failed"]
    ]


def rows(totals: Totals, policy: str) -> Iterator[Measure]:
    """Every number with its interval, one in a row."""
    for of, against, decoding, values in _tables(totals):
        for name, value in values.items():
            is_end = name in ("low", "high") or name.endswith(("_low", "_high"))
            if is_end or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            bare = name in _OF_LOW_AND_HIGH and f"{name}_low" not in values
            ends = ("low", "high") if bare else (f"{name}_low", f"{name}_high")
            low, high = (values.get(end) for end in ends)
            yield Measure(totals["round"], policy, of, against, decoding, name, float(value), low, high)


def _tables(totals: Totals) -> Iterator[tuple[str, str | None, str | None, Totals]]:
    """The numbers of an evaluation in tables: (of, against, decoding, values)."""
    for decoding in (d for d in DECODINGS if d in totals):
        yield "answers", None, decoding, totals[decoding]
        for name, means in totals["rewards"].items():
            yield f"reward {name}", None, decoding, means[decoding]
    for comparison in totals.get("comparisons", ()):
        yield from _compared(comparison)
    for guard in totals.get("guards", ()):
        of = f"guard {guard['prompts']}:{guard['reward']}"
        yield of, None, "greedy", guard
        yield from ((of, drop["baseline"], "greedy", drop) for drop in guard["drops"])
    if text := totals.get("perplexity"):
        of = f"text {text['text']}"
        yield of, None, None, text
        yield from ((of, drop["baseline"], None, drop) for drop in text["drops"])
    for kl in totals.get("kl", ()):
        yield from ((f"kl {unit}", kl["to"], "sampled", kl[unit]) for unit in ("per_token", "per_sequence"))
    for number in totals.get("benchmarks", ()):
        metric, value = number["metric"], number["value"]
        ends = {f"{metric}_{end}": number[end] for end in ("low", "high") if end in number}
        yield f"task {number['task']}", None, None, {metric: value, **ends}


def _compared(comparison: Totals) -> Iterator[tuple[str, str | None, str | None, Totals]]:
    against = comparison["baseline"]
    for decoding in (d for d in DECODINGS if d in comparison):
        yield "comparison", against, decoding, comparison[decoding]
    yield "comparison at equal length", against, "greedy", comparison["length_controlled"]
    for decoding, judged in _judged(comparison):
        yield f"judge {judged['name']}", against, decoding, judged
        yield f"judge {judged['name']} at equal length", against, decoding, judged.get("length_controlled", {})


def _judged(comparison: Totals) -> Iterator[tuple[str, Totals]]:
    """What a judge said of greedy and of sampled answers."""
    yield from ((decoding, comparison[name]) for decoding, name in JUDGED.items() if name in comparison)


def _table(totals: Totals) -> list[str]:
    """The numbers of the answers, greedy beside sampled; those that are 0 in both are left out."""
    there = [d for d in DECODINGS if d in totals]
    table = [("", there), ("pass", [_interval(totals[d], "pass", "low", "high", percent=True) for d in there])]
    of_k = dict.fromkeys(name for d in there for name in totals[d] if re.fullmatch(r"pass_at_(?!1$)\d+", name))
    table += [
        (name.replace("pass_at_", "pass@").replace("_", " "), [_named(totals[d], name) for d in there])
        for name in (*of_k, *_ROWS)
        if name in of_k or any(totals[d].get(name) for d in there)
    ]
    table += [
        (f"reward {name}", [_interval(means[d], "mean", "low", "high") for d in there])
        for name, means in list(totals.get("rewards", {}).items())[1:]
    ]
    width = max(len(name) for name, _ in table)
    return [f"  {name:<{width}}  {''.join(f'{cell:<{_CELL}}' for cell in cells)}".rstrip() for name, cells in table]


def _named(values: Totals, name: str) -> str:
    if name not in values:
        return ""
    percent = name in _SHARES or name.startswith("pass")
    return _interval(values, name, f"{name}_low", f"{name}_high", percent=percent)


def _interval(values: Totals, name: str, low: str, high: str, *, percent: bool = False) -> str:
    """A number with its interval; runs of before have some without one."""
    numbers = [values[name], *(values[end] for end in (low, high) if end in values)]
    form = ".1%" if percent else ".1f" if max(map(abs, numbers)) >= 10 else ".3f"
    value, *ends = (format(number, form) for number in numbers)
    return f"{value} [{', '.join(ends)}]" if ends else value


def _comparison(comparison: Totals) -> list[str]:
    """The lines of a comparison with one baseline."""
    lines = [f"  against {comparison['baseline']}, {comparison['prompts']} prompts:"]
    for decoding in (d for d in DECODINGS if d in comparison):
        d = comparison[decoding]
        change = f"pass {100 * d['difference']:+.1f} points [{100 * d['difference_low']:+.1f}, "
        lines.append(f"    {decoding}: {_tally(d)}; {change}{100 * d['difference_high']:+.1f}]")
    fit = _interval(comparison["length_controlled"], "win_rate", "win_rate_low", "win_rate_high", percent=True)
    lines.append(f"    greedy at equal length: win rate {fit}")
    for decoding, judged in _judged(comparison):
        bias = judged["order_bias"]
        counted = _tally(judged) if "win" in judged else "no verdict counts"
        lines.append(
            f"    judge {judged['name']}, {decoding}: {counted}; {judged['inconsistent']} of {judged['judged']} "
            f"changed with order, the first better in {bias['first']:.0%}"
        )
        if "length_controlled" in judged:
            fit = _interval(judged["length_controlled"], "win_rate", "win_rate_low", "win_rate_high", percent=True)
            lines.append(f"    judge {judged['name']}, {decoding}, at equal length: win rate {fit}")
    return lines


def _tally(values: Totals) -> str:
    counts = f"{values['win']} won, {values['tie']} tied, {values['loss']} lost"
    rate = _interval(values, "win_rate", "low", "high", percent=True)
    return f"{counts}, win rate {rate}, p {statistics.p_in_words(values['p_value'], '= ')}"


def _drops(drops: Sequence[Totals], what: str) -> list[str]:
    return [
        f"    {'FAILED: ' if drop['failed'] else ''}{_interval(drop, 'difference', 'low', 'high')} {what} against "
        f"{drop['baseline']}"
        for drop in drops
    ]
