"""Every kind of failure has an exit code, a message and a hint."""

import pickle
import signal

import pytest

from prefpipe import errors
from prefpipe.api import calls
from prefpipe.errors import Interrupted, LockedError, PrefpipeError, RowFault, of_process


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


def test_an_error_of_python_comes_back_from_another_process_with_its_hint() -> None:
    """multiprocessing pickles it; a pool that cannot read an error back waits for ever."""
    with pytest.raises(LockedError) as caught, calls.in_words():
        raise of_process("what", "do", 75)
    back = pickle.loads(pickle.dumps(caught.value))
    assert (type(back), str(back), back.message, back.hint) == (LockedError, "what\nhint: do", "what", "do")


@pytest.mark.parametrize("error", [Interrupted(signal.SIGTERM), RowFault("tie", "all equal")], ids=type)
def test_errors_of_other_kinds_come_back_too(error: BaseException) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), vars(back), str(back)) == (type(error), vars(error), str(error))


@pytest.mark.parametrize(
    ("code", "kind", "exit_code"),
    [(74, errors.StorageError, 74), (-9, PrefpipeError, 137), (3, errors.StrictError, 3), (7, PrefpipeError, 7)],
)
def test_a_process_that_fails_is_an_error_of_the_kind_that_has_its_code(
    code: int, kind: type[PrefpipeError], exit_code: int
) -> None:
    error = of_process("what", "do", code)
    assert type(error) is kind
    assert pickle.loads(pickle.dumps(error)).exit_code == error.exit_code == exit_code
