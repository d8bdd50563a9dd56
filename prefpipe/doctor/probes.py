"""Python code in a child process: what it says, or how it ended."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefpipe import processes

IMPORT_SECONDS = 300.0  # a first import compiles thousands of files
_FRAME = re.compile(r'File "([^"]+)"')
_HIDE = "import sys\nfor name in {hidden!r}: sys.modules[name] = None\n"


@dataclass(frozen=True)
class Answer:
    """`value` is the last line on stdout as JSON, None where there is none. `error` says how the process failed, empty
    where it did not; `modules` are the top modules in its traceback, the innermost first."""

    value: Any
    error: str
    modules: Sequence[str] = ()


def ask(code: str, hidden: Iterable[str] = (), seconds: float = IMPORT_SECONDS) -> Answer:
    """Run code in a Python that finds the modules that this one finds, but for the modules `hidden`."""
    words = [sys.executable, "-P", "-X", "faulthandler", "-c", _HIDE.format(hidden=sorted(hidden)) + code]
    path = processes.module_path()
    try:
        ended = subprocess.run(
            words,
            env={**processes.environment(path), "TRANSFORMERS_VERBOSITY": "error"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(None, f"no answer within {seconds:g} seconds")
    except OSError as error:
        return Answer(None, f"no process could be started: {error}")
    said = ended.stderr.decode(errors="replace")
    if ended.returncode != 0:
        return Answer(None, _reason(ended.returncode, said), _modules(said, path))
    return Answer(_value(ended.stdout.decode(errors="replace")), "")


def _reason(code: int, said: str) -> str:
    if code < 0:
        return f"the process died of {signal.Signals(-code).name}"
    lines = [line for line in said.splitlines() if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", line)]
    return lines[-1][:300] if lines else f"the process ended with exit code {code}"


def _modules(said: str, path: Sequence[str]) -> list[str]:
    """The top modules whose files stand in a traceback, and those that its last lines name, the innermost first."""
    folders = sorted({os.path.realpath(folder) for folder in path}, key=len, reverse=True)
    # faulthandler lists the innermost frame first, a traceback last.
    files = _FRAME.findall(said)
    inner_first = files if "Fatal Python error" in said else files[::-1]
    found = [_top(os.path.realpath(file), folders) for file in inner_first]
    named = re.findall(r"[A-Za-z_]\w+", said.strip().splitlines()[-1] if said.strip() else "")
    return list(dict.fromkeys(name for name in (*found, *named) if name))


def _top(file: str, folders: Sequence[str]) -> str:
    for folder in folders:
        if file.startswith(folder + os.sep):
            return Path(file).relative_to(folder).parts[0].partition(".")[0]
    return ""


def _value(said: str) -> Any:
    try:
        return json.loads(said.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return None
