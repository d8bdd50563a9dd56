"""The words of the glossary: each is there once and in use, and every dataset and kind of row is among them."""

import re

from prefpipe.schemas import Pair
from tests.conftest import ROOT
from tests.meta import pages

PAGE = ROOT / "docs" / "glossary.md"
LINES = re.findall(r"^- (.+)$", PAGE.read_text(), re.MULTILINE)
WORDS = [word.strip("`") for line in LINES for word in re.findall(r"\*\*([^*]+)\*\*", line)]


def test_a_line_gives_a_word_and_its_meaning() -> None:
    assert all(re.match(r"\*\*[^*]+\*\*.*: \S.*\.$", line) for line in LINES)
    assert len(WORDS) == len(set(WORDS))


def test_every_word_is_in_use() -> None:
    texts = [p.read_text() for p in pages.EVERY if p not in (PAGE, ROOT / "CHANGELOG.md")]
    texts += [p.read_text() for p in (ROOT / "prefpipe").rglob("*.py")]
    used = "\n".join(texts).lower().replace("-", " ")
    assert [word for word in WORDS if word.lower().replace("-", " ").removesuffix("y") not in used] == []


def test_every_dataset_is_there() -> None:
    """By its folder, as the page of datasets heads it."""
    folders = re.findall(r"^\*\*`([^`]+)`\*\*", (ROOT / "docs" / "datasets.md").read_text(), re.MULTILINE)
    assert len(folders) > 5
    assert [folder for folder in folders if folder not in PAGE.read_text()] == []


def test_every_idea_of_a_pair_is_there() -> None:
    """A column of `pairs/` is a word of the glossary, or two of them, with what programs add to them."""
    plain = {"id", "ids", "weight", "template", "inputs", "finish", "reason"}
    known = plain | {part for word in WORDS for part in re.split(r"[_ /-]", word.lower())}
    columns = {part for name in Pair.__dataclass_fields__ for part in name.split("_")}
    assert columns - known == set()
