"""Checks in a process of their own: one that hangs is killed, one that takes the process with it is noted, and the
checks behind it go on in a new one."""

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from card.record import Record
from card.worker import Check

START = 90.0  # seconds that a process may take for its imports
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
GRACE = 15.0  # seconds after the limit of a check before its process is killed
DEATH = 5.0  # seconds that a killed process may take to die; one that waits inside the driver may never


def supervise(
    record: Record,
    checks: Sequence[Check],
    command: Callable[[list[str], int], list[str]],
    until: float,
    *,
    start: float = START,
    grace: float = GRACE,
) -> None:
    """Run the checks through `command` (names of checks and the number of a pipe -> a command line), and note every
    event that comes through the pipe as a line of JSON, until the moment `until` of time.time()."""
    waiting = {check.name: check for check in checks}
    while waiting:
        if until - time.time() < min(check.needs for check in waiting.values()):
            for name in waiting:
                why = "no time is left before the deadline"
                record.take({"check": name, "kind": "end", "state": "left out", "why": why})
            return
        before, (reading, writing) = len(waiting), os.pipe()
        process = subprocess.Popen(
            command([*waiting], writing), pass_fds=[writing], start_new_session=True, env=_environment(os.environ)
        )
        os.close(writing)
        running, why = None, "the run was broken off"
        try:
            running, why = _listen(record, waiting, reading, until, (start, grace))
        finally:
            os.close(reading)
            _end(process, hangs=bool(why))
        why = why or f"its process ended with code {process.returncode}"
        lost = [running] if running else [*waiting] if len(waiting) == before else []
        for name in lost:  # a process that begins no check ends all of them: the next one would not either
            del waiting[name]
            record.take({"check": name, "kind": "end", "state": "failed", "why": why})


def _environment(of_user: Mapping[str, str]) -> dict[str, str]:
    """What a process gets: no hub, and one card, the first of those that the user shows (on two, TRL would train on
    both)."""
    return {**of_user, **OFFLINE, "CUDA_VISIBLE_DEVICES": of_user.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def _listen(
    record: Record, waiting: dict[str, Check], pipe: int, until: float, seconds: tuple[float, float]
) -> tuple[str | None, str]:
    """Note events until the pipe closes or a check passes its time; what has ended leaves `waiting`. Returns the check
    that runs then, and why it is ended; without a reason the process ended by itself."""
    start, grace = seconds
    running: str | None = None
    end = min(time.time() + start, until + grace)
    rest = b""
    while True:
        if not select.select([pipe], [], [], max(0.0, end - time.time()))[0]:
            return running, "it went on past its time and was killed" if running else "its process did not start"
        read = os.read(pipe, 1 << 16)
        if not read:
            return running, ""
        *lines, rest = (rest + read).split(b"\n")
        for line in lines:
            event = json.loads(line)
            record.take(event)
            if event["kind"] == "start":
                running = event["check"]
                end = min(time.time() + waiting[event["check"]].limit, until) + grace
            elif event["kind"] == "end":
                waiting.pop(event["check"])
                running = None
                end = min(time.time() + start, until + grace)
        if not waiting:
            return None, ""


def _end(process: subprocess.Popen[bytes], *, hangs: bool) -> None:
    """Wait for a process that has said all, or end one that hangs, with the processes that it started."""
    try:
        process.wait(timeout=0 if hangs else 5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=DEATH)
