"""What a run directory shares with others: the best policy, the rounds of another run, files that both have."""

import os
import shutil
from pathlib import Path

from prefpipe.errors import UsageError
from prefpipe.runs import fsio
from prefpipe.runs.storage import storage_errors


def publish(path: Path, target: Path) -> None:
    """Let `path` be a link to `target`, by way of the folder of `path`, so that both may move together. A link that
    stands there is replaced at once. Raises UsageError for anything else there."""
    words = os.path.relpath(target.absolute(), path.parent.absolute())
    if path.is_symlink() and str(path.readlink()) == words:
        return
    if not path.is_symlink() and os.path.lexists(path):
        raise UsageError(f"{path} is no link of this run", "move it away, or choose another --out")
    temporary = _temporary(path)
    fsio.make_dirs(path.parent)
    with storage_errors(path):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(words)
        _rename(temporary, path)


def share(source: Path, path: Path) -> None:
    """Let `path` be a second name of a file, so that it stays when the first is removed; a copy where the file system
    has no such names, or has the file elsewhere. Files of runs are never changed in place."""
    if path.exists() and path.samefile(source):
        return
    temporary = _temporary(path)
    fsio.make_dirs(path.parent)
    with storage_errors(path):
        temporary.unlink(missing_ok=True)
        try:
            os.link(source.resolve(), temporary)
        except OSError:
            fsio.write_atomic(path, lambda copy: shutil.copyfile(source, copy))
        else:
            _rename(temporary, path)


def withdraw(path: Path) -> None:
    """Remove a link; none, or something that is no link, is left alone."""
    if path.is_symlink():
        fsio.remove(path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _rename(temporary: Path, path: Path) -> None:
    fsio.fault("rename")
    temporary.replace(path)
    fsio.sync_dir(path.parent)
