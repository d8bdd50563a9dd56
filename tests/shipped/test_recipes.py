"""The recipes of the package: what their headers say, and copies that work where they are copied to."""

import re
import tomllib
from pathlib import Path

import pytest

from prefpipe.config import base
from prefpipe.config.commands import CLASSES
from prefpipe.config.iterate import IterateConfig
from prefpipe.errors import UsageError
from prefpipe.shipped import recipes
from tests.conftest import ROOT

NAMES = [recipe.name for recipe in recipes.listed()]


def test_every_recipe_of_the_checkout_is_listed() -> None:
    assert set(NAMES) == {str(p.relative_to(ROOT / "stages").with_suffix("")) for p in ROOT.glob("stages/*/*.toml")}


@pytest.mark.parametrize("name", NAMES)
def test_a_header_says_what_it_is_for_on_what_and_how_to_run_it(name: str) -> None:
    recipe = recipes.find(name)
    assert recipe.purpose
    assert recipe.hardware
    assert re.match(rf"prefpipe {name.partition('/')[0]} stages/{name}\.toml ", recipe.command)
    assert "(" not in recipe.command


@pytest.mark.parametrize("name", NAMES)
def test_a_header_says_what_must_be_there_before(name: str) -> None:
    """Runs and files that its first command reads and this package does not bring, and extras by their names."""
    recipe = recipes.find(name)
    words = recipe.command.split()
    made = words[words.index("--out") + 1]
    read = {word.removesuffix("/adapter") for word in words if re.match(r"runs/|\w+\.jsonl$", word)} - {made}
    assert [word for word in read if word not in recipe.needs] == []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"the extra (\w+)", recipe.needs)) <= set(extras)
    assert "pip install" not in recipe.needs


def test_lines_that_go_on_belong_to_their_word() -> None:
    compared = recipes.find("evaluate/compared")
    assert compared.purpose.endswith("at equal length, KL to the model without the adapter, refusals on other prompts")
    assert [line.split()[:2] for line in compared.run.splitlines()] == [["prefpipe", "evaluate"]] * 2
    assert compared.expected == ""


@pytest.mark.parametrize("name", ["demo", "iterate/demo", "stages/iterate/demo.toml", "demo.toml"])
def test_a_recipe_is_found_by_its_short_name(name: str) -> None:
    assert recipes.find(name).name == "iterate/demo"


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("judge", "one of several", "generate/judge, score/judge"),
        ("simp0", "did you mean 'simpo'?", "prefpipe recipes"),
        ("", "no recipe ''", "prefpipe recipes"),
        ("../iterate/demo", "no recipe", "prefpipe recipes"),
    ],
)
def test_another_name_is_refused(name: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        recipes.find(name)
    assert hint in caught.value.hint


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_loads_and_has_what_it_names(name: str, tmp_path: Path) -> None:
    """Files of this package that a recipe names are there; runs and files of a user's are not ours to copy."""
    recipe = recipes.find(name)
    copies = recipes.copy(recipe, tmp_path)
    assert sorted(copies) == sorted(p for p in tmp_path.rglob("*") if p.is_file())
    assert all(path.read_bytes() == (ROOT / path.relative_to(tmp_path)).read_bytes() for path in copies)
    base.load(CLASSES[name.partition("/")[0]], tmp_path / recipe.path, {})
    for named in re.findall(r'"(data/[\w.]+)', (tmp_path / recipe.path).read_text()):
        assert (tmp_path / named).is_file()
    assert recipes.copy(recipe, tmp_path) == copies


def test_another_file_stays_and_nothing_is_copied_beside_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prompts.jsonl").write_text("mine\n")
    with pytest.raises(UsageError, match="is another file"):
        recipes.copy(recipes.find("demo"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    assert (tmp_path / "data" / "prompts.jsonl").read_text() == "mine\n"


def test_the_demo_reads_the_prompts_of_the_installation() -> None:
    """In place of those that its recipe names relative to the current folder; flags win."""
    recipe = base.load(IterateConfig, ROOT / "stages" / "iterate" / "demo.toml", {})
    config = recipes.demo({})
    for table in ("generate", "evaluate"):
        prompts = Path(getattr(config, table).prompts)
        assert prompts.is_absolute()
        assert prompts.read_bytes() == (ROOT / getattr(recipe, table).prompts).read_bytes()
    apart = {table: {"prompts": getattr(recipe, table).prompts} for table in ("generate", "evaluate")}
    whole = base.dump(config)
    assert {**whole, **{t: {**whole[t], **values} for t, values in apart.items()}} == base.dump(recipe)
    assert recipes.demo({"generate.prompts": "mine.jsonl"}).generate.prompts == "mine.jsonl"
