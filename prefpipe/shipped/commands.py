"""The commands `recipes` and `recipes copy`."""

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup

from prefpipe import extras, terminal
from prefpipe.config import base
from prefpipe.shipped import recipes
from prefpipe.shipped.recipes import Recipe

_WIDTH = 110  # characters of a line


def show(
    context: typer.Context,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")] = False,
) -> None:
    """List the recipes of this package, or copy one."""
    if context.invoked_subcommand is not None:
        return
    listed = recipes.listed()
    if as_json:
        terminal.show(json.dumps([asdict(recipe) for recipe in listed], indent=2))
        return
    for recipe in listed:
        terminal.show("\n".join(_lines(recipe)))
    terminal.show("\n`prefpipe recipes copy NAME` copies one here; `prefpipe config COMMAND` prints every setting.")


def copy(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="iterate/demo, or demo where one command alone has a recipe demo.")
    ],
    *,
    to: Annotated[str, typer.Option(metavar="DIR", help="The folder to copy into.")] = ".",
) -> None:
    """Copy a recipe, with its schema and the prompts that it names, and print how to run it."""
    recipe, folder = recipes.find(name), base.local_path(to, "to")
    for path in recipes.copy(recipe, folder):
        terminal.show(f"copied       {path}")
    for line in _needs(recipe):
        terminal.show(f"it needs     {line}")
    prefix = "" if folder.resolve() == Path.cwd() else f"cd {to} && "
    terminal.show(f"run it with  {prefix}{recipe.command}")


def register(app: typer.Typer, heading: str, group_class: type[TyperGroup], command_class: type[TyperCommand]) -> None:
    """Add the commands to an app, under a heading of its help."""
    group = typer.Typer(cls=group_class, invoke_without_command=True, rich_markup_mode=None)
    group.callback()(show)
    group.command(cls=command_class)(copy)
    app.add_typer(group, name="recipes", rich_help_panel=heading)


def _lines(recipe: Recipe) -> Iterator[str]:
    yield recipe.name
    for key in ("purpose", "hardware", "expected"):
        if text := getattr(recipe, key):
            yield from textwrap.wrap(text, _WIDTH, initial_indent=f"  {key:<10}", subsequent_indent=" " * 12)
    for line in _needs(recipe):
        yield f"  needs     {line}"


def _needs(recipe: Recipe) -> list[str]:
    """What must be there before, with the commands of this installation in place of names of extras."""
    return re.sub(r"the extra (\w+)", lambda found: f"`{extras.command(found[1])}`", recipe.needs).splitlines()
