"""What goes to stdout, and how text of others is written on a terminal."""

import os
import re
import sys
from typing import TextIO

from prefpipe.errors import PrefpipeError, StorageError

_LONGEST = 2000
_KEPT_TAIL = 400
# What a terminal obeys instead of showing it: control characters, marks that turn the direction of text, and halves of
# characters, which stand for the bytes of a path that is not UTF-8.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class OutputClosed(PrefpipeError):
    """Nobody reads stdout any more, as after `| head`: the command ends without a word, with the code of SIGPIPE."""

    exit_code = 141


def escaped(text: str, *, keep: str = "") -> str:
    """Text for a terminal: control characters as Python writes them, but for those in `keep`."""
    return _CONTROLS.sub(lambda m: m[0] if m[0] in keep else repr(m[0])[1:-1], text)


def bounded(text: str) -> str:
    """Text of at most some 2,000 characters: of a longer one the beginning and the end."""
    if len(text) <= _LONGEST:
        return text
    left_out = len(text) - _LONGEST
    return f"{text[: _LONGEST - _KEPT_TAIL]} [... {left_out:,} characters ...] {text[-_KEPT_TAIL:]}"


def show(text: str) -> None:
    """Print text to stdout. Raises OutputClosed when nobody reads it, StorageError when it cannot be written."""
    show_drawn(escaped(text, keep="\n\t") + "\n")


def show_drawn(text: str) -> None:
    """Write text to stdout that is escaped already and may hold the colours of a terminal. Raises as `show` does."""
    stream = sys.stdout
    if stream is None:  # the command was started with stdout closed
        raise StorageError("cannot write to standard output: it is closed", "leave out >&-")
    encoding = stream.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, end="", flush=True)
    except BrokenPipeError:
        forget(stream)
        raise OutputClosed("nobody reads standard output", "") from None
    except OSError as error:
        forget(stream)
        raise StorageError(
            f"cannot write to standard output: {error.strerror or error}", "free some space, or write it elsewhere"
        ) from error


def forget(stream: TextIO | None) -> None:
    """Let what is still in the buffer of a stream go nowhere: the interpreter flushes it once more when it ends. None
    is a stream that was closed when the command started."""
    if stream is None:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    except (OSError, ValueError):
        return
    finally:
        os.close(nowhere)
