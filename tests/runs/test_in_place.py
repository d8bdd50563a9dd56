"""Files that several processes fill: bytes where they belong, and what the operating system says to a write."""

from pathlib import Path

import pytest

from prefpipe.errors import StorageError
from prefpipe.runs import fsio, in_place


def test_blocks_stand_where_they_belong(tmp_path: Path):
    path = tmp_path / "f"
    in_place.create(path, b"head", 12)
    assert path.read_bytes() == b"head" + b"\0" * 8
    in_place.write_at(path, 8, [memoryview(b"ij"), memoryview(b"kl")])
    in_place.write_at(path, 4, [memoryview(b"efgh")])
    assert path.read_bytes() == b"headefghijkl"


def test_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "f"
    with pytest.raises(StorageError, match="cannot write"):
        in_place.write_at(path, 0, [])
    in_place.create(path, b"", 4)
    with pytest.raises(StorageError, match="File exists"):
        in_place.create(path, b"", 4)
    monkeypatch.setenv("PREFPIPE_FAULT", f"pwrite:{fsio._passes['pwrite'] + 1}:enospc")
    with pytest.raises(StorageError, match="no space left"):
        in_place.write_at(path, 0, [memoryview(b"a")])
    assert path.read_bytes() == b"\0" * 4
