"""A process that runs commands in forked children: a command costs milliseconds, not the start of an interpreter.

Started by `forge`. It reads lines of JSON, a number and jobs that run at the same time, and answers each line with the
number and the exit status of every child. What a child prints goes to two files that its job names.
"""

import atexit
import faulthandler
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from tests.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ("prefpipe.stages.train.stage", "transformers.models.llama.modeling_llama")


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or minus the signal that killed it; and what it said."""

    code: int
    stderr: str
    stdout: str = ""


@dataclass(frozen=True)
class Forge:
    """Runs `prefpipe ARGUMENTS` in forked children of one process."""

    process: "subprocess.Popen[str]"
    folder: Path
    numbers: Iterator[int] = field(default_factory=count)

    def run(self, *arguments: object, **job: Any) -> Ended:
        """`fault` arms a fault point, `alarm` kills after so many seconds, `engine` replaces the fake engine, `inline`
        names a module whose `Inline` runs the steps of `iterate`, `module` is run in place of `prefpipe`, `env` adds
        variables to the environment of now, `cwd` is where it runs."""
        return self.run_together([{"arguments": list(map(str, arguments)), **job}])[0]

    def run_together(self, jobs: Sequence[dict[str, Any]], timeout: float = PATIENCE_S) -> list[Ended]:
        """Several commands at the same time. Raises TimeoutExpired after killing those that take longer."""
        number = next(self.numbers)
        outputs = [[str(self.folder / f"{number}-{i}.{name}") for name in ("out", "err")] for i in range(len(jobs))]
        whole = [
            job
            | {"env": {**os.environ, **(job.get("env") or {})}, "cwd": str(job.get("cwd") or ROOT), "outputs": files}
            for job, files in zip(jobs, outputs, strict=True)
        ]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([number, timeout, whole]) + "\n")
        self.process.stdin.flush()
        answered = -1
        while answered != number:  # an earlier one, which nobody waited for: its test was interrupted
            answered, codes = json.loads(self.process.stdout.readline())
        said = [[Path(file).read_text(errors="replace") for file in files] for files in outputs]
        for file in self.folder.iterdir():
            file.unlink()
        if None in codes:
            raise subprocess.TimeoutExpired([job["arguments"] for job in jobs], timeout, *said[codes.index(None)])
        return [Ended(code, stderr, stdout) for code, (stdout, stderr) in zip(codes, said, strict=True)]


@contextmanager
def forge(*modules: str) -> Iterator[Forge]:
    """The process for the length of a `with` block; its children share these modules, imported once."""
    command = [sys.executable, "-m", "tests.forge", *modules]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # a process with threads must not fork
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process,
    ):
        yield Forge(process, Path(folder))
        assert process.stdin is not None
        process.stdin.close()


def _child(job: dict[str, Any]) -> None:
    """Becomes the command: its environment, directory and files, and where it looks for modules."""
    from prefpipe import cli, engines  # noqa: PLC0415  (before this, nothing may start a thread)

    for place, file in zip((1, 2), job["outputs"], strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), place)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    paths = [job["cwd"], *filter(None, job["env"].get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*paths, *sys.path]
    if "fault" in job:
        os.environ["PREFPIPE_FAULT"] = job["fault"]
    if "alarm" in job:
        signal.setitimer(signal.ITIMER_REAL, job["alarm"])  # nobody handles it: as sudden as a kill
    if "inline" in job:
        importlib.import_module("prefpipe.stages.iterate.stage").Processes = importlib.import_module(
            job["inline"]
        ).Inline
    if "engine" in job:
        engines.ENGINES["fake"] = job["engine"]
    sys.argv = [job.get("module", "prefpipe"), *job["arguments"]]
    if "module" in job:
        runpy.run_module(job["module"], run_name="__main__")
        sys.exit(0)
    cli.main()


def _exit_code(job: dict[str, Any]) -> int:
    """Runs the command up to where an interpreter would begin to clear away what it holds: that takes a second, in
    memory that the forge shares with it."""
    try:
        _child(job)
    except SystemExit as end:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        return end.code if isinstance(end.code, int) else 1
    except Exception:  # of a module: `main` prints its own
        traceback.print_exc()
    return 99


def _code(child: int, deadline: float) -> int | None:
    """How a child ended; None if it had to be killed at the deadline."""
    waiting = select.poll()
    handle = os.pidfd_open(child)
    waiting.register(handle, select.POLLIN)
    in_time = waiting.poll(max(0.0, deadline - time.monotonic()) * 1000)
    os.close(handle)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if in_time else None


def _serve() -> None:
    # What children share: the imports, pandas too, which pyarrow looks for at its first array. No torch.
    from prefpipe import cli, schemas  # noqa: F401, PLC0415
    from prefpipe.engines import fake  # noqa: F401, PLC0415
    from prefpipe.stages import build_pairs  # noqa: F401, PLC0415
    from prefpipe.stages.generate import stage as generate  # noqa: F401, PLC0415
    from prefpipe.stages.score import stage as score  # noqa: F401, PLC0415
    from tests.quick import quick  # noqa: PLC0415

    schemas.to_table(schemas.Dropped, [])
    for module in sys.argv[1:]:
        importlib.import_module(module)
    quick()
    faulthandler.enable()
    gc.freeze()  # a collection in a child would copy every page that it shares
    for line in sys.stdin:
        number, timeout, jobs = json.loads(line)
        children: list[int] = []
        begin, begun = os.pipe()  # none begins before all are there
        for job in jobs:
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
                try:
                    os.close(begun)
                    os.read(begin, 1)
                    os.close(begin)
                    os._exit(_exit_code(job))
                finally:
                    os._exit(99)
            children.append(child)
        os.close(begun)
        os.close(begin)
        deadline = time.monotonic() + timeout
        print(json.dumps([number, [_code(child, deadline) for child in children]]), flush=True)  # noqa: T201


if __name__ == "__main__":
    _serve()
