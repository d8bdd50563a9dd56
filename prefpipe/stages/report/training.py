"""What happened? The metrics of training over its steps, rounds side by side, and the parity of the cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefpipe.runs import overview
from prefpipe.runs.overview import Overview
from prefpipe.stages.report import charts
from prefpipe.stages.report.charts import Chart, is_number
from prefpipe.stages.report.subject import Subject, label, number
from prefpipe.stages.report.texts import shown

_SEVEN = (  # of the course page: metric, title, what to expect
    ("loss", "Loss", "Falls, then levels out."),
    ("rewards/accuracies", "Accuracy", "Above 0.7: the policy prefers the chosen side."),
    ("rewards/margins", "Margin", "Positive, and it grows."),
    ("rewards/chosen", "Reward of chosen", "Rises, or at least does not fall far."),
    ("rewards/rejected", "Reward of rejected", "Falls."),
    ("logps/chosen", "Log-prob of chosen (nats)", "Must not collapse."),
    ("logps/rejected", "Log-prob of rejected (nats)", "Falls."),
)
_OTHERS = (
    ("kl/ref_policy", "KL from the reference (nats)", "Some nats; above 10 is far."),
    ("grad_norm", "Gradient norm", "No single spike."),
    ("learning_rate", "Learning rate", "Warmup, then decay."),
)


@dataclass(frozen=True)
class Parity:
    """How far a second engine is from the cached log-probs of a run."""

    run: str
    agrees: bool | None
    summary: str
    chart: Chart | None


@dataclass(frozen=True)
class Training:
    """Section 3 of the page; `last` has every metric of the newest round at its last step."""

    runs: Sequence[str]
    seven: Sequence[Chart]
    others: Sequence[Chart]
    note: str
    skipped: Sequence[str]
    last: Sequence[tuple[str, str]]
    parity: Sequence[Parity]


@dataclass(frozen=True)
class _Series:
    """A run of training with its metrics thinned: the points of a line, and the steps in each."""

    name: str
    points: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    per_point: int


def training(subject: Subject) -> Training:
    """Section 3, from metrics.jsonl, alerts and parity.json."""
    runs = subject.trained()
    logs = [subject.metrics(run) for run in runs]
    names = [*(name for name, *_ in (*_SEVEN, *_OTHERS)), *(f"rewards/{n}/{q}" for n in _BANDS for q in ("p05", "p95"))]
    series = [_series(label(run), log, names) for run, log in zip(runs, logs, strict=True) if log]
    marks = _marks(runs[-1], len(logs[-1])) if series else []
    most = max((one.per_point for one in series), default=1)
    return Training(
        [one.name for one in series],
        _charts(series, _SEVEN, marks),
        _charts(series, _OTHERS, marks),
        f"Every point is a mean of up to {most} steps." if most > 1 else "",
        [note for run, log in zip(runs, logs, strict=True) if (note := _skipped(run, log))],
        [(name, number(value, 5)) for name, value in logs[-1][-1].items() if is_number(value)] if series else [],
        [one for run in subject.of("generate", "score") if (one := _parity(run))],
    )


_BANDS = ("margins", "chosen", "rejected")


def _series(name: str, log: Sequence[Mapping[str, Any]], names: Sequence[str]) -> _Series:
    points, per_point = charts.thinned(log, names)
    held_out = [line for line in log if "eval_loss" in line]
    evaluations, _ = charts.thinned(held_out, [f"eval_{name}" for name in names])
    return _Series(name, points, evaluations, per_point)


def _charts(
    series: Sequence[_Series], wanted: Sequence[tuple[str, str, str]], marks: Sequence[Mapping[str, Any]]
) -> list[Chart]:
    found: list[Chart] = []
    colours = charts.shades([one.name for one in series])
    for metric, title, expected in wanted:
        values = [
            {"step": point["step"], "value": point[name], "series": one.name, "kind": kind}
            for one in series
            for kind, name, points in (
                ("training", metric, one.points),
                ("held-out", f"eval_{metric}", one.evaluations),
            )
            for point in points
            if name in point
        ]
        if values:
            band = _band(series[-1], metric)
            svg = charts.lines(values, "step", series=colours, band=band, marks=marks)
            found.append(Chart(title, _in_words(values, series[-1].name), svg, expected))
    return found


def _band(one: _Series, metric: str) -> list[dict[str, Any]]:
    """The 5 % and the 95 % quantile over the rows of a step."""
    low, high = f"{metric}/p05", f"{metric}/p95"
    return [{"step": p["step"], "low": p[low], "high": p[high]} for p in one.points if low in p and high in p]


def _in_words(values: Sequence[Mapping[str, Any]], name: str) -> str:
    """Where the lines of a run begin and end."""
    lines: dict[str, list[float]] = {}
    for row in values:
        if row["series"] == name:
            lines.setdefault("" if row["kind"] == "training" else f"{row['kind']} ", []).append(row["value"])
    return "; ".join(
        f"{kind}{number(of[0])}{f' to {number(of[-1])}' if len(of) > 1 else ''}" for kind, of in lines.items()
    )


def _marks(run: Overview, steps: int) -> list[dict[str, Any]]:
    """Where the alerts of a run fired; those of one step share a mark."""
    by_step: dict[int, list[str]] = {}
    for alert in overview.alerts(run):
        step = alert.get("step")
        if isinstance(step, int) and 0 <= step <= steps:
            by_step.setdefault(step, []).append(shown(alert.get("rule", ""), 10))
    return [{"step": step, "rule": ", ".join(dict.fromkeys(rules))} for step, rules in sorted(by_step.items())]


def _skipped(run: Overview, log: Sequence[Mapping[str, Any]]) -> str:
    steps = [str(line["step"]) for line in log if line.get("skipped")]
    if not steps:
        return ""
    more = f" and {len(steps) - 10} more" if len(steps) > 10 else ""
    return f"{label(run)}: {len(steps)} steps moved no weight, at {', '.join(steps[:10])}{more}"


def _parity(run: Overview) -> Parity | None:
    report = overview.report(run, "parity.json")
    if not report:
        return None
    if "not_checked" in report:
        return Parity(label(run), None, f"not checked: {shown(report['not_checked'], 300)}", None)
    summary = shown(report.get("summary", ""), 500)
    return Parity(label(run), bool(report.get("agrees")), summary, _differences(label(run), report.get("histogram")))


def _differences(run: str, histogram: object) -> Chart | None:
    """Tokens by the absolute difference of their log-probs."""
    if not isinstance(histogram, dict) or not histogram:
        return None
    values = [{"label": shown(name, 20), "count": count} for name, count in histogram.items() if is_number(count)]
    total = sum(count for count in histogram.values() if is_number(count))
    says = ", ".join(f"{value['count']} {value['label']}" for value in values if value["count"])
    svg = charts.counts(values, "nats, absolute")
    title = f"Differences per token, {run}"
    return Chart(title, f"{number(total)} tokens: {says}", svg, "Far below 1: kernels round differently.")
