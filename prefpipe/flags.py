"""A config class as command-line options: one flag per field. The flag of a field in a table is `--TABLE.FIELD`.

--help shows the options of a command under the headings of its config class, and commands under theirs. They travel as
typer's `rich_help_panel`, which typer itself shows only with rich markup; the classes here show them in plain text.
"""

import inspect
import re
from collections.abc import Callable, Collection
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.core import TyperCommand, TyperGroup

from prefpipe.config import other_names
from prefpipe.config.base import fields_under_headings, local_path
from prefpipe.config.names import known
from prefpipe.errors import UsageError

FORCE = "Start over: what is in --out moves to its quarantine/ folder."
VERBOSE = "Show the traceback of an unexpected error."
OPERATIONS = {  # options of every command that are no settings
    "out": "Directory of this run; the same command resumes it.",
    "force": FORCE,
    "dry_run": "Print the resolved settings as JSON and stop.",
    "verbose": VERBOSE,
}


# of the whole command line: `--learning_rate` is `--learning-rate`, and help is as wide as the terminal, up to 120
CONTEXT = {
    "token_normalize_func": lambda name: name.replace("_", "-"),
    "max_content_width": 120,
    "help_option_names": ["-h", "--help"],
}
EXAMPLE = """\b
From prompts to a trained adapter, each step a directory that the next one reads:
  prefpipe generate    --model org/model --prompts prompts.jsonl --rewards mine:reward --out runs/g
  prefpipe build-pairs --completions runs/g --reward mine:reward --out runs/p
  prefpipe train       --model org/model --pairs runs/p --out runs/t
  prefpipe report      runs/t

`prefpipe COMMAND --help` explains the settings of a command."""
EXAMPLES = {
    "generate": "--model org/model --prompts prompts.jsonl --rewards math --num-samples 8 --out runs/g",
    "score": "--model org/model --inputs pairs.jsonl --out runs/s",
    "build-pairs": "--completions runs/g --reward math --rule correct-wrong --out runs/p",
    "train": "--model org/model --pairs runs/p --loss-type sigmoid --beta 0.1 --out runs/t",
    "evaluate": "--model org/model --adapter runs/t/adapter --prompts test.jsonl --reward math --out runs/e",
    "iterate": "recipe.toml --rounds 3 --train.beta 0.1 --out runs/r",
    "sweep": "recipe.toml --grid beta=0.03,0.1 --grid learning_rate=1e-5,5e-5 --out runs/s",
    "plan": "--model org/model --pairs pairs.jsonl --gpus 8 --gpu-memory 80",
}
_SEVERAL = "a list takes its option for each value: --loss-type sigmoid --loss-type nll"
_TYPES = {"str": "TEXT", "int range": "INT", "float range": "FLOAT", "path": "PATH"}


class Command(TyperCommand):
    """A command whose --help groups its options by their headings."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """[OPTIONS] and the arguments, as their metavars say."""
        parameters: list[Any] = self.get_params(ctx)
        shown = (p.display_name_raw for p in parameters if p.param_type_name == "argument" and not p.hidden)
        return ["[OPTIONS]", *shown]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, each group under its heading, in the order in which they are declared."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                name = _shown(record[0], is_option=kind == "Options")
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or kind, []).append((name, record[1]))
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def _shown(name: str, *, is_option: bool) -> str:
    """An option with the kind of its value; typer writes <str> behind what has no metavar, arguments too."""
    typed = re.match(r"(\S+) <(.+)>$", name)
    if typed is None:
        return name
    return f"{typed[1]} {_TYPES.get(typed[2], '')}".rstrip() if is_option else typed[1]


class Commands(TyperGroup):
    """Commands that --help shows under headings, each with its first sentence."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, each heading at the place of its first command."""
        groups: dict[str, list[tuple[str, Any]]] = {}
        for name in self.list_commands(ctx):
            found: Any = self.get_command(ctx, name)
            if not found.hidden:
                groups.setdefault(getattr(found, "rich_help_panel", None) or "Commands", []).append((name, found))
        width = max(len(name) for name in self.list_commands(ctx))
        for heading, commands in groups.items():
            with formatter.section(heading):
                formatter.write_dl([(f"{name:<{width}}", _first_sentence(found.help)) for name, found in commands])


