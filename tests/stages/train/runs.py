"""Runs of train: started on two ranks, and what is read back from one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT


def torchrun(*arguments: object, fault: str = "") -> subprocess.CompletedProcess[str]:
    """Two processes on this machine. The rendezvous is at a port that the system chooses when it is opened, so that
    several of them can start at the same time."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PREFPIPE_FAULT": fault},
    )  # fmt: skip


def adapter(out: Path) -> bytes:
    """The file of the trained adapter."""
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def metrics(out: Path) -> list[dict[str, Any]]:
    """The metrics of every step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
