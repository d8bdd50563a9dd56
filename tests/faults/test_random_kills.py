"""Random kills, a full disk at any write, poisoned prompts, two writers: always the same bytes.

Directories live in memory where the system has such a place: what is tested is the order of operations, not the disk.
"""

import json
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prefpipe.runs import store
from prefpipe.schemas import Completion
from tests.forge import Forge

# A sixth of them by default, all with PREFPIPE_ALL_FAULTS=1 (`make faults`).
NUM_NAMED, NUM_TIMED, NUM_DOUBLE = (76, 30, 16) if "PREFPIPE_ALL_FAULTS" in os.environ else (14, 4, 3)
POINTS = ("write", "fsync", "rename", "fsync_dir")
ACTIONS = ("kill", "kill", "torn")
COMMANDS = ("generate", "score")
_MEMORY = Path("/dev/shm")


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def inputs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """Arguments of both commands: four shards each, all kinds of datasets, with faulty and repeated rows."""
    folder = tmp_path_factory.mktemp("inputs")
    prompts = [{"prompt": f"Tell me about bird {i}."} for i in range(7)] + [{"prompt": "say <|im_end|>"}]
    pairs = [{"prompt": f"Bird {i}?", "chosen": f"Owl {i}.", "rejected": f"No {i}."} for i in range(5)]
    pairs += [{**pairs[0], "chosen": "An owl."}, pairs[1]]  # an answer of the first shard again, a pair of it again
    for name, rows in (("prompts", prompts), ("pairs", [*pairs, {"prompt": " ", "chosen": "a", "rejected": "b"}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--model", tiny_model, "--engine", "fake", "--shard-rows", 2, "--rewards", "short_sentence", "--check", 3]
    return {
        "generate": ["generate", "--prompts", folder / "prompts.jsonl", "--num-samples", 2, *common],
        "score": ["score", "--inputs", folder / "pairs.jsonl", *common],
    }


@pytest.fixture(scope="module")
def expected(
    forged: Forge, inputs: dict[str, list[object]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, bytes]]:
    """Every file of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("expected")
    for command in COMMANDS:
        done = forged.run(*inputs[command], "--out", folder / command)
        assert done.code == 0, done.stderr
    return {command: contents(folder / command) for command in COMMANDS}


def contents(out: Path) -> dict[str, bytes]:
    skipped = (".lock", ".owner", "timing.jsonl", "inputs.txt")
    return {
        str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name not in skipped
    }


def test_a_run_cut_anywhere_and_run_again_has_the_same_bytes(
    forged: Forge, inputs: dict[str, list[object]], expected: dict[str, dict[str, bytes]], place: Path
) -> None:
    """Kills at named points, kills at random times, and kills while a killed run recovers."""
    source = random.Random(20_241_124)
    kills = 0
    for number in range(NUM_NAMED + NUM_TIMED + NUM_DOUBLE):
        command = COMMANDS[number % 2]
        arguments = [*inputs[command], "--out", place / "out"]
        for _ in range(2 if number >= NUM_NAMED + NUM_TIMED else 1):
            if NUM_NAMED <= number < NUM_NAMED + NUM_TIMED:
                job: dict[str, object] = {"alarm": source.uniform(0.005, 0.1)}
            else:
                job = {"fault": f"{source.choice(POINTS)}:{source.randint(1, 36)}:{source.choice(ACTIONS)}"}
            done = forged.run(*arguments, **job)
            assert done.code in (0, -signal.SIGKILL, -signal.SIGALRM), (job, done.stderr)
            kills += done.code < 0 and "fault" in job  # the others may come too late, on a fast machine
        done = forged.run(*arguments)
        assert done.code == 0, (job, done.stderr)
        assert contents(place / "out") == expected[command], job
        shutil.rmtree(place / "out")
    assert kills >= (NUM_NAMED + 2 * NUM_DOUBLE) * 0.7


@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_is_full_at_any_write_costs_nothing_but_a_rerun(
    forged: Forge, inputs: dict[str, list[object]], expected: dict[str, dict[str, bytes]], place: Path, command: str
) -> None:
    """The n-th write fails, n = 1, 2, 3, ... on one directory, until nothing fails any more."""
    arguments = [*inputs[command], "--out", place / "out"]
    number = 1
    while (done := forged.run(*arguments, fault=f"write:{number}:enospc")).code != 0:
        assert done.code == 74, done.stderr
        assert "no space left on the disk" in done.stderr
        assert not list((place / "out").rglob(".*.tmp"))
        shutil.rmtree(place / "out") if number % 3 == 0 else None
        number += 1
    assert number > 10
    assert contents(place / "out") == expected[command]


@pytest.mark.parametrize(("engine", "deaths"), [("raises", [1, 1]), ("vanishes", [-9, -9, -9])])
def test_a_prompt_that_kills_the_engine_ends_in_the_ledger(
    forged: Forge, tiny_model: Path, place: Path, engine: str, deaths: list[int]
) -> None:
    """An engine that fails with a prompt alone convicts it; a process that vanishes, which may be anybody's doing, when
    it does so twice. All other prompts are answered, and nothing is started anew."""
    rows = [{"prompt": f"Tell me about bird {i}."} for i in range(9)]
    rows.insert(5, {"prompt": "Tell me about poison."})
    (place / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["generate", "--model", tiny_model, "--prompts", place / "p.jsonl", "--engine", "fake",
                 "--num-samples", 2, "--shard-rows", 3, "--out", place / "g"]  # fmt: skip
    for code in deaths:
        done = forged.run(*arguments, engine=f"tests.faults.engines:{engine}")
        assert done.code == code, done.stderr
        if code == 1:
            assert "the engine died while it worked on" in done.stderr
            assert "run the same command again" in done.stderr
    done = forged.run(*arguments, engine=f"tests.faults.engines:{engine}")
    assert done.code == 0, done.stderr
    prompts = store.read_dataset(place / "g", "completions", Completion, ["prompt_id"])["prompt_id"]
    assert prompts.value_counts().to_pylist()[0]["counts"] == 2
    assert len(prompts.unique()) == 9
    (row,) = pq.read_table(place / "g" / "dropped.parquet").to_pylist()
    assert row["reason"] == "engine_died"
    assert forged.run(*arguments).code == 0  # complete, and it stays so
    damaged = place / "g" / "completions" / "part-00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    again = forged.run(*arguments, engine=f"tests.faults.engines:{engine}")
    assert again.code == 0, again.stderr  # the shard is made again without the prompt that would kill


@pytest.fixture(scope="module")
def poisoned(forged: Forge, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What score reads, with poison in it: a file of pairs whose poisoned answer stands in two shards, a run with two
    completions of a poisoned prompt, and the pair that was built from them."""
    folder = tmp_path_factory.mktemp("poisoned")
    pairs = [{"prompt": f"Bird {i}?", "chosen": f"Owl {i}.", "rejected": "No."} for i in range(5)]
    pairs[2] |= {"chosen": "A poison."}
    pairs += [{**pairs[2], "rejected": "Never."}, {**pairs[0], "rejected": "Never."}]
    prompts = [{"prompt": f"Tell me about {topic}."} for topic in ("owls", "moss", "poison", "clay")]
    for name, rows in (("pairs.jsonl", pairs), ("prompts.jsonl", prompts)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--model", tiny_model, "--engine", "fake", "--num-samples", 2, "--rewards", "length", "--shard-rows", 1]
    for command in (
        ["generate", "--prompts", folder / "prompts.jsonl", *common, "--reward-settings",
         '{"length": {"kind": "length", "min": 50}}', "--out", folder / "g"],
        ["build-pairs", "--completions", folder / "g", "--reward", "length", "--out", folder / "p"],
    ):  # fmt: skip
        done = forged.run(*command)
        assert done.code == 0, done.stderr
    return {"file": folder / "pairs.jsonl", "completions": folder / "g", "pairs": folder / "p"}


def scoring(model: Path, source: Path, out: Path) -> list[object]:
    rated = [] if source.name == "p" else ["--rewards", "short_sentence"]
    return ["score", "--model", model, "--inputs", source, "--engine", "fake", "--shard-rows", 2, "--check", 3, *rated,
            "--out", out]  # fmt: skip


def test_an_engine_that_fails_once_while_it_scores_costs_nothing_but_a_rerun(
    forged: Forge, tiny_model: Path, poisoned: dict[str, Path], place: Path
) -> None:
    """The same bytes as those of a run that nothing disturbed."""
    for out, codes in (("undisturbed", [0]), ("disturbed", [1, 0])):
        for code in codes:
            engine = "tests.faults.engines:raises" if code else "prefpipe.engines.fake:FakeEngine"
            done = forged.run(*scoring(tiny_model, poisoned["file"], place / out), engine=engine)
            assert done.code == code, done.stderr
            assert ("run the same command again" in done.stderr) is bool(code)
    assert contents(place / "disturbed") == contents(place / "undisturbed")


@pytest.mark.parametrize(("engine", "deaths"), [("raises", [1, 1]), ("vanishes", [-9, -9, -9])])
@pytest.mark.parametrize("kind", ["file", "completions", "pairs"])
def test_a_completion_that_kills_the_engine_ends_in_the_ledger(
    forged: Forge, tiny_model: Path, poisoned: dict[str, Path], place: Path, kind: str, engine: str, deaths: list[int]
) -> None:
    """Nothing of it is in any dataset, every row about it is in the ledger, and all others are as without it."""
    plain = forged.run(*scoring(tiny_model, poisoned[kind], place / "plain"))
    assert plain.code == 0, plain.stderr
    arguments = scoring(tiny_model, poisoned[kind], place / "out")
    for code in deaths * (2 if kind == "completions" else 1):  # one row after the other is found
        done = forged.run(*arguments, engine=f"tests.faults.engines:{engine}")
        assert done.code == code, done.stderr
    done = forged.run(*arguments, engine=f"tests.faults.engines:{engine}")
    assert done.code == 0, done.stderr
    ledger = pq.read_table(place / "out" / "dropped.parquet").to_pylist()
    assert {row["reason"] for row in ledger} == {"engine_died"}
    assert len({row["id"] for row in ledger}) == len(ledger) == {"file": 3, "completions": 2, "pairs": 1}[kind]
    missing = rows_of(place / "plain") - rows_of(place / "out")
    assert rows_of(place / "out") <= rows_of(place / "plain")
    assert (
        sorted(dataset for dataset, _ in missing)
        == {
            "file": ["completions", "pairs", "pairs", "ref_logps", "rewards/short_sentence"],
            "completions": ["ref_logps"] * 2 + ["rewards/short_sentence"] * 2,
            "pairs": ["pairs", "ref_logps", "ref_logps"],
        }[kind]
    )
    assert {row["id"] for row in ledger} == {key for dataset, key in missing if kind != "pairs" or dataset == "pairs"}
    assert {row["detail"].split()[-1] for row in ledger} <= {key for dataset, key in missing if dataset == "ref_logps"}
    whole = contents(place / "out")
    damaged = sorted((place / "out" / "ref_logps").glob("part-*.parquet"))[-2:][0]  # of the file: where it is again
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    again = forged.run(*arguments, engine=f"tests.faults.engines:{engine}")
    assert again.code == 0, again.stderr  # made again without what would kill it
    assert {n: b for n, b in contents(place / "out").items() if "quarantine" not in n} == whole


def rows_of(out: Path) -> set[tuple[str, str]]:
    """(dataset, key) of every row; each stands there once."""
    found = [
        (str(path.parent.relative_to(out)), key)
        for path in out.rglob("part-*.parquet")
        if path.parent.name not in ("dropped", "prompts")
        for key in pq.read_table(path).column(0).to_pylist()
    ]
    assert len(found) == len(set(found))
    return set(found)


def test_of_many_writers_one_works_and_the_others_are_told_who(
    forged: Forge, inputs: dict[str, list[object]], expected: dict[str, dict[str, bytes]], place: Path
) -> None:
    arguments = list(map(str, [*inputs["generate"], "--out", place / "out"]))
    job = {"arguments": arguments, "engine": "tests.faults.engines:last"}
    ended = forged.run_together([job] * 6)
    assert sorted(e.code for e in ended) == [0, 75, 75, 75, 75, 75], ended
    assert all("is being written by process" in e.stderr for e in ended if e.code == 75)
    assert contents(place / "out") == expected["generate"]
