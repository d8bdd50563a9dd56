"""The command line without the start of an interpreter."""

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from prefpipe import cli


@dataclass(frozen=True)
class Done:
    code: int
    stderr: str


Call = Callable[..., Done]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """`prefpipe ARGUMENTS` in this process."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["prefpipe", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Done(end.value.code if isinstance(end.value.code, int) else 0, capsys.readouterr().err)

    yield run
    for number, handler in kept.items():
        signal.signal(number, handler)
