"""Files that survive a power cut: the only fsync of the package."""

import errno
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prefpipe import log
from prefpipe.runs.storage import storage_errors

_AT_ONCE = 8
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
_without_fsync = set[int]()  # devices of which it was said


def sync(files: Mapping[Path, Path]) -> None:
    """Fsync files or directories, by the name that an error is to have: they may stand under a temporary one.

    Several at once, because a file system with a journal then commits them together. Of a file system without fsync it
    is said once.
    """
    if len(files) == 1:
        errors = [*map(_error, files.values())]
    else:
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            errors = [*threads.map(_error, files.values())]
    for (path, file), error in zip(files.items(), errors, strict=True):
        if error is None:
            continue
        if error.errno not in _NO_FSYNC:
            with storage_errors(path):
                raise error
        device = file.stat().st_dev
        if device not in _without_fsync:
            log.warn(f"the file system of {path} has no fsync: what a power cut leaves is up to it")
        _without_fsync.add(device)


def _error(file: Path) -> OSError | None:
    """Fsync a file or directory; the error, if there is one."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        return error
    return None
