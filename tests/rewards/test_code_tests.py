"""Programs against tests: right, wrong, hanging, cheating; and what the sandbox keeps them from."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefpipe.config.rewards import Code
from prefpipe.errors import MissingInputError
from prefpipe.rewards import code_tests, folders, sandbox
from prefpipe.rewards.base import Answer, Scored
from prefpipe.rewards.code_tests import cases, code, extract, inputs
from prefpipe.rewards.sandbox import limits
from prefpipe.schemas import Message
from tests.conftest import ROOT
from tests.waiting import interruption, until

QUESTION = [Message(role="user", content="?")]
FORGED = """import os
for descriptor in range(3, 64):
    try:
        os.write(descriptor, b"okok")
    except OSError:
        pass
os._exit(0)"""
TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"
GOOD = "def add(a, b):\n    return a + b\n"
SUMS = json.dumps(
    [{"input": "1 2", "output": "3"}, {"input": "2 2", "output": "4\n"}, {"input": "5 5", "output": "10"}]
)
strict = pytest.mark.skipif(sandbox.supported() is not None, reason=str(sandbox.supported()))


def rate(text: str, answer: str | None = TESTS, **settings: object) -> Scored:
    (scored,) = code(Code(**{"timeout_seconds": 20, "memory_mib": 256, **settings}))([Answer(QUESTION, text, answer)])
    return scored


def inside(program: str, **settings: object) -> Scored:
    """What becomes of a program that does something and then would pass."""
    return rate(f"{program}\n{GOOD}", **settings)


@strict
@pytest.mark.parametrize(
    ("text", "reward", "status", "words"),
    [
        (f"Sure:\n```python\n{GOOD}```\nDone.", 1.0, "ok", None),
        (f"```\nnot this\n```\n```py\n{GOOD}```", 1.0, "ok", None),
        (GOOD, 1.0, "ok", None),
        (GOOD.replace("+", "-"), 0.0, "wrong", "tests: AssertionError"),
        ("def (", 0.0, "wrong", "program: SyntaxError"),
        ("```python\n\n```", 0.0, "unparsable", "no code"),
        ("x = 1", 0.0, "wrong", "tests: NameError: name 'add' is not defined"),
        (f"import sys\nsys.exit(0)\n{GOOD}", 0.0, "wrong", "program: ended with exit code 0"),
        (f"import os\nos._exit(0)\n{GOOD}", 0.0, "wrong", "ended with exit code 0 before it was over"),
        (f"import ctypes\nctypes.string_at(0)\n{GOOD}", 0.0, "wrong", "ended with signal 11"),
        ("def add(a, b):\n    raise SystemExit(0)", 0.0, "wrong", "tests: ended with exit code 0"),
        (f"import builtins\nbuiltins.AssertionError = None\n{GOOD.replace('+', '-')}", 0.0, "wrong", "AssertionError"),
        (f"{FORGED}\n{GOOD}", 0.0, "wrong", "ended with exit code 0"),
    ],
)
def test_programs(text: str, reward: float, status: str, words: str | None) -> None:
    scored = rate(text)
    assert (scored.reward, scored.status) == (reward, status)
    assert words is None or words in (scored.detail or "")


@strict
def test_endless_programs_are_timeouts_with_a_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the limit of the wall clock is over first: it stands still here."""
    with monkeypatch.context() as patch:
        patch.setattr(code_tests, "time", SimpleNamespace(monotonic=lambda: 0.0))
        busy = inside("while True: pass", timeout_seconds=1)
    assert (busy.reward, busy.status, busy.detail) == (0.0, "timeout", "too much CPU time: timeout_seconds is 1")
    asleep = inside("import time; time.sleep(60)", timeout_seconds=0.2)
    assert (asleep.reward, asleep.status) == (0.0, "timeout")
    assert "wall clock" in (asleep.detail or "")


