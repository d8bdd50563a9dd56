"""The kernel's figures move when memory is taken."""

import ctypes
import os
import subprocess
import sys

import pytest

from prefpipe import memory
from prefpipe.stages.train import process_memory


def test_the_peak_holds_what_was_taken_and_given_back() -> None:
    size = 64 << 20
    assert process_memory.restart_resident_peak()
    before = process_memory.resident_memory()
    taken = bytearray(b"x") * size
    assert process_memory.resident_memory() >= before + size // 2
    del taken
    process_memory.return_free_memory()
    assert process_memory.resident_memory() < before + size // 2
    assert memory.resident_peak() >= before + size // 2


BLOCKS = """
import ctypes
from prefpipe.stages.train import process_memory
process_memory.return_blocks_at_once() if SET else None
libc, size, count = ctypes.CDLL(None), 100 << 10, 400
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
large, small = zip(*[(libc.malloc(size), libc.malloc(64)) for _ in range(count)])
for block in large:
    ctypes.memset(block, 1, size)
held = process_memory.resident_memory()
for block in large:
    libc.free(block)
print((held - process_memory.resident_memory()) / size / count)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_blocks_between_small_ones_go_back_to_the_kernel_when_they_are_freed() -> None:
    """Of 100 KiB each, below the 128 KiB from which glibc does so by itself: almost none without the call, all with."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    shares: list[float] = []
    for call in ("False", "True"):
        command = [sys.executable, "-c", BLOCKS.replace("SET", call)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        shares.append(float(done.stdout))
    assert shares[0] < 0.1
    assert shares[1] > 0.9
