"""What is this, and is it good? The verdict in a sentence, the rounds, what stopped the run, alerts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefpipe.runs import overview
from prefpipe.runs.overview import Overview, Record
from prefpipe.stages.report.flags import Flag, flags
from prefpipe.stages.report.subject import Subject, label, number, p_value, percent, table
from prefpipe.stages.report.texts import shown
from prefpipe.statistics import wilson_of_share

Tone = Literal["good", "bad", "unclear"]
_DECODINGS = ("greedy", "sampled")
_GUARDS = ("guards", "perplexity", "kl", "rewards")  # of an evaluation, where it measured them
_RESUMES = "run the same command again: it resumes"
_WHAT = {
    "generate": "Completions sampled from a policy, with reference log-probs and rewards",
    "score": "Completions from elsewhere, with reference log-probs and rewards",
    "build-pairs": "Training rows made of rated completions",
    "train": "A policy trained on preferences",
    "evaluate": "Answers of a policy to held-out prompts",
    "iterate": "Rounds of sampling, pairing, training and evaluation",
}


@dataclass(frozen=True)
class Round:
    """A row of the table of rounds: cells as text, and whether it is the one to take."""

    name: str
    greedy: str
    greedy_interval: str
    sampled: str
    sampled_interval: str
    words: str
    degenerate: str
    reward: str
    best: bool


@dataclass(frozen=True)
class Comparison:
    """Answers of two policies to the same prompts: what the newer one won, with its interval."""

    baseline: str
    decoding: str
    counts: str
    win_rate: str
    interval: str
    p_value: str


@dataclass(frozen=True)
class Stop:
    """Why a run ended before its last step, or that it has not ended."""

    what: str
    reason: str
    advice: str


@dataclass(frozen=True)
class Alert:
    """An alert of training, with the run that it fired in, and whether that is the newest one."""

    run: str
    newest: bool
    rule: str
    level: str
    step: str
    message: str
    advice: str


@dataclass(frozen=True)
class Verdict:
    """Section 1 of the page."""

    what: str
    sentence: str
    tone: Tone
    rounds: Sequence[Round]
    prompts: str
    stops: Sequence[Stop]
    alerts: Sequence[Alert]
    flags: Sequence[Flag]
    comparisons: Sequence[Comparison]
    guards: Sequence[tuple[str, str]]


def verdict(subject: Subject) -> Verdict:
    """Section 1, from totals, metrics and alerts."""
    evaluated = [run for run in subject.of("evaluate") if _passes(run.totals)]
    sentence, tone = _sentence(subject, evaluated)
    newest = evaluated[-1].totals if evaluated else {}
    best = _iterate_fact(subject.root, "best")
    best = best.get("round") if isinstance(best, dict) else best
    return Verdict(
        _WHAT.get(subject.root.command, subject.root.command),
        sentence,
        tone,
        [_round(run, best) for run in evaluated],
        number(newest.get("prompts")),
        _stops(subject),
        _alerts(subject),
        flags(subject),
        [_comparison(one, name) for one in _list(newest, "comparisons") for name in _DECODINGS if one.get(name)],
        [row for name in _GUARDS if newest.get(name) for row in table({name: newest[name]})],
    )


def _sentence(subject: Subject, evaluated: Sequence[Overview]) -> tuple[str, Tone]:
    if evaluated:
        return _of_evaluations(evaluated)
    trained = subject.of("train")
    if trained:
        return _of_training(trained[-1], len(subject.metrics(trained[-1])))
    return _of_data(subject.root), "unclear"


def _of_evaluations(evaluated: Sequence[Overview]) -> tuple[str, Tone]:
    last = evaluated[-1].totals["greedy"]
    prompts = number(evaluated[-1].totals.get("prompts"))
    who = "The policy" if len(evaluated) == 1 else f"After {label(evaluated[-1])} the policy"
    head = f"{who} passes {percent(last['pass'])} of {prompts} held-out prompts (95 % interval {_span(last)})"
    if len(evaluated) == 1:
        return f"{head}; nothing here says what it passed before.", "unclear"
    first = evaluated[0].totals["greedy"]
    head += f", {percent(first['pass'])} ({_span(first)}) before training"
    compared = _compared(evaluated[-1].totals, evaluated[0])
    if compared is not None:
        low, high, text = compared
        head += f"; {text}"
        better, worse, open_since = low > 0.5, high < 0.5, "one half lies in that interval"
    else:
        better, worse = last["low"] > first["high"], last["high"] < first["low"]
        open_since = "the intervals overlap"
    if better:
        return f"{head}: it got better, beyond what chance explains.", "good"
    if worse:
        return f"{head}: it got worse.", "bad"
    return f"{head}: {open_since}, so this is no proof of a change.", "unclear"


def _compared(totals: Record, baseline: Overview) -> tuple[float, float, str] | None:
    """The win rate against the first policy with its interval, where the evaluation compared them."""
    policy = (baseline.manifest.get("identity") or {}).get("policy")
    for entry in _list(totals, "comparisons"):
        found = entry.get("greedy") or entry.get("sampled")
        named = str(entry.get("baseline", ""))
        if not (named == policy or Path(named).absolute() == baseline.path.absolute()) or not isinstance(found, dict):
            continue
        low, high, rate = found.get("low"), found.get("high"), found.get("win_rate")
        if isinstance(low, float) and isinstance(high, float) and isinstance(rate, float):
            return low, high, f"its answers win {percent(rate)} of comparisons with the start ({_span(found)})"
    return None


def _comparison(entry: Record, decoding: str) -> Comparison:
    found = entry[decoding] if isinstance(entry[decoding], dict) else {}
    return Comparison(
        shown(entry.get("baseline", ""), 120),
        decoding,
        " / ".join(number(found.get(key)) for key in ("win", "tie", "loss")),
        percent(found.get("win_rate")),
        _span(found),
        p_value(found.get("p_value")),
    )


def _of_training(run: Overview, steps: int) -> tuple[str, Tone]:
    totals = run.totals
    kind = next((kind for kind in ("pairs", "labels", "groups") if kind in totals), "rows")
    last = totals.get("last_step") or {}
    held_out = totals.get(f"eval_{kind}")
    accuracy = last.get("eval_rewards/accuracies")
    if not totals:
        return f"Training is at step {number(steps)}: it is not complete, and nothing is evaluated yet.", "unclear"
    head = f"Trained on {number(totals.get(kind))} {kind} in {number(totals.get('steps'))} steps"
    if isinstance(accuracy, float) and isinstance(held_out, int) and held_out > 0:
        low, high = wilson_of_share(accuracy, held_out)
        head += (
            f"; on {number(held_out)} held-out {kind} it prefers the chosen side in {percent(accuracy)} "
            f"(95 % interval {percent(low)} to {percent(high)})"
        )
        tone: Tone = "good" if low > 0.5 else "bad" if high < 0.5 else "unclear"
        return f"{head}. Whether its answers got better takes `prefpipe evaluate`.", tone
    return f"{head}. Nothing was held out: whether its answers got better takes `prefpipe evaluate`.", "unclear"


def _of_data(run: Overview) -> str:
    totals = run.totals
    if not totals:
        return f"This run of {run.command} is not complete: the page shows what is committed so far."
    checks = [check for check in _list(totals, "data_report") if check.get("level") == "WARN"]
    if run.command == "build-pairs":
        kind = next((kind for kind in ("pairs", "labels", "groups") if kind in totals), "rows")
        warned = f"{len(checks)} of its checks warn" if checks else "none of its checks warns"
        return f"{number(totals.get(kind))} {kind} from {number(totals.get('completions'))} completions; {warned}."
    if "completions" in totals:
        return f"{number(totals['completions'])} completions of {number(totals.get('prompts'))} prompts."
    counted = totals.get("rows")
    rows = ", ".join(f"{number(n)} {name}" for name, n in counted.items() if n) if isinstance(counted, dict) else ""
    return f"{rows or 'Rewards'}, scored."


def _stops(subject: Subject) -> list[Stop]:
    found: list[Stop] = []
    stopped = _iterate_fact(subject.root, "stopped")
    if isinstance(stopped, dict):
        why = stopped.get("reason", stopped.get("why", ""))
        reason = shown("; ".join(map(str, why)) if isinstance(why, list) else why)
        found.append(Stop(f"stopped by {shown(stopped.get('rule', ''))}", reason, shown(stopped.get("advice", ""))))
    for run in subject.runs if subject.root in subject.runs else (subject.root, *subject.runs):
        name = shown(run.name, 300)
        if run.state == "running":
            found.append(Stop(f"{name} is running", "a process holds it", "write the page again later"))
        elif run.state == "unfinished":
            found.append(Stop(f"{name} is not complete", "it was stopped or killed", _RESUMES))
    waiting = [run.name for run in subject.runs if run.state == "not started"]
    if waiting and not isinstance(stopped, dict):
        found.append(Stop(f"{len(waiting)} steps are not started", ", ".join(waiting), ""))
    return found


def _iterate_fact(root: Overview, name: str) -> Any:
    return root.manifest.get(name, root.totals.get(name)) if root.command == "iterate" else None


def _round(run: Overview, best: object) -> Round:
    greedy, sampled = run.totals["greedy"], run.totals.get("sampled") or {}
    name = label(run)
    return Round(
        name,
        percent(greedy.get("pass")),
        _span(greedy),
        percent(sampled.get("pass")),
        _span(sampled),
        f"{number(greedy.get('mean_words'))} / {number(sampled.get('mean_words'))}",
        f"{percent(greedy.get('degenerate'))} / {percent(sampled.get('degenerate'))}",
        f"{number(greedy.get('mean_reward'))} / {number(sampled.get('mean_reward'))}",
        run.round is not None and run.round == best,
    )


def _alerts(subject: Subject) -> list[Alert]:
    runs = subject.of("train")
    keys = ("rule", "level", "step", "message", "advice")
    return [
        Alert(label(run), run is runs[-1], **{key: shown(found.get(key, "")) for key in keys})
        for run in reversed(runs)
        for found in overview.alerts(run)
    ]


def _passes(totals: Record) -> bool:
    greedy = totals.get("greedy")
    return isinstance(greedy, dict) and {"pass", "low", "high"} <= greedy.keys()


def _span(decoding: Mapping[str, Any]) -> str:
    return f"{percent(decoding.get('low'))} to {percent(decoding.get('high'))}"


def _list(totals: Record, name: str) -> list[dict[str, Any]]:
    found = totals.get(name)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
