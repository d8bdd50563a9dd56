"""Start a module of prefpipe in another Python, which takes no file of the current folder for a module of its own."""

import atexit
import ctypes
import gc
import os
import signal
import site
import sys
import sysconfig
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# OpenMP threads that spin while they wait starve each other on a busy machine: vLLM is then 6 to 12 times slower
# (docs/LOG.md). It is read when torch loads.
_WAITING = {"OMP_WAIT_POLICY": "passive"}
_ROOT = str(Path(__file__).resolve().parents[1])


def python(module: str, *arguments: str) -> list[str]:
    """The command `python -m MODULE ARGUMENT...`. Without -P the folder that a user stands in would come first: with a
    file `random.py` there, that file would run."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment(path: list[str] | None = None) -> dict[str, str]:
    """The environment of this process, in which a module of prefpipe is found and threads sleep while they wait; `path`
    are the folders of modules to look in, by default those of PYTHONPATH."""
    folders = path if path is not None else list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    if _ROOT not in map(os.path.realpath, [*folders, *site.getsitepackages()]):
        folders = [_ROOT, *folders]
    return {**_WAITING, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


def wait_passively() -> None:
    """Threads of this process sleep while they wait, if the user has not said otherwise and torch is not loaded yet."""
    for name, value in _WAITING.items():
        os.environ.setdefault(name, value)


def death_with_parent(number: int = signal.SIGTERM, parent: int | None = None) -> Callable[[], None]:
    """A function for a child to call first, as `preexec_fn` of `Popen` or by itself: when its parent (this process, or
    the id that is given) ends, however it ends, the kernel sends the child the signal `number`. It holds across `exec`,
    on Linux.

    The kernel goes by the thread that starts the child: start it from one that lives as long as the process.
    """
    expected = os.getpid() if parent is None else parent
    kernel = ctypes.CDLL(None)
    if has_prctl := sys.platform == "linux":
        _ = kernel.prctl  # looked up here: a fork should do little

    def call() -> None:
        if has_prctl:
            kernel.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != expected:  # it ended before the call
            os._exit(128 + number)

    return call


def leave_garbage() -> None:
    """Nobody looks for garbage in this process any more: it is about to end. With vLLM loaded that takes most of a
    second, and an engine that ends asks for it again and again: then it looks at no object of now."""
    gc.disable()
    gc.freeze()


def end() -> NoReturn:
    """End this process with exit code 0: exit functions run and streams are flushed, but nothing is cleared away, which
    takes seconds with torch and vLLM loaded."""
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]  (what an interpreter does first when it ends)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextmanager
def current_folder() -> Generator[None]:
    """Modules are looked for in the current folder too: before the installed packages, after Python's own modules."""
    stdlib = (*map(sysconfig.get_path, ("stdlib", "platstdlib")), sysconfig.get_config_var("DESTSHARED"))
    here = str(Path.cwd())
    sys.path.insert(max((place for place, folder in enumerate(sys.path, 1) if folder in stdlib), default=0), here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def module_path() -> list[str]:
    """Where this process looks for modules, without the current folder that `python -m` puts first."""
    here = str(Path.cwd())
    kept = {_ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    return [folder for folder in sys.path if folder and (folder != here or folder in kept)]
