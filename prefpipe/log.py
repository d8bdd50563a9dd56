"""Messages and progress on stderr. No other module writes there; stdout is for data."""

import importlib.util
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from prefpipe.clock import monotonic
from prefpipe.terminal import bounded, escaped

_PLAIN_EVERY_S = 5.0
_REMARK_EVERY_S = 30.0
# Where stderr is closed or full, or its terminal is gone, nobody can be told; the work goes on. Rich makes a SystemExit
# of a broken pipe.
_DEAF = (OSError, ValueError, SystemExit)


class Advance(Protocol):
    """Reports progress: `amount` units more are done. `note` is shown behind the rate, such as the present loss."""

    def __call__(self, amount: float, note: str = "") -> None:
        """Update the bar, or print a line when the last one is old enough."""
        ...


def _console() -> Console:
    # Under torchrun only rank 0 speaks.
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")


def info(message: str) -> None:
    """Print a line about what the command does."""
    _print(_text(message))


def warn(message: str) -> None:
    """Print a warning: the user should look at something, and the run goes on."""
    _print(Text("warning: ", style="yellow") + _text(message))


def error(message: str, hint: str) -> None:
    """Print the two lines of an error: what happened, and what to do."""
    _print(Text("error: ", style="bold red") + _text(message))
    _print(Text("hint: ", style="cyan") + _text(hint))


def _text(message: str) -> Text:
    """One line of bounded length: words of files, models and endpoints in it do nothing to the terminal."""
    return Text(bounded(escaped(message)))


def _print(text: Text) -> None:
    with suppress(*_DEAF):
        _console().print(text)


@contextmanager
def progress(description: str, total: float | None, unit: str) -> Generator[Advance]:
    """Show progress of `total` units, or of an unknown number (None).

    On a terminal, and in a notebook with ipywidgets, it is a bar with rate and ETA, elsewhere a line every few seconds.
    """
    console = _console()
    if console.quiet:
        yield lambda amount, note="": None  # noqa: ARG005
    elif console.is_terminal or (console.is_jupyter and _has_widgets()):
        bars = _bar(console, unit)
        task = bars.add_task(description, total=total, note="")
        with suppress(*_DEAF):
            bars.start()
        try:
            yield lambda amount, note="": bars.update(task, advance=amount, note=note)
        finally:
            with suppress(*_DEAF):
                bars.stop()
    else:
        yield from _plain(description, total, unit)


def remarks(description: str, total: int, unit: str) -> Callable[[int], None]:
    """Show progress of long work while a bar is on the screen already: a line every half minute.

    Returns a function that takes the number of units done so far.
    """
    last = monotonic()

    def reached(done: int) -> None:
        nonlocal last
        if monotonic() - last >= _REMARK_EVERY_S:
            last = monotonic()
            info(f"{description}: {done} of {total} {unit}")

    return reached


class _RateColumn(ProgressColumn):
    """Units per second, or nothing before the first one is done."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.2f}/s")


def _bar(console: Console, unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        _RateColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
    )


def _has_widgets() -> bool:
    """Whether rich can draw bars in a notebook: without this package it shows nothing there but a warning."""
    return importlib.util.find_spec("ipywidgets") is not None


def _plain(description: str, total: float | None, unit: str) -> Iterator[Advance]:
    start = last = monotonic()
    done, shown = 0.0, ""

    def line() -> str:
        spent = monotonic() - start
        rate = done / spent if spent > 0 else 0.0
        if total is None:
            return f"{description}: {done:.0f} {unit}, {rate:.2f}/s, {spent:.0f} s"
        eta = f"{(total - done) / rate:.0f} s" if rate > 0 else "?"
        return f"{description}: {done:.0f}/{total:.0f} {unit}, {rate:.2f}/s, {spent:.0f} s, ETA {eta}"

    def say() -> None:
        _print(_text(f"{line()}, {shown}" if shown else line()))

    def advance(amount: float, note: str = "") -> None:
        nonlocal done, last, shown
        done, shown = done + amount, note
        if monotonic() - last >= _PLAIN_EVERY_S:
            last = monotonic()
            say()

    yield advance
    say()