FORBIDDEN = {
    "fork": "import os; os.fork()",
    "subprocess": "import subprocess; subprocess.run(['/bin/true'])",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "connect": "import socket; socket.create_connection(('127.0.0.1', 22))",
    "udp": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX)",
    "read outside": "open(SECRET).read()",
    "write outside": "open(SECRET, 'w')",
    "delete outside": "import os; os.unlink(SECRET)",
    "chmod outside": "import os; os.chmod(SECRET, 0)",
    "list outside": "import os; os.listdir(os.path.dirname(SECRET))",
    "environment of the parent": "import os; open(f'/proc/{os.getppid()}/environ').read()",
    "kill the parent": "import os; os.kill(os.getppid(), 9)",
    "limits of the parent": "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "new session": "import os; os.setsid()",
    "a raised limit": "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
}


@strict
@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_a_program_must_not_do_is_an_error_inside_it(what: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("untouched")
    scored = inside(f"SECRET = {str(secret)!r}\n{FORBIDDEN[what]}")
    assert (scored.reward, scored.status) == (0.0, "wrong"), scored
    assert any(word in (scored.detail or "") for word in ("PermissionError", "ValueError: not allowed")), scored.detail
    assert secret.read_text() == "untouched"


@strict
def test_memory_and_files_have_limits() -> None:
    assert "MemoryError" in (inside("x = bytes(1 << 30)").detail or "")
    assert "File too large" in (inside("open('a', 'wb').write(bytes(17 << 20))").detail or "")
    assert "File too large" in (inside("print('x' * (17 << 20))").detail or "")


FILLING = {
    "files": "open(str(n), 'wb').write(bytes(8 << 20))",
    "deleted files": "f = open(str(n), 'wb'); kept.append(f); os.unlink(f.name); f.write(bytes(8 << 20)); f.flush()",
    "unnamed files": "kept.append(tempfile.TemporaryFile()); kept[-1].write(bytes(8 << 20)); kept[-1].flush()",
    "empty files": "open(str(n), 'wb').close()",
    "folders": "os.mkdir(str(n))",
    "files in folders": "os.makedirs(f'{n}/a/b'); open(f'{n}/a/b/c', 'wb').write(bytes(8 << 20))",
    "a path that is too long": "os.mkdir('d' * 200); os.chdir('d' * 200); open('a', 'wb').write(bytes(1 << 20))",
}


@strict
@pytest.mark.parametrize("what", FILLING)
def test_all_files_together_have_a_limit(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mebibytes, rests = (4, "n % 500 == 0") if what in ("empty files", "folders") else (24, "True")
    monkeypatch.setattr(code_tests, "_FILES_BYTES", mebibytes << 20)
    peaks: list[float] = []
    measure = folders.used_bytes

    def measured(*given: str) -> float:
        peaks.append(measure(*given))
        return peaks[-1]

    monkeypatch.setattr(code_tests, "used_bytes", measured)
    program = (
        "import itertools, os, tempfile, time\nkept = []\n"
        f"for n in itertools.count():\n    {FILLING[what]}\n    time.sleep(0.1 * ({rests}))"
    )
    scored = rate(program)
    assert (scored.reward, scored.status) == (0.0, "wrong")
    assert f"more than {mebibytes} MiB of files" in (scored.detail or ""), scored
    assert peaks[-1] == math.inf or mebibytes << 20 < peaks[-1] < 1 << 30
    assert list(tmp_path.iterdir()) == []


@strict
@pytest.mark.parametrize("mode", ["os.umask(0o777)", "os.umask(0o477)"])
def test_a_folder_that_nobody_may_list_is_over_the_limit_or_counted(mode: str) -> None:
    scored = inside(f"import os, time\n{mode}\nos.mkdir('d')\ntime.sleep({0.3 if os.geteuid() == 0 else 30})")
    assert scored.status == ("ok" if os.geteuid() == 0 else "wrong")


@strict
def test_memory_has_no_file_descriptors() -> None:
    assert "OSError: [Errno 38]" in (inside("import os; os.memfd_create('x')").detail or "")
    assert "PermissionError" in (inside("open('/dev/shm/x', 'wb')").detail or "")


@strict
def test_what_a_program_may_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "secret")
    assert inside("import os; assert 'SOME_API_KEY' not in os.environ") == Scored(1.0)
    assert inside("open('own', 'w').write('x'); assert open('own').read() == 'x'") == Scored(1.0)
    assert inside("import threading; t = threading.Thread(target=print); t.start(); t.join()") == Scored(1.0)
    assert inside("import numpy; assert numpy.arange(3).sum() == 3") == Scored(1.0)
    assert inside("import os; assert os.listdir('.') == []") == Scored(1.0)


@strict
@pytest.mark.parametrize(
    ("program", "partial", "scored"),
    [
        ("print(sum(map(int, input().split())))", False, Scored(1.0)),
        ("import sys\nprint(sum(map(int, input().split())), end='  \\n\\n')\nsys.exit()", False, Scored(1.0)),
        ("print(3)", False, Scored(0.0, "wrong", r"case 2: printed '3\n', expected '4\n'")),
        ("print(3)", True, Scored(1 / 3, "wrong", r"1 of 3 passed; case 2: printed '3\n', expected '4\n'")),
        ("print(3)\nraise SystemExit(1)", False, Scored(0.0, "wrong", "case 1: program: ended with exit code 1")),
        ("if __name__ == '__main__':\n    print(sum(map(int, input().split())))", False, Scored(1.0)),
    ],
)
def test_input_and_output_cases(program: str, partial: bool, scored: Scored) -> None:
    assert rate(program, SUMS, partial=partial) == scored


@strict
def test_many_programs_at_once_keep_their_order() -> None:
    texts = [GOOD if i % 3 else GOOD.replace("+", "-") for i in range(12)]
    scores = code(Code(num_workers=4))([Answer(QUESTION, t, TESTS) for t in texts])
    assert [s.reward for s in scores] == [float(i % 3 > 0) for i in range(12)]


@strict
def test_a_sandbox_that_cannot_be_made_is_a_crash_and_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = code_tests.run(Code(memory_mib=1 << 60), GOOD, TESTS, "", code_tests.Running())
    assert ran.status == "crash"
    assert "cannot isolate" in (ran.detail or "")


def test_where_isolation_is_impossible_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.platform, "machine", lambda: "riscv64")
    with pytest.raises(MissingInputError, match="riscv64") as caught:
        code(Code())
    assert 'isolation = "limits"' in caught.value.hint
    assert rate(GOOD, isolation="limits") == Scored(1.0)


