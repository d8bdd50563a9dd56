"""The most memory that this process has held: main memory with that of the processes it started, and of its GPUs."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_GIB = 1 << 30
_PROC = Path("/proc")


def peaks() -> dict[str, float]:
    """Peaks in GiB, for timing.jsonl. `peak_memory_gib` adds up this process and those below it that still run;
    `peak_gpu_memory_gib` is what torch has reserved in this process, absent where it uses no GPU. The kernel's count
    starts anew where training measures the memory of a step."""
    found = {"peak_memory_gib": round(sum(map(resident_peak, ["self", *_below("self")])) / _GIB, 3)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        reserved = sum(torch.cuda.max_memory_reserved(device) for device in range(torch.cuda.device_count()))
        found["peak_gpu_memory_gib"] = round(reserved / _GIB, 3)
    return found


def _below(process: str) -> Iterator[str]:
    """The processes that a process started and that still run, and those that they started."""
    for task in (_PROC / process / "task").glob("*/children"):
        with suppress(OSError):  # it ended
            for child in task.read_text(encoding="ascii").split():
                yield child
                yield from _below(child)


def resident_peak(process: str = "self") -> int:
    """The most bytes that a process has held, since its count was restarted; 0 for one that has ended."""
    with suppress(OSError, ValueError):
        for line in (_PROC / process / "status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
