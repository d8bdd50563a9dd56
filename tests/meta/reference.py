"""docs/reference/commands.md: every command with its options, as the command line itself declares them.

python -m tests.meta.reference      # writes the page; `make fix` calls it
"""

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import typer

from prefpipe import cli, errors, flags
from prefpipe.config import base
from prefpipe.config.rewards import KINDS
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "reference" / "commands.md"
Row = tuple[str, str, str, str]  # option, what it takes, default, meaning
_INTRODUCTION = """# Commands and settings

`make fix` writes this page from the command line and the config classes, and a test compares them. Every setting is an
option and a line of a TOML recipe: `--lora-r 8` is `lora_r = 8`, and `--train.lora-r 8` of `iterate` is that line under
`[train]`. An option wins over the recipe, the recipe over the default. A list takes its option several times, and
`--no-NAME` turns off what `--NAME` turns on. `prefpipe config COMMAND` prints a recipe with every setting.

Commands that have settings take these too:
"""
_SHARED = ("recipe", *flags.OPERATIONS)


def page() -> str:
    """The page."""
    return "\n".join([_INTRODUCTION, *_commands(), *_rewards(), *_exit_codes()])


def _commands() -> Iterator[str]:
    """A section for every command: those with recipes first, since others repeat their settings."""
    every = dict(_all(typer.main.get_command(cli.app), ""))
    known: dict[str, set[Row]] = {}
    for name in (*cli.STAGES, *sorted(set(every) - set(cli.STAGES))):
        command = every[name]
        arguments = [row[0] for _, row in _options(command) if not row[0].startswith("-")]
        has_settings = any(p.name == "recipe" for p in command.params)
        options = list(_options(command, without=_SHARED if has_settings else ()))
        if has_settings and not known:
            yield _table(row for _, row in _options(command) if row not in {row for _, row in options})
        yield f"## {name}\n\n{_line(command.help or '')}\n\n    {' '.join(['prefpipe', name, *arguments])}\n"
        mine = {row for _, row in options}
        same = next((o for o, rows in known.items() if rows == mine or (name == "plan" and rows < mine)), "")
        more = [option for option in options if option[1] not in known.get(same, ())]
        if has_settings:
            known[name] = mine
        if same:
            yield f"Its settings are those of [{same}](#{same}){', and these:' if more else '.'}\n"
        if more:
            yield "\n".join(_tables(more, known))


def _all(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every command that --help shows; one of a group has both words as its name."""
    for name, command in group.commands.items():
        if not command.hidden:
            yield f"{prefix}{name}", command
            yield from _all(command, f"{name} ") if hasattr(command, "commands") else ()


def _options(command: Any, without: Collection[str] = ()) -> Iterator[tuple[str, Row]]:
    """Arguments and options, each with the heading that it stands under."""
    context = typer.Context(command)
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None or parameter.name in ("help", *without):
            continue
        name, text = re.sub(r" <[^>]+>| /.*", "", record[0]), _line(record[1])
        kind = ""
        if parameter.param_type_name == "argument":
            name = name.upper()
        else:
            name, _, kind = name.partition(" ")
        meaning, _, said = text.removesuffix(" [required]").rpartition(" [default: ")
        default = said.removesuffix("]").partition("; x")[0] if meaning else ""
        heading = getattr(parameter, "rich_help_panel", None)
        yield heading if isinstance(heading, str) else "", (name, kind, default, meaning or said)


def _tables(options: list[tuple[str, Row]], known: dict[str, set[Row]]) -> Iterator[str]:
    """Tables under headings. Of the settings of another command only those stand here that differ."""
    folded: dict[str, None] = {}
    for heading in dict.fromkeys(heading for heading, _ in options):
        rows = [row for under, row in options if under == heading]
        table = rows[0][0].removeprefix("--").partition(".")[0]
        if "." in rows[0][0] and table in known:
            folded[table] = None
            rows = [row for row in rows if (row[0].replace(f"--{table}.", "--"), *row[1:]) not in known[table]]
        if rows:
            yield (f"**{heading}**\n\n" if heading else "") + _table(rows)
    for table in folded:
        yield f"`--{table}.NAME` is the setting NAME of [{table}](#{table}), where no row here says otherwise.\n"


def _table(rows: Iterable[Row]) -> str:
    lines = [
        (f"`{name}`", kind and f"`{kind}`", default and f"`{default}`", text) for name, kind, default, text in rows
    ]
    return _drawn(("option", "takes", "default", "meaning"), lines)


def _drawn(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    cells = [head, ("---",) * len(head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n"


def _line(text: str) -> str:
    return " ".join(text.split())


def _rewards() -> Iterator[str]:
    yield (
        "## Settings of rewards\n\nLines of a table `[reward_settings.NAME]` with its `kind`; "
        "[rewards](../rewards.md) explains them.\n"
    )
    for kind, cls in KINDS.items():
        yield f"### {kind}\n\n{_line(cls.__doc__ or '')}\n"
        rows = [
            (f"`{name}`", f"`{flags._metavar(field)}`", _default(field), _line(field.description or ""))
            for name, field in base.fields(cls)
            if name != "kind"
        ]
        if rows:
            yield _drawn(("setting", "takes", "default", "meaning"), rows)


def _default(field: Any) -> str:
    """As in a recipe."""
    if field.is_required():
        return "needed"
    return f"`{base._toml(field.default)}`" if field.default_factory is None else "by other settings"


def _exit_codes() -> Iterator[str]:
    """From the table of the error tree."""
    rows = re.findall(r"^ *\w+ +([\d/]+) {2,}(.*)$", errors.__doc__ or "", re.MULTILINE)
    yield (
        "## Exit codes\n\nAn error is two lines on stderr, `error:` and `hint:`.\n\n"
        + _drawn(("exit", "situation"), [("0", "done, or already done"), *rows])
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
