"""Every write, rename, fsync and lock of the package, with fault points for the crash tests.

`PREFPIPE_FAULT="point:n:action"` makes a crash: the n-th call (from 1) that reaches `point` does `action`. Points are
`write`, `fsync`, `rename`, `fsync_dir`, `append`, and `pwrite` of `in_place`. Actions are `kill` (SIGKILL to this
process), `sigterm`, `enospc`, `eio`, and `torn` (half of the bytes reach the temporary file, then SIGKILL).
"""

import errno
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import filelock

from prefpipe.clock import utc_now
from prefpipe.errors import LockedError, StorageError
from prefpipe.reading import file_digest, read_bytes
from prefpipe.runs import syncs
from prefpipe.runs.storage import storage_errors, utf8

Appender = Callable[[str], None]
Writer = Callable[[Path], object]  # fills the file of that name
_LEFTOVER = re.compile(r"\..+\.\d+\.tmp")
_ASKED_S = 0.1  # who only looks whether a directory is held (`prefpipe runs`) is done by then
_passes: Counter[str] = Counter()  # calls per fault point, while a fault is armed


def fault(point: str, path: Path | None = None) -> None:
    """A fault point: do what PREFPIPE_FAULT asks for this call. `path` is the file that `torn` cuts in half."""
    armed = os.environ.get("PREFPIPE_FAULT")
    if not armed:
        return
    name, _, rest = armed.partition(":")
    number, _, action = rest.partition(":")
    if name != point:
        return
    _passes[point] += 1
    if _passes[point] != int(number):
        return
    if action == "enospc":
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    if action == "eio":
        raise OSError(errno.EIO, "Input/output error", str(path))
    if action == "torn" and path is not None:
        os.truncate(path, path.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGTERM if action == "sigterm" else signal.SIGKILL)


def make_dirs(path: Path) -> None:
    """Create a directory and its parents."""
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def write_atomic(path: Path, write: Writer) -> None:
    """Write one file, see `write_in_order`."""
    write_in_order([{path: write}])


