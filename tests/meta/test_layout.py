"""The house is as it is drawn: rooms of the package, lengths of files, and tests that do not lean on each other."""

import ast
import re
from pathlib import Path

import pytest

from prefpipe.cli import STAGES
from tests.conftest import ROOT

PACKAGE = ROOT / "prefpipe"
GROUND = {
    "api_key",
    "cli",
    "user_functions",
    "flags",
    "http",
    "processes",
    "reading",
    "terminal",
    "schemas",
    "statistics",
    "machine",
    "extras",
    "memory",
    "rows",
    "errors",
    "ids",
    "log",
    "clock",
    "__init__",
    "__main__",
}
ROOMS = {
    "api",
    "stages",
    "doctor",
    "shipped",
    "views",
    "inference",
    "rewards",
    "inputs",
    "engines",
    "forward",
    "models",
    "runs",
    "config",
    "exports",
    "chat",
}
MOST_LINES = 300
COMMANDS = (*STAGES, "gather", "report")  # these two have no settings and no recipes
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def names(paths: list[Path]) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in paths]


def test_the_root_of_the_package_holds_ground_words_and_rooms() -> None:
    assert {p.stem for p in PACKAGE.glob("*.py")} == GROUND
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"} == ROOMS


def test_a_stage_is_a_room_of_its_name_with_recipes_of_its_name() -> None:
    rooms = {p.name for p in (PACKAGE / "stages").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms == {name.replace("-", "_") for name in COMMANDS}
    assert {p.name for p in (ROOT / "stages").iterdir() if p.is_dir()} == set(STAGES)


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_a_file_of_the_package_can_be_read_at_once(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stage_opens_with_its_command_and_its_numbered_steps(command: str) -> None:
    opening = ast.get_docstring(ast.parse((PACKAGE / "stages" / command.replace("-", "_") / "stage.py").read_text()))
    assert opening is not None
    assert f"prefpipe {command}" in opening
    steps = [int(number) for number in re.findall(r"^\s*(\d+)\. \S", opening, re.MULTILINE)]
    assert len(steps) >= 3
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("path", TESTS, ids=names(TESTS))
def test_what_tests_share_stands_in_no_test_module(path: Path) -> None:
    """cases.py, data.py and others beside them: else one test's change breaks another's."""
    imported = re.findall(r"^\s*(?:from (tests\.\S+) import|import (tests\.\S+))", path.read_text(), re.MULTILINE)
    imported += re.findall(r"^\s*from (tests(?:\.\w+)*) import (test_\w+)", path.read_text(), re.MULTILINE)
    assert not [words for words in imported if any("test_" in word for word in words)]
