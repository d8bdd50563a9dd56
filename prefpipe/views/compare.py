"""`prefpipe compare A B [C ...]`: how runs differ in settings, inputs, data and results.

1. Read each run; the only file that is written is the page of --html.
2. Settings and inputs: those that are not the same everywhere.
3. Data: ids of rows and prompts that each run shares with the first.
4. Results: the numbers of each run, and rewards on the same prompts, paired, with an interval and a p value.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import RenderableType

from prefpipe import statistics
from prefpipe.errors import UsageError
from prefpipe.runs import fsio
from prefpipe.statistics import Estimate
from prefpipe.views import drawing, facts, rows, run_view, settings
from prefpipe.views.run_view import RunView

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MOST = 40  # lines of a table; runs of different commands differ in pages of settings


@dataclass(frozen=True)
class Overlap:
    """For a column of ids: how many ids each run has, and how many of the first run's ids."""

    column: str
    counts: list[int]
    shared: list[int]


@dataclass(frozen=True)
class Pairing:
    """A reward of a run compared with that of the first run, on the prompts that both have.

    `outcomes` counts the prompts on which the reward is higher, equal and lower; `win_rate` counts an equal one as
    half. `difference` is the difference of the means. `p_value` is that of the exact test of wins against losses
    (`statistics.sign_flip_p`).
    """

    reward: str
    decoding: str
    prompts: int
    outcomes: tuple[int, int, int]
    win_rate: Estimate
    difference: Estimate
    p_value: float


def runs_of(paths: Sequence[Path]) -> list[RunView]:
    """The runs to compare. Raises UsageError for fewer than two runs, or for more runs than letters."""
    if not 2 <= len(paths) <= len(_LETTERS):
        raise UsageError(
            f"compare takes 2 to {len(_LETTERS)} runs, not {len(paths)}", "prefpipe compare RUN RUN [RUN ...]"
        )
    return [run_view.view(path) for path in paths]


def drawn(paths: Sequence[Path]) -> Iterator[RenderableType]:
    """The comparison as tables."""
    runs = runs_of(paths)
    names = _LETTERS[: len(runs)]
    yield drawing.table(
        ["", "run", "command", "state", "result"],
        ((letter, r.path, r.command, r.state, facts.headline(r)) for letter, r in zip(names, runs, strict=True)),
    )
    for title, values in (("Settings that differ", _settings(runs)), ("Inputs that differ", _inputs(runs))):
        if values:
            yield drawing.table(["", *names], _lines(values), title=title)
        else:
            yield drawing.text(f"{title}: none")
    if found := overlaps(runs):
        lines = [(o.column, *(f"{n:,} ({s:,} of A)" for n, s in zip(o.counts, o.shared, strict=True))) for o in found]
        yield drawing.table(["ids", *names], lines, title="Rows that are the same")
    for letter, run in zip(names[1:], runs[1:], strict=True):
        if pairings := paired(runs[0], run):
            head = [
                "reward",
                "answers",
                "prompts",
                "higher / equal / lower",
                "win rate [95 %]",
                "difference [95 %]",
                "p",
            ]
            title = f"{letter} against A, on the prompts that both have"
            yield drawing.table(head, map(_pairing_line, pairings), [2, 3, 4, 5, 6], title)
    if results := _results(runs):
        yield drawing.table(["", *names], _lines(results), range(1, len(runs) + 1), title="Results")


def write_page(paths: Sequence[Path], page: Path) -> None:
    """The comparison as one HTML file, without script."""
    fsio.write_text(page, drawing.html("prefpipe compare", *drawn(paths)))


def as_json(paths: Sequence[Path]) -> str:
    """The comparison as JSON; lists have one entry per run."""
    runs = runs_of(paths)
    content = {
        "runs": [facts.as_json(run) for run in runs],
        "settings": _settings(runs),
        "inputs": _inputs(runs),
        "overlap": [{"ids": o.column, "counts": o.counts, "shared_with_first": o.shared} for o in overlaps(runs)],
        "paired_with_first": [[asdict(pairing) for pairing in paired(runs[0], run)] for run in runs[1:]],
        "results": _results(runs),
    }
    return json.dumps(content, indent=2)


def overlaps(runs: Sequence[RunView]) -> list[Overlap]:
    """The overlap with the first run for each column of ids that the main datasets of all runs have."""
    names = [rows.main_dataset(run) for run in runs if run.rows]
    if len(names) < len(runs) or "dropped" in names:
        return []
    frames = [rows.scan(run, name) for run, name in zip(runs, names, strict=True)]
    columns = [rows.id_columns(frame.collect_schema()) for frame in frames]
    found = list[Overlap]()
    for column in columns[0]:
        if all(column in others for others in columns):
            ids = [frame.select(pl.col(column).unique()).collect() for frame in frames]
            shared = [i.join(ids[0], on=column, how="semi").height for i in ids]
            found.append(Overlap(column, [i.height for i in ids], shared))
    return found


