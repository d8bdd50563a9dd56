"""How steps run: each in a process of its own, which frees its memory; an evaluation and the sampling after it in one.

Both have the same policy, and the start of an engine is a large part of a short round. The process waits for the name
of its next step on stdin, so that what comes after an evaluation may depend on its result. Where memory allows it, that
process stays for all rounds with one engine, which takes the adapter of every round, and so does one that trains. No
step outlives this process: when it is killed, the kernel sends the step a SIGTERM, and a launcher ends its ranks.
"""

import json
import select
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from prefpipe import machine, processes
from prefpipe.errors import PrefpipeError, of_process

Runner = Callable[[str, Path, Path], None]  # command, saved config, run directory
_SHARED = ("evaluate", "generate")  # commands that run in one process when they follow each other


@dataclass(frozen=True)
class Engines:
    """What stays open. `after_evaluation`: the engine of an evaluation, for the sampling behind it; `throughout`: one
    engine for all rounds, also while other steps run, with room for adapters of `lora_rank`; `training`: a process that
    trains, which would hold memory of a GPU."""

    after_evaluation: bool = True
    throughout: bool = False
    training: bool = False
    lora_rank: int = 0


class Processes:
    """Runs steps; a `with` block ends the processes that wait for the next one. `launcher` is the setting."""

    def __init__(self, launcher: str = "auto", engines: Engines | None = None) -> None:
        self._launcher = launcher
        self._engines = engines or Engines()
        self._sampling = _Waiting()
        self._training = _Waiting()

    def __call__(self, command: str, saved: Path, out: Path) -> None:
        """Run one step to its end. Raises an error with the exit code of the step."""
        stay, launcher = self._engines.throughout, launched(self._launcher) if command == "train" else []
        if command in _SHARED or (stay and command != "train"):
            keep = self._engines.after_evaluation if command == "evaluate" else stay
            self._sampling.run(command, saved, out, keep=keep, lora_rank=self._engines.lora_rank)
            return
        if not stay:
            self._sampling.end()
        if command == "train" and self._engines.training and not launcher:
            self._training.run(command, saved, out)
        else:
            run_process(command, saved, out, launcher)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        both = (self._sampling, self._training)
        for process in both:
            process.dismiss()
        for process in both:
            process.end()


class _Waiting:
    """A process that runs the steps that it is told, one after the other; it starts with the first."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, command: str, saved: Path, out: Path, *, keep: bool = False, lora_rank: int = 0) -> None:
        """Run a step. `keep`: its engine stays open for the next."""
        if self.process is None:
            self.process = subprocess.Popen(
                processes.python("prefpipe", "steps"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=processes.environment(),
                preexec_fn=processes.death_with_parent(),
            )
        process = self.process
        assert process.stdin is not None
        step = {"saved": str(saved), "out": str(out), "keep": keep, "lora_rank": lora_rank}
        try:
            print(json.dumps(step), file=process.stdin, flush=True)
            answer = _answer(process)
        except BrokenPipeError:
            answer = ""
        except BaseException:
            _terminate(process)
            raise
        if not answer:
            code = _wait(process)
            self.end()
            raise _failed(command, saved, out, code)

    def dismiss(self) -> None:
        """Tell the process that no step follows."""
        if self.process is not None:
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):
                    pipe.close()

    def end(self) -> None:
        """End the process: its memory is free."""
        self.dismiss()
        process, self.process = self.process, None
        if process is not None:
            _wait(process)


def run_process(command: str, saved: Path, out: Path, launcher: list[str] | None = None) -> None:
    """Run one step as `python -m prefpipe COMMAND CONFIG --out DIR`, behind the words of a launcher. Raises an error
    with the exit code of the step."""
    arguments = [command, str(saved), "--out", str(out)]
    words = [*launcher, "-m", "prefpipe", *arguments] if launcher else processes.python("prefpipe", *arguments)
    # The processes of a launcher start without -P.
    environment = {**processes.environment(), **({"PYTHONSAFEPATH": "1"} if launcher else {})}
    process = subprocess.Popen(words, stdout=sys.stderr, env=environment, preexec_fn=processes.death_with_parent())
    code = _wait(process)
    if code != 0:
        raise _failed(command, saved, out, code)


def launched(launcher: str) -> list[str]:
    """The words in front of `-m prefpipe train`: [] for one process. torchrun is that of this Python."""
    if launcher == "auto":
        gpus = len(machine.visible_gpus())
        launcher = f"torchrun --standalone --nproc_per_node {gpus}" if gpus > 1 else "none"
    if launcher == "none":
        return []
    first, *others = shlex.split(launcher)
    if Path(first).name == "torchrun":
        return [sys.executable, "-P", "-m", "torch.distributed.run", *others]
    return [first, *others, sys.executable, "-P"]


def _answer(process: "subprocess.Popen[str]") -> str:
    """The line with which it ends a step; nothing when it has ended itself. What it has started may live on and hold
    its stdout open."""
    assert process.stdout is not None
    while not select.select([process.stdout], [], [], 1.0)[0]:
        if process.poll() is not None:
            return ""
    return process.stdout.readline()


def _wait(process: "subprocess.Popen[str] | subprocess.Popen[bytes]") -> int:
    try:
        return process.wait()
    except BaseException:
        _terminate(process)
        raise


def _terminate(process: "subprocess.Popen[str] | subprocess.Popen[bytes]") -> None:
    """Ctrl-C reaches a step by itself; a SIGTERM reaches this process only."""
    process.terminate()
    process.wait()


def _failed(command: str, saved: Path, out: Path, code: int) -> PrefpipeError:
    return of_process(
        f"{command} failed with exit code {code}", f"replay it alone: prefpipe {command} {saved} --out {out}", code
    )
