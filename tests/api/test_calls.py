"""One way to every stage: the command line has no other."""

import re

from tests.conftest import ROOT


def test_the_command_line_imports_no_stage() -> None:
    code = (ROOT / "prefpipe" / "cli.py").read_text()
    assert not re.search(r"prefpipe\.stages|importlib\.import_module\((?!\"prefpipe\.inference\.warm\")", code)
