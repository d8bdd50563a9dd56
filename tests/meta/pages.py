"""The pages for users: what they say to type, and where their links lead.

An indented line is a command. A block fenced as `LANGUAGE NAME` is a file of that name, and other fenced blocks are
output. Commands also stand in the text, as code that begins with a command of prefpipe.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))
FOR_USERS = [ROOT / "README.md", *GUIDE]
EVERY = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "stages" / "README.md"]
_FENCED = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PROSE_CODE = re.compile(r"`([^`\n]+)`")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def files(page: Path) -> dict[str, str]:
    """The files that a page shows, by name."""
    return {found[2]: found[3] for found in _FENCED.finditer(page.read_text()) if found[2]}


def commands(page: Path) -> list[list[str]]:
    """The words of every command in an indented block, in order."""
    text = _FENCED.sub("", page.read_text())
    lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def in_the_text(page: Path) -> Iterator[list[str]]:
    """The words of code in the text that begins with `prefpipe` and a command, and has more."""
    for code in _PROSE_CODE.findall(re.sub(r"^    .*$", "", _FENCED.sub("", page.read_text()), flags=re.MULTILINE)):
        if code.startswith("prefpipe ") and len(words := shlex.split(code)) > 2:
            yield [word for word in words[1:] if word != "..."]


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", _FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
