"""Values of JSON files, whatever piece of a file is in memory."""

import io
import json
import math
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from prefpipe.errors import DataError
from prefpipe.inputs import json_files

VALUES = [
    {"prompt": "a\\\"]", "n": [1, -2.5e-7, 1234567890123456789, True, None]}, "é\U0001f600]", [], {}, [[["x"]]], 12,
    0.5, -1e300, False, "", {"a": {"b": ["]", "[", ","]}}, math.inf, -math.inf,
]  # fmt: skip


def read_back(text: str, piece: int) -> list[Any]:
    return list(json_files.entries(io.StringIO(text, newline="").read, piece))


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 3])
def test_an_array_cut_anywhere_is_the_same_array(indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(VALUES, indent=indent, ensure_ascii=ascii_only)
    for piece in range(1, 60):
        assert read_back(f" \r\n{text}\n\t ", piece) == VALUES


@pytest.mark.parametrize("text", ["[]", " [ ] ", "[\n]\n"])
def test_an_empty_array_has_no_entries(text: str) -> None:
    assert read_back(text, 1) == []


FAULTY = [
    "", "[", "[1", "[1,", "[1,]", "[,1]", "[1 2]", "[1]]", "[1] 2", "{}", "1", '["a]', "[nul]", "[1.]", "[1e]", "[-]",
    "[01]", '["\\u12"]', '["\\x"]', '[{"a" 1}]', '[{"a": 1, "a": 1}]', '[[{"b": {"a": 1, "a": 2}}]]', f"[{'9' * 5000}]",
    "[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("text", FAULTY, ids=range(len(FAULTY)))
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_what_a_parser_of_the_whole_text_refuses_is_refused(text: str, piece: int) -> None:
    if '"a": 1, "a"' not in text:
        with pytest.raises((ValueError, RecursionError, AssertionError)):
            assert isinstance(json.loads(text), list)
    with pytest.raises((ValueError, RecursionError)):
        read_back(text, max(piece, len(text) // 1000))


def test_random_cuts_of_an_array_are_refused() -> None:
    text = json.dumps(VALUES)
    for cut in random.Random(0).sample(range(len(text)), 60):
        with pytest.raises(json.JSONDecodeError):
            read_back(text[:cut], 16)


def test_a_large_array_is_not_held_in_memory(tmp_path: Path) -> None:
    path, row = tmp_path / "a.json", {"text": "x" * 1000}
    path.write_text(json.dumps([row] * 20_000))
    tracemalloc.start()
    try:
        assert sum(value == row for _, value in json_files.values(path)) == 20_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 2  # 20 MB in the file; two pieces of 1 MB and their bytes are held


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("a.jsonl", '{"prompt": 1}\n{"prompt": "a", "n": 0, "prompt": "b"}\n', "line 2"),
        ("a.jsonl", '{"prompt": [{"role": "user", "role": "user"}]}', "line 1"),
        ("a.json", '[{"a": 1}, {"b": 0, "b": 0}]', "row 1"),
    ],
)
def test_a_key_twice_is_refused(tmp_path: Path, name: str, text: str, where: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"{name}, {where}: not valid JSON: the key '(prompt|role|b)' stands twice"):
        list(json_files.values(tmp_path / name))


def test_the_entry_that_is_wrong_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\ufeff[{"a": 1},\n {"a": nil}, 3]')
    with pytest.raises(DataError, match=r"a\.json, row 1: not valid JSON: Expecting value$"):
        list(json_files.values(path))
    path.write_bytes(b'[{"a": "\xe9"}]')
    with pytest.raises(DataError, match=r"row 0: not valid JSON: 'utf-8' codec") as error:
        list(json_files.values(path))
    assert error.value.hint == "save it as UTF-8"
