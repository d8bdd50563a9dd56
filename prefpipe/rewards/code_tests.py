"""A verifier of Python programs: they run against the prompt's tests in a process under limits (sandbox.py)."""

import contextlib
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

from prefpipe.config.rewards import Code
from prefpipe.errors import MissingInputError
from prefpipe.rewards import sandbox
from prefpipe.rewards.base import Answer, RewardFunction, Scored
from prefpipe.rewards.isolation import num_cores

VERSION = 1  # raise it when the reward can change: a run never mixes two versions
_BLOCK = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_OUTPUT_BYTES = 1 << 20
_SHOWN = 200


@dataclass(frozen=True)
class Ran:
    """How a program ended: status ok, wrong, timeout or crash (of the sandbox), why, and what it printed."""

    status: str
    detail: str | None
    output: str


def inputs(_settings: Code) -> dict[str, str]:
    """The Python that runs the programs."""
    return {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}


def code(settings: Code) -> RewardFunction:
    """1 if the last fenced block of the completion (the whole text without one) passes the prompt's tests, else 0.

    `answer` holds the tests: Python that runs after the program in the same namespace (asserts), or a JSON list of
    {"input": text, "output": text}: then the program runs once for each as a script, and what it prints is compared
    line by line, white space at the ends aside. With `partial` the reward is the share of such cases.

    Status wrong with the exception or the first difference; timeout (reward 0) when it takes too long; unparsable
    without tests (no reward) or without code (0). crash, without a reward, is a failure of the sandbox itself.
    """
    reason = sandbox.supported() if settings.isolation == "strict" else None
    if reason is not None:
        raise MissingInputError(
            f"isolation = 'strict' is not possible here: {reason}",
            'run in a container or machine you can lose, with isolation = "limits"',
        )

    def rate(answers: Sequence[Answer]) -> list[Scored]:
        running: set[subprocess.Popen[bytes]] = set()
        with ThreadPoolExecutor(num_cores(settings.num_workers)) as pool:
            try:
                return list(pool.map(lambda a: _rate(settings, a, running), answers))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in [*running]:
                    _kill(process)
                raise

    return rate


def extract(text: str) -> str:
    """The last fenced block of Python (or of no language), or the whole text."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else text


def cases(answer: str) -> list[dict[str, str]] | None:
    """Input and output cases, or None for tests in Python."""
    try:
        found = json.loads(answer)
    except ValueError:
        return None
    fits = (
        isinstance(found, list) and found and all(isinstance(c, dict) and {"input", "output"} <= set(c) for c in found)
    )
    return [{k: str(c[k]) for k in ("input", "output")} for c in found] if fits else None


def run(settings: Code, program: str, tests: str | None, stdin: str, running: set[subprocess.Popen[bytes]]) -> Ran:
    """Run a program once, with tests or with an input, in a folder of its own that is gone afterwards."""
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="prefpipe-code-") as folder:
        job = {
            "program": program,
            "tests": tests,
            "token": token,
            "folder": folder,
            "isolation": settings.isolation,
            "cpu_seconds": math.ceil(settings.timeout_seconds),
            "memory_bytes": settings.memory_mib << 20,
        }
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as printed:
            given.write(stdin.encode(errors="replace"))
            given.seek(0)
            verdict, exit_code = _spawn(job, given, printed, settings.timeout_seconds, running)
            printed.seek(0)
            text = printed.read(_OUTPUT_BYTES).decode(errors="replace")
    if exit_code is None or exit_code == -signal.SIGXCPU:
        which = "wall clock" if exit_code is None else "CPU time"
        return Ran("timeout", f"too much {which}: timeout_seconds is {settings.timeout_seconds:g}", text)
    if verdict.startswith(sandbox.UNABLE):
        return Ran("crash", verdict, text)
    if verdict == f"ok {token}":
        return Ran("ok", None, text)
    ended = f"ended with {f'signal {-exit_code}' if exit_code < 0 else f'exit code {exit_code}'} before it was over"
    return Ran("wrong", verdict[:_SHOWN] or ended, text)


def _spawn(
    job: dict[str, Any], given: IO[bytes], printed: IO[bytes], seconds: float, running: set[subprocess.Popen[bytes]]
) -> tuple[str, int | None]:
    """(verdict, exit code), exit code None after a timeout. The environment is empty but for its own folder."""
    job_read, job_write = os.pipe()
    verdict_read, verdict_write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-I", sandbox.__file__, str(job_read), str(verdict_write)],
        stdin=given,
        stdout=printed,
        stderr=subprocess.DEVNULL,
        pass_fds=(job_read, verdict_write),
        cwd=job["folder"],
        env={"HOME": job["folder"], "TMPDIR": job["folder"], "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    running.add(process)
    try:
        os.close(job_read)
        os.close(verdict_write)
        with contextlib.suppress(BrokenPipeError), os.fdopen(job_write, "w", encoding="utf-8") as lines:
            json.dump(job, lines)
        try:
            exit_code = process.wait(2 * seconds + 2)
        except subprocess.TimeoutExpired:
            exit_code = None
        return os.read(verdict_read, 4096).decode(errors="replace") if exit_code is not None else "", exit_code
    finally:
        os.close(verdict_read)
        _kill(process)
        running.discard(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """It and everything in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _rate(settings: Code, answer: Answer, running: set[subprocess.Popen[bytes]]) -> Scored:
    if not answer.answer:
        return Scored(None, "unparsable", "the prompt has no tests: its `answer` is empty")
    program = extract(answer.text)
    if not program.strip():
        return Scored(0.0, "unparsable", "no code")
    given = cases(answer.answer)
    if given is None:
        return _scored(run(settings, program, answer.answer, "", running))
    return _rate_cases(settings, program, given, running)


def _rate_cases(
    settings: Code, program: str, given: list[dict[str, str]], running: set[subprocess.Popen[bytes]]
) -> Scored:
    passed, first = 0, None
    for number, case in enumerate(given, start=1):
        scored = _scored(_compare(run(settings, program, None, case["input"], running), case["output"]))
        if scored.reward is None:
            return scored
        passed += int(scored.reward)
        if scored.status != "ok":
            first = first or Scored(0.0, scored.status, f"case {number}: {scored.detail}")
            if not settings.partial:
                break
    if first is None:
        return Scored(1.0)
    detail = f"{passed} of {len(given)} passed; {first.detail}" if settings.partial else first.detail
    return Scored(passed / len(given) if settings.partial else 0.0, first.status, detail)


def _compare(ran: Ran, expected: str) -> Ran:
    if ran.status != "ok" or _lines(ran.output) == _lines(expected):
        return ran
    shown = f"printed {ran.output[:_SHOWN]!r}, expected {expected[:_SHOWN]!r}"
    return Ran("wrong", shown, ran.output)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _scored(ran: Ran) -> Scored:
    reward = {"ok": 1.0, "wrong": 0.0, "timeout": 0.0, "crash": None}[ran.status]
    return Scored(reward, ran.status, ran.detail)
