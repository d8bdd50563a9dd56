"""The experiments of benchmarks/results.py: what they conclude from numbers, a sample of each, their pages."""

import importlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest

from prefpipe.errors import DataError
from prefpipe.statistics import Estimate
from tests.conftest import ROOT

DOCS = ROOT / "docs" / "results"
NAMES = ("references", "losses", "rounds", "pair-rules")


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of benchmarks/ by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module


@pytest.fixture(scope="module")
def results(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("results")


@pytest.fixture(scope="module")
def bench(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("experiments.bench")


@pytest.fixture(scope="module")
def measures(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("experiments.measures")


@pytest.fixture(scope="module")
def addition(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("addition")


def evaluation(directory: Path, rewards: Sequence[Sequence[float]], gap: float | None = None) -> Path:
    """A run of evaluate with sampled answers of one token, one list of rewards for each prompt. gap: our log-prob of
    each answer minus that of the start."""
    rows = [
        {"prompt_id": f"p{p}", "completion_id": f"{p}-{i}", "decoding": "sampled" if i else "greedy", "reward": reward}
        for p, group in enumerate(rewards)
        for i, reward in enumerate([0.0, *group])
    ]
    (directory / "evaluations").mkdir(parents=True)
    pl.DataFrame([{**row, "token_logps": [-1.0]} for row in rows]).write_parquet(
        directory / "evaluations" / "part-00000.parquet"
    )
    if gap is not None:
        (directory / "kl" / "k").mkdir(parents=True)
        theirs = [{"completion_id": row["completion_id"], "token_logps": [-1.0 - gap]} for row in rows]
        pl.DataFrame(theirs).write_parquet(directory / "kl" / "k" / "part-00000.parquet")
    return directory


@pytest.mark.parametrize(
    ("said", "right", "reward"),
    [
        *[
            ("42", "42", 1.0),
            ("41", "42", 0.9),
            ("51", "42", 0.1),
            ("52", "42", 0.0),
            ("32", "42", 0.0),
            ("0", "9", 0.1),
        ],
        *[("042", "42", 0.0), ("", "42", 0.0), ("4+", "42", 0.0), (" 42", "42", 0.0), ("-2", "2", 0.0)],
    ],
)
def test_closeness_is_a_tenth_for_each_unit(addition: ModuleType, said: str, right: str, reward: float) -> None:
    assert addition.closeness([[{"role": "assistant", "content": said}]], [right]) == [pytest.approx(reward)]


def test_no_held_out_sum_is_taught(addition: ModuleType) -> None:
    splits = addition.split()
    assert {name: len(sums) for name, sums in splits.items()} == {"train": 400, "validation": 200, "heldout": 300}
    assert len({s for sums in splits.values() for s in sums}) == 900


@pytest.mark.parametrize(
    ("sign", "low", "high", "outcome"),
    [
        *[(1, 0.1, 0.3, "held"), (1, -0.1, 0.3, "not shown"), (1, -0.3, -0.1, "the opposite")],
        *[(-1, -0.3, -0.1, "held"), (-1, -0.1, 0.3, "not shown"), (-1, 0.1, 0.3, "the opposite")],
        *[(0, -0.1, 0.3, "none shown"), (0, 0.1, 0.3, "a difference"), (0, -0.3, -0.1, "a difference")],
    ],
)
def test_an_interval_decides_a_hypothesis(
    measures: ModuleType, sign: int, low: float, high: float, outcome: str
) -> None:
    assert measures.outcome(sign, Estimate((low + high) / 2, low, high)) == outcome


def test_arms_are_compared_by_seed_and_prompt(measures: ModuleType, bench: ModuleType, tmp_path: Path) -> None:
    """By hand: prompts differ by 1, 0.5 and 0 in seed 0, and by -0.5, 0 and 0.5 in seed 1, whose mean is 0. Seed 2 has
    failed in one arm, and counts in none."""
    ours = {0: [[1, 1], [1, 0], [0, 0]], 1: [[0.9, 1], [0, 0], [1, 0]], 2: [[1, 1]] * 3}
    theirs = {0: [[0, 0.9], [0, 0], [0, 0]], 1: [[1, 1], [0, 0], [0, 0]]}
    arms = {
        name: bench.Arm(name, "", {s: evaluation(tmp_path / f"{name}{s}", rows) for s, rows in of.items()})
        for name, of in (("new", ours), ("old", theirs))
    }
    found = measures.judged(bench.Hypothesis("sampled", "new", 1, "old", ""), arms)
    assert found["seeds"] == pytest.approx({0: 0.5, 1: 0.0})
    assert found["difference"] == pytest.approx(0.25)
    assert found["difference_low"] < 0.25 < found["difference_high"]
    assert measures.judged(bench.Hypothesis("sampled", "new", 1, "none", ""), arms)["outcome"] == "not measured"


def test_the_divergence_is_k3_of_the_sampled_answers(measures: ModuleType, bench: ModuleType, tmp_path: Path) -> None:
    """By hand: every answer is 0.5 nats likelier than at the start, so k3 = e^-0.5 - 1 + 0.5 = 0.1065 for each."""
    k3 = math.exp(-0.5) - 1 + 0.5
    moved, start = evaluation(tmp_path / "a", [[1, 0], [0, 0]], gap=0.5), evaluation(tmp_path / "b", [[1, 0], [0, 0]])
    arms = {name: bench.Arm(name, "", {0: path}) for name, path in (("moved", moved), ("start", start))}
    found = measures.judged(bench.Hypothesis("kl", "moved", 1, "start", ""), arms)
    assert (found["difference"], found["outcome"]) == (pytest.approx(k3), "held")


def test_what_fails_stays_in_the_table_with_its_message(results: ModuleType, bench: ModuleType, tmp_path: Path) -> None:
    experiment = bench.Bench(tmp_path, "rounds", bench.QUICK)
    with experiment.arm("DPO", 0) as evaluations:
        evaluations[0] = evaluation(tmp_path / "a", [[1, 0]])
    with experiment.arm("DPO", 1):
        raise DataError("no pair is left", "look")
    found = results.report("rounds", bench.QUICK, experiment.arms, 1.0)
    assert found["arms"][0]["failures"] == {1: "no pair is left"}
    (row,) = (line for line in results.page(found).splitlines() if line.startswith("| DPO "))
    assert "50.0 [" in row
    assert "seed 1 failed: no pair is left" in row


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_sample_of_each_runs(
    results: ModuleType, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, name: str
) -> None:
    """One seed and the fewest steps, from a start that all of them share; a second time nothing is left to do. What it
    measures says nothing."""
    out = tmp_path_factory.getbasetemp() / "results"
    out.mkdir(exist_ok=True)
    found = results.run(name, results.QUICK, out, tmp_path)
    assert {h["outcome"] for h in found["hypotheses"]} <= {
        "held",
        "not shown",
        "the opposite",
        "none shown",
        "a difference",
    }
    assert [arm["failures"] for arm in found["arms"]] == [{}] * len(found["arms"])
    assert all(arm[measure]["low"] <= arm[measure]["high"] for arm in found["arms"] for measure in ("sampled", "kl"))
    assert found["arms"][0]["name"] == "start"
    assert found["arms"][0]["kl"]["value"] == 0
    assert any(arm["kl"]["value"] > 0 for arm in found["arms"][1:])
    assert json.loads((tmp_path / f"{name}.json").read_text())["hypotheses"][0]["arm"] == found["hypotheses"][0]["arm"]
    before = {p: p.stat().st_mtime_ns for p in (out / name).rglob("*.parquet")}
    again = results.run(name, results.QUICK, out, tmp_path)
    assert again["arms"] == found["arms"]
    assert {p: p.stat().st_mtime_ns for p in (out / name).rglob("*.parquet")} == before


def test_the_command_of_a_page_gives_its_numbers(results: ModuleType) -> None:
    """Of the seeds it names those that are not the usual ones."""
    command = "python benchmarks/results.py losses"
    found = [results.report("losses", scale, [], 0.0)["command"] for scale in (results.Scale(), results.QUICK)]
    found.append(results.report("losses", results.replace(results.Scale(), seeds=(0, 4)), [], 0.0)["command"])
    assert found == [command, f"{command} --quick", f"{command} --seeds 0 4"]


PAGES = sorted(path.stem for path in DOCS.glob("*.json") if path.stem != "semi-online")  # benchmarks/semi_online.py


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_the_raw_numbers_beside_it(results: ModuleType, name: str) -> None:
    """Nothing in a page was written by hand, and the index has its command."""
    found: dict[str, Any] = json.loads((DOCS / f"{name}.json").read_text())
    assert (DOCS / f"{name}.md").read_text() == results.page(found)
    index = (DOCS / "README.md").read_text()
    assert f"({name}.md)" in index
    assert f"`{found['command']}`" in index


def test_the_index_names_every_experiment(results: ModuleType) -> None:
    index = (DOCS / "README.md").read_text()
    assert PAGES
    assert all(f"`python benchmarks/results.py {name}" in index for name in results.EXPERIMENTS)
