"""`recipes`, `recipes copy` and `demo` through the command line."""

import json
from pathlib import Path

import pytest

from prefpipe import extras
from tests.cases import assert_refused
from tests.conftest import Cli
from tests.forge import Forge

LETTERS = "tests.e2e.letters:most_letters"


def test_recipes_are_listed_for_people_and_for_programs(cli: Cli) -> None:
    done = cli("recipes")
    assert done.returncode == 0, done.stderr
    assert "\niterate/demo\n  purpose   three rounds on a real model" in done.stdout
    listed = {recipe["name"]: recipe for recipe in json.loads(cli("recipes", "--json").stdout)}
    assert listed["train/orpo"]["hardware"] in done.stdout.replace("\n            ", " ")
    assert listed["generate/rules"].keys() == {"name", "purpose", "hardware", "expected", "needs", "run"}


def test_what_a_recipe_needs_is_said_with_the_command_of_this_installation(cli: Cli, tmp_path: Path) -> None:
    lines = cli("recipes", "copy", "qlora", cwd=tmp_path).stdout.splitlines()
    (needs,) = [line for line in lines if line.startswith("it needs     ")]
    assert f"`{extras.command('bnb')}`; pairs.jsonl with" in needs
    assert needs.removeprefix("it needs     ") in cli("recipes").stdout


def test_a_copied_recipe_is_run_as_its_header_says(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    done = cli("recipes", "copy", "generate/short-sentence", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()[-1].removeprefix("run it with  prefpipe ").split()
    made = cli(*words, "--engine", "fake", "--model", tiny_model, "--limit", 2, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "runs" / "g" / "manifest.json").is_file()


@pytest.mark.parametrize("arguments", [("copy", "nothing"), ("copy",), ("copy", "demo", "--to", "hf://x"), ("lst",)])
def test_what_is_no_recipe_is_one_error(cli: Cli, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert_refused(cli("recipes", *arguments, cwd=tmp_path), 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_demo_runs_in_an_empty_folder_and_again(forged: Forge, tiny_model: Path, tmp_path: Path) -> None:
    """With the fake engine, one round, few prompts and a reward that random answers can earn; a loss without reference,
    since the log-probs of the fake engine are those of no model."""
    settings = ("--rounds", 1, "--model", tiny_model, "--generate.engine", "fake", "--evaluate.engine", "fake",
                "--generate.limit", 4, "--generate.max-tokens", 128, "--evaluate.limit", 2,
                "--generate.rewards", LETTERS, "--build-pairs.reward", LETTERS, "--evaluate.reward", LETTERS,
                "--generate.check", 0, "--train.loss-type", "nll", "--train.loss-weights", 1)  # fmt: skip
    inline = "tests.stages.iterate.cases"
    done = forged.run("demo", *settings, cwd=tmp_path, inline=inline)
    assert done.code == 0, done.stderr
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"demo"}
    assert done.stdout.splitlines()[-1] == "report       runs/demo/report.html"
    again = forged.run("demo", *settings, cwd=tmp_path, inline=inline)
    assert "runs/demo is complete already" in again.stderr


def test_the_demo_takes_no_recipe_and_prints_its_settings(cli: Cli, tmp_path: Path) -> None:
    assert_refused(cli("demo", "mine.toml", cwd=tmp_path), 2, "prefpipe iterate mine.toml")
    settings = json.loads(cli("demo", "--dry-run", "--rounds", 3, cwd=tmp_path).stdout)
    assert settings["rounds"] == 3
    assert Path(settings["generate"]["prompts"]).is_file()
    assert list(tmp_path.iterdir()) == []
