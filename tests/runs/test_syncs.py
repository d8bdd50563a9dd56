"""What is synced: every file once, several at a time; a file system without fsync is said once."""

import errno
import os
from pathlib import Path

import pytest

from prefpipe.errors import StorageError
from prefpipe.runs import fsio, syncs


@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_every_file_and_directory_is_synced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda number: seen.append(Path(f"/proc/self/fd/{number}").readlink()))
    files = [tmp_path / str(number) for number in range(count)]
    for file in files:
        file.mkdir() if file.name.endswith("3") else file.touch()
    syncs.sync({Path("named", file.name): file for file in files})
    assert sorted(seen) == sorted(files)


def test_the_one_of_many_that_fails_is_named_as_it_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> None:
        if Path(f"/proc/self/fd/{number}").readlink().name == "7":
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    for number in range(10):
        (tmp_path / str(number)).touch()
    with pytest.raises(StorageError, match="cannot write named/7: Input/output error"):
        syncs.sync({Path("named", str(number)): tmp_path / str(number) for number in range(10)})


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_fsync_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def refuse(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(syncs, "_without_fsync", set[int]())
    for name in ("a", "b"):
        fsio.write_text(tmp_path / name, name)
        fsio.publish_dir(tmp_path / f"{name}.d", lambda into: (into / "file").touch())
    assert (tmp_path / "b").read_text() == "b"
    assert capsys.readouterr().err.count("has no fsync") == 1


def test_an_fsync_that_fails_is_no_missing_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        fsio.write_text(tmp_path / "a", "a")
    assert list(tmp_path.iterdir()) == []
