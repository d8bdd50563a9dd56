"""Files that survive a power cut: the only fsync of the package."""

import errno
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prefpipe import log
from prefpipe.runs.storage import storage_errors

_MOST_AT_ONCE, _FILES_EACH = 8, 5  # threads, and files for which one is worth its start
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
_without_fsync = set[int]()  # devices of which it was said


def sync(files: Mapping[Path, Path]) -> None:
    """Fsync files or directories, by the name that an error is to have: they may stand under a temporary one.

    Several at once, because a file system with a journal then commits them together. Of a file system without fsync it
    is said once.
    """
    at_once = min(len(files) // _FILES_EACH, _MOST_AT_ONCE)
    if at_once < 2:
        errors = [*map(_error, files.values())]
    else:
        with ThreadPoolExecutor(at_once) as threads:
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
