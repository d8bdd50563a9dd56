"""The values of JSON files: one on each line, or the entries of one array, a piece of the file in memory at a time."""

import codecs
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from prefpipe import reading
from prefpipe.errors import DataError

SUFFIXES = (".jsonl", ".json", ".ndjson")
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_CONSTANTS = {"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}  # pandas writes NaN for a missing value
_PIECE = 1 << 20  # characters
_BLANK = re.compile(r"[ \t\n\r]*")
# A value that a piece cuts is wrong this close to the end of the piece: `-Infinit`, or `\u12` in a text.
_LONGEST_WORD = 16
_UNENDED = "Unterminated string"  # what the parser says of a text that a piece cuts, at its start
_HINT = "every line is one JSON object, or the file is one array of them"


def values(path: Path) -> Iterator[tuple[str, Any]]:
    """(file and line, value) of every line that is not blank, or of the entries of one array.

    Raises DataError for what is not JSON, and for an object with a key twice, of which a parser keeps the last alone.
    """
    try:
        yield from _array(path) if _is_array(path) else _lines(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}", "the file is damaged") from error


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    value = json.loads(line, parse_constant=_CONSTANTS.get, object_pairs_hook=reading.unique_keys)
                except (ValueError, RecursionError) as error:
                    raise _refused(where, error) from error
                yield where, value


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    with _opened(path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogatepass", newline="")
        try:
            for value in entries(text.read):
                yield f"{path}, row {number}", value
                number += 1
        except (ValueError, RecursionError) as error:
            raise _refused(f"{path}, row {number}", error) from error


def entries(read: Callable[[int], str], piece: int = _PIECE) -> Iterator[Any]:
    """The entries of a JSON array, from a function that reads so many characters more. Raises ValueError for anything
    else, and RecursionError."""
    decoder = json.JSONDecoder(parse_constant=_CONSTANTS.get, object_pairs_hook=reading.unique_keys)
    text, place, is_first, is_whole = "", 0, True, False
    while True:
        try:
            place, value = _entry(decoder, text, place, is_first=is_first)
        except json.JSONDecodeError as error:
            is_cut = error.pos > len(text) - _LONGEST_WORD or error.msg.startswith(_UNENDED)
            if is_whole or not is_cut:
                raise
        else:
            if value is _END:
                break
            is_first = False
            yield value
            continue
        more = read(max(piece, len(text) - place))  # as much again: a long value is parsed a few times, not many
        text, place, is_whole = text[place:] + more, 0, not more
    rest = text[place:]
    while rest or (rest := read(piece)):
        if rest.strip(" \t\n\r"):
            raise ValueError("there is more behind the end of the array")
        rest = ""


_END = object()


def _entry(decoder: json.JSONDecoder, text: str, place: int, *, is_first: bool) -> tuple[int, Any]:
    """Where the entry that follows ends, before its comma, and the entry; _END where the array ends. Raises
    JSONDecodeError where the text ends before that is known."""
    place = _blank_end(text, place)
    mark = text[place : place + 1]
    if mark == "]" and not is_first:
        return place + 1, _END
    if mark != ("[" if is_first else ","):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
    place = _blank_end(text, place + 1)
    if is_first and text[place : place + 1] == "]":
        return place + 1, _END
    value, place = decoder.raw_decode(text, place)
    after = _blank_end(text, place)
    if text[after : after + 1] not in (",", "]") or after == len(text):  # `1` may go on as `12`
        raise json.JSONDecodeError("Expecting ',' delimiter", text, after)
    return after, value


def _blank_end(text: str, place: int) -> int:
    found = _BLANK.match(text, place)
    assert found is not None
    return found.end()


def _is_array(path: Path) -> bool:
    """Whether a file is one array. Raises DataError for UTF-16, whose lines do not end with a byte."""
    with _opened(path) as file:
        start = file.read(1 << 16)
    if start.startswith(_UTF16):
        raise DataError(f"{path} is UTF-16 text", "save it as UTF-8")
    return start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _opened(path: Path) -> io.BufferedReader:
    """A file for reading, decompressed by the ending of its name. (Arrow itself opens no path that is not UTF-8.)"""
    file = path.open("rb")
    codec = COMPRESSED.get(path.suffix.lower())
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), codec)) if codec else file


def _refused(where: str, error: Exception) -> DataError:
    hint = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else _HINT
    # The parser counts lines and characters from the start of a piece, which nobody can find.
    what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(f"{where}: not valid JSON: {what}", hint)
