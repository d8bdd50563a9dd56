"""Every command as one call, which the command line and the functions of Python share.

A stage and its heavy packages are imported by the call that runs it.
"""

import importlib
import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prefpipe import extras, log
from prefpipe.api import caller
from prefpipe.config import base
from prefpipe.config.commands import CLASSES, SETTINGS
from prefpipe.errors import Interrupted, MissingInputError, PrefpipeError, StorageError, UsageError

Manifest = dict[str, Any]
STAGES: dict[str, tuple[type[BaseModel], str]] = {
    name: (cls, f"prefpipe.stages.{name.replace('-', '_')}.stage") for name, cls in CLASSES.items()
}
_TRAIN = ("train", "sweep")
_training = threading.RLock()
_first: list[int] = []  # the process of the first call; a fork inherits it


def settings(command: str, recipe: Path | None, given: Mapping[str, Any], place: str = base.COMMAND_LINE) -> BaseModel:
    """The settings of a command: defaults < recipe < `given`, by dotted name. Raises as `base.load` does."""
    return base.load(SETTINGS[command], recipe, given, place)


def run(command: str, config: BaseModel, out: Path, *, force: bool = False) -> Manifest:
    """Run a command in `out`, or go on where it was stopped. Returns the manifest of the complete run."""
    refuse_fork()
    with _one_trains() if command in _TRAIN else nullcontext():
        return _finished(_stage(command).run, config, out, force=force)


def summary(command: str, manifest: Manifest, out: Path) -> list[str]:
    """Lines about a complete run."""
    return _stage(command).summary(manifest, out)


def gather(directories: Sequence[Path], out: Path, *, force: bool = False) -> tuple[str, Manifest]:
    """Join the runs of all parts in `out`. Returns the command that they are of, and the manifest."""
    stage = importlib.import_module("prefpipe.stages.gather.stage")
    command, config = stage.run(directories, out, force=force)
    return command, run(command, config, out)


def report(directory: Path, out: Path | None = None) -> Path:
    """Write the page about a run. Returns its path."""
    return importlib.import_module("prefpipe.stages.report.stage").run(directory, out)


def merge(directory: Path, out: Path, model: str = "") -> str:
    """Merge the adapter of a run into the weights of its base. Returns the identity of the merged model."""
    return importlib.import_module("prefpipe.stages.train.merging").run(directory, out, model)


def plan(config: BaseModel) -> list[str]:
    """Lines about what a run of train will cost."""
    with _one_trains():
        return importlib.import_module("prefpipe.stages.train.plan").run(config)


def refuse_fork() -> None:
    """Raises UsageError in a process that was forked after its parent had worked here: the threads of polars and torch
    stay behind in a fork, and whoever asks them for something waits for ever."""
    if not _first:
        _first.append(os.getpid())
    if _first[0] != os.getpid():
        raise UsageError(
            f"this process is a fork of process {_first[0]}, which called prefpipe before: it would wait for ever",
            "start it with multiprocessing.get_context('spawn'), or make no call before the fork",
        )


def explained(error: BaseException) -> PrefpipeError | None:
    """An error of prefpipe for a package that is missing or a refusal of the operating system; None for any other."""
    if isinstance(error, ModuleNotFoundError):
        others = {"vllm": ("cpu", "cuda"), "vl_convert": ("report",), "ray": ("cluster",)}
        parts = others.get(error.name or "", ("train",))
        commands = " or ".join(extras.command(part) for part in parts)
        return MissingInputError(f"this command needs the package '{error.name}'", f"install it with: {commands}")
    if isinstance(error, OSError):
        return StorageError(str(error), "check permissions and the disk, then run the same command again")
    return None


@contextmanager
def in_words() -> Generator[None]:
    """Errors as a caller in Python wants them: always of prefpipe, with the hint in their text and in words of Python;
    Ctrl-C is Ctrl-C. What the caller draws at random is not touched."""
    try:
        with caller.kept():
            yield
    except Interrupted as stop:
        raise KeyboardInterrupt(f"{stop.message}; make the same call again: it resumes where it stopped") from stop
    except Exception as error:
        known = error if isinstance(error, PrefpipeError) else explained(error)
        if known is None:
            raise
        known.message, known.hint = map(caller.in_python, (known.message, known.hint))
        known.args = (f"{known.message}\nhint: {known.hint}",)
        if known is error:
            raise
        raise known from error


@contextmanager
def _one_trains() -> Generator[None]:
    """One thread trains at a time: new weights and dropout come from the one generator of torch."""
    if not _training.acquire(blocking=False):
        log.info("another thread of this process trains: this call goes on when that has ended")
        _training.acquire()
    try:
        yield
    finally:
        _training.release()


def _stage(command: str) -> Any:
    return importlib.import_module(STAGES[command][1])


def _finished(run: Callable[..., Manifest], config: BaseModel, out: Path, *, force: bool) -> Manifest:
    """The manifest of a run. Exit code 0 is for a run that has one: whoever ends the command before fails."""
    try:
        return run(config, out, force=force)
    except SystemExit as end:
        raise PrefpipeError(
            f"the command was ended from inside, with exit code {end.code}",
            "a package that it uses called sys.exit; run the same command again with --verbose",
        ) from end
    except BrokenPipeError as error:
        raise PrefpipeError(
            "a process that the command talked to is gone", "run the same command again: it resumes"
        ) from error
