"""A config class as command-line options: one flag per field. The flag of a field in a table is `--TABLE.FIELD`.

--help shows the options of a command under the headings of its config class, and commands under theirs. They travel as
typer's `rich_help_panel`, which typer itself shows only with rich markup; the classes here show them in plain text.
"""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.core import TyperCommand, TyperGroup

from prefpipe.config.base import fields_under_headings, local_path
from prefpipe.config.names import known

FORCE = "Start over: what is in --out moves to its quarantine/ folder."
VERBOSE = "Show the traceback of an unexpected error."
OPERATIONS = {  # options of every command that are no settings
    "out": "Directory of this run; the same command resumes it.",
    "force": FORCE,
    "dry_run": "Print the resolved settings as JSON and stop.",
    "verbose": VERBOSE,
}


class SettingsCommand(TyperCommand):
    """A command whose --help groups its options by their headings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, each group under its heading, in the order in which they are declared."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                default = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or default, []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class GroupedCommands(TyperGroup):
    """Commands that --help shows under headings."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, each heading at the place of its first command."""
        groups: dict[str, list[tuple[str, Any]]] = {}
        for name in self.list_commands(ctx):
            found: Any = self.get_command(ctx, name)
            if not found.hidden:
                groups.setdefault(getattr(found, "rich_help_panel", None) or "Commands", []).append((name, found))
        limit = formatter.width - 6 - max(len(name) for name in self.list_commands(ctx))
        for heading, commands in groups.items():
            with formatter.section(heading):
                formatter.write_dl([(name, found.get_short_help_str(limit)) for name, found in commands])


def command(cls: type[BaseModel], run: Callable[..., None]) -> Callable[..., None]:
    """A function for typer, with one parameter per option. It calls `run(recipe, flags, out=, force=, dry_run=)`.

    `flags` holds the settings of the command line by dotted name; a setting without a flag is absent. `--verbose` is
    declared here for the help text and read by `cli.main`, which must know it before anything can fail.
    """
    settings = list(fields_under_headings(cls))
    names = {name: name.replace(".", "__") for name, *_ in settings}

    def call(**given: Any) -> None:
        flags = {name: given[argument] for name, argument in names.items() if given[argument] not in (None, [])}
        recipe, out = (local_path(given[n], n) if given[n] is not None else None for n in ("recipe", "out"))
        run(recipe, flags, out=out, force=given["force"], dry_run=given["dry_run"])

    parameters = [_RECIPE, *map(_operation, OPERATIONS), *(_option(*setting) for setting in settings)]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads the signature
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__doc__ = cls.__doc__
    return call


def _option(name: str, field: FieldInfo, heading: str) -> inspect.Parameter:
    *tables, _ = name.split(".")
    flag = "--" + name.replace("_", "-")
    shown = field.default
    default = " ".join(map(str, shown)) if isinstance(shown, tuple) else shown
    text = f"{field.description} [default: {default if default not in ('', ()) else 'none'}]"
    if field.annotation is bool:
        flag = f"{flag}/--no-{name.replace('_', '-')}"
    panel = ": ".join(part for part in (".".join(tables), heading) if part) or None
    several = get_origin(field.annotation) is tuple
    kind: Any = list[str] if several else (bool if field.annotation is bool else str)
    option = typer.Option(flag, help=text, metavar=_metavar(field), show_default=False, rich_help_panel=panel)
    return _parameter(name.replace(".", "__"), kind | None, option)


def _operation(name: str) -> inspect.Parameter:
    of_path = name == "out"
    flag = "--" + name.replace("_", "-")
    option = typer.Option(flag, metavar="PATH" if of_path else None, help=OPERATIONS[name])
    return _parameter(name, str | None if of_path else bool, option, None if of_path else False)


def _metavar(field: FieldInfo) -> str:
    choices = [str(c) for c in get_args(field.annotation) if isinstance(c, str)]
    if ours := known(field.metadata):
        choices = [*ours, "MODULE:FUNCTION"]
    if choices:
        return "|".join(choices)
    kind: Any = field.annotation
    names: dict[Any, str] = {int: "INT", float: "FLOAT", bool: "BOOL"}
    return "TEXT..." if get_origin(kind) is tuple else names.get(kind, "TEXT")


def _parameter(name: str, kind: Any, option: Any, default: object = None) -> inspect.Parameter:
    """A parameter of the function that typer reads."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


_RECIPE = _parameter(
    "recipe", str | None, typer.Argument(metavar="[RECIPE]", help="TOML recipe, or a config.json that a run saved.")
)
