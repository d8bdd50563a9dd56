"""What went in? Rows from level to level with the reasons of those left out, the checks of the data, pictures."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefpipe.runs import overview
from prefpipe.runs.overview import Overview, Rows
from prefpipe.schemas import Completion, Pair, RefLogps, Reward
from prefpipe.stages.report import charts
from prefpipe.stages.report.charts import Chart, is_number
from prefpipe.stages.report.subject import Subject, label, number, percent
from prefpipe.stages.report.texts import shown

MOST_ROWS = 5_000  # of a dataset that pictures are drawn from
_MOST_DOTS = 400
_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Branch:
    """Rows that left a level, by reason."""

    reason: str
    rows: str
    share: str


@dataclass(frozen=True)
class Level:
    """Rows of one kind in one run: how many came in and went on, and why the others did not."""

    run: str
    kind: str
    came_in: int
    went_on: int
    branches: Sequence[Branch]


@dataclass(frozen=True)
class Source:
    """Rows that training read: where from, their digest, and their weight where weights were set."""

    kind: str
    place: str
    digest: str
    weight: str


@dataclass(frozen=True)
class Data:
    """Section 2 of the page; `levels` and `checks`, entries of the data report, are those of the newest round."""

    levels: Sequence[Level]
    earlier: Sequence[Level]
    flow: Chart | None
    checks: Sequence[Mapping[str, str]]
    checks_of: str
    pictures: Sequence[Chart]
    sources: Sequence[Source]


def data(subject: Subject) -> Data:
    """Section 2, from totals, ledgers and the first rows of the datasets."""
    every = [level for run in subject.of("generate", "score", "build-pairs", "train") for level in _levels(run)]
    in_rounds = subject.root.command == "iterate"
    newest = [level for level in every if level.run == every[-1].run or not in_rounds]
    built = subject.of("build-pairs")
    sampled = subject.of("generate", "score")
    return Data(
        newest,
        [level for level in every if level not in newest],
        _flow(newest, newest[0].run if newest and in_rounds else ""),
        _checks(built[-1]) if built else [],
        label(built[-1]) if built else "",
        [*_of_pairs(built[-1] if built else None), *_of_completions(sampled[-1] if sampled else None)],
        [source for run in subject.of("train") for source in _sources(run)],
    )


def _levels(run: Overview) -> list[Level]:
    totals, name = run.totals, label(run)
    if isinstance(totals.get("levels"), dict):
        return [
            _level(name, shown(kind, 80), level.get("in"), level.get("out"), level.get("dropped"))
            for kind, level in totals["levels"].items()
            if isinstance(level, dict)
        ]
    dropped = overview.ledger(run)
    left_out = sum(dropped.values())
    if run.command == "train":
        kind = next((kind for kind in ("pairs", "labels", "groups") if isinstance(totals.get(kind), int)), None)
        return [_level(name, f"{kind} trained on", totals[kind] + left_out, totals[kind], dropped)] if kind else []
    count = totals.get("prompts") if run.command == "generate" else _total_rows(totals)
    kind = "prompts sampled" if run.command == "generate" else "rows scored"
    return [_level(name, kind, count + left_out, count, dropped)] if isinstance(count, int) else []


def _total_rows(totals: Mapping[str, Any]) -> int | None:
    rows = totals.get("rows")
    return sum(count for count in rows.values() if isinstance(count, int)) if isinstance(rows, dict) else None


def _level(run: str, kind: str, came_in: object, went_on: object, dropped: object) -> Level:
    entering = came_in if isinstance(came_in, int) else 0
    reasons = dropped if isinstance(dropped, dict) else {}
    counted = sorted(((str(k), v) for k, v in reasons.items() if isinstance(v, int) and v), key=lambda item: -item[1])
    branches = [Branch(shown(why, 80), number(n), percent(n / entering) if entering else "") for why, n in counted]
    return Level(run, kind, entering, went_on if isinstance(went_on, int) else 0, branches)


def _flow(levels: Sequence[Level], round: str) -> Chart | None:
    parts = [
        {"level": level.kind, "part": part, "rows": count, "order": place}
        for level in levels
        for place, (part, count) in enumerate(
            (("went on", level.went_on), ("left out", max(level.came_in - level.went_on, 0)))
        )
    ]
    if not any(part["rows"] for part in parts):
        return None
    says = "; ".join(f"{level.kind} {number(level.went_on)} of {number(level.came_in)}" for level in levels)
    return Chart(f"From prompts to pairs{', ' * bool(round)}{round}", f"{says} went on", charts.flow(parts))


def _checks(run: Overview) -> list[dict[str, str]]:
    found = run.totals.get("data_report") or overview.report(run, "data_report.json").get("checks")
    return [
        {key: shown(check.get(key, ""), 500) for key in ("id", "name", "level", "found", "advice")}
        for check in (found if isinstance(found, list) else ())
        if isinstance(check, dict)
    ]


def _of_pairs(run: Overview | None) -> list[Chart]:
    """The gap of the rewards, the lengths, and what the reference thinks of both sides."""
    if run is None or not run.has("pairs"):
        return []
    columns = ["reward_gap", *(f"{side}_token_ids" for side in _SIDES), *(f"ref_{side}_logps" for side in _SIDES)]
    rows = overview.rows(run, "pairs", Pair, MOST_ROWS, columns)
    pairs = [row | {f"{side}_tokens": max(len(row[f"{side}_token_ids"]), 1) for side in _SIDES} for row in rows.rows]
    part = f"; the first {number(len(pairs))} of {number(rows.total)} pairs" if len(pairs) < rows.total else ""
    both = {side: charts.SIDES[side] for side in _SIDES}
    found: list[Chart] = []
    gaps = _values(pairs, lambda row: row["reward_gap"], "pairs")
    if gaps:
        says = f"{_middle(gaps)}{part}"
        svg = charts.histogram(gaps, "reward gap", series={"pairs": charts.ACCENT})
        found.append(Chart("Reward gap (D1)", says, svg, "Gaps near 0 teach little."))
    lengths = [{"value": row[f"{side}_tokens"], "series": side} for row in pairs for side in _SIDES]
    if lengths:
        svg = charts.histogram(lengths, "tokens", series=both)
        found.append(
            Chart("Length of the sides (D7)", _both(lengths) + part, svg, "The two should lie over each other.")
        )
    easy = _values(pairs, lambda row: _per_token(row, "chosen") - _per_token(row, "rejected"), "pairs")
    if easy:
        share = sum(row["value"] > 0 for row in easy) / len(easy)
        svg = charts.histogram(easy, "log-prob per token, chosen minus rejected", series={"pairs": charts.ACCENT})
        says = f"the reference prefers chosen in {percent(share)}{part}"
        found.append(Chart("Hardness (D4)", says, svg, "All above 0: the pairs teach what is known already."))
    logps = [
        {**row, "series": side}
        for side in _SIDES
        for row in _values(pairs, lambda row, side=side: _per_token(row, side), side)
    ]
    if logps:
        svg = charts.histogram(logps, "reference log-prob per token", series=both)
        found.append(
            Chart("Off-policyness (D11)", _both(logps) + part, svg, "Below minus 2.5 the reference hardly writes it.")
        )
    return found


def _of_completions(run: Overview | None) -> list[Chart]:
    """Length against reward of sampled completions."""
    rewards = _first_reward(run) if run is not None else None
    if run is None or rewards is None or not run.has("ref_logps"):
        return []
    lengths = overview.rows(run, "ref_logps", RefLogps, MOST_ROWS, ["completion_id", "num_tokens"])
    tokens = {row["completion_id"]: row["num_tokens"] for row in lengths.rows}
    dots = [
        {"x": tokens[row["completion_id"]], "y": row["reward"], "series": "completions"}
        for row in rewards.rows
        if row["completion_id"] in tokens and is_number(row["reward"])
    ]
    if not dots:
        return []
    few = dots[:: -(-len(dots) // _MOST_DOTS)]
    says = f"{number(len(few))} of {number(rewards.total)} completions; correlation {number(_correlation(dots), 2)}"
    svg = charts.scatter(few, "tokens", "reward", series={"completions": charts.ACCENT})
    return [Chart("Length against reward (D7)", says, svg, "A slope means that length is rewarded.")]


def reward_names(run: Overview) -> list[str]:
    """The rewards that a run of generate or score holds, in order of their names."""
    folders = dict.fromkeys(name.rpartition("/")[0] for name in run.files if name.startswith("rewards/"))
    return [folder.removeprefix("rewards/") for folder in folders]


def completion_rows(run: Overview, limit: int) -> Rows:
    """The first completions of a run, with the columns that people read."""
    columns = ["completion_id", "prompt_id", "sample_index", "text", "finish_reason"]
    return overview.rows(run, "completions", Completion, limit, columns)


def _first_reward(run: Overview) -> Rows | None:
    names = reward_names(run)
    return overview.rows(run, f"rewards/{names[0]}", Reward, MOST_ROWS) if names else None


def _sources(run: Overview) -> list[Source]:
    inputs, weights = run.manifest.get("inputs") or {}, run.config.get("source_weights") or []
    return [
        Source(
            f"{kind} of {label(run)}",
            shown(place, 300),
            shown(inputs.get(f"{kind}.{index}", ""), 80),
            number(weights[index]) if kind != "sft" and index < len(weights) else "",
        )
        for kind in ("pairs", "labels", "groups", "sft")
        for index, place in enumerate(run.config.get(kind) or ())
    ]


def _values(pairs: Sequence[Mapping[str, Any]], value: Any, series: str) -> list[dict[str, Any]]:
    """The values that a function has for rows, where the columns that it reads have a value."""
    found: list[dict[str, Any]] = []
    for row in pairs:
        try:
            found.append({"value": float(value(row)), "series": series})
        except TypeError:  # a column without a value
            continue
    return found


def _per_token(row: Mapping[str, Any], side: str) -> float:
    return row[f"ref_{side}_logps"] / row[f"{side}_tokens"]


def _middle(values: Sequence[Mapping[str, Any]]) -> str:
    ordered = sorted(row["value"] for row in values)
    return f"median {number(ordered[len(ordered) // 2])}, from {number(ordered[0])} to {number(ordered[-1])}"


def _both(values: Sequence[Mapping[str, Any]]) -> str:
    means = {side: [row["value"] for row in values if row["series"] == side] for side in _SIDES}
    return ", ".join(f"{side} {number(sum(of) / len(of))} on average" for side, of in means.items() if of)


def _correlation(dots: Sequence[Mapping[str, Any]]) -> float:
    """Pearson's correlation of x and y; 0 where one of them does not vary."""
    try:
        return statistics.correlation([dot["x"] for dot in dots], [dot["y"] for dot in dots])
    except statistics.StatisticsError:
        return 0.0
