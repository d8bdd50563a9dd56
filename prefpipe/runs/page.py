"""The page of a run while it goes on: written by `prefpipe report` in another process, at the lowest priority.

A page that cannot be written costs a warning, never the run.
"""

import importlib.util
import os
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from prefpipe import extras, log, processes
from prefpipe.errors import MissingInputError

_SECONDS = 300.0
_LOWEST = 19  # of priorities


@dataclass(frozen=True)
class _Writer:
    """A process that writes a page, and what it says."""

    process: subprocess.Popen[str]
    said: IO[str]


_writers: dict[Path, _Writer] = {}  # of this process, by the directory of the run


def check_installed() -> None:
    """Raise MissingInputError where the package that draws the charts is missing: before the run, not hours later."""
    if importlib.util.find_spec("vl_convert") is None:
        raise MissingInputError("--report needs the package 'vl_convert'", extras.hint("report"))


def renew(run_dir: Path) -> None:
    """Begin to write RUN_DIR/report.html as the run stands now, and do not wait: the run goes on meanwhile. While the
    page before is still being written, this one is left out."""
    before = _writers.get(run_dir)
    if before is None or before.process.poll() is not None:
        _end(run_dir)
        _begin(run_dir)


def write(run_dir: Path) -> None:
    """Write RUN_DIR/report.html as the run stands now, which takes seconds."""
    _end(run_dir)
    _begin(run_dir)
    _end(run_dir)


def _begin(run_dir: Path) -> None:
    said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (`_end` closes it)
    try:
        process = subprocess.Popen(
            processes.python("prefpipe", "report", str(run_dir)),
            env=processes.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            text=True,
        )
    except OSError as error:
        said.close()
        _warn(run_dir, str(error))
        return
    with suppress(OSError):  # it has ended already
        os.setpriority(os.PRIO_PROCESS, process.pid, _LOWEST)
    _writers[run_dir] = _Writer(process, said)


def _end(run_dir: Path) -> None:
    """Wait for the page that is being written, if any, and warn where it could not be."""
    writer = _writers.pop(run_dir, None)
    if writer is None:
        return
    with writer.said:
        try:
            code = writer.process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            writer.process.kill()
            writer.process.wait()
            _warn(run_dir, f"it took longer than {_SECONDS:.0f} s")
            return
        if code:
            writer.said.seek(0)
            text = writer.said.read()
            _warn(run_dir, next((line for line in text.splitlines() if line.startswith("error:")), text[-300:]))


def _warn(run_dir: Path, why: str) -> None:
    log.warn(f"the page of {run_dir} could not be written: {why}")
