"""`prefpipe runs [ROOT]`: every run below a directory.

1. Find the directories with a config.json.
2. Read the state, size, age and headline of each. Nothing is written.
3. Name the runs whose results are inputs of each run, by their digests.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from rich.console import RenderableType

from prefpipe.errors import MissingInputError
from prefpipe.views import drawing, facts, run_view
from prefpipe.views.run_view import RunView


def runs_below(root: Path) -> list[RunView]:
    """The runs below a directory. Raises MissingInputError where there is no run."""
    runs = list(run_view.below(root))
    if not runs:
        raise MissingInputError(f"no run below {root}", "name the directory that holds your runs: prefpipe runs DIR")
    return runs


def drawn(root: Path) -> RenderableType:
    """The runs as a table."""
    runs = runs_below(root)
    rows = [
        (
            _name(run, root),
            run.command,
            run.state,
            drawing.size(run.bytes),
            facts.age(run),
            facts.headline(run),
            ", ".join(_name(source, root) for source in made_from(run, runs)),
        )
        for run in runs
    ]
    return drawing.table(["run", "command", "state", "size", "age", "result", "made from"], rows, [3, 4])


def as_json(root: Path) -> str:
    """The runs as a JSON list."""
    runs = runs_below(root)
    rows = [{**facts.as_json(run), "made_from": [str(s.path) for s in made_from(run, runs)]} for run in runs]
    return json.dumps(rows, indent=2)


def made_from(run: RunView, runs: Iterable[RunView]) -> list[RunView]:
    """The runs among `runs` that are inputs of a run, by the digests of their manifests."""
    digests = {str(value) for value in run.inputs.values()}
    return [source for source in runs if source.digest and source.digest in digests]


def _name(run: RunView, root: Path) -> str:
    return "." if run.path == root else str(run.path.relative_to(root))
