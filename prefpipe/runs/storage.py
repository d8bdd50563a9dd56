"""What the operating system says to a write, as an error of prefpipe."""

import errno
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from prefpipe.errors import PrefpipeError, StorageError

_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def storage_errors(path: Path) -> Generator[None]:
    """Turn an OSError into a StorageError that names the path, and the free space when the disk is full.

    Packages in Rust (safetensors, tokenizers, polars) raise errors of their kind for it, with the number in the text.
    """
    try:
        yield
    except PrefpipeError:
        raise
    except Exception as error:
        rust = _RUST_ERROR.search(str(error))
        if rust is None and not isinstance(error, OSError):
            raise
        number = int(rust[1]) if rust is not None else getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing_parent(path)).free
            raise StorageError(
                f"no space left on the disk while writing {path} ({free:,} bytes free)",
                "free some space and run the same command again: committed work is kept",
            ) from error
        raise StorageError(
            f"cannot write {path}: {os.strerror(number) if number else error}",
            "check permissions and the disk, then run the same command again",
        ) from error


@contextmanager
def utf8(path: Path) -> Generator[Path]:
    """A path of the same file or directory that is UTF-8, for packages that take no other (Arrow, polars)."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        parent = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            yield Path(f"/proc/{os.getpid()}/fd/{parent}", path.name)
        finally:
            os.close(parent)
    else:
        yield path


@cache
def utf8_directory(path: Path) -> Path:
    """As `utf8`, of a directory, for as long as this process lives."""
    with utf8(path) as name:
        return path if name == path else Path(f"/proc/{os.getpid()}/fd/{os.open(path, os.O_PATH | os.O_DIRECTORY)}")


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in [path, *path.absolute().parents] if parent.exists())
