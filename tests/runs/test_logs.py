"""A log of JSON lines, whole and by its end: what is torn or no object is left out."""

import json
from pathlib import Path

import pytest

from prefpipe.runs import logs

TEXTS = [
    "", "\n\n", '{"step": 0}\n[1]\nnull\n{"step": 1, "lo', '{"step": 0}\n\xff\xfe\n{"step": 1}', "[" * 10_000,
    '{"step": 0}\n' + '{"a": "' + "b" * 200_000,
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_the_end_of_a_log_is_the_end_of_the_whole(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(text.encode("latin-1"))
    whole = logs.lines(path)
    assert logs.tail(path) == (whole if len(text) < 1 << 16 else [])


def test_of_a_long_log_the_last_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(20_000)))
    whole, end = logs.lines(path), logs.tail(path)
    assert len(whole) == 20_000
    assert 20 < len(end) < 5_000
    assert whole[-len(end) :] == end


def test_no_file_is_an_empty_log(tmp_path: Path) -> None:
    assert logs.lines(tmp_path / "none.jsonl") == logs.tail(tmp_path / "none.jsonl") == []
