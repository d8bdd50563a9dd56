"""Every kind of failure has an exit code, a message and a hint."""

import shlex
import signal
from pathlib import Path

import pytest

from prefpipe import errors
from prefpipe.errors import Interrupted, PrefpipeError, to_install


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


@pytest.mark.parametrize("folder", ["checkout", "a folder; rm"])
def test_an_extra_is_installed_from_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """No index has the package: a command that names it there would install a stranger's."""
    root = tmp_path / folder
    monkeypatch.setattr(errors, "__file__", str(root / "prefpipe/errors.py"))
    assert to_install("cpu", "cuda") == "install prefpipe again, with its extra cpu or cuda"
    root.mkdir()
    (root / "pyproject.toml").touch()
    one, other = to_install("cpu", "cuda").removeprefix("install it with: ").split(" or ")
    assert shlex.split(one) == ["pip", "install", "--editable", f"{root}[cpu]"]
    assert shlex.split(other)[-1] == f"{root}[cuda]"