def test_with_limits_only_time_and_memory_still_hold() -> None:
    assert inside("x = bytes(1 << 30)", isolation="limits").status == "wrong"
    assert inside("while True: pass", isolation="limits", timeout_seconds=1).status == "timeout"


def test_no_process_is_left_after_an_interrupt() -> None:
    reward = code(Code(timeout_seconds=300, num_workers=2, isolation="limits"))
    before = _sandboxes()
    with interruption(KeyboardInterrupt()) as interrupt:

        def later() -> None:
            until(lambda: _sandboxes() - before)
            interrupt()

        thread = threading.Thread(target=later)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            reward([Answer(QUESTION, "while True: pass", TESTS)] * 8)
        thread.join()
    until(lambda: _sandboxes() <= before)


def test_a_program_that_starts_after_an_interrupt_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call is about to start its process while that of the first one is killed."""
    entered, killing, turns, ends = threading.Event(), threading.Event(), count(), list[object]()
    folder, kill, watch = code_tests.temporary_folder, code_tests.kill, code_tests._wait

    @contextlib.contextmanager
    def late() -> Iterator[str]:
        if next(turns):
            entered.set()
            killing.wait()
        with folder() as name:
            yield name

    with interruption(KeyboardInterrupt()) as interrupt:

        def interrupting(*given: Any) -> Any:
            if not killing.is_set():
                entered.wait()
                interrupt()
            ends.append(watch(*given))
            return ends[-1]

        monkeypatch.setattr(code_tests, "temporary_folder", late)
        monkeypatch.setattr(code_tests, "_wait", interrupting)
        monkeypatch.setattr(code_tests, "kill", lambda process: (killing.set(), kill(process)))
        with pytest.raises(KeyboardInterrupt):
            code(Code(timeout_seconds=300, num_workers=2, isolation="limits"))(
                [Answer(QUESTION, "import time; time.sleep(600)", TESTS)] * 2
            )
        until(
            lambda: len(ends) == 2
        )  # an interrupt inside Thread.start leaves a thread that the pool does not wait for
    assert ends == [("", -signal.SIGKILL)] * 2


@strict
@pytest.mark.parametrize("where", ["program", "tests"])
def test_no_process_outlives_a_killed_owner(where: str, tmp_path: Path) -> None:
    sleep = "import time; open('started', 'w').close(); time.sleep(600)"
    program, tests = (sleep, TESTS) if where == "program" else (GOOD, sleep)
    lines = (
        "from prefpipe.config.rewards import Code\nfrom prefpipe.rewards.base import Answer\n"
        "from prefpipe.rewards.code_tests import code\n"
        f"code(Code(timeout_seconds=300))([Answer([], {program!r}, {tests!r})])"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    owner = subprocess.Popen([sys.executable, "-c", lines], cwd=ROOT, env=environment)
    with owner:
        until(lambda: owner.poll() is not None or list(tmp_path.glob("*/started")))
        assert owner.poll() is None
        (folder,) = tmp_path.iterdir()
        assert len(_working_in(folder)) == 2
        owner.kill()
    until(lambda: not _working_in(folder))


def _working_in(folder: Path) -> list[str]:
    working: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink() == folder:
                working.append(process.name)
    return working


def _sandboxes() -> set[str]:
    """The ids of the sandboxes that this process has started."""
    return {process.name for process in Path("/proc").glob("[0-9]*") if _runs_sandbox(process)}


def _runs_sandbox(process: Path) -> bool:
    try:
        parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
        return b"rewards/sandbox" in (process / "cmdline").read_bytes() and int(parent) == os.getpid()
    except OSError:
        return False


def test_without_tests_there_is_no_reward() -> None:
    assert rate(GOOD, None, isolation="limits").reward is None


def test_extract_and_cases() -> None:
    assert extract("no block") == "no block"
    assert extract("```python\na\n```\n```\nb\n```") == "b\n"
    assert extract("```bash\nls\n```\n") == "```bash\nls\n```\n"
    assert cases(TESTS) is None
    assert cases("[1, 2]") is None
    assert cases("[]") is None
    assert cases('[{"input": 1, "output": 2}]') == [{"input": "1", "output": "2"}]
    assert inputs(Code()).keys() == {"python"}


DEEP = "import os\nfor _ in range(1100):\n    os.mkdir('d')\n    os.chdir('d')\n"


@pytest.mark.parametrize(
    ("text", "answer", "status"),
    [
        (f"{DEEP}{GOOD}", TESTS, "ok"),
        (GOOD, "[" * 100_000, "wrong"),
        (GOOD, "[" * 100_000 + "]" * 100_000, "wrong"),
        ("(" * 100_000, TESTS, "wrong"),
        ("x = " + "-" * 100_000 + "1", TESTS, "wrong"),
        (GOOD + "\0", TESTS, "wrong"),
        (GOOD + "# \ud800", TESTS, "wrong"),
        (GOOD, "\ud800", "wrong"),
    ],
)
@pytest.mark.parametrize("isolation", ["limits", pytest.param("strict", marks=strict)])
def test_what_a_completion_leaves_or_holds_costs_its_row(text: str, answer: str, status: str, isolation: str) -> None:
    wanted = Answer(QUESTION, GOOD, TESTS)
    reward = code(Code(timeout_seconds=20, memory_mib=512, isolation=isolation))
    first, odd, last = reward([wanted, Answer(QUESTION, text, answer), wanted])
    assert first == last == Scored(1.0)
    assert odd.status == status, odd


def test_what_fails_around_a_program_is_a_crash_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(code_tests, "_spawn", fail)
    scored = rate(GOOD, isolation="limits")
    assert (scored.reward, scored.status) == (None, "crash")
    assert "No space left" in (scored.detail or "")
