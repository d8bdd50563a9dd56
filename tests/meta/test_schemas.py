"""The schemas that editors read are those of the settings, and the recipes name them."""

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from prefpipe.config import base
from prefpipe.config.commands import CLASSES
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "stages").rglob("*.toml"))


def problems(command: str, recipe: dict[str, Any]) -> list[str]:
    schema = json.loads((ROOT / "stages" / command / "schema.json").read_text())
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(recipe)]


@pytest.mark.parametrize("command", CLASSES)
def test_a_schema_is_the_one_of_today(command: str) -> None:
    written = json.loads((ROOT / "stages" / command / "schema.json").read_text())
    assert written == json.loads(json.dumps(base.json_schema(CLASSES[command]))), "run `make fix`"
    jsonschema.Draft202012Validator.check_schema(written)


@pytest.mark.parametrize("recipe", RECIPES, ids=[p.name for p in RECIPES])
def test_a_recipe_names_its_schema_and_follows_it(recipe: Path) -> None:
    text = recipe.read_text()
    assert text.splitlines()[0] == "#:schema schema.json"
    assert problems(recipe.parent.name, tomllib.loads(text)) == []


@pytest.mark.parametrize(
    ("command", "recipe"),
    [
        ("train", {"betta": 0.1}),
        ("train", {"loss_type": ["sigmoyd"]}),
        ("iterate", {"train": {"save_steps": 0}}),
        ("generate", {"num_samples": "many"}),
    ],
)
def test_a_mistake_is_marked(command: str, recipe: dict[str, Any]) -> None:
    assert problems(command, recipe)


@pytest.mark.parametrize("command", CLASSES)
def test_every_setting_has_its_meaning_for_the_editor(command: str) -> None:
    schema = base.json_schema(CLASSES[command])
    for name, _ in base.fields(CLASSES[command]):
        place = schema
        for part in name.split("."):
            while "$ref" in place:
                place = schema["$defs"][place["$ref"].rsplit("/", 1)[-1]]
            place = place["properties"][part]
        assert place.get("description"), name
