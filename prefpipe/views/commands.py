"""The options of the commands `show`, `runs` and `compare`. The modules that draw are imported when a command runs."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from prefpipe import terminal
from prefpipe.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")]


def show(
    run_dir: Annotated[Path, typer.Argument(metavar="DIR", help="The directory of a run.")],
    *,
    dataset: Annotated[str, typer.Option(help="Rows of this dataset; `prefpipe show DIR` lists them.")] = "",
    row: Annotated[str, typer.Option(metavar="ID", help="The row with this id, or a beginning of it, whole.")] = "",
    worst: Annotated[int, typer.Option(min=0, help="So many rows of the lowest reward, or of the smallest gap.")] = 0,
    limit: Annotated[int, typer.Option(min=0, help="At most so many rows; 0 for all.")] = 0,
    where: Annotated[str, typer.Option(metavar="SQL", help="Rows that fulfil this: 'reward_gap > 1'.")] = "",
    as_json: Json = False,
) -> None:
    """Show a run, or rows of it, also of one that is going on or was killed."""
    rows, view = _room("rows"), _room("show")
    query = rows.RowQuery(dataset, row, where, worst, limit)
    if query != rows.RowQuery():
        if as_json:
            for line in view.rows_json(run_dir, query):
                terminal.show(line)
        else:
            _room("drawing").show(*view.of_rows(run_dir, query))
    elif as_json:
        terminal.show(view.overview_json(run_dir))
    else:
        _room("drawing").show(*view.overview(run_dir))


def runs(
    root: Annotated[Path, typer.Argument(metavar="[ROOT]", help="A directory that holds runs.")] = Path("runs"),
    *,
    as_json: Json = False,
) -> None:
    """List the runs below a directory: state, size, age, result, and what each was made from."""
    listing = _room("listing")
    if as_json:
        terminal.show(listing.as_json(root))
    else:
        _room("drawing").show(listing.drawn(root))


def compare(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="A B...", help="The directories of two or more runs.")],
    *,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the comparison as a page, too.")] = None,
    as_json: Json = False,
) -> None:
    """Compare runs: settings, rows that they share, and results, paired where they have the same prompts."""
    view = _room("compare")
    if html is not None and html.is_dir():
        raise UsageError(f"--html {html} is a directory", "name a file: --html compare.html")
    if html is not None:
        view.write_page(run_dirs, html)
    if as_json:
        terminal.show(view.as_json(run_dirs))
    else:
        _room("drawing").show(*view.drawn(run_dirs))


def _room(name: str) -> ModuleType:
    return importlib.import_module(f"prefpipe.views.{name}")
