"""`prefpipe show DIR`: a summary of a run, or rows of it.

1. Read the directory; nothing is written, so that the run may be going on.
2. Without a query: command, state, headline, settings that differ from the defaults, inputs, datasets, the ledger by
   reason, the runs inside.
3. With a query: the rows as conversations, or as JSON lines.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import polars as pl
from rich.console import RenderableType

from prefpipe.config.commands import CLASSES
from prefpipe.runs import logs
from prefpipe.views import cost, drawing, facts, rows, run_view, settings
from prefpipe.views.rows import RowQuery
from prefpipe.views.run_view import RunView

_MOST_SHOWN = 20  # rows, unless a limit is given
_LONGEST = 300  # characters of the value of a setting


def overview(path: Path) -> Iterator[RenderableType]:
    """The summary of a run."""
    run = run_view.view(path)
    yield drawing.named(
        {
            "run": run.path,
            "command": run.command,
            "state": facts.state(run),
            "result": facts.headline(run),
            "size": drawing.size(run.bytes),
            "cost": cost.of(path) or "not noted",
            "digest": run.digest or "none yet",
        }
    )
    cls = CLASSES.get(run.command)
    if cls is not None and (changed := settings.changed(cls, run.config)):
        shown = {name: json.dumps(value, ensure_ascii=False)[:_LONGEST] for name, value in changed.items()}
        yield drawing.table(["setting", "value"], shown.items(), title="Settings that are not the defaults")
    if run.inputs:
        yield drawing.table(["input", "digest"], run.inputs.items(), title="Inputs")
    if run.rows:
        yield drawing.table(["dataset", "rows"], ((n, f"{c:,}") for n, c in run.rows.items()), [1], "Datasets")
    if reasons := _ledger(run):
        yield drawing.table(
            ["reason", "rows", "the first one"], reasons, [1], "Rows that did not go on (--dataset dropped)"
        )
    if steps := list(_inside(path)):
        yield drawing.table(["step", "state", "result"], steps, title="Runs inside")


def overview_json(path: Path) -> str:
    """The summary of a run as JSON."""
    run = run_view.view(path)
    timing = logs.tail(path / "timing.jsonl")
    more = {"config": run.config, "inputs": run.inputs, "totals": run.totals, "timing": timing[-1] if timing else {}}
    return json.dumps(facts.as_json(run) | more, indent=2)


def of_rows(path: Path, query: RowQuery) -> Iterator[RenderableType]:
    """The rows that a query selects, each with its conversations."""
    run = run_view.view(path)
    limited = bool(query.worst or query.limit or query.row)
    name, found = rows.selected(run, query)
    shown = found if limited else found.head(_MOST_SHOWN)
    for number, values in enumerate(shown.iter_rows(named=True), start=1):
        yield drawing.row(values, number, whole=bool(query.row))
    total = run.rows[name]
    left_out = "" if shown.height == found.height else "; --limit N shows more"
    yield drawing.text(f"{shown.height:,} of {found.height:,} matching rows, {total:,} {name} in all{left_out}")


def rows_json(path: Path, query: RowQuery) -> Iterator[str]:
    """The rows that a query selects, each as one line of ASCII JSON with every column."""
    _, found = rows.selected(run_view.view(path), query)
    for values in found.iter_rows(named=True):
        yield json.dumps(values)


def _ledger(run: RunView) -> list[tuple[str, str, str]]:
    """The reasons of the ledger with their counts, most frequent first, each with its first row."""
    if not run.rows.get("dropped"):
        return []
    frame = rows.scan(run, "dropped").group_by("reason", maintain_order=True)
    counted = frame.agg(pl.len(), pl.first("id"), pl.first("detail")).sort("len", descending=True, maintain_order=True)
    return [
        (r["reason"], f"{r['len']:,}", f"{r['id']}: {r['detail']}"[:_LONGEST])
        for r in counted.collect().iter_rows(named=True)
    ]


def _inside(path: Path) -> Iterator[tuple[str, str, str]]:
    """The runs inside this one, such as the steps of rounds."""
    for run in run_view.below(path):
        if run.path != path:
            yield str(run.path.relative_to(path)), run.state, facts.headline(run)
