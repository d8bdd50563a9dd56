"""The reference of commands is what the command line declares."""

import re

import pytest
import typer

from prefpipe import cli, errors
from prefpipe.config import base
from prefpipe.config.rewards import KINDS
from tests.meta import reference

TEXT = reference.PAGE.read_text()


def section(name: str, level: str = "##") -> str:
    return TEXT.split(f"\n{level} {name}\n")[1].split(f"\n{level} ")[0]


def test_the_page_is_the_one_of_today() -> None:
    assert reference.page() == TEXT, "run `make fix`"


def test_every_command_and_every_error_has_its_place() -> None:
    assert {name for name, _ in reference._all(typer.main.get_command(cli.app), "")} <= set(
        re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
    )
    codes = {c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.PrefpipeError)}
    assert {str(code) for code in codes} <= set(re.findall(r"^\| (\d+) \|", section("Exit codes"), re.MULTILINE))


@pytest.mark.parametrize("name", cli.STAGES)
def test_every_setting_is_there_with_its_default_and_meaning(name: str) -> None:
    """In its own row, or in that of the command whose settings a table takes over."""
    text = section(name)
    for setting, field in base.fields(cli.STAGES[name][0]):
        flag = "--" + setting.replace("_", "-")
        table, _, leaf = flag.removeprefix("--").partition(".")
        rows = re.findall(rf"^\| `{flag}` \|.*$", text, re.MULTILINE)
        if not rows and f"`--{table}.NAME`" in text:
            rows = re.findall(rf"^\| `--{leaf}` \|.*$", section(table), re.MULTILINE)
        (row,) = rows
        assert " ".join((field.description or "").split()).replace("|", "\\|") in row
        if isinstance(field.default, int | float):
            assert f"| `{field.default}` |" in row


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_of_a_reward_is_there(kind: str) -> None:
    text = section(kind, "###")
    assert all(f"| `{name}` |" in text for name, _ in base.fields(KINDS[kind]) if name != "kind")
