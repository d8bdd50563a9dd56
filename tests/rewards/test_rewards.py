"""Rewards by name, and a user's own function in TRL's signature."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefpipe import extras, machine, reading, rewards
from prefpipe.config import shared
from prefpipe.config.rewards import KINDS, Math, ShortSentence
from prefpipe.errors import MissingInputError, UsageError
from prefpipe.rewards import text_rules
from prefpipe.rewards.base import Answer
from prefpipe.runs import store
from prefpipe.schemas import Message, Reward
from tests.conftest import Cli

QUESTION = [Message(role="user", content="Name a bird.")]
ANSWERS = [Answer(QUESTION, "An owl.", "owl"), Answer(QUESTION, "No.", None)]
HERE = "tests.rewards.test_rewards"
seen: dict[str, Any] = {}


def remember(prompts: list[Any], completions: list[Any], answer: list[Any], **columns: Any) -> list[float]:
    """A user's reward with all of TRL's arguments."""
    seen.clear()
    seen.update(prompts=prompts, completions=completions, answer=answer, **columns)
    return [0.5, 1]


def mixed(completions: list[Any], **_columns: Any) -> list[Any]:
    return [None, float("nan")]


def infinite(completions: list[Any], **_columns: Any) -> list[Any]:
    return [float("inf"), "good"]


def one(completions: list[Any], **_columns: Any) -> list[float]:
    return [1.0]


def explodes(completions: list[Any], **_columns: Any) -> list[float]:
    raise ValueError("no such bird")


def from_numpy(completions: list[Any], **_columns: Any) -> np.ndarray:
    return np.array([0.25, 0.5], dtype=np.float32)


class Counter:
    """A reward with state is an object that can be called."""

    def __call__(self, completions: list[Any], **_columns: Any) -> list[float]:
        return [1.0 for _ in completions]


counter = Counter()
half = partial(one)


def as_bools(completions: list[Any], **_columns: Any) -> Sequence[bool]:
    return (True, False)


def test_a_reward_of_ours_by_name() -> None:
    answers = [Answer(QUESTION, "An owl is a bird at night.", "owl")]
    assert rewards.load("short_sentence")(answers) == text_rules.short_sentence(ShortSentence())(answers)
    assert set(rewards.REWARDS) == set(shared.REWARD_NAMES)


def test_a_users_function_gets_what_trl_gives_it() -> None:
    """TRL: prompts and completions are lists of messages, further columns come by name."""
    scores = rewards.load(f"{HERE}:remember")(ANSWERS)
    assert [(s.reward, s.status, s.detail) for s in scores] == [(0.5, "ok", None), (1.0, "ok", None)]
    assert seen == {
        "prompts": [QUESTION, QUESTION],
        "completions": [[{"role": "assistant", "content": "An owl."}], [{"role": "assistant", "content": "No."}]],
        "answer": ["owl", None],
    }


def test_further_columns_of_the_prompts_come_by_name() -> None:
    """As TRL passes the columns of its dataset; a column named like an argument does not replace it."""
    given = [Answer(QUESTION, "a", "x", '{"level": 3, "answer": "y"}'), Answer(QUESTION, "b", None, '{"topic": ["z"]}')]
    assert [s.reward for s in rewards.load(f"{HERE}:remember")(given)] == [0.5, 1.0]
    assert {k: v for k, v in seen.items() if k not in ("prompts", "completions")} == {
        "answer": ["x", None], "level": [3, None], "topic": [None, ["z"]],
    }  # fmt: skip


def test_none_is_unparsable_and_nan_a_crash_of_that_row() -> None:
    """TRL reads None as "does not apply"; a number that is none must not reach a ranking."""
    nothing, bad = rewards.load(f"{HERE}:mixed")(ANSWERS)
    assert (nothing.reward, nothing.status) == (None, "unparsable")
    assert (bad.reward, bad.status) == (None, "crash")
    assert bad.detail is not None
    assert "nan" in bad.detail
    endless, text = rewards.load(f"{HERE}:infinite")(ANSWERS)
    assert (endless.reward, endless.status) == (None, "crash")
    assert text.detail == "the function returned 'good'"


def test_a_wrong_count_is_a_crash_of_every_row() -> None:
    scores = rewards.load(f"{HERE}:one")(ANSWERS)
    assert [(s.reward, s.status, s.detail) for s in scores] == [(None, "crash", "1 rewards for 2 completions")] * 2


def test_an_exception_is_a_crash_of_every_row_with_its_words() -> None:
    scores = rewards.load(f"{HERE}:explodes")(ANSWERS)
    assert [(s.reward, s.status, s.detail) for s in scores] == [(None, "crash", "ValueError: no such bird")] * 2


def test_numbers_of_numpy_are_numbers() -> None:
    """TRL turns what the function returns into a float32 tensor: numpy numbers and truth values are fine there."""
    assert [s.reward for s in rewards.load(f"{HERE}:from_numpy")(ANSWERS)] == [0.25, 0.5]
    assert [s.reward for s in rewards.load(f"{HERE}:as_bools")(ANSWERS)] == [1.0, 0.0]


@pytest.mark.parametrize("name", ["remember", "counter", "half", "Counter"])
def test_a_users_reward_is_identified_by_the_bytes_of_its_module(name: str) -> None:
    """Whatever can be called: an edit of the module must start another run."""
    assert rewards.identity(f"{HERE}:{name}") == reading.file_digest(Path(__file__))


def test_a_wrapped_reward_is_identified_by_the_users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decorator of another module must not hide edits of the user's own."""
    source = tmp_path / "my_wrapped_reward.py"
    source.write_text(
        "from contextlib import contextmanager\n@contextmanager\ndef f(completions, **_):\n    yield [1.0]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert rewards.identity("my_wrapped_reward:f") == reading.file_digest(source)


def test_our_reward_is_identified_by_its_version() -> None:
    assert rewards.identity("short_sentence") == f"short_sentence-{text_rules.VERSION}"


def test_the_number_type_of_a_judge_behind_an_endpoint_is_not_that_of_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What runs of earlier versions have stays, on any machine: nothing is computed here."""
    found: set[str] = set()
    for dtype in ("bfloat16", "float32"):
        monkeypatch.setattr(machine, "number_type", lambda dtype=dtype: (dtype, ""))
        found.add(rewards.identity("judge"))
    assert len(found) == 1
    assert '"dtype":"bfloat16"' in found.pop()


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(MissingInputError, match="no module 'no_such_module'") as caught:
        rewards.load("no_such_module:f")
    assert "folder" in caught.value.hint


@pytest.mark.parametrize("name", [f"{HERE}:no_such_function", f"{HERE}:"])
def test_a_function_that_is_not_there(name: str) -> None:
    with pytest.raises(UsageError, match=f"{HERE} has no '"):
        rewards.load(name)


def test_a_name_without_a_module_is_an_error_of_the_user() -> None:
    with pytest.raises((UsageError, MissingInputError), match="reward :f"):
        rewards.load(":f")


def test_a_module_beside_the_recipe_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_reward.py").write_text("def f(completions, **_):\n    return [1.0] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    assert [s.reward for s in rewards.load("my_own_reward:f")(ANSWERS)] == [1.0, 1.0]


def test_a_module_that_is_broken_is_an_error_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader must learn that the own file is at fault, and not read "unexpected SyntaxError"."""
    (tmp_path / "my_broken_reward.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="my_broken_reward"):
        rewards.load("my_broken_reward:f")


def test_a_table_of_settings_is_a_reward_and_part_of_the_run(
    cli: Cli, tiny_model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'rewards = ["short", "length"]\nnum_samples = 2\nengine = "fake"\nmodel = "{tiny_model}"\n'
        f'prompts = "{prompts_file}"\n[reward_settings.short]\nkind = "length"\nmax = 3\n'
        '[reward_settings.unused]\nkind = "judge"\n'
    )
    done = cli("generate", recipe, "--out", tmp_path / "g")
    assert done.returncode == 0, done.stderr
    rows = {n: store.read_dataset(tmp_path / "g", f"rewards/{n}", Reward).to_pylist() for n in ("short", "length")}
    assert {r["name"] for r in rows["short"]} == {"short"}
    assert [r["reward"] for r in rows["short"]] != [r["reward"] for r in rows["length"]]
    again = cli("generate", tmp_path / "g" / "config.json", "--out", tmp_path / "g")
    assert (again.returncode, "complete already" in again.stderr) == (0, True)
    recipe.write_text(recipe.read_text().replace("max = 3", "max = 4").replace("judge", "regex"))
    changed = cli("generate", recipe, "--out", tmp_path / "g")
    assert changed.returncode == 2
    assert "reward short" in changed.stderr
    assert '"max":4' in changed.stderr
    recipe.write_text(recipe.read_text().replace("max = 4", "max = 3"))  # a table that no reward names changes nothing
    assert cli("generate", recipe, "--out", tmp_path / "g").returncode == 0


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    monkeypatch.delitem(sys.modules, "prefpipe.rewards.json_schema", raising=False)
    with pytest.raises(MissingInputError, match="needs the package 'jsonschema'") as caught:
        rewards.load("json_schema")
    assert caught.value.hint == extras.hint("rewards")


@pytest.mark.parametrize("kind", sorted(set(rewards.REWARDS) - {"reward_model", "function"}))
def test_every_kind_is_a_reward_with_its_defaults_and_has_an_identity(kind: str) -> None:
    assert callable(rewards.load(kind))
    assert rewards.identity(kind).startswith(f"{kind}-")
    assert rewards.identity(kind) == rewards.identity("mine", {"mine": KINDS[kind]()})


def test_runtime_settings_are_no_part_of_the_identity() -> None:
    tables = [Math(num_workers=n) for n in (0, 3)]
    assert len({rewards.identity("m", {"m": t}) for t in tables}) == 1
    assert rewards.identity("m", {"m": Math(precision=2)}) != rewards.identity("m", {"m": Math()})
