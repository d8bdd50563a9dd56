"""Links from a run directory to what it shares with others: the best policy, the rounds of another run."""

import os
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(words)
        fsio.fault("rename")
        temporary.replace(path)
        fsio.sync_dir(path.parent)


def withdraw(path: Path) -> None:
    """Remove a link; none, or something that is no link, is left alone."""
    if path.is_symlink():
        fsio.remove(path)
