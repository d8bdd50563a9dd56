"""One way to every stage, and how an error of another package reads: the command line has no other."""

import re

import pytest

from prefpipe.api import calls
from tests.conftest import ROOT


def test_the_command_line_imports_no_stage() -> None:
    code = (ROOT / "prefpipe" / "cli.py").read_text()
    assert not re.search(r"prefpipe\.stages|importlib\.import_module\((?!\"prefpipe\.inference\.warm\")", code)


@pytest.mark.parametrize(
    ("package", "part"),
    [("ray", "cluster"), ("vl_convert", "report"), ("vllm", "cpu or cuda"), ("torch", "train"), ("peft", "train")],
)
def test_a_package_that_is_missing_is_installed_by_its_part(
    monkeypatch: pytest.MonkeyPatch, package: str, part: str
) -> None:
    monkeypatch.setattr(calls.extras, "command", lambda *parts: ",".join(parts))
    error = calls.explained(ModuleNotFoundError("no", name=package))
    assert error is not None
    assert error.hint == f"install it with: {part}"
