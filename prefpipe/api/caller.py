"""The program or notebook that calls: its random numbers stay its own, and errors speak to it in Python."""

import random
import re
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from prefpipe.config.commands import SETTINGS

_FIELDS = {name: field.annotation is bool for cls in SETTINGS.values() for name, field in cls.model_fields.items()}
_IS_SWITCH = {**_FIELDS, "force": True, "out": False}
_FLAG = re.compile(r"(?<![\w-])--(no-)?([a-z][a-z0-9-]*[a-z0-9])")
_COMMAND = re.compile(r"\bprefpipe [a-z]")


@contextmanager
def kept() -> Generator[None]:
    """The generators of random numbers (of Python, and of numpy and torch where they are loaded) and the hook for
    errors that nobody catches come back: a step seeds torch, and vLLM replaces all of them.

    In other threads than the main one nothing comes back: what the main one has drawn meanwhile would come again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numpy: Any = sys.modules.get("numpy")
    torch: Any = sys.modules.get("torch")
    python, hook = random.getstate(), sys.excepthook
    of_numpy = numpy.random.get_state() if numpy else None
    of_torch = torch.get_rng_state() if torch else None
    of_gpus = torch.cuda.get_rng_state_all() if torch and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        sys.excepthook = hook
        if numpy:
            numpy.random.set_state(of_numpy)
        if torch:
            torch.set_rng_state(of_torch)
        if of_gpus is not None:
            torch.cuda.set_rng_state_all(of_gpus)


def in_python(text: str) -> str:
    """Options of prefpipe in the words of an error as keyword arguments: --num-samples is num_samples, and --force is
    force=True. A command that is quoted stays as it is."""
    command = _COMMAND.search(text)
    end = command.start() if command else len(text)
    return _FLAG.sub(_keyword, text[:end]) + text[end:]


def _keyword(flag: re.Match[str]) -> str:
    name = flag[2].replace("-", "_")
    if name not in _IS_SWITCH:
        return flag[0]
    return f"{name}={not flag[1]}" if _IS_SWITCH[name] else name
