"""The command line reads what README and guide tell a user to type; every link of the documents leads somewhere.

tests/examples/test_guide.py runs the commands that need no other machine.
"""

import re
import tomllib
from pathlib import Path

import pytest
import typer

from prefpipe import cli
from tests.conftest import ROOT, Call
from tests.meta import pages

LINK = re.compile(r"\]\(([^)\s]+)\)")
GROUP = typer.main.get_command(cli.app)
COMMANDS = set(GROUP.commands)  # type: ignore[attr-defined]  # it is a group
# Programs of others that a page starts; their own words are not ours to check.
OTHERS = {"torchrun", "python", "pip", "make", "source", "vllm", "ray"}


@pytest.fixture
def read(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Have the command line read the words of a command, in a folder where the recipes stand that pages name."""
    for folder in ("stages", "data", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for recipe in ("RECIPE", "RECIPE.toml", "mine.toml"):
        (tmp_path / recipe).touch()
    monkeypatch.chdir(tmp_path)

    def parse(*words: object) -> object:
        name = str(words[0])
        if name in cli.STAGES or name == "plan":
            ended = call(*words, "--dry-run")
            assert ended.code == 0, f"{words}: {ended.stderr}"
            return None
        context = typer.Context(GROUP)
        rest = list(map(str, words))
        command = GROUP
        while hasattr(command, "commands") and rest and rest[0] in command.commands:
            command = command.commands[rest.pop(0)]
        return command.make_context(name, rest, parent=context)

    return parse  # type: ignore[return-value]


@pytest.mark.parametrize("page", pages.FOR_USERS, ids=pages.name)
def test_every_command_is_one_that_is_read(page: Path, read: Call) -> None:
    for program, *words in pages.commands(page):
        if program == "prefpipe":
            read(*words)
            continue
        assert program in OTHERS, program
        if "prefpipe" in words:  # torchrun ... -m prefpipe train ...
            read(*words[words.index("prefpipe") + 1 :])
        elif program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", pages.FOR_USERS, ids=pages.name)
def test_commands_in_the_text_are_read(page: Path, read: Call) -> None:
    """NAME stands for a reward."""
    for words in pages.in_the_text(page):
        read(*("math" if word == "NAME" else word for word in words))


@pytest.mark.parametrize("page", pages.FOR_USERS, ids=pages.name)
def test_options_and_extras_in_the_text_exist(page: Path) -> None:
    text = page.read_text()
    known = {option for command in GROUP.commands.values() for p in command.params for option in p.opts}  # type: ignore[attr-defined]
    known |= {f"--no-{option.removeprefix('--')}" for option in known}
    code = [
        c
        for c in re.findall(r"`([^`\n]+)`", text)
        if c.split(maxsplit=1)[0] in COMMANDS | {"prefpipe"} or c.startswith("--")
    ]
    named = {option for c in code for option in re.findall(r"(?<!\S)(--[a-z][\w.-]*)", c)}
    assert named - known - {"--help"} == set()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"pip install -e '\.\[(\w+)\]'", text)) <= set(extras)


@pytest.mark.parametrize("page", pages.EVERY, ids=pages.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in pages.headings(file), target


@pytest.mark.parametrize(
    "name",
    sorted({m for p in (ROOT / "prefpipe").rglob("*.py") for m in re.findall(r"docs/[\w/-]+\.md", p.read_text())}),
)
def test_pages_that_the_code_names_exist(name: str) -> None:
    assert (ROOT / name).is_file()


def test_the_readme_and_the_guide_are_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert len(pages.GUIDE) == 5
    assert all(len(page.read_text().splitlines()) <= 110 for page in pages.GUIDE)
