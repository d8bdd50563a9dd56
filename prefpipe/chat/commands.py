"""The command `chat`: its options, and where its lines come from."""

import importlib
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from prefpipe import flags, log
from prefpipe.chat.settings import Settings
from prefpipe.config import base


def chat(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="A run of train, or of iterate for its best round.")],
    *,
    model: Annotated[str, typer.Option(help="The base, if it is not where it was when the run started.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the answers.")] = 0,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.7,
    max_tokens: Annotated[int, typer.Option("--max", min=1, help="The most tokens of an answer.")] = 256,
    verbose: Annotated[bool, typer.Option("--verbose", help=flags.VERBOSE)] = False,  # noqa: ARG001
) -> None:
    """Talk to the policy of a run and to its base, side by side. /help lists what can be changed on the way."""
    voices = importlib.import_module("prefpipe.chat.voices")
    talk = importlib.import_module("prefpipe.chat.talk")
    with voices.voices(base.local_path(run_dir, "RUN"), model) as both:
        log.info("ask something; /help lists the commands, /quit ends")
        talk.talk(_reader(), both, Settings(seed, temperature, max_tokens))


def _reader() -> Callable[[], str | None]:
    """A function that gives the next line of stdin; None at its end."""
    if sys.stdin is None:
        return lambda: None
    if not sys.stdin.isatty():
        sys.stdin.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]  (a text file)
        return lambda: sys.stdin.readline() or None
    importlib.import_module("readline")  # from here on arrows go through the lines before

    def ask() -> str | None:
        try:
            return input("> ")
        except EOFError:
            return None

    return ask
