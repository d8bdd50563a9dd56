"""A Python that prefpipe starts takes no file of the folder a user stands in for one of Python's own modules."""

import gc
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from prefpipe import processes, rewards
from prefpipe.config.rewards import Function
from prefpipe.rewards.base import Answer
from tests.conftest import ROOT

SHADOWED = ("random", "json", "typing", "socket", "numpy", "torch", "pyarrow", "yaml")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with files under names of Python's and of installed modules that say when they run."""
    for name in SHADOWED:
        (tmp_path / f"{name}.py").write_text("from pathlib import Path\n(Path(__file__).parent / 'ran').touch()\n")
    (tmp_path / "mine.py").write_text(
        "import random, socket\nfrom helper import value\n"
        "def f(completions, **columns):\n    import later\n    return [value + later.value] * len(completions)\n"
    )
    (tmp_path / "helper.py").write_text("value = 1.0\n")
    (tmp_path / "later.py").write_text("value = 2.0\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("python_path", ["", str(ROOT)])
def test_a_command_of_its_own_runs_nothing_of_the_current_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, python_path: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", python_path)
    done = subprocess.run(
        processes.python("prefpipe", "config", "train"),
        capture_output=True, text=True, check=False, env=processes.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "learning_rate" in done.stdout
    assert not (folder / "ran").exists()


def test_a_reward_finds_its_own_modules_and_pythons(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user's `python -m prefpipe` would start it: with the current folder first."""
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    for name in ("mine", "helper", "later"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    reward = rewards.load("r", {"r": Function(function="mine:f", num_workers=1)})
    (scored,) = reward([Answer([], "text", None, "{}", 1)])
    assert (scored.reward, scored.status) == (3.0, "ok"), scored
    assert not (folder / "ran").exists()


def test_the_current_folder_comes_before_installed_packages_and_leaves_again(folder: Path) -> None:
    before = list(sys.path)
    with processes.current_folder():
        place = sys.path.index(str(folder))
        assert all("site-packages" not in entry for entry in sys.path[:place] if entry not in before[:1])
        assert any(entry.endswith("lib-dynload") for entry in sys.path[:place])
    assert sys.path == before


def test_folders_of_modules_that_a_user_named_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(folder), "/elsewhere", ""])
    monkeypatch.setenv("PYTHONPATH", "")
    assert processes.module_path() == ["/elsewhere"]
    monkeypatch.setenv("PYTHONPATH", f"/a:{folder}")
    assert processes.module_path() == [str(folder), "/elsewhere"]
    assert processes.environment(["/elsewhere"])["PYTHONPATH"].split(":")[-1] == "/elsewhere"


def test_the_source_tree_is_found_without_a_pythonpath(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty PYTHONPATH names no folder: not the current one, which `-P` leaves out."""
    monkeypatch.chdir(processes._ROOT)
    monkeypatch.setattr(processes.site, "getsitepackages", list)
    monkeypatch.setenv("PYTHONPATH", "")
    assert processes.environment()["PYTHONPATH"] == processes._ROOT


_PARENT = """
import signal, subprocess, sys
from prefpipe import processes
number = signal.Signals[sys.argv[1]]
child = subprocess.Popen([sys.executable, "-c", sys.argv[2]], preexec_fn=processes.death_with_parent(number))
child.wait()
"""
_CHILD = """
import signal, sys, time
def end(number, frame):
    print("asked to end", flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("runs", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "said"), [("SIGTERM", "asked to end\n"), ("SIGKILL", "")])
def test_a_child_ends_with_a_parent_that_is_killed(number: str, said: str) -> None:
    """stdout closes when the child is gone, which alone holds it by then."""
    words = [sys.executable, "-c", _PARENT, number, _CHILD]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=processes.environment()) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "runs\n"
        parent.kill()
        assert parent.stdout.read() == said


def test_a_child_whose_parent_is_gone_already_ends_at_once() -> None:
    call = processes.death_with_parent()
    first = os.fork()
    if first == 0:  # to its child it is not the process that `call` was made in
        second = os.fork()
        if second == 0:
            call()
            os._exit(0)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]))
    assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 128 + signal.SIGTERM


@pytest.mark.parametrize(("before", "policy"), [(None, "passive"), ("active", "active")])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, before: str | None, policy: str
) -> None:
    """In this process and in those that it starts; nothing is read by OpenMP after torch is loaded."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if before:
        monkeypatch.setenv("OMP_WAIT_POLICY", before)
    assert processes.environment()["OMP_WAIT_POLICY"] == policy
    processes.wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == policy


def test_the_command_line_says_how_threads_wait_before_torch_is_loaded() -> None:
    """In a fresh process: when `wait_passively` runs, no module has brought torch yet."""
    code = (
        "import sys\nfrom prefpipe import cli, processes\n"
        "def seen():\n    print('torch' in sys.modules)\n    raise SystemExit\n"
        "processes.wait_passively = seen\ncli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, env=processes.environment()
    )
    assert done.stdout == "False\n"


def test_a_process_that_ends_runs_exit_functions_and_clears_nothing_away() -> None:
    """What is in a buffer is written."""
    code = """
import atexit, sys
from prefpipe import processes
class Large:
    def __del__(self): print("cleared away")
kept = Large()
atexit.register(print, "exit function")
print("said", end=" ")
processes.end()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=processes.environment()
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "said exit function\n", "")


def test_before_a_process_ends_nobody_looks_for_garbage() -> None:
    class Circle:
        pass

    circle = Circle()
    circle.itself = circle  # type: ignore[attr-defined]
    left = weakref.ref(circle)
    del circle
    try:
        processes.leave_garbage()
        gc.collect()
        assert left() is not None
        assert not gc.isenabled()
    finally:
        gc.unfreeze()
        gc.enable()
