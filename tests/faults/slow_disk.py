"""Run in place of `prefpipe`: the disk is so slow that step 5 is done before the checkpoint of step 4 is written.

In the middle of that checkpoint the process is killed.
"""

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from prefpipe import cli
from prefpipe.runs import in_place

_write_at = in_place.write_at


def slowly(path: Path, place: int, blocks: Iterable[memoryview]) -> None:
    """As `in_place.write_at`; of the checkpoint of step 4 one tensor."""
    _write_at(path, place, blocks)
    if "step-00000004" in path.parent.name:
        metrics = path.parents[2] / "metrics.jsonl"
        while len(metrics.read_text().splitlines()) < 5:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    in_place.write_at = slowly
    cli.main()
