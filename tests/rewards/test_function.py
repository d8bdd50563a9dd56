"""Functions of the user's with a time limit: a completion that hangs or kills costs itself; the others go on.

What they are called with and how their values are read, `test_rewards.py` tests through the name alone.
"""

from pathlib import Path
from typing import Any

import pytest

from prefpipe import rewards
from prefpipe.config.rewards import Function
from prefpipe.errors import MissingInputError, UsageError
from prefpipe.rewards.base import Answer, Scored
from prefpipe.runs import store
from prefpipe.schemas import Message, Reward
from tests.conftest import Cli

BEHAVE = "tests.rewards.limited:behave"
QUESTION = [Message(role="user", content="Name a bird.")]


def rated(name: str, *texts: str, seconds: float = 60.0, workers: int = 1) -> dict[str, Scored]:
    reward = rewards.load("mine", {"mine": Function(function=name, timeout_seconds=seconds, num_workers=workers)})
    answers = [Answer(QUESTION, text, "owl", '{"level": 3}', 7) for text in texts]
    return dict(zip(texts, reward(answers), strict=True))


def test_values_are_read_as_those_of_a_function_that_is_named_alone() -> None:
    texts = ("numpy", "nothing", "raise", "level", "expected", "two")
    assert rated(BEHAVE, *texts) == {
        text: rewards.load(BEHAVE)([Answer(QUESTION, text, "owl", '{"level": 3}', 7)])[0] for text in texts
    }


def test_a_completion_that_hangs_or_kills_costs_itself() -> None:
    found = rated(BEHAVE, "level", "hang", "die", "exit", "expected", seconds=2, workers=2)
    assert found == {
        "level": Scored(3.0), "hang": Scored(None, "timeout", "more than 2 s"),
        "die": Scored(None, "crash", "the process ended with signal 9"), "exit": Scored(None, "crash", "SystemExit: 3"),
        "expected": Scored(3.0),
    }  # fmt: skip


def test_the_import_is_no_part_of_the_time() -> None:
    """The process that forks has imported the module."""
    assert rated(BEHAVE, "imported before")["imported before"].reward == 1.0


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("", UsageError, "names none"),
        ("no_such_module:f", MissingInputError, "no module 'no_such_module'"),
        ("tests.rewards.limited:f", UsageError, r"tests\.rewards\.limited has no 'f'"),
    ],
)
def test_a_function_that_is_not_there_is_said_before_anything_is_sampled(
    name: str, error: type[Exception], words: str
) -> None:
    tables = {"mine": Function(function=name)}
    for act in (rewards.load, rewards.identity):
        with pytest.raises(error, match=words):
            act("mine", tables)


def test_the_limit_and_the_bytes_of_the_module_are_part_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "my_limited_reward.py"
    source.write_text("def f(completions, **_):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)

    def identity(**values: Any) -> str:
        return rewards.identity("mine", {"mine": Function(function="my_limited_reward:f", **values)})

    first = identity()
    assert first == identity(num_workers=3) != identity(timeout_seconds=3)
    source.write_text(source.read_text() + "# changed\n")
    assert identity() != first


def test_a_run_goes_on_past_completions_that_hang(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    """Through the command line, with a module beside the user: the second of three answers hangs."""
    (tmp_path / "mine.py").write_text(
        "import time\ndef reward(completions, **_):\n    text = completions[0][0]['content']\n"
        "    time.sleep(600 if 'slow' in text else 0)\n    return [len(text)]\n"
    )
    texts = ("Yes.", "A slow no.", "Perhaps.")
    rows = "".join(f'{{"prompt": "Q{i}", "completion": "{text}"}}\n' for i, text in enumerate(texts))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "r.toml").write_text(
        f'model = "{tiny_model}"\ninputs = ["rows.jsonl"]\nreference = "none"\nrewards = ["limited"]\n'
        '[reward_settings.limited]\nkind = "function"\nfunction = "mine:reward"\ntimeout_seconds = 2\nnum_workers = 1\n'
    )
    done = cli("score", "r.toml", "--out", "s", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = store.read_dataset(tmp_path / "s", "rewards/limited", Reward).to_pylist()
    assert [(r["reward"], r["status"], r["detail"]) for r in found] == [
        (4.0, "ok", None), (None, "timeout", "more than 2 s"), (8.0, "ok", None)
    ]  # fmt: skip
