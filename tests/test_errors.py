"""Every kind of failure has an exit code, a message and a hint."""

import signal

from prefpipe import errors
from prefpipe.errors import Interrupted, PrefpipeError


def test_exit_codes() -> None:
    codes = {
        c.__name__: c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, PrefpipeError)
    }
    assert codes == {
        "PrefpipeError": 1,
        "UsageError": 2,
        "StrictError": 3,
        "DataError": 65,
        "MissingInputError": 66,
        "StorageError": 74,
        "LockedError": 75,
        "IdentityError": 76,
    }


def test_a_signal_gives_the_shells_exit_code() -> None:
    assert Interrupted(signal.SIGINT).exit_code == 130
    assert Interrupted(signal.SIGTERM).exit_code == 143
    assert "resumes" in Interrupted(signal.SIGTERM).hint


def test_an_error_keeps_message_and_hint() -> None:
    error = PrefpipeError("what", "do")
    assert (str(error), error.message, error.hint) == ("what", "what", "do")
