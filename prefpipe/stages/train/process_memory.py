"""The memory of this process, as the kernel counts it."""

import ctypes
import os
from pathlib import Path

import pyarrow as pa

_MMAP_THRESHOLD, _APART = -3, 64 << 10  # M_MMAP_THRESHOLD of malloc.h, and its bytes


def resident_memory() -> int:
    """Bytes of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def restart_resident_peak() -> bool:
    """Make `prefpipe.memory.resident_peak` count from now on. False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def return_free_memory() -> None:
    """Give memory that was freed back to the kernel; Arrow and glibc would keep it. Other C libraries do as they do."""
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def return_blocks_at_once() -> None:
    """From now on glibc gives blocks of 64 KiB and more back to the kernel when they are freed. In its heap small
    blocks that live on keep the holes between them from being joined. Other C libraries do as they do."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _APART)
