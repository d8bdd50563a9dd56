"""Every setting is a flag, every flag is a setting or one of four operations, and help says what it does."""

import json
import re
from typing import Any

import pytest
import typer
from typer import TyperException
from typer.main import get_command
from typer.testing import CliRunner

from prefpipe import cli, flags
from prefpipe.config import base
from prefpipe.config.commands import SETTINGS
from prefpipe.errors import UsageError

APP = get_command(cli.app)
COMMANDS = APP.commands  # type: ignore[attr-defined]  # the app is always a group
FREE = ("--out", "--force", "--dry-run", "--verbose", "--help")


def parameters(command: str) -> dict[str, Any]:
    return {p.name: p for p in COMMANDS[command].params}


@pytest.mark.parametrize("command", cli.STAGES)
def test_flags_are_the_fields_and_the_operations(command: str) -> None:
    fields = {name.replace(".", "__") for name, _ in base.fields(cli.STAGES[command][0])}
    assert set(parameters(command)) - {"help"} == fields | {"recipe", *flags.OPERATIONS}


@pytest.mark.parametrize("command", cli.STAGES)
def test_a_flag_is_spelled_like_its_field(command: str) -> None:
    found = parameters(command)
    for name, field in base.fields(cli.STAGES[command][0]):
        expected = "--" + name.replace("_", "-")
        options = found[name.replace(".", "__")].opts
        assert options == [expected], (name, options)
        assert field.annotation is not bool or found[name.replace(".", "__")].secondary_opts


@pytest.mark.parametrize("command", cli.STAGES)
def test_help_has_the_description_and_the_default(command: str) -> None:
    found = parameters(command)
    for name, field in base.fields(cli.STAGES[command][0]):
        text = found[name.replace(".", "__")].help
        assert text.startswith(field.description)
        assert text.endswith("]")
        shown = field.default
        words = shown if isinstance(shown, tuple) else [shown]
        assert all(str(w) in text.rpartition("[default: ")[2] for w in words)
    assert all(p.help for p in found.values() if p.name != "help")


@pytest.mark.parametrize("command", cli.STAGES)
def test_help_shows_every_option_under_its_heading(command: str) -> None:
    shown = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"}).output
    heading, place = "", dict[str, str]()
    for line in shown.splitlines():
        heading = line.removesuffix(":") if re.fullmatch(r"\S.*:", line) else heading
        flags_of_line = re.match(r"  (?:-h, )?(--[\w.-]+)", line)
        place |= {flags_of_line[1]: heading} if flags_of_line else {}
    assert place["--out"] == place["--help"] == "Options"
    for name, _, heading in base.fields_under_headings(cli.STAGES[command][0]):
        table = name.rpartition(".")[0]
        expected = ": ".join(part for part in (table, heading) if part) or "Options"
        assert place["--" + name.replace("_", "-")] == expected


def test_choices_and_kinds_are_shown() -> None:
    found = parameters("generate")
    assert found["engine"].metavar == "vllm|transformers|server|fake"
    assert found["num_samples"].metavar == "INT"
    assert found["temperature"].metavar == "FLOAT"
    assert found["rewards"].metavar == "TEXT..."
    assert parameters("train")["loss_type"].metavar == "TEXT..."
    assert parameters("iterate")["generate__engine"].metavar == "vllm|transformers|server|fake"


def test_operations_are_no_settings() -> None:
    for cls, _ in cli.STAGES.values():
        leaves = {name.rsplit(".", 1)[-1] for name, _ in base.fields(cls)}
        assert not leaves & {"recipe", *flags.OPERATIONS}


