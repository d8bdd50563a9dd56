"""Signals are noted, a second one interrupts, and the handlers of before come back."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from prefpipe.errors import Interrupted
from prefpipe.stages.train.interrupts import noted


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A shell starts what runs in its background with SIGINT ignored: these tests ask what happens when it is not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_is_noted_and_the_second_interrupts(number: signal.Signals):
    before = signal.getsignal(number)
    with noted() as stopped:
        assert stopped() == 0
        os.kill(os.getpid(), number)
        assert stopped() == number
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), number)
        assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before


def test_two_kinds_of_signal_are_one_wish():
    """Ctrl-C under torchrun: the terminal sends SIGINT to everyone, and torchrun SIGTERM to its workers."""
    with noted() as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped() == signal.SIGINT


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with noted() as stopped:
            os.kill(os.getpid(), signal.SIGINT)
            assert stopped() == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_a_thread_nothing_changes():
    before = signal.getsignal(signal.SIGTERM)
    found: list[object] = []

    def work() -> None:
        with noted() as stopped:
            found.append((stopped(), signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(0, True)]
