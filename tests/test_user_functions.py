"""Functions of users by name and as callables: which of them a run can find again, and what identifies them."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefpipe import user_functions
from prefpipe.errors import MissingInputError, UsageError
from tests.conftest import ROOT
from tests.rewards.limited import behave

# A script whose functions have no module that others can import; it prints their names and digests, or the error.
SCRIPT = """
import functools, json, math, sys
from prefpipe import user_functions
from prefpipe.errors import UsageError

{code}

try:
    name = user_functions.name_of(reward, "reward")
    print(name, user_functions.digest(name), user_functions.find(name) is reward)
except UsageError as error:
    print(error.message)
"""
PLAIN = """
WORDS = ['a', 'b']
def helper(text):
    return len(text)
def reward(completions, **_):
    return [helper(w) for w in WORDS]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes mine.py into the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_for_tests", raising=False)
    user_functions._digests.pop("mine_for_tests", None)

    def write(text: str) -> Path:
        (tmp_path / "mine_for_tests.py").write_text(text)
        importlib.invalidate_caches()
        return tmp_path / "mine_for_tests.py"

    return write


def script(tmp_path: Path, code: str) -> str:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(code=code))
    done = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)}
    )
    return done.stdout.strip()


def test_a_function_of_a_module_is_its_name() -> None:
    assert user_functions.name_of(behave, "reward") == "tests.rewards.limited:behave"
    assert user_functions.find("tests.rewards.limited:behave") is behave


def inside() -> Callable[[], None]:
    def function() -> None: ...

    return function


class Scorer:
    def __call__(self) -> None: ...

    def method(self) -> None: ...


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda: None, r"reward <lambda>|a lambda has no name"),
        (inside(), "it stands inside a function or class"),
        (Scorer().method, "it stands inside a function or class"),
        (Scorer(), "reward Scorer cannot be used: it is an object without a name"),
    ],
)
def test_what_no_run_finds_again_is_refused(function: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        user_functions.name_of(function, "reward")
    assert "mine.py" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("no_such_module:f", MissingInputError, "loss no_such_module:f: no module 'no_such_module'"),
        ("tests.rewards.limited:f", UsageError, r"tests\.rewards\.limited has no 'f'"),
        ("__main__:f", UsageError, "a function of a notebook or script, which no other process can import"),
        (":f", UsageError, "cannot be imported"),
    ],
)
def test_a_name_that_leads_nowhere(name: str, error: type[Exception], words: str) -> None:
    for act in (user_functions.find, user_functions.digest):
        with pytest.raises(error, match=words):
            act(name, "loss")


def test_an_edited_module_is_read_again(module: Callable[[str], Path]) -> None:
    """A notebook lives on while its user edits a module: what runs is what the digest says."""
    name = "mine_for_tests:f"
    module("def f():\n    return 1\n")
    first = user_functions.find(name)
    before = user_functions.digest(name)
    assert user_functions.name_of(first, "reward") == name
    module("def f():\n    return 1 + 1\n")
    assert user_functions.find(name)() == 2
    assert user_functions.digest(name) != before
    with pytest.raises(UsageError, match="mine_for_tests:f is another object: the module changed"):
        user_functions.name_of(first, "reward")


def test_a_function_of_a_script_is_known_by_its_source(tmp_path: Path) -> None:
    """By that of what it names, too; not by code that it does not name."""
    name, digest, found = script(tmp_path, PLAIN).split()
    assert (name, found) == ("__main__:reward", "True")
    assert script(tmp_path, f"import os\n\n{PLAIN}\nOTHER = 1").split()[1] == digest
    for changed in (
        PLAIN.replace("'b'", "'c'"),
        PLAIN.replace("len(text)", "-len(text)"),
        PLAIN.replace("w in", "w in 2 *"),
    ):
        assert changed != PLAIN
        assert script(tmp_path, changed).split()[1] != digest


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("reward = lambda **_: [1.0]", "a lambda has no name"),
        ("exec('def reward(): pass')", "reward has no source"),
        ("MODEL = object()\ndef reward():\n    return MODEL", "reward reads MODEL, a object that no digest"),
        ("def reward(model=object()):\n    return 1", "reward has a default of any type"),
        ("reward = functools.partial(print)", "it is an object without a name"),
        ("def wrapped(f):\n    @functools.wraps(f)\n    def g(**k): return f(**k)\n    return g\n"
         "@wrapped\ndef reward(**_): return 1", "keeps values of another function"),
        ("class reward:\n    pass", "it is no function of Python"),
    ],
)  # fmt: skip
def test_what_no_digest_identifies_is_refused(code: str, words: str, tmp_path: Path) -> None:
    assert words in script(tmp_path, code)


def test_classes_recursion_and_modules_are_part_of_the_source(tmp_path: Path) -> None:
    code = (
        "class Counter:\n    def count(self, text):\n        return twice(len(text))\n"
        "def twice(n):\n    return 2 * n if n else reward()\n"
        "def reward():\n    return math.floor(Counter().count('a')), json.dumps([x for x in [twice(1)]])"
    )
    digest = script(tmp_path, code).split()[1]
    assert script(tmp_path, code).split()[1] == digest
    assert script(tmp_path, code.replace("2 * n", "3 * n")).split()[1] != digest
    assert script(tmp_path, code.replace("(len(text))", "(-len(text))")).split()[1] != digest


def test_no_other_process_gets_one_of_a_script(tmp_path: Path) -> None:
    code = PLAIN + "\nuser_functions.name_of(reward, 'reward')\n"
    assert script(tmp_path, code + "user_functions.find('__main__:reward')").endswith("True")
    act = "user_functions.name_of(reward, 'reward', elsewhere=True)"
    said = script(tmp_path, f"{PLAIN}\ntry:\n    {act}\nexcept UsageError as error:\n    print(error.message)")
    assert "which no other process can import" in said
