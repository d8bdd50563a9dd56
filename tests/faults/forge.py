"""A process that runs commands in forked children: a kill costs milliseconds, not the start of an interpreter.

Started by `Forge`; reads one JSON job per line and answers with the child's exit status and what it wrote to stderr.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.conftest import ROOT


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or minus the signal that killed it."""

    code: int
    stderr: str


@dataclass(frozen=True)
class Forge:
    """Runs `prefpipe ARGUMENTS` in forked children of one process."""

    stdin: IO[str]
    stdout: IO[str]

    def run(self, *arguments: object, **job: Any) -> Ended:
        """`fault` arms a fault point, `alarm` kills after so many seconds, `engine` replaces the fake engine."""
        return self.run_together([{"arguments": list(map(str, arguments)), **job}])[0]

    def run_together(self, jobs: list[dict[str, Any]]) -> list[Ended]:
        """Several commands at the same time."""
        self.stdin.write(json.dumps(jobs) + "\n")
        self.stdin.flush()
        return [Ended(**ended) for ended in json.loads(self.stdout.readline())]


@contextmanager
def forge(*modules: str) -> Iterator[Forge]:
    """The process for the length of a `with` block; its children share these modules, imported once."""
    command = [sys.executable, "-m", "tests.faults.forge", *modules]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # a process with threads must not fork
    with subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield Forge(process.stdin, process.stdout)
        process.stdin.close()


def _child(job: dict[str, Any], errors: Path) -> None:
    from prefpipe import cli, engines  # noqa: PLC0415  (before this, nothing may start a thread)

    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if "fault" in job:
        os.environ["PREFPIPE_FAULT"] = job["fault"]
    if "alarm" in job:
        signal.setitimer(signal.ITIMER_REAL, job["alarm"])  # nobody handles it: as sudden as a kill
    if "engine" in job:
        engines.ENGINES["fake"] = job["engine"]
    sys.argv = ["prefpipe", *job["arguments"]]
    cli.main()


def _serve() -> None:
    # What children share: the imports, pandas too, which pyarrow looks for at its first array. No torch.
    from prefpipe import cli, schemas  # noqa: F401, PLC0415
    from prefpipe.engines import fake  # noqa: F401, PLC0415
    from prefpipe.stages import build_pairs  # noqa: F401, PLC0415
    from prefpipe.stages.generate import stage as generate  # noqa: F401, PLC0415
    from prefpipe.stages.score import stage as score  # noqa: F401, PLC0415

    schemas.to_table(schemas.Dropped, [])
    for module in sys.argv[1:]:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            running: list[tuple[int, Path]] = []
            for number, job in enumerate(json.loads(line)):
                errors = Path(folder) / f"{number}.err"
                errors.unlink(missing_ok=True)
                child = os.fork()
                if child == 0:
                    try:
                        _child(job, errors)
                    except SystemExit as end:
                        os._exit(end.code if isinstance(end.code, int) else 1)
                    finally:
                        os._exit(99)
                running.append((child, errors))
            ended = [
                {"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "stderr": errors.read_text()}
                for child, errors in running
            ]
            print(json.dumps(ended), flush=True)  # noqa: T201


if __name__ == "__main__":
    _serve()
