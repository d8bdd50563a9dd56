"""Runs of train: started on two ranks, and what is read back from one."""

import json
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from tests.forge import Ended, Forge


def two_ranks(forged: Forge, *arguments: object, faults: tuple[str, str] = ("", ""), **job: str) -> Ended:
    """`prefpipe ARGUMENTS`, or a `module`, as two ranks without the start of three interpreters. They meet as under
    torchrun: at a store that is open before they start, at a port that the system chose. `faults` are armed on rank 0
    and on rank 1. The code of the one that failed, if any."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    jobs = [
        {
            "arguments": list(map(str, arguments)),
            "env": {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank), "PREFPIPE_FAULT": fault},
            **job,
        }
        for rank, fault in enumerate(faults)
    ]
    ended = forged.run_together(jobs)
    return Ended(
        next((e.code for e in ended if e.code), 0), "".join(e.stderr for e in ended), "".join(e.stdout for e in ended)
    )


def adapter(out: Path) -> bytes:
    """The file of the trained adapter."""
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def metrics(out: Path) -> list[dict[str, Any]]:
    """The metrics of every step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
