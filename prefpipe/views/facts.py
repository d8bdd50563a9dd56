"""A run in a few words: its state, and its most important numbers; for an incomplete run its progress."""

from collections.abc import Callable, Mapping
from typing import Any

from prefpipe import clock
from prefpipe.views.run_view import RunView

_SECONDS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
_SHOWN = (("loss", "loss", ".4g"), ("rewards/accuracies", "accuracy", ".3g"), ("rewards/margins", "margin", ".3g"),
          ("eval_loss", "held-out loss", ".4g"), ("eval_rewards/accuracies", "held-out accuracy", ".3g"))  # fmt: skip


def headline(run: RunView) -> str:
    """The most important numbers of a run, in one line."""
    if run.problem:
        return run.problem
    if run.state != "complete":
        return _so_far(run)
    try:
        return _COMPLETE.get(run.command, _counts)(run.totals) or _so_far(run)
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration):  # one bad run must not hide the others
        return f"totals that this version does not know; {_so_far(run)}"


def state(run: RunView) -> str:
    """The state of a run and how old it is."""
    return f"{run.state}, changed {age(run)} ago"


def age(run: RunView) -> str:
    """The time since a file of the run changed, in its largest unit: 3 min, 2 d."""
    seconds = max(0.0, clock.age(run.changed))
    unit, length = next(((unit, length) for unit, length in _SECONDS if seconds >= length), ("s", 1))
    return f"{int(seconds // length)} {unit}"


def as_json(run: RunView) -> dict[str, Any]:
    """The facts of a run, for other programs."""
    return {
        "path": str(run.path),
        "command": run.command,
        "state": run.state,
        "headline": headline(run),
        "rows": run.rows,
        "bytes": run.bytes,
        "changed": run.changed,
        "digest": run.digest,
    }


def _so_far(run: RunView) -> str:
    rows = ", ".join(f"{count:,} {name}" for name, count in run.rows.items() if count)
    return "; ".join(part for part in (_step(run.last_step), rows) if part) or "nothing committed yet"


def _step(line: Mapping[str, Any]) -> str:
    if "step" not in line:
        return ""
    return ", ".join([f"step {line['step'] + 1}", *_metrics(line)])


def _metrics(line: Mapping[str, Any]) -> list[str]:
    return [f"{shown} {line[name]:{form}}" for name, shown, form in _SHOWN if isinstance(line.get(name), int | float)]


def _generate(totals: Mapping[str, Any]) -> str:
    rewards = [f"mean {name} {value:.3g}" for name, value in totals.get("mean_reward", {}).items() if value is not None]
    return ", ".join([f"{totals['completions']:,} completions of {totals['prompts']:,} prompts", *rewards])


def _build_pairs(totals: Mapping[str, Any]) -> str:
    kind = next(name for name in ("pairs", "labels", "groups") if name in totals)
    dropped = sum(totals.get("dropped", {}).values())
    warned = [check["id"] for check in totals.get("data_report", ()) if check["level"] in ("WARN", "STOP")]
    return ", ".join(
        [
            f"{totals[kind]:,} {kind} of {totals['prompts']:,} prompts",
            *([f"{dropped:,} rows dropped"] if dropped else []),
            *([f"warnings {' '.join(warned)}"] if warned else []),
        ]
    )


def _train(totals: Mapping[str, Any]) -> str:
    return ", ".join([f"{totals['steps']:,} steps", *_metrics(totals.get("last_step", {}))])


def _evaluate(totals: Mapping[str, Any]) -> str:
    rates = [
        f"{decoding} {totals[decoding]['pass']:.1%} [{totals[decoding]['low']:.1%}, {totals[decoding]['high']:.1%}]"
        for decoding in ("greedy", "sampled")
    ]
    return f"{totals['prompts']:,} prompts, passed: {', '.join(rates)}"


def _iterate(totals: Mapping[str, Any]) -> str:
    rates = " -> ".join(f"{r['greedy']['pass']:.1%}" for r in totals["rounds"])
    best, stopped = totals.get("best"), totals.get("stopped")
    return ", ".join(
        [
            f"{totals['rounds'][-1]['round']} rounds, greedy passed {rates}",
            *([f"best round {best['round']}"] if best else []),
            *([f"stopped by rule {stopped['rule']}"] if stopped else []),
        ]
    )


def _sweep(totals: Mapping[str, Any]) -> str:
    states = [variant["state"] for variant in totals["variants"]]
    others = [f"{states.count(state)} {state}" for state in ("stopped", "failed") if state in states]
    best = totals["best"]
    interval = f"{best['value']:.4g} [{best['low']:.4g}, {best['high']:.4g}]"
    return ", ".join([f"{len(states)} variants", *others, f"best {best['name']}, {best['metric']} {interval}"])


def _counts(totals: Mapping[str, Any]) -> str:
    return ", ".join(f"{value:,} {name}" for name, value in totals.items() if isinstance(value, int))


_COMPLETE: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "generate": _generate,
    "build-pairs": _build_pairs,
    "train": _train,
    "evaluate": _evaluate,
    "iterate": _iterate,
    "sweep": _sweep,
}