def mistake(error: typer.TyperException) -> tuple[str, str]:
    """What is wrong with a command line that typer refused, and what to do."""
    context: Any = getattr(error, "ctx", None)
    path = context.command_path if context else "prefpipe"
    message, where = error.format_message().rstrip("."), f"`{path} --help` lists its options"
    option = getattr(error, "option_name", "")
    if type(error).__name__ != "NoSuchOption":
        return message, f"{_SEVERAL}; {where}" if "extra argument" in message else f"see `{path} --help`"
    word, options = option.lstrip("-"), _options(context.command, context)
    found = other_names.meant(word, options)
    if found:
        nearest, elsewhere = f"did you mean {' or '.join(options[name] for name in found)}? ", ""
    else:
        nearest, elsewhere = "", _elsewhere(word, context)
    more = "; ".join(filter(None, [elsewhere, other_names.note(word, found), where]))
    return f"`{path}` has no option {option}", nearest + more


def _elsewhere(word: str, context: Any) -> str:
    """Which other commands have an option; empty where none has it."""
    commands = context.find_root().command.commands
    found = [name for name, other in commands.items() if word.replace("-", "_") in _options(other, context)]
    return f"it is an option of {' and '.join(found)}" if found else ""


def _options(command: Any, context: Any) -> dict[str, str]:
    """The options of a command by the name of their setting, each as it is written."""
    shown: dict[str, str] = {}
    for parameter in command.get_params(context):
        if parameter.param_type_name == "option":
            choices = f" {parameter.metavar}" if "|" in (parameter.metavar or "") else ""
            shown[parameter.opts[-1].lstrip("-").replace("-", "_")] = parameter.opts[-1] + choices
    return shown


def _first_sentence(text: str | None) -> str:
    return re.split(r"(?<=\.)\s", " ".join((text or "").split()), maxsplit=1)[0]


def example(name: str) -> str | None:
    """What --help of a command ends with."""
    return f"\b\nExample:\n  prefpipe {name} {EXAMPLES[name]}" if name in EXAMPLES else None


def command(
    cls: type[BaseModel], run: Callable[..., None], text: str = "", hidden: Collection[str] = ()
) -> Callable[..., None]:
    """A function for typer, with one parameter per option. It calls `run(recipe, flags, out=, force=, dry_run=)`.
    --help begins with `text`, or as the class does, and leaves the parameters in `hidden` out.

    `flags` holds the settings of the command line by dotted name; a setting without a flag is absent. `--verbose` is
    declared here for the help text and read by `cli.main`, which must know it before anything can fail.
    """
    settings = list(fields_under_headings(cls))
    names = {name: name.replace(".", "__") for name, *_ in settings}

    def call(**given: Any) -> None:
        flags = {name: given[argument] for name, argument in names.items() if given[argument] not in (None, [])}
        recipe, out = (local_path(given[n], n) if given[n] is not None else None for n in ("recipe", "out"))
        if recipe is not None and not recipe.suffix and not recipe.exists():
            raise UsageError(f"there is no recipe {recipe}", f"{_SEVERAL}; a recipe is a file of TOML or JSON")
        run(recipe, flags, out=out, force=given["force"], dry_run=given["dry_run"])

    operations = (_operation(name, hidden=name in hidden) for name in OPERATIONS)
    parameters = [
        _recipe(hidden="recipe" in hidden),
        *operations,
        *(_option(*setting, hidden=setting[0] in hidden) for setting in settings),
    ]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads the signature
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__doc__ = text or cls.__doc__
    return call


def _option(name: str, field: FieldInfo, heading: str, *, hidden: bool) -> inspect.Parameter:
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
    option = typer.Option(
        flag, help=text, metavar=_metavar(field), show_default=False, rich_help_panel=panel, hidden=hidden
    )
    return _parameter(name.replace(".", "__"), kind | None, option)


def _operation(name: str, *, hidden: bool) -> inspect.Parameter:
    of_path = name == "out"
    flag = "--" + name.replace("_", "-")
    option = typer.Option(flag, metavar="DIR" if of_path else None, help=OPERATIONS[name], hidden=hidden)
    return _parameter(name, str | None if of_path else bool, option, None if of_path else False)


def _recipe(*, hidden: bool) -> inspect.Parameter:
    text = "TOML recipe, or a config.json that a run saved."
    return _parameter("recipe", str | None, typer.Argument(metavar="[RECIPE]", help=text, hidden=hidden))


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
