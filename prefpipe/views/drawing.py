"""Runs, rows and comparisons drawn with rich: for a terminal, for a pipe, or as one HTML file.

All texts come from files, models and users. They are escaped before rich gets them, and never read as markup.
"""

import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from rich.text import Text

from prefpipe import terminal
from prefpipe.terminal import escaped

_LONGEST_TEXT = 600  # characters of one turn, unless the row is shown whole
_KEPT_TAIL = 120
_PIPE_WIDTH = 120  # characters of a line where stdout is not a terminal
_ROLE_STYLES = {"user": "cyan", "assistant": "green", "system": "magenta", "tool": "yellow"}
_QUIET = "bright_black"
_TEXTS = ("text", "thinking", "detail", "answer")  # columns
_FIRST = ("prompt", "messages")  # columns that others answer
_WORDS = ("reason", "status", "decoding")  # ends of columns that hold one word
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def show(*parts: RenderableType) -> None:
    """Print to stdout; with colours on a terminal."""
    console = Console(highlight=False, width=None if _on_terminal() else _PIPE_WIDTH)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    terminal.show_drawn(captured.get())


def html(title: str, *parts: RenderableType) -> str:
    """The same as one HTML page, without scripts and requests."""
    console = Console(
        record=True,
        file=io.StringIO(),
        width=_PIPE_WIDTH,
        highlight=False,
        color_system="truecolor",
        force_terminal=True,
    )
    console.print(Text(escaped(title), style="bold"))
    for part in parts:
        console.print(part)
    return console.export_html(theme=DEFAULT_TERMINAL_THEME, inline_styles=True)


def text(value: object, style: str = "") -> Text:
    """A value as one line."""
    return Text(escaped(str(value)), style=style)


def table(
    head: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[int] = (), title: str = ""
) -> RenderableType:
    """A table. The columns `right` are aligned for numbers. Long cells break over lines."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", title_justify="left", title_style="bold")
    for index, name in enumerate(head):
        drawn.add_column(text(name), justify="right" if index in set(right) else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(cell if isinstance(cell, Text) else text(cell) for cell in row))
    return Group(text(title, "bold"), drawn) if title else drawn


def named(values: Mapping[str, object]) -> RenderableType:
    """One line `name value` for each value."""
    drawn = Table.grid(padding=(0, 2))
    drawn.add_column(style=_QUIET)
    drawn.add_column(overflow="fold")
    for name, value in values.items():
        drawn.add_row(text(name), value if isinstance(value, Text) else text(value))
    return drawn


def row(values: Mapping[str, Any], number: int, *, whole: bool) -> RenderableType:
    """A row of a dataset: its id, its numbers, then its texts and conversations.

    With `whole`, texts have their full length, and all ids and the lengths of lists of numbers are shown too.
    """
    (key, value), *others = values.items()
    lines: list[RenderableType] = [Text.assemble((f"#{number}  ", "bold"), (f"{key} ", _QUIET), escaped(str(value)))]
    facts = Text()
    for name, value in others:
        if (fact := _fact(name, value, whole=whole)) is not None:
            facts.append(f"{escaped(name)} ", _QUIET).append(f"{escaped(fact)}   ")
    others.sort(key=lambda item: item[0] not in _FIRST)
    drawn = [_conversation(name, value, whole=whole) for name, value in others]
    inner = [part for part in (facts or None, *drawn) if part is not None]
    return Group(*lines, *(Padding(part, (0, 0, 0, 2)) for part in inner), Text())


def size(count: int) -> str:
    """A number of bytes with a unit: 512 B, 1.4 MiB."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if unit == 0 or value >= 10 else f"{value:.1f} {_UNITS[unit]}"


def _fact(name: str, value: object, *, whole: bool) -> str | None:
    """A value of one word for the line of facts; None for a text, and unless the row is shown whole for ids and
    lists."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) or (isinstance(value, str) and name.endswith(_WORDS)):
        return str(value)
    if whole and isinstance(value, str) and name not in _TEXTS:
        return value
    if whole and isinstance(value, list) and value and isinstance(value[0], int | float):
        return f"{len(value)} values"
    return None


def _conversation(name: str, value: Any, *, whole: bool) -> RenderableType | None:
    """A text, or the turns of a conversation, below the name of its column; None for any other value."""
    if isinstance(value, str) and value and name in _TEXTS:
        return Text.assemble((escaped(name), _QUIET), "  ", escaped(_cut(value, whole=whole), keep="\n\t"))
    if not (isinstance(value, list) and value):
        return None
    if isinstance(value[0], list):
        return Group(*filter(None, (_conversation(f"{name} {i + 1}", v, whole=whole) for i, v in enumerate(value))))
    if not isinstance(value[0], dict) or "role" not in value[0]:
        return None
    drawn = Text()
    drawn.append(escaped(name), _QUIET)
    for turn in value:
        role = str(turn["role"])
        drawn.append("\n").append(escaped(role), _ROLE_STYLES.get(role, "bold")).append("  ")
        drawn.append(escaped(_cut(str(turn["content"]), whole=whole), keep="\n\t"))
        if turn.get("extra"):
            drawn.append("\n").append(escaped(_cut(str(turn["extra"]), whole=whole)), _QUIET)
    return drawn


def _cut(value: str, *, whole: bool) -> str:
    if whole or len(value) <= _LONGEST_TEXT:
        return value
    left_out = len(value) - _LONGEST_TEXT
    return f"{value[: _LONGEST_TEXT - _KEPT_TAIL]} [... {left_out:,} characters ...] {value[-_KEPT_TAIL:]}"


def _on_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()
