"""Temporary folders that a program writes to: the size of their content, and their removal whatever it is."""

import contextlib
import itertools
import math
import os
import secrets
import stat
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

_ENTRY_BYTES = 4096  # bytes that a name costs, at least


@contextlib.contextmanager
def temporary_folder() -> Generator[str]:
    """A temporary folder, removed at the end with whatever a program left in it."""
    folder = tempfile.mkdtemp(prefix="prefpipe-code-")
    try:
        yield folder
    finally:
        remove_tree(folder)


def remove_tree(folder: str) -> None:
    """Remove a folder of any depth. The content of each inner folder is moved up before the folder is removed, so that
    neither the stack nor the length of a path is a limit."""
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    numbers = itertools.count()
    try:
        while names := os.listdir(top):  # noqa: PTH208  (a descriptor)
            for name in names:
                if stat.S_ISDIR(os.stat(name, dir_fd=top, follow_symlinks=False).st_mode):
                    _empty(top, name, numbers)
                    os.rmdir(name, dir_fd=top)
                else:
                    os.unlink(name, dir_fd=top)
    finally:
        os.close(top)
    Path(folder).rmdir()


def _empty(top: int, name: str, numbers: Iterator[int]) -> None:
    """Move the content of the folder `name` of `top` into `top`, under unused names."""
    os.chmod(name, stat.S_IRWXU, dir_fd=top)
    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
    try:
        for entry in os.listdir(inner):  # noqa: PTH208
            if stat.S_ISDIR(os.stat(entry, dir_fd=inner, follow_symlinks=False).st_mode):
                os.chmod(entry, stat.S_IRWXU, dir_fd=inner)  # a folder without write permission cannot be moved
            os.rename(entry, f"{secrets.token_hex(8)}-{next(numbers)}", src_dir_fd=inner, dst_dir_fd=top)
    finally:
        os.close(inner)


def used_bytes(folder: str, process: str) -> float:
    """Bytes on disk of a folder, and of deleted files that a process still has open; each name counts as one block
    more.

    `process` is the id of a process, "" for none. Files that vanish meanwhile do not count. Infinite when a folder
    cannot be listed, because it may not be read or its path is too long.
    """
    total, folders, seen = 0, [folder], set[int]()
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    total += _ENTRY_BYTES
                    with contextlib.suppress(FileNotFoundError):
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
                        elif entry.inode() not in seen:
                            seen.add(entry.inode())
                            total += entry.stat(follow_symlinks=False).st_blocks * 512
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:
            return math.inf
    return total + (_deleted_bytes(process) if process else 0)


def _deleted_bytes(process: str) -> int:
    total = 0
    with contextlib.suppress(OSError), os.scandir(f"/proc/{process}/fd") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                opened = entry.stat()
                if opened.st_nlink == 0 and stat.S_ISREG(opened.st_mode):
                    total += opened.st_blocks * 512
    return total
