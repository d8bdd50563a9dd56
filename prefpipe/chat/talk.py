"""The conversation: a line is a question to every voice, or a command."""

import signal
from collections.abc import Callable, Iterator, Sequence

from prefpipe import log
from prefpipe.chat import screen
from prefpipe.chat.settings import Settings
from prefpipe.chat.voices import Voice
from prefpipe.errors import Interrupted, RowFault


def talk(read: Callable[[], str | None], voices: Sequence[Voice], settings: Settings) -> None:
    """Answer what `read` gives, until it gives None, or /quit. Ctrl-C ends the answer that is going on; a question that
    cannot be asked is said to stderr and forgotten."""
    for line in _lines(read):
        if line == "/reset":
            for voice in voices:
                voice.messages = []
            log.info("the conversation is forgotten")
        elif line.startswith("/"):
            for said in settings.change(line).splitlines():
                log.info(said)
        else:
            _ask(line, [v for v in voices if settings.with_base or v.name != "base"], settings)


def _lines(read: Callable[[], str | None]) -> Iterator[str]:
    while True:
        try:
            line = read()
        except Interrupted as stop:
            _only_of_the_user(stop)
            log.info("/quit ends the chat")
            continue
        if line is None or line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()


def _ask(question: str, voices: Sequence[Voice], settings: Settings) -> None:
    try:
        with screen.answers([voice.name for voice in voices]) as show:
            for voice in voices:
                voice.answer(question, settings, lambda text, name=voice.name: show(name, text))
    except RowFault as fault:
        log.warn(f"not asked: {fault.detail}; /reset begins anew, /max N leaves more room")
    except Interrupted as stop:
        _only_of_the_user(stop)
        log.info("stopped")


def _only_of_the_user(stop: Interrupted) -> None:
    """Go on after Ctrl-C; any other signal ends the command."""
    if stop.exit_code != 128 + signal.SIGINT:
        raise stop
