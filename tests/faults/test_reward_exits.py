"""Rewards that end their process: exit code 0 is for a run with a manifest, whoever says otherwise."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.forge import Ended, Forge

ENDS = ["sys.exit(0)", "sys.exit()", "os._exit(0)", "raise SystemExit", "early(0)", "quit_all()", "exit(0)"]
REPLACED = ["os.execv('/bin/true', ['true'])", "os.execlp('true', 'true')", "os.execvpe('true', ['true'], {})"]
ENDS += ["import posix; posix._exit(0)", *REPLACED]
MODULE = """
import os, sys
from os import _exit as early

def quit_all():
    try:
        os._exit(0)
    finally:
        sys.exit(0)

{at_import}

def reward(completions, **columns):
    bad = [i for i, turns in enumerate(completions) if "{word}" in str(columns["prompts"][i])]
    if bad:
        {in_call}
    return [1.0] * len(completions)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    rows = [{"prompt": f"Tell me about {topic}."} for topic in ("owls", "moss", "poison", "clay")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(
    forged: Forge, model: Path, place: Path, *more: str, word: str = "", in_call: str = "pass", at: str = ""
) -> Ended:
    (place / "mine.py").write_text(MODULE.format(at_import=at, in_call=in_call, word=word))
    return forged.run(
        "generate", "--model", model, "--prompts", place / "p.jsonl", "--engine", "fake", "--num-samples", 1,
        "--shard-rows", 1, "--out", place / "g", *(more or ("--rewards", "mine:reward")), cwd=place,
    )  # fmt: skip


@pytest.mark.parametrize("in_call", ENDS)
def test_an_end_in_every_call_is_a_crash_of_the_reward(
    forged: Forge, tiny_model: Path, place: Path, in_call: str
) -> None:
    done = run(forged, tiny_model, place, in_call=in_call)
    assert done.code == 65, done.stderr
    assert "reward mine:reward failed on all" in done.stderr
    assert "SystemExit" in done.stderr
    assert not (place / "g" / "manifest.json").exists()


@pytest.mark.parametrize("at", ENDS)
def test_an_end_at_import_is_a_module_that_cannot_be_imported(
    forged: Forge, tiny_model: Path, place: Path, at: str
) -> None:
    done = run(forged, tiny_model, place, at=at)
    assert done.code == 2, done.stderr
    assert "reward mine:reward cannot be imported: SystemExit" in done.stderr
    assert not (place / "g").exists()


@pytest.mark.parametrize("in_call", ["sys.exit(0)", "os._exit(0)", "early(0)"])
def test_with_a_time_limit_an_end_costs_its_row(forged: Forge, tiny_model: Path, place: Path, in_call: str) -> None:
    table = json.dumps({"r": {"kind": "function", "function": "mine:reward", "num_workers": 1}})
    done = run(forged, tiny_model, place, "--rewards", "r", "--reward-settings", table, word="nobody", in_call=in_call)
    assert done.code == 0, done.stderr
    (place / "g").rename(place / "before")
    done = run(forged, tiny_model, place, "--rewards", "r", "--reward-settings", table, "--shard-rows", "4",
               word="poison", in_call=in_call)  # fmt: skip
    assert done.code == 0, done.stderr
    rows = [
        row for path in sorted((place / "g").glob("rewards/r/*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    assert sorted(row["status"] for row in rows) == ["crash", "ok", "ok", "ok"]


def test_a_child_that_the_reward_forks_may_end(forged: Forge, tiny_model: Path, place: Path) -> None:
    fork = "child = os.fork(); child or os._exit(7); assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7"
    done = run(forged, tiny_model, place, in_call=fork)
    assert done.code == 0, done.stderr


def test_a_child_of_the_reward_may_become_another_program(forged: Forge, tiny_model: Path, place: Path) -> None:
    become = "child = os.fork(); child or os.execlp('true', 'true'); assert os.waitpid(child, 0)[1] == 0"
    done = run(forged, tiny_model, place, in_call=f"{become}; import subprocess; subprocess.run(['true'], check=True)")
    assert done.code == 0, done.stderr


def test_a_package_that_ends_the_command_fails_it(forged: Forge, tiny_model: Path, place: Path) -> None:
    """Whatever is not a reward: here an engine."""
    (place / "engines.py").write_text("import sys\ndef ends(settings):\n    sys.exit(0)\n")
    done = forged.run(
        "generate", "--model", tiny_model, "--prompts", place / "p.jsonl", "--engine", "fake", "--out", place / "g",
        cwd=place, engine="engines:ends",
    )  # fmt: skip
    assert done.code == 1, done.stderr
    assert "ended from inside, with exit code 0" in done.stderr
