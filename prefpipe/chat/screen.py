"""Answers as they come: on a terminal in columns beside each other, elsewhere below each other."""

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from prefpipe import terminal

Show = Callable[[str, str], None]  # takes the name of a voice and more of its answer


@contextmanager
def answers(names: Sequence[str], console: Console | None = None) -> Generator[Show]:
    """Show the answers of these voices for the length of a `with` block. `console` stands for a terminal."""
    if console is None and not sys.stdout.isatty():
        yield from _below(names)
        return
    texts = {name: Text() for name in names}
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in names:
        table.add_column(ratio=1)
    table.add_row(*(Text(name, style="bold") for name in names))
    table.add_row(*texts.values())
    with Live(table, console=console, vertical_overflow="visible", refresh_per_second=12):
        yield lambda name, text: _append(texts[name], text)


def _append(answer: Text, text: str) -> None:
    answer.append(terminal.escaped(text, keep="\n"))


def _below(names: Sequence[str]) -> Generator[Show]:
    current = ""

    def show(name: str, text: str) -> None:
        nonlocal current
        if name != current:
            terminal.show_drawn(("\n" if current else "") + (f"[{name}]\n" if len(names) > 1 else ""))
            current = name
        terminal.show_drawn(terminal.escaped(text, keep="\n\t"))

    try:
        yield show
    finally:
        terminal.show_drawn("\n")
