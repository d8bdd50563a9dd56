"""Reads are bounded and name the file: 66 where it is not, 65 where it is no such file, 74 where the system refuses."""

import errno
import json
import os
import signal
import socket
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe import reading
from prefpipe.config import base
from prefpipe.config.train import TrainConfig
from prefpipe.errors import DataError, MissingInputError, PrefpipeError, StorageError
from prefpipe.runs import commits, manifests

READERS: dict[str, Callable[[Path], object]] = {
    "bytes": reading.read_bytes,
    "text": reading.read_text,
    "json": reading.read_json,
    "toml": reading.read_toml,
    "digest": reading.file_digest,
    "recipe": lambda path: base.load(TrainConfig, path, {}),
    "manifest": manifests.read,
}


@pytest.fixture(autouse=True)
def never_a_hang() -> Iterator[None]:
    """A read that waits ends the test: SIGALRM kills as no test framework could."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("a read waits"))
    signal.alarm(120)
    yield
    signal.alarm(0)


def a_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


KINDS: dict[str, tuple[Callable[[Path], object], type[PrefpipeError], str]] = {
    "nothing": (lambda _path: None, MissingInputError, "does not exist"),
    "a directory": (Path.mkdir, DataError, "is a directory"),
    "a named pipe": (os.mkfifo, DataError, "is a named pipe"),
    "a link to a pipe": (lambda p: (os.mkfifo(p.with_name("q")), p.symlink_to("q")), DataError, "is a named pipe"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), DataError, "is a device"),
    "a socket": (a_socket, DataError, "is a socket"),
    "a link to nothing": (lambda path: path.symlink_to("absent"), MissingInputError, "does not exist"),
    "a link to itself": (lambda path: path.symlink_to(path.name), MissingInputError, "does not exist"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str, reader: str) -> None:
    make, error, words = KINDS[kind]
    make(tmp_path / "p.json")
    with pytest.raises(error, match=words) as caught:
        READERS[reader](tmp_path / "p.json")
    assert str(tmp_path / "p.json") in caught.value.message


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file/below", "x/" * 3000])
@pytest.mark.parametrize("reader", READERS)
def test_a_path_that_can_be_none_does_not_exist(tmp_path: Path, name: str, reader: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MissingInputError, match="does not exist"):
        READERS[reader](tmp_path / name)
    assert not reading.is_there(tmp_path / name)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ENXIO, errno.ENOMEM])
@pytest.mark.parametrize("call", ["stat", "open", "read"])
@pytest.mark.parametrize("reader", READERS)
def test_what_the_system_refuses_is_74(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str, reader: str
) -> None:
    path = tmp_path / "p.json"
    path.write_text("{}")

    def fail(*_given: object, **_named: object) -> None:
        raise OSError(number, os.strerror(number))

    class Failing(reading.io.FileIO):
        read = fail

    with monkeypatch.context() as patch:
        if call == "stat":
            patch.setattr(Path, "stat", fail)
        elif call == "open":
            patch.setattr(reading.os, "open", fail)
        else:
            patch.setattr(reading.io, "FileIO", Failing)
        with pytest.raises(StorageError, match=os.strerror(number)) as caught:
            READERS[reader](path)
    assert str(path) in caught.value.message
    assert caught.value.exit_code == 74


def test_a_file_that_grows_without_end_is_read_no_further_than_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    path.touch()
    os.truncate(path, 1 << 40)  # a hole: it takes no room
    for read in (reading.read_text, reading.read_json, reading.read_toml, manifests.read_json):
        with pytest.raises(DataError, match=r"big\.json has more than 67,108,864 bytes"):
            read(path)
    with pytest.raises(DataError, match="more than 1,048,576 bytes"):
        base.load(TrainConfig, path, {})
    (tmp_path / "exact").write_bytes(b"12345")
    assert reading.read_bytes(tmp_path / "exact", 5) == b"12345"
    with pytest.raises(DataError, match="more than 4 bytes"):
        reading.read_bytes(tmp_path / "exact", 4)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
)
BAD_JSON = {
    "brackets": "[" * 100_000 + "]" * 100_000,
    "braces": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "more than DEPTH": "[" * 203 + "]" * 203,
    "a giant integer": '{"a": ' + "9" * 10_000 + "}",
    "NUL": '{"a": 1}\0',
    "latin-1": '{"a": "größe"}'.encode("latin-1"),
    "half a character": '{"a": ["\\ud800"]}',
    "half a character in a key": '{"\\udfff": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
}
BAD_TOML = {
    "brackets": "a = " + "[" * 100_000 + "]" * 100_000,
    "tables": "a = " + "{a=" * 100_000 + "1" + "}" * 100_000,
    "a key of many parts": "a." * 400_000 + "a = 1",
    "a table of many parts": "[" + "a . " * 200_000 + "a]",
    "a giant integer": "a = " + "9" * 10_000,
    "NUL": "a = 1\0",
    "latin-1": 'a = "größe"'.encode("latin-1"),
}


@pytest.mark.parametrize("case", BAD_JSON)
@pytest.mark.parametrize("reader", ["json", "recipe", "manifest"])
def test_json_that_no_parser_should_take(tmp_path: Path, case: str, reader: str) -> None:
    content = BAD_JSON[case]
    path = tmp_path / "p.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=r"p\.json") as caught:
        READERS[reader](path)
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("case", BAD_TOML)
@pytest.mark.parametrize("reader", ["toml", "recipe"])
def test_toml_that_no_parser_should_take(tmp_path: Path, case: str, reader: str) -> None:
    content = BAD_TOML[case]
    path = tmp_path / "p.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=r"p\.toml"):
        READERS[reader](path)


@settings(deadline=None, max_examples=60)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    )
)
def test_json_values_come_back(value: object) -> None:
    text = json.dumps(value, ensure_ascii=False)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "p.json").write_text(text, encoding="utf-8")
        assert reading.read_json(Path(folder) / "p.json") == value


def test_toml_with_many_dots_in_a_text_is_read(tmp_path: Path) -> None:
    text = 'a = "' + "..." * 500 + '"\nb.c.d = 1.5\n[e."f.g"]\nh = 1e3\n'
    (tmp_path / "p.toml").write_text(text)
    assert reading.read_toml(tmp_path / "p.toml") == tomllib.loads(text)


@settings(deadline=None, max_examples=30)
@given(content=st.binary(max_size=200), size=st.none() | st.integers(0, 300))
def test_file_digest_is_blake3_of_the_bytes(content: bytes, size: int | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(content)
        assert reading.file_digest(path, size) == blake3(content[:size]).hexdigest()[:32]


def test_file_digest_of_a_large_file_reads_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_CHUNK", 16)
    content = bytes(range(256)) * 3 + b"rest"
    (tmp_path / "file").write_bytes(content)
    assert reading.file_digest(tmp_path / "file") == blake3(content).hexdigest()[:32]
    assert reading.file_digest(tmp_path / "file", 40) == blake3(content[:40]).hexdigest()[:32]


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text("{")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(40):
        with pytest.raises(json.JSONDecodeError):
            reading.read_json(tmp_path / "p.json")
    assert len(list(Path("/proc/self/fd").iterdir())) < before + 20


@pytest.mark.parametrize("kind", ["a directory", "a named pipe", "nothing", "a device"])
def test_what_stands_in_the_place_of_a_shard_is_a_damaged_shard(tmp_path: Path, kind: str) -> None:
    KINDS[kind][0](tmp_path / "part-00000.parquet")
    assert not commits.matches(tmp_path / "part-00000.parquet", "0" * 32)
    assert commits.mismatch(tmp_path / "part-00000.parquet", {}) == "its commit record is damaged"
