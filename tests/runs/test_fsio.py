"""Files are whole or absent, directories have one writer, and nothing is overwritten, whatever fails and when."""

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import filelock
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.errors import LockedError, StorageError
from prefpipe.runs import fsio
from tests.conftest import ROOT

TEXT = st.text(st.characters(codec="utf-8"), max_size=50)
WRITE_POINTS = ("write", "fsync", "rename", "fsync_dir")


@contextmanager
def armed(fault: str) -> Generator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFPIPE_FAULT", fault)
        fsio._passes.clear()
        yield


def python(code: str, *arguments: object, fault: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PREFPIPE_FAULT": fault},
    )


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def umask(mask: int) -> Generator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@settings(deadline=None, max_examples=60)
@given(old=st.none() | TEXT, new=TEXT, point=st.sampled_from(WRITE_POINTS), action=st.sampled_from(("enospc", "eio")))
def test_a_failed_write_leaves_the_old_file_or_the_whole_new_one(
    old: str | None, new: str, point: str, action: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.txt"
        if old is not None:
            fsio.write_text(path, old)
        with armed(f"{point}:1:{action}"), pytest.raises(StorageError) as caught:
            fsio.write_text(path, new)
        assert caught.value.exit_code == 74
        assert str(path) in caught.value.message
        survivor = new if point == "fsync_dir" else old  # the rename has happened when the directory is synced
        assert [p.name for p in Path(folder).iterdir()] == ([] if survivor is None else ["file.txt"])
        if survivor is not None:
            assert path.read_bytes() == survivor.encode()


def in_order(folder: Path, shards: int = 2) -> None:
    """Two datasets, with a record for each file."""
    parts = [folder / name / f"part-{number}" for number in range(shards) for name in ("a", "b")]
    groups = [parts, [path.with_suffix(".ok") for path in parts]]
    fsio.write_in_order([{path: lambda to, text=path.name: to.write_text(text) for path in group} for group in groups])


def test_a_file_of_a_later_group_never_stands_without_those_before_whenever_the_power_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the order of calls. What a directory forgets is what was renamed since its last sync, any part of it."""
    synced, renamed, safe = set[Path](), set[Path](), set[Path]()
    plain = os.replace

    def fsync(number: int) -> None:
        path = Path(f"/proc/self/fd/{number}").readlink()
        synced.add(path)
        safe.update(file for file in renamed if file.parent == path)

    def replace(temporary: Path, path: Path) -> None:
        assert temporary in synced  # a name never stands for bytes that are not on the disk
        if path.suffix == ".ok":
            assert path.with_suffix("") in safe
        renamed.add(path)
        plain(temporary, path)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    in_order(tmp_path)
    assert safe == renamed == {path for path in tmp_path.rglob("part*") if path.is_file()}
    assert len(safe) == 8


@pytest.mark.parametrize(("point", "passes"), [("write", 8), ("fsync", 8), ("rename", 8), ("fsync_dir", 4)])
def test_of_files_in_order_an_error_leaves_whole_ones_and_no_later_one_without_its_earlier(
    tmp_path: Path, point: str, passes: int
) -> None:
    for number in range(1, passes + 1):
        folder = tmp_path / str(number)
        with armed(f"{point}:{number}:eio"), pytest.raises(StorageError):
            in_order(folder)
        there = {path for path in folder.rglob("*") if path.is_file()}
        assert all(path.read_text() == path.name for path in there)
        assert {path.with_suffix("") for path in there if path.suffix == ".ok"} <= there
    with armed(f"{point}:{passes + 1}:eio"):
        in_order(tmp_path / "all")


def test_a_full_disk_says_how_much_is_free_and_that_a_rerun_helps(tmp_path: Path) -> None:
    with armed("write:1:enospc"), pytest.raises(StorageError, match=r"no space left.*bytes free") as caught:
        fsio.write_text(tmp_path / "a" / "b", "x")
    assert "run the same command again" in caught.value.hint
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC


def test_an_error_of_the_writer_itself_leaves_nothing(tmp_path: Path) -> None:
    def half_then_fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fsio.write_atomic(tmp_path / "file", half_then_fail)
    assert list(tmp_path.iterdir()) == []


def test_only_the_nth_pass_fails(tmp_path: Path) -> None:
    with armed("write:2:eio"):
        fsio.write_text(tmp_path / "first", "1")
        with pytest.raises(StorageError):
            fsio.write_text(tmp_path / "second", "2")
        fsio.write_text(tmp_path / "third", "3")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "third"]


@pytest.mark.parametrize(
    ("fault", "published"),
    [
        ("write:1:enospc", False),
        ("write:2:eio", False),
        ("fsync:2:eio", False),
        ("fsync_dir:1:eio", False),  # the subfolder
        ("fsync_dir:2:eio", False),  # the directory itself
        ("rename:1:eio", False),
        ("fsync_dir:3:eio", True),  # its parent, after the rename
    ],
)
def test_a_directory_is_absent_or_complete(tmp_path: Path, fault: str, published: bool) -> None:
    def fill(into: Path) -> None:
        (into / "inner").mkdir()
        (into / "inner" / "a").write_text("a")
        (into / "b").write_text("b")

    with armed(fault), pytest.raises(StorageError):
        fsio.publish_dir(tmp_path / "d", fill)
    assert [p.name for p in tmp_path.iterdir()] == (["d"] if published else [])
    if not published:
        fsio.publish_dir(tmp_path / "d", fill)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["d", "d/b", "d/inner", "d/inner/a"]


def test_a_torn_write_kills_the_process_and_the_next_writer_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "out" / "file.txt"
    code = "import sys, pathlib; from prefpipe.runs import fsio; fsio.write_text(pathlib.Path(sys.argv[1]), 'x' * 1000)"
    done = python(code, path, fault="write:1:torn")
    assert done.returncode == -signal.SIGKILL
    (left,) = path.parent.iterdir()
    assert left.name.startswith(".file.txt.")
    assert left.name.endswith(".tmp")
    assert left.stat().st_size == 500
    with fsio.lock(path.parent):
        fsio.remove_leftovers(path.parent)
        assert not left.exists()
    assert not path.exists()


@pytest.mark.parametrize("point", WRITE_POINTS)
def test_a_killed_writer_leaves_no_partial_file_under_the_name(tmp_path: Path, point: str) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    code = "import sys, pathlib; from prefpipe.runs import fsio; fsio.write_text(pathlib.Path(sys.argv[1]), 'new')"
    assert python(code, path, fault=f"{point}:1:kill").returncode == -signal.SIGKILL
    assert path.read_text() == ("new" if point == "fsync_dir" else "old")


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_published_files_follow_the_umask(tmp_path: Path, mask: int) -> None:
    def private(into: Path) -> None:
        (into / "weights").touch(mode=0o600)
        (into / "weights").chmod(0o600)  # as safetensors leaves it

    with umask(mask):
        fsio.write_text(tmp_path / "text", "x")
        fsio.publish_dir(tmp_path / "d", private)
    assert mode(tmp_path / "text") == 0o666 & ~mask
    assert mode(tmp_path / "d") == 0o777 & ~mask
    assert mode(tmp_path / "d" / "weights") == 0o666 & ~mask


def test_a_second_process_is_refused_and_told_who_holds_the_lock_until_a_kill_9(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from prefpipe.runs import fsio\n"
        "with fsio.lock(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {owner.pid} on ") as caught, fsio.lock(tmp_path):
            pass
        assert caught.value.exit_code == 75
        assert str(tmp_path) in caught.value.message
        owner.kill()
    with fsio.lock(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / ".owner").read_text()


def test_who_has_the_lock_is_asked_again_as_long_as_it_has_not_said_who_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process writes its name when it has the lock; a busy machine may let others look in between."""
    acquire, owner, tries = filelock.FileLock.acquire, tmp_path / ".owner", list[int]()

    def acquired(self: filelock.FileLock, **options: float) -> object:
        tries.append(1)
        if len(tries) == 3:
            owner.write_text("process 7 on there\n")
        return acquire(self, **options)

    owner.touch()
    monkeypatch.setattr(filelock.FileLock, "acquire", acquired)
    with (tmp_path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(LockedError, match="is being written by process 7 on there"), fsio.lock(tmp_path):
            pass
    assert len(tries) == 3


def test_the_lock_is_free_after_an_error_inside(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), fsio.lock(tmp_path / "new"):
        raise ZeroDivisionError
    with fsio.lock(tmp_path / "new"):
        pass


def test_waiting_for_the_lock_ends_when_the_other_process_ends(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from prefpipe.runs import fsio\n"
        "with fsio.lock(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(0.5)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        with fsio.lock(tmp_path, wait=True):
            assert owner.wait() == 0


def test_leftovers_are_removed_at_any_depth_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.1.tmp", "inner/.b.2.tmp", ".d.3.tmp/x", ".d.3.tmp/sub/.y.tmp", "keep", "keep.tmp", "inner/.keep"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    fsio.remove_leftovers(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "inner/.keep",
        "keep",
        "keep.tmp",
    ]


def test_temporary_files_of_a_live_writer_further_down_are_left_alone(tmp_path: Path) -> None:
    busy = tmp_path / "round-1" / "train" / ".adapter.1.tmp"
    with fsio.lock(busy.parent):  # a step whose `iterate` was killed and that still writes
        busy.write_text("half")
        with fsio.lock(tmp_path):  # `iterate` again
            assert busy.exists()


@settings(deadline=None, max_examples=30)
@given(names=st.lists(st.sampled_from(("part", "part.1", "other")), max_size=8))
def test_move_aside_never_overwrites(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "quarantine"
        targets: dict[Path, str] = {}
        for number, name in enumerate(names):
            source = Path(folder) / name
            source.write_text(str(number))
            targets[fsio.move_aside(source, into)] = str(number)
            assert not source.exists()
        assert len(targets) == len(names)
        assert {p: p.read_text() for p in targets} == targets


def test_move_aside_moves_whole_directories(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "file").write_text(str(number))
        fsio.move_aside(tmp_path / "d", tmp_path / "q")
    assert [(tmp_path / "q" / n / "file").read_text() for n in ("d", "d.1")] == ["0", "1"]


def test_move_aside_of_what_is_not_there_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="gone"):
        fsio.move_aside(tmp_path / "gone", tmp_path / "q")


def test_append_adds_lines_and_reports_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    fsio.append_line(path, "one")
    with armed("append:1:enospc"), pytest.raises(StorageError, match="no space"):
        fsio.append_line(path, "two")
    fsio.append_line(path, "drei ä")
    assert path.read_bytes() == "one\ndrei ä\n".encode()


def test_truncate_cuts_back_to_a_size(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"abcdef")
    fsio.truncate(path, 4)
    assert path.read_bytes() == b"abcd"
    fsio.truncate(path, 0)
    assert path.read_bytes() == b""
    fsio.truncate(tmp_path / "absent", 4)
    assert not (tmp_path / "absent").exists()


def test_truncate_never_makes_a_file_longer(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"abc")
    fsio.truncate(path, 10)  # a power cut can lose the last lines of a log that a checkpoint counted
    assert path.read_bytes() == b"abc"


def test_remove_dir_removes_it(tmp_path: Path) -> None:
    fsio.make_dirs(tmp_path / "d" / "e")
    fsio.remove_dir(tmp_path / "d")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match="cannot write"):
        fsio.remove_dir(tmp_path / "d")


def test_a_file_where_a_directory_should_be_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file"):
        fsio.make_dirs(tmp_path / "file" / "below")


def test_a_directory_that_is_published_again_stays_where_it_is_the_same(tmp_path: Path) -> None:
    """A killed run may have published it; nobody vouches for its bytes until the manifest is there."""

    def fill(into: Path) -> None:
        (into / "weights").write_bytes(b"weights")

    path = tmp_path / "adapter"
    fsio.publish_dir(path, fill, tmp_path / "quarantine")
    before = path.stat().st_ino
    fsio.publish_dir(path, fill, tmp_path / "quarantine")
    assert path.stat().st_ino == before
    (path / "weights").write_bytes(b"weightz")
    fsio.publish_dir(path, fill, tmp_path / "quarantine")
    assert (path / "weights").read_bytes() == b"weights"
    assert (tmp_path / "quarantine" / "adapter" / "weights").read_bytes() == b"weightz"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "quarantine"]
