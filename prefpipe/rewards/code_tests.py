"""A verifier of Python programs: each runs against the tests of its prompt, in a process under limits (sandbox/)."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from prefpipe.config.rewards import Code
from prefpipe.errors import MissingInputError
from prefpipe.rewards import sandbox
from prefpipe.rewards.base import Answer, RewardFunction, Scored
from prefpipe.rewards.folders import temporary_folder, used_bytes
from prefpipe.rewards.isolation import kill, num_cores

VERSION = 2  # raise it when the reward can change: a run never mixes two versions
_BLOCK = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_OUTPUT_BYTES = 1 << 20
_VERDICT_BYTES = 1 << 16
_FILES_BYTES = 64 << 20  # limit of all files together; sandbox/limits.py limits each file
_WATCH_SECONDS = 0.05
_SHOWN = 200


class Running(set[subprocess.Popen[bytes]]):
    """The processes under way. After `stopped` is set, a process that starts is killed at once."""

    stopped = False


@dataclass(frozen=True)
class ProgramRun:
    """The end of a program: status ok, wrong, timeout or crash (of the sandbox), the reason, and its output."""

    status: str
    detail: str | None
    output: str


def inputs(_settings: Code) -> dict[str, str]:
    """The version of Python that runs the programs."""
    return {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}


def code(settings: Code) -> RewardFunction:
    """1 if the program passes the tests of its prompt, else 0. The program is the last fenced block of the completion,
    or the whole text without one.

    `answer` holds the tests. It is Python that runs after the program in the same namespace (asserts), or a JSON list
    of {"input": text, "output": text}. With such cases the program runs once for each as a script, and what it prints
    is compared line by line, without the white space at the ends; with `partial` the reward is the share that passes.

    Status wrong comes with the exception or the first difference. timeout (reward 0): the program took too long.
    unparsable: the prompt has no tests (no reward) or the completion no code (0). crash (no reward): the sandbox fails.
    Raises MissingInputError when the sandbox is not possible on this machine.
    """
    reason = sandbox.supported() if settings.isolation == "strict" else None
    if reason is not None:
        raise MissingInputError(
            f"isolation = 'strict' is not possible here: {reason}",
            'run in a container or machine you can lose, with isolation = "limits"',
        )

    def rate(answers: Sequence[Answer]) -> list[Scored]:
        running = Running()
        with ThreadPoolExecutor(num_cores(settings.num_workers)) as pool:
            try:
                return list(pool.map(lambda a: _rate(settings, a, running), answers))
            except BaseException:
                running.stopped = True  # first of all: a thread may be about to start another process
                pool.shutdown(wait=False, cancel_futures=True)
                for process in tuple(running):
                    kill(process)
                raise

    return rate


def extract(text: str) -> str:
    """The last fenced block of Python (or of no language), or the whole text where there is none."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else text


def cases(answer: str) -> list[dict[str, str]] | None:
    """The cases {"input": text, "output": text} in a prompt's `answer`, or None for tests in Python."""
    try:
        values = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, list) or not values:
        return None
    if not all(isinstance(v, dict) and {"input", "output"} <= set(v) for v in values):
        return None
    return [{k: str(v[k]) for k in ("input", "output")} for v in values]


def run(settings: Code, program: str, tests: str | None, stdin: str, running: Running) -> ProgramRun:
    """Run a program once, with tests or with an input, in a temporary folder. `running` holds its process meanwhile."""
    job = {
        "program": program,
        "tests": tests is not None,
        "isolation": settings.isolation,
        "cpu_seconds": math.ceil(settings.timeout_seconds),
        "memory_bytes": settings.memory_mib << 20,
    }
    with temporary_folder() as folder, tempfile.TemporaryFile() as typed, tempfile.TemporaryFile() as printed:
        typed.write(stdin.encode(errors="replace"))
        typed.seek(0)
        parts = [{**job, "folder": folder}, *([] if tests is None else [tests])]
        verdict, exit_code = _spawn(parts, folder, typed, printed, settings.timeout_seconds, running)
        printed.seek(0)
        text = printed.read(_OUTPUT_BYTES).decode(errors="replace")
    slow = f"timeout_seconds is {settings.timeout_seconds:g}"
    if exit_code is None or exit_code == -signal.SIGXCPU:
        which = "wall clock" if exit_code is None else "CPU time"
        return ProgramRun("timeout", f"too much {which}: {slow}", text)
    if not verdict:
        how = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
        return ProgramRun("wrong", f"the tests ended with {how} before they were over", text)
    status, detail = json.loads(verdict)
    return ProgramRun(status, f"too much {detail}: {slow}" if status == "timeout" else detail and detail[:_SHOWN], text)


