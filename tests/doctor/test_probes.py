"""A child process: its answer, its error, and the modules that the error went through."""

from pathlib import Path

import pytest

from prefpipe.doctor import probes
from tests.doctor.stand_ins import write


def test_the_last_line_is_the_answer() -> None:
    assert probes.ask("print('a word')\nprint('{\"a\": 1}')") == probes.Answer({"a": 1}, "")
    assert probes.ask("print('no JSON')") == probes.Answer(None, "")
    assert probes.ask("") == probes.Answer(None, "")


def test_a_child_that_hangs_is_given_up() -> None:
    assert probes.ask("import time\ntime.sleep(60)", seconds=0.5).error == "no answer within 0.5 seconds"


def test_hidden_modules_are_missing() -> None:
    assert "json" in probes.ask("import json", ["json"]).error
    assert not probes.ask("import json", ["csv"]).error


def test_modules_stand_innermost_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, {"outer/__init__.py": "import inner", "inner.py": "raise ValueError('of nobody')"})
    answer = probes.ask("import outer")
    assert answer.error == "ValueError: of nobody"
    assert list(answer.modules)[:2] == ["inner", "outer"]
