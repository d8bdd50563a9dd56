"""Files that several processes fill together: one of them makes the file, each then writes its bytes where they belong.

Fault point (`fsio.fault`): `pwrite`, before each call of `write_at`.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from prefpipe.runs import fsio
from prefpipe.runs.storage import storage_errors


def create(path: Path, head: bytes, size: int) -> None:
    """Make a file of `size` bytes that begins with `head`."""
    with storage_errors(path), path.open("xb") as file:
        file.write(head)
        file.truncate(size)


def write_at(path: Path, place: int, blocks: Iterable[memoryview]) -> None:
    """Write blocks one after the other into a file that is there, from byte `place` on."""
    with storage_errors(path):
        fsio.fault("pwrite", path)
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for block in blocks:
                left = block
                while left:
                    count = os.pwrite(descriptor, left, place)
                    left, place = left[count:], place + count
        finally:
            os.close(descriptor)