def write_in_order(groups: Sequence[Mapping[Path, Writer]]) -> None:
    """Fill a temporary file beside each path and fsync all of them; then rename those of the first group and fsync
    their directories, and so on with the next.

    A reader sees an old file or a whole new one, never a part. A file of a later group is there only with those of the
    groups before, also after a power cut. A failed write leaves no temporary file behind. Many files cost few waits for
    the disk: one for all contents, and one for the directories of each group.
    """
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for group in groups for path in group}
    try:
        for path, write in (file for group in groups for file in group.items()):
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write(temporary[path])
                fault("write", temporary[path])
        _sync("fsync", temporary)
        for group in groups:
            for path in group:
                with storage_errors(path):
                    fault("rename")
                    os.replace(temporary[path], path)
            folders = {path.parent: path for path in group}
            _sync("fsync_dir", {path: folder for folder, path in folders.items()})
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically (UTF-8). Bytes of a path that is not UTF-8 are written as JSON does it."""
    write_atomic(path, lambda temporary: temporary.write_bytes(text.encode(errors="backslashreplace")))


def publish_dir(path: Path, fill: Callable[[Path], object], aside: Path | None = None) -> None:
    """Let `fill` build a directory under a temporary name, fsync everything in it, and rename it to `path`.

    A published directory is complete from the moment it exists. One that stands at `path` already moves into `aside`,
    unless it has the same content; without `aside` none may stand there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            # The new folder shows the umask; asking for it would change it for a moment, in all threads.
            mode = temporary.stat().st_mode & 0o666
            fill(temporary)
            for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
                file.chmod(mode)  # safetensors leaves 0600, and a vLLM of another user must read an adapter
                fault("write", file)
                sync_file(file)
            for folder in sorted(p for p in temporary.rglob("*") if p.is_dir()):
                sync_dir(folder)
            sync_dir(temporary)
            if aside is not None and os.path.lexists(path):
                if _contents(path) == _contents(temporary):
                    shutil.rmtree(temporary)
                    return
                move_aside(path, aside)
            fault("rename")
            os.rename(temporary, path)
            sync_dir(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def temporary_dir(path: Path) -> Generator[Path]:
    """A directory beside `path` under a temporary name that is UTF-8, removed at the end.

    `remove_leftovers` removes it when the process was killed before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        temporary.mkdir(parents=True)
    try:
        with utf8(temporary) as name:
            yield name
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def append_line(path: Path, line: str) -> None:
    """Append one line to a log file. A kill can tear the last line, which readers ignore."""
    with storage_errors(path):
        fault("append", path if path.exists() else None)
        with open(path, "a", encoding="utf-8", opener=_without_waiting) as file:
            file.write(line + "\n")


@contextmanager
def appender(path: Path) -> Generator[Appender]:
    """A function that appends one line per system call: lines survive a kill of this process, not a power cut."""
    with storage_errors(path):
        file = open(path, "ab", buffering=0, opener=_without_waiting)  # noqa: SIM115  (closed below)

    def append(line: str) -> None:
        with storage_errors(path):
            file.write(line.encode() + b"\n")

    with file:
        yield append


def remove(path: Path) -> None:
    """Remove a file; none is no error."""
    with storage_errors(path):
        path.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Fsync a file, so that appended lines survive a power cut."""
    _sync("fsync", {path: path})


def truncate(path: Path, size: int) -> None:
    """Cut a log file back to `size` bytes. A resumed run drops the lines after its checkpoint."""
    with storage_errors(path):
        if path.exists() and path.stat().st_size > size:
            os.truncate(path, size)


def move_aside(path: Path, into: Path) -> Path:
    """Move a file or directory into `into`, with a number behind its name when that is taken. Returns its new path."""
    with storage_errors(path):
        target = _free_name(path, into)
        os.rename(path, target)
        return target


def copy_aside(path: Path, into: Path) -> None:
    """Copy a file into `into`, with a number behind its name when that is taken."""
    with storage_errors(path):
        write_atomic(_free_name(path, into), lambda temporary: shutil.copyfile(path, temporary))


def remove_dir(path: Path) -> None:
    """Remove a directory with everything in it."""
    with storage_errors(path):
        shutil.rmtree(path)


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files of writers that were killed. The caller holds the lock of the directory.

    A folder with another lock in it is skipped: it is another run, such as a step of a round.
    """
    with storage_errors(directory):
        for entry in sorted(directory.iterdir()):
            if is_leftover(entry) and entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif is_leftover(entry):
                entry.unlink()
            elif entry.is_dir() and not entry.is_symlink() and not (entry / ".lock").exists():
                remove_leftovers(entry)


def is_leftover(path: Path) -> bool:
    """Whether a path has the name of a temporary file of this module."""
    return _LEFTOVER.fullmatch(path.name) is not None


def sync_dir(path: Path) -> None:
    """Fsync a directory, so that renames in it survive a power cut."""
    _sync("fsync_dir", {path: path})


@contextmanager
def lock(directory: Path, *, wait: bool = False) -> Generator[None]:
    """Hold `directory` for this process. The kernel frees the lock when the process ends, however it ends.

    While another process holds it, `wait` waits for its end; otherwise LockedError names that process.
    """
    make_dirs(directory)
    held = filelock.FileLock(directory / ".lock")
    owner = directory / ".owner"
    try:
        for tries_left in range(10, -1, -1):
            try:
                held.acquire(timeout=-1 if wait else _ASKED_S, poll_interval=_ASKED_S / 4)
                break
            except filelock.Timeout as error:
                who = read_bytes(owner).decode(errors="replace").strip() if owner.is_file() else ""
                if not who and tries_left:  # it has come just now, and writes it next
                    continue
                raise LockedError(
                    f"{directory} is being written by {who or 'an unknown process'}",
                    "wait for it to end, or choose another --out",
                ) from error
    except OSError as error:
        raise StorageError(
            f"cannot lock {directory}: {error.strerror}", "check its permissions, or choose another --out"
        ) from error
    try:
        with storage_errors(owner), open(owner, "w", encoding="utf-8", opener=_without_waiting) as file:
            file.write(f"process {os.getpid()} on {os.uname().nodename}, since {utc_now()}\n")
        yield
    finally:
        held.release()


def _sync(point: str, files: Mapping[Path, Path]) -> None:
    """Fsync files or directories, see `syncs.sync`."""
    for path in files:
        with storage_errors(path):
            fault(point)
    syncs.sync(files)


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file to write; a pipe without a reader, which would wait for one, is refused."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def _contents(directory: Path) -> dict[str, str]:
    """The digest of every file in a directory."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(file.relative_to(directory)): file_digest(file) for file in files}


def _free_name(path: Path, into: Path) -> Path:
    into.mkdir(parents=True, exist_ok=True)
    target = into / path.name
    number = 1
    while os.path.lexists(target):
        target = into / f"{path.name}.{number}"
        number += 1
    return target