def _spawn(
    parts: list[Any], folder: str, typed: IO[bytes], printed: IO[bytes], seconds: float, running: Running
) -> tuple[str, int | None]:
    """(verdict, exit code) of one run of the sandbox; after a timeout ("", None)."""
    job_read, job_write = os.pipe()
    verdict_read, verdict_write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-I", str(Path(sandbox.__file__).parent), str(job_read), str(verdict_write)],
        stdin=typed,
        stdout=printed,
        stderr=subprocess.DEVNULL,
        pass_fds=(job_read, verdict_write),
        cwd=folder,
        env={"HOME": folder, "TMPDIR": folder, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    running.add(process)
    try:
        if running.stopped:
            kill(process)
        os.close(job_read)
        os.close(verdict_write)
        with contextlib.suppress(BrokenPipeError), os.fdopen(job_write, "wb") as job:
            for content in (json.dumps(part).encode() for part in parts):
                job.write(len(content).to_bytes(8, "big") + content)
        os.set_blocking(verdict_read, False)
        return _wait(process, verdict_read, folder, time.monotonic() + 2 * seconds + 2)
    finally:
        os.close(verdict_read)
        kill(process)
        process.wait()
        running.discard(process)


def _wait(process: subprocess.Popen[bytes], verdict: int, folder: str, deadline: float) -> tuple[str, int | None]:
    """(verdict, exit code) of the sandbox. It is killed when its time is over or its files are too large."""
    received = b""
    while True:
        with contextlib.suppress(BlockingIOError):
            received += os.read(verdict, _VERDICT_BYTES)
        try:
            exit_code = process.wait(_WATCH_SECONDS)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                return "", None
            if used_bytes(folder, received.decode()) > _FILES_BYTES:
                return json.dumps(
                    ["wrong", f"more than {_FILES_BYTES >> 20} MiB of files, or files that cannot be counted"]
                ), 0
        else:
            with contextlib.suppress(BlockingIOError):
                received += os.read(verdict, _VERDICT_BYTES)
            return received.decode().partition("\n")[2], exit_code


def _rate(settings: Code, answer: Answer, running: Running) -> Scored:
    """The score of one completion. A failure around its program affects only this completion."""
    try:
        return _rate_program(settings, answer, running)
    except (OSError, ValueError, RecursionError) as error:
        return Scored(None, "crash", f"{type(error).__name__}: {error}"[:_SHOWN])


def _rate_program(settings: Code, answer: Answer, running: Running) -> Scored:
    if not answer.answer:
        return Scored(None, "unparsable", "the prompt has no tests: its `answer` is empty")
    program = extract(answer.text)
    if not program.strip():
        return Scored(0.0, "unparsable", "no code")
    inputs_and_outputs = cases(answer.answer)
    if inputs_and_outputs is None:
        return _scored(run(settings, program, answer.answer, "", running))
    return _rate_cases(settings, program, inputs_and_outputs, running)


def _rate_cases(settings: Code, program: str, tests: list[dict[str, str]], running: Running) -> Scored:
    """The score over all cases; without `partial` the first failure ends the run."""
    passed, first_failure = 0, None
    for number, case in enumerate(tests, start=1):
        scored = _scored(_compare(run(settings, program, None, case["input"], running), case["output"]))
        if scored.reward is None:
            return scored
        passed += int(scored.reward)
        if scored.status != "ok":
            first_failure = first_failure or Scored(0.0, scored.status, f"case {number}: {scored.detail}")
            if not settings.partial:
                return first_failure
    if first_failure is None:
        return Scored(1.0)
    detail = f"{passed} of {len(tests)} passed; {first_failure.detail}"
    return Scored(passed / len(tests), first_failure.status, detail)


def _compare(ran: ProgramRun, expected: str) -> ProgramRun:
    if ran.status != "ok" or _lines(ran.output) == _lines(expected):
        return ran
    shown = f"printed {ran.output[:_SHOWN]!r}, expected {expected[:_SHOWN]!r}"
    return ProgramRun("wrong", shown, ran.output)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _scored(ran: ProgramRun) -> Scored:
    reward = {"ok": 1.0, "wrong": 0.0, "timeout": 0.0, "crash": None}[ran.status]
    return Scored(reward, ran.status, ran.detail)
