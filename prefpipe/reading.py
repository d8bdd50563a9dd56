"""Every read of a configuration, a record or a manifest: bounded, never a wait, and every refusal names the file.

A file that is not there is MissingInputError (66), one whose kind or content is wrong DataError (65), and one that the
operating system refuses StorageError (74). A FIFO is refused and not opened: it would wait for a writer. `DEPTH` is
less than what Python's parsers bear, and `SMALL` is more than the manifest of 300,000 files needs.
"""

import errno
import io
import json
import os
import re
import stat
import tomllib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from blake3 import blake3

from prefpipe.errors import DataError, MissingInputError, StorageError

SMALL = 64 << 20  # bytes
DEPTH = 200  # of brackets
T = TypeVar("T")
_CHUNK = 8 << 20
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_DOTTED = re.compile(rf"(?<![\w-])(?:[\w-]++\s*+\.\s*+){{{DEPTH}}}")  # tomllib takes hours for a long one
_HALF_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")  # UTF-8 has no halves, so that only an escape can bring one
_LONE_SURROGATE = re.compile(r"[\ud800-\udc7f\udd00-\udfff]")  # the others are bytes of paths


@contextmanager
def reading(path: Path) -> Generator[None]:
    """Turn what the operating system says to a read of `path` into an error of prefpipe."""
    try:
        yield
    except OSError as error:
        if error.errno in _ABSENT:
            raise MissingInputError(
                f"{path} does not exist", "check the path; it is relative to the current directory"
            ) from error
        raise StorageError(
            f"cannot read {path}: {error.strerror or error}", "check permissions and the disk, then run it again"
        ) from error


def is_there(path: Path) -> bool:
    """Whether a path leads to something. Raises StorageError where the operating system does not say."""
    try:
        with reading(path):
            path.stat()
    except (MissingInputError, ValueError):  # ValueError: a path with NUL
        return False
    return True


@contextmanager
def opened(path: Path) -> Generator[BinaryIO]:
    """A regular file, open for reading. Raises as this module does for anything else."""
    if "\0" in str(path):
        raise MissingInputError(f"{path} does not exist", "no path has a NUL character")
    with reading(path):
        _check_kind(path, path.stat())
        # Between the two calls a pipe may take the place of the file; without O_NONBLOCK its open would wait.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with io.FileIO(descriptor, "rb") as file:
            _check_kind(path, os.fstat(descriptor))
            yield file  # type: ignore[misc]  # FileIO has the methods of BinaryIO


def read_bytes(path: Path, limit: int = SMALL) -> bytes:
    """The bytes of a file that is small by nature. Raises DataError for more than `limit`."""
    with opened(path) as file:
        content = bytearray()
        while block := file.read(min(_CHUNK, limit + 1 - len(content))):
            content += block
            if len(content) > limit:
                raise DataError(f"{path} has more than {limit:,} bytes", "that is not a file of this kind: check it")
        return bytes(content)


def read_text(path: Path, limit: int = SMALL) -> str:
    """The UTF-8 text of a small file. Raises DataError for other bytes and for NUL."""
    try:
        text = read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}", "save it as UTF-8, or check the path") from error
    if "\0" in text:
        raise DataError(f"{path} is not text: it has NUL at character {text.index(chr(0))}", "check the file")
    return text


def read_json(path: Path, limit: int = SMALL, *, by_hand: bool = False) -> Any:
    """The JSON value in a small file. Raises json.JSONDecodeError for a mistake in its syntax, DataError for what no
    parser should take: brackets deeper than DEPTH, numbers of thousands of digits, halves of characters, and in a file
    that people write `by_hand` a key twice."""
    text = read_text(path, limit)
    value = _parsed(path, partial(json.loads, object_pairs_hook=unique_keys if by_hand else None), text)
    if _HALF_ESCAPE.search(text) and has_lone_surrogate(value):
        raise DataError(f"{path} holds half of a character (a lone surrogate)", "no text has that: check the file")
    return value


def read_toml(path: Path, limit: int = SMALL) -> dict[str, Any]:
    """The tables in a small TOML file. Raises tomllib.TOMLDecodeError for a mistake in its syntax, DataError as
    `read_json` does."""
    text = read_text(path, limit)
    if _DOTTED.search(text):
        raise DataError(f"{path} has a key of more than {DEPTH} parts", "check the file: nobody writes this by hand")
    return _parsed(path, tomllib.loads, text)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, as `object_pairs_hook` of a JSON parser. Raises ValueError for a key twice: a parser
    keeps the last one without a word."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for place, key in enumerate(keys) if key in keys[:place])
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return unique


def file_digest(path: Path, size: int | None = None) -> str:
    """blake3 of a file's bytes, or of its first `size`, 32 hex digits (128 bits)."""
    hasher = blake3()
    left = size
    with opened(path) as file:
        while block := file.read(_CHUNK if left is None else min(_CHUNK, left)):
            hasher.update(block)
            left = None if left is None else left - len(block)
    return hasher.hexdigest(16)


def has_lone_surrogate(value: object) -> bool:
    """Whether a JSON value holds half of a character, which no file and no terminal takes."""
    if isinstance(value, str):
        return _LONE_SURROGATE.search(value) is not None
    if isinstance(value, dict):
        return any(has_lone_surrogate(part) for pair in value.items() for part in pair)
    return isinstance(value, list) and any(map(has_lone_surrogate, value))


def _parsed(path: Path, parse: Callable[[str], T], text: str) -> T:
    try:
        value = parse(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError):
        raise
    except (RecursionError, ValueError) as error:
        what = "brackets nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{path} cannot be read: {what}", "check the file, and mend it") from error
    if _is_too_deep(value):
        raise DataError(f"{path} has brackets deeper than {DEPTH}", "check the file: nobody writes this by hand")
    return value


def _is_too_deep(value: object) -> bool:
    """Whether a value has objects or lists inside each other on more than DEPTH levels."""
    level = [value]
    for _ in range(DEPTH + 1):
        if not level:
            return False
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [part for parts in inner for part in parts if isinstance(part, dict | list)]
    return bool(level)


def _check_kind(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise DataError(f"{path} is {kind}, not a file", "check the path")
