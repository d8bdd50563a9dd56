"""What this machine computes with: the number type that its hardware is fast at, GPUs, memory and how it is kept. No
package of the GPU is imported."""

import contextlib
import ctypes
import functools
import os
import subprocess
from pathlib import Path

_CPUINFO, _MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
_CGROUP, _DEV = Path("/sys/fs/cgroup/memory.max"), Path("/dev")
_CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})  # of x86 and, the last two, of ARM
_NVIDIA, _AMD = Path("/dev/nvidiactl"), Path("/dev/kfd")
_AMPERE = 8.0  # the first compute capability with bfloat16
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")


@functools.cache
def number_type() -> tuple[str, str]:
    """The number type to compute with, and why: bfloat16 where the hardware has it, float32 elsewhere.

    A CPU without it computes bfloat16 by conversions, 2.5 to 10 times slower than float32.
    """
    if _AMD.exists():
        return "bfloat16", "the GPU computes it"
    if _NVIDIA.exists():
        return _of_nvidia(_capabilities())
    flags = _CPU_FLAGS & set(_cpu_flags().split())
    if flags:
        return "bfloat16", f"this CPU computes it ({', '.join(sorted(flags))})"
    return "float32", "this CPU has no instructions for bfloat16"


def available_memory() -> int:
    """Bytes that this process may still take: the kernel's estimate of what can be had without swapping, or the limit
    of its container where that is less."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text(encoding="ascii").splitlines())
        free = int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _CGROUP.read_text(encoding="ascii").strip() if _CGROUP.exists() else "max"
    return min(free, int(limit)) if limit.isdigit() else free


def visible_gpus() -> tuple[str, ...]:
    """The NVIDIA GPUs of this process, as CUDA_VISIBLE_DEVICES names them, or by number."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        gpus = [name.strip() for name in named.split(",")]
        return tuple(gpus[: next((i for i, name in enumerate(gpus) if name in ("", "-1")), len(gpus))])
    return tuple(str(i) for i in range(len([p for p in _DEV.glob("nvidia[0-9]*") if p.name[6:].isdigit()])))


def has_gpu() -> bool:
    """Whether there is a GPU of NVIDIA or AMD, hidden or not."""
    return _AMD.exists() or _NVIDIA.exists()


def on_cpu() -> bool:
    """Whether this machine computes on its CPU: it has no GPU, or CUDA_VISIBLE_DEVICES hides every one."""
    return not has_gpu() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def named(dtype: str) -> str:
    """A number type by its name; auto is that of this machine."""
    return number_type()[0] if dtype == "auto" else dtype


def _of_nvidia(capabilities: list[float]) -> tuple[str, str]:
    if capabilities and min(capabilities) < _AMPERE:
        return "float32", f"a GPU of compute capability {min(capabilities)} has no bfloat16; float16 may be faster"
    return "bfloat16", "the GPU computes it"


def _capabilities() -> list[float]:
    """The compute capabilities of the NVIDIA GPUs; none where nobody says."""
    try:
        said = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, check=True, timeout=20).stdout
        return [float(line) for line in said.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def _cpu_flags() -> str:
    """The flags of the first core: on x86 the line `flags`, on ARM the line `Features`."""
    try:
        lines = _CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")


def keep_freed_memory() -> None:
    """Let glibc keep memory that is freed. A step of sampling frees buffers of [sequences, vocabulary]; by chance
    they went back to the system or not, and those that did were mapped again page by page in the next step
    (docs/LOG.md)."""
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    with contextlib.suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 32 << 20)  # the largest that glibc takes
        mallopt(trim_threshold, 512 << 20)