def paired(first: RunView, other: RunView) -> list[Pairing]:
    """Rewards of two runs on the prompts that both have, by reward and decoding, averaged over the answers to each
    prompt. A run of `iterate` stands for the evaluation of its best round."""
    means = [_means_by_prompt(_rated(run)) for run in (first, other)]
    if any(frame is None for frame in means):
        return []
    joined = pl.DataFrame(means[0]).join(
        pl.DataFrame(means[1]), on=["prompt_id", "reward", "decoding"], suffix="_other"
    )
    found = list[Pairing]()
    for (reward, decoding), group in joined.group_by("reward", "decoding", maintain_order=True):
        differences = (group["mean_other"] - group["mean"]).to_list()
        outcomes = [(d > 0) - (d < 0) for d in differences]
        wins, losses = outcomes.count(1), outcomes.count(-1)
        found.append(
            Pairing(
                str(reward),
                str(decoding),
                len(outcomes),
                (wins, len(outcomes) - wins - losses, losses),
                statistics.win_rate([float(o) for o in outcomes]),
                statistics.mean([[d] for d in differences]),
                statistics.sign_flip_p(outcomes),
            )
        )
    return sorted(found, key=lambda p: (p.reward, p.decoding))


def _rated(run: RunView) -> RunView:
    """The run whose answers have rewards: for a complete run of `iterate` the evaluation of its best round."""
    rounds = run.totals.get("rounds", ())
    if run.command != "iterate" or not rounds:
        return run
    best = run.totals.get("best") or {"round": len(rounds) - 1}  # a run of an older version names no best round
    return run_view.view(run.path / f"round-{best['round']}" / "evaluate")


def _means_by_prompt(run: RunView) -> pl.DataFrame | None:
    """The mean of each reward over the answers to each prompt: columns prompt_id, reward, decoding, mean."""
    by = ["prompt_id", "reward", "decoding"]
    if "evaluations" in run.rows:
        frame = rows.scan(run, "evaluations").select("prompt_id", "decoding", reward="name", value="reward")
    elif "completions" in run.rows and (names := rows.reward_names(run)):
        wide = rows.scan(run, "completions").select("prompt_id", *names).unpivot(names, index="prompt_id")
        frame = wide.select("prompt_id", "value", decoding=pl.lit("sampled"), reward="variable")
    else:
        return None
    means = frame.drop_nulls("value").group_by(by).agg(mean=pl.col("value").mean())
    return means.sort(by).collect()


def _settings(runs: Sequence[RunView]) -> dict[str, list[Any]]:
    return settings.differing([run.config for run in runs])


def _inputs(runs: Sequence[RunView]) -> dict[str, list[Any]]:
    return settings.differing([run.inputs for run in runs])


def _results(runs: Sequence[RunView]) -> dict[str, list[Any]]:
    """Numbers that at least two runs have. Numbers inside lists, such as the checks of the data, are left out."""
    numbers = [{name: value for name, value in settings.flat(run.totals).items() if _is_number(value)} for run in runs]
    names = dict.fromkeys(name for each in numbers for name in each)
    values = {name: [each.get(name) for each in numbers] for name in names}
    return {name: each for name, each in values.items() if sum(v is not None for v in each) > 1}


def _pairing_line(pairing: Pairing) -> list[str]:
    higher, equal, lower = pairing.outcomes
    win, difference = pairing.win_rate, pairing.difference
    return [
        pairing.reward,
        pairing.decoding,
        f"{pairing.prompts:,}",
        f"{higher} / {equal} / {lower}",
        f"{win.value:.1%} [{win.low:.1%}, {win.high:.1%}]",
        f"{difference.value:+.3g} [{difference.low:+.3g}, {difference.high:+.3g}]",
        statistics.p_in_words(pairing.p_value),
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _lines(values: dict[str, list[Any]]) -> Iterator[list[str]]:
    for name in list(values)[:_MOST]:
        yield [name, *(_cell(name, value) for value in values[name])]
    if len(values) > _MOST:
        yield [f"... {len(values) - _MOST} more: --json", *("" for _ in next(iter(values.values())))]


def _cell(name: str, value: object) -> str:
    if value is None:
        return "-"
    if name.endswith("p_value") and isinstance(value, float):
        return statistics.p_in_words(value)
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