def called(command: str, *arguments: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """What `run` gets for a command line."""
    got: list[Any] = []
    app = typer.Typer(add_completion=False)
    app.command()(flags.command(cli.STAGES[command][0], lambda *a, **k: got.append((*a, k))))
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return got[0]


def test_only_flags_that_were_given_arrive() -> None:
    recipe, given, operations = called("generate", "r.toml", "--limit", "0", "--rewards", "a:b", "--rewards", "c:d")
    assert str(recipe) == "r.toml"
    assert given == {"limit": "0", "rewards": ["a:b", "c:d"]}
    assert operations == {"out": None, "force": False, "dry_run": False}


def test_nested_flags_arrive_by_dotted_name() -> None:
    _, given, operations = called("iterate", "--train.learning-rate", "1e-4", "--out", "o", "--force", "--dry-run")
    assert given == {"train.learning_rate": "1e-4"}
    assert str(operations["out"]) == "o"
    assert operations["force"] is operations["dry_run"] is True


@pytest.mark.parametrize("command", cli.STAGES)
def test_every_default_can_be_given_as_a_flag(command: str) -> None:
    cls = cli.STAGES[command][0]
    arguments: list[str] = []
    for name, field in base.fields(cls):
        many = field.default if isinstance(field.default, tuple) else [field.default]
        for value in many:
            flag = name.replace("_", "-")
            arguments += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    _, given, _ = called(command, *arguments)
    assert base.load(cls, None, given) == cls()
    assert json.loads(json.dumps(given)) == given


@pytest.mark.parametrize("name", flags.EXAMPLES)
def test_the_example_of_a_command_is_one_of_its_command_lines(name: str) -> None:
    words = flags.EXAMPLES[name].split()
    given = {word.removeprefix("--") for word in words if word.startswith("--")} - {"out"}
    settings = {n.replace("_", "-") for n, _ in base.fields(SETTINGS[name])}
    assert given <= settings
    APP.main([name, *words, "--help"], standalone_mode=False)


def mistake_of(*words: str) -> str:
    with pytest.raises(TyperException) as caught:
        APP.main([*words], prog_name="prefpipe", standalone_mode=False)
    return ": ".join(flags.mistake(caught.value))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train --lr 1", "`prefpipe train` has no option --lr: did you mean --learning-rate? `prefpipe train --help`"),
        ("train --use-peft", "did you mean --tuning lora|full?"),
        ("train --gradient_accumulation_steps 2", "did you mean --train-batch-size? train_batch_size counts the whole"),
        ("iterate --lr 1", "did you mean --train.learning-rate?"),
        ("train --num-samples 3", "it is an option of generate and evaluate; "),
        ("train --tokenizer x", "the tokenizer is that of the model; "),
        ("demo --roundz 3", "did you mean --rounds"),
        ("train a b --beta 1", "a list takes its option for each value"),
        ("trian", "Did you mean 'train'?"),
        ("show", "Missing argument 'DIR': see `prefpipe show --help`"),
        ("recipes coppy", "see `prefpipe recipes --help`"),
    ],
)
def test_a_mistake_in_a_command_line_is_explained(line: str, words: str) -> None:
    assert words in mistake_of(*line.split())


def test_names_are_understood_with_underscores() -> None:
    for line in ("build_pairs --min_gap 1 --help", "train --learning_rate 1 --help", "train -h"):
        APP.main(line.split(), standalone_mode=False)


def test_a_second_value_of_a_list_is_no_recipe() -> None:
    app = typer.Typer(add_completion=False)
    app.command()(flags.command(cli.STAGES["train"][0], lambda *_, **__: None))
    result = CliRunner().invoke(app, ["--loss-type", "sigmoid", "bco_pair"])
    assert isinstance(result.exception, UsageError)
    assert result.exception.message == "there is no recipe bco_pair"


def test_help_says_every_command_in_a_sentence_that_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    APP.main(["--help"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "..." not in shown.partition("Start:")[2]
    assert re.findall(r"^(\w+):$", shown, re.MULTILINE) == ["Options", "Start", "Stages", "Settings", "Look", "Share"]
    assert "prefpipe build-pairs --completions runs/g --reward mine:reward --out runs/p" in shown
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize("command", ["show", "recipes copy", "chat", "export", "plan", "demo"])
def test_help_has_the_words_of_its_metavars(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    APP.main([*command.split(), "--help"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert not re.search(r"{[A-Z]|<(str|int|float|path|list)", shown)
    assert ("--out" in shown) == (command in ("export", "demo"))
