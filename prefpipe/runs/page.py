"""The page of a run while it goes on: written by `prefpipe report` in another process.

A page that cannot be written costs a warning, never the run.
"""

import importlib.util
import subprocess
from pathlib import Path

from prefpipe import extras, log, processes
from prefpipe.errors import MissingInputError

_SECONDS = 300.0


def check_installed() -> None:
    """Raise MissingInputError where the package that draws the charts is missing: before the run, not hours later."""
    if importlib.util.find_spec("vl_convert") is None:
        raise MissingInputError("--report needs the package 'vl_convert'", extras.hint("report"))


def write(run_dir: Path) -> None:
    """Write RUN_DIR/report.html as the run stands now, which takes seconds."""
    words = processes.python("prefpipe", "report", str(run_dir))
    try:
        ended = subprocess.run(
            words,
            env=processes.environment(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warn(f"the page of {run_dir} could not be written: {error}")
        return
    if ended.returncode:
        why = next((line for line in ended.stderr.splitlines() if line.startswith("error:")), ended.stderr[-300:])
        log.warn(f"the page of {run_dir} could not be written: {why}")
