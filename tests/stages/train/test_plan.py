"""`prefpipe plan`: what a run will cost, through the command line, and its numbers against a count by hand."""

import os
import re
import shutil
from pathlib import Path

import pytest

from prefpipe import machine
from prefpipe.config.plan import PlanConfig
from prefpipe.errors import UsageError
from prefpipe.forward import load
from prefpipe.stages.train import host_copies, loading, memory, plan
from prefpipe.stages.train.examples import TrainPair
from prefpipe.stages.train.inputs import prepare
from prefpipe.stages.train.micro_batches import tree_of
from tests.conftest import Cli
from tests.stages.train import data

ROWS = (
    "figures", "pairs, steps", "tokens per epoch", "micro-batch", "weights", "trained, gradients", "optimizer",
    "activations", "checkpointing", "head chunk", "peak", "time", "cache saves", "saving",
)  # fmt: skip

LORA = {"lora_r": 16, "lora_alpha": 32}  # the defaults, which full fine-tuning leaves alone
FORECAST = (
    "figures", "model", "micro-batch", "GiB a rank of", *plan._PARTS, "checkpointing", "fits 24 GiB", "head chunk",
    "host", "saving",
)  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = data.with_reference(data.bare_pairs(10), tiny_model)
    return data.write_pairs(tmp_path_factory.mktemp("pairs") / "p", rows)


def settings(model: Path, *pairs: Path, **changes: object) -> PlanConfig:
    """Those of a few quick fp32 steps, and of the machine."""
    here = {name: changes.pop(name) for name in ("gpus", "gpu_memory") if name in changes}
    return PlanConfig.model_validate({**data.config(model, *pairs, **changes).model_dump(), **here})


def number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    assert found, text
    return int(found.group(1).replace(",", ""))


def test_the_command_prints_a_table_and_writes_nothing(cli: Cli, tiny_model: Path, pairs: Path, tmp_path: Path):
    done = cli(
        "plan", "--model", tiny_model, "--pairs", pairs, "--dtype", "float32", "--train-batch-size", 4,
        "--num-train-epochs", 2, "--lora-r", 4, "--max-tokens-per-micro-batch", 60,
        cwd=tmp_path, env={"PYTHONPATH": os.fspath(Path(plan.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    width = max(map(len, ROWS))
    rows = {line[:width].rstrip(): line[width + 2 :] for line in done.stdout.splitlines()}
    assert tuple(rows) == ROWS
    assert rows["pairs, steps"] == "10, 6 of 4 pairs"
    computed, logical = (
        number(rows["tokens per epoch"], p) for p in (r"([\d,]+) computed", r"([\d,]+) as separate rows")
    )
    rows_of = data.bare_pairs(10)
    assert logical == sum(
        2 * len(r.prompt_token_ids) + len(r.chosen_token_ids) + len(r.rejected_token_ids) for r in rows_of
    )
    assert 0 < computed <= logical
    assert number(rows["micro-batch"], r"holds ([\d,]+)") <= 60
    for name in ("weights", "trained, gradients", "optimizer", "activations", "head chunk", "peak"):
        assert re.match(r"\d+\.\d{3} GiB", rows[name]), rows[name]
    assert re.match(r"\d+\.\d min \(\d+ tokens/s", rows["time"])
    assert "reference passes with the adapter off" in rows["cache saves"]
    assert re.search(r"^while training (goes on, from|waits: the host has no room for) copies of", rows["saving"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", [("--out", "somewhere"), ("--force",)])
def test_flags_that_write_are_refused(cli: Cli, tmp_path: Path, flag: tuple[str, ...]):
    done = cli("plan", *flag, cwd=tmp_path, env={"PYTHONPATH": os.fspath(Path(plan.__file__).parents[1])})
    assert done.returncode == 2
    assert "plan writes nothing" in done.stderr
    assert list(tmp_path.iterdir()) == []


def pair(name: str, prompt: int, chosen: tuple[int, ...], rejected: tuple[int, ...]) -> TrainPair:
    return TrainPair(name, "c", "r", (1,) * prompt, chosen, rejected, None, None, 1.0)


def test_unique_tokens_by_hand(tiny_model: Path):
    """Three pairs of a 10-token prompt in one step, the chosen one (5 tokens) always the same, rejected 1, 2, 3.

    Computed 10 + 5 + 1 + 2 + 3 = 21, as separate rows 3 x (20 + 5) + 6 = 81; apart in steps of one pair
    16 + 17 + 18 = 51.
    """
    pairs = [pair(str(n), 10, (9,) * 5, (20,) * n) for n in (1, 2, 3)]
    together, apart = (data.config(tiny_model, train_batch_size=size) for size in (3, 1))
    assert plan.unique_tokens(pairs, together, 1000) == {"computed": 21, "logical": 81, "largest micro-batch": 21}
    assert plan.unique_tokens(pairs, apart, 1000) == {"computed": 51, "logical": 81, "largest micro-batch": 18}


def test_grouping_by_prompt_computes_fewer_tokens(tiny_model: Path):
    rows = data.to_train_pairs(data.bare_pairs(40))
    apart, together = (
        plan.unique_tokens(rows, data.config(tiny_model, group_by_prompt=flag), 10**6) for flag in (False, True)
    )
    assert together["computed"] < apart["computed"] < apart["logical"] == together["logical"]


def test_a_plan_without_a_budget_fits_the_free_memory(tiny_model: Path, pairs: Path):
    lines = plan.run(settings(tiny_model, pairs))
    assert [line.split("  ")[0] for line in lines] == list(ROWS)
    (micro,) = (line for line in lines if line.startswith("micro-batch"))
    assert number(micro, r"at most ([\d,]+)") >= number(micro, r"holds ([\d,]+)") > 0


@pytest.mark.parametrize(
    ("setting", "share", "events", "said"),
    [
        ("auto", 0.9, ["measure", "checkpoint", "measure"], "on: a row of {} tokens does not fit the free memory"),
        ("auto", 1.2, ["measure"], "off: a row of {} tokens, the longest, fits the free memory"),
        ("on", 1.2, ["checkpoint", "measure"], "on, as asked for"),
        ("off", 0.9, ["measure"], "off, as asked for"),
    ],
)
def test_checkpointing_is_foretold_as_train_does_it(
    tiny_model: Path, pairs: Path, setting: str, share: float, events: list[str], said: str,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """Free memory of `share` of what the longest row needs beside what is fixed: plan says what train does, from a
    footprint of the model as it will train."""
    rows = prepare(data.config(tiny_model, pairs)).rows
    trees = [tree_of(row) for row in rows]
    longest = max(tree.num_tokens for tree in trees)
    footprint = memory.measure(data.policy(tiny_model), trees)
    needed = footprint.optimizer + footprint.head + footprint.activations(longest)
    seen: list[str] = []

    def measure(_model: object, _trees: object) -> memory.Footprint:
        seen.append("measure")
        return footprint

    monkeypatch.setattr(memory, "measure", measure)
    monkeypatch.setattr(memory, "free_bytes", lambda _device: share * needed / memory.SHARE)
    monkeypatch.setattr(load, "checkpoint_layers", lambda _model: seen.append("checkpoint"))
    config = data.config(tiny_model, pairs, gradient_checkpointing=setting)
    (line,) = (
        line
        for line in plan.run(settings(tiny_model, pairs, gradient_checkpointing=setting))
        if line.startswith("checkpointing")
    )
    assert said.format(longest) in line
    planned, seen = seen, []
    loading.fitting_tokens(data.policy(tiny_model), rows, config)
    assert planned == seen == events


def forecast_of(*lines: str) -> dict[str, list[str]]:
    """The words of each line by its name."""
    width = max(map(len, FORECAST))
    return {line[:width].rstrip(): line[width + 2 :].split() for line in lines}


def test_a_config_alone_gives_the_memory_of_a_rank(cli: Cli, tiny_model: Path, tmp_path: Path):
    """A folder without weights and tokenizer, rows as long as settings and context (1,024 tokens) allow."""
    shutil.copyfile(tiny_model / "config.json", tmp_path / "config.json")
    done = cli("plan", "--model", tmp_path, "--gpus", 6, "--gpu-memory", 24, "--max-prompt-length", 1000, "--lora-r", 4)
    assert done.returncode == 0, done.stderr
    rows = forecast_of(*done.stdout.splitlines())
    assert tuple(rows) == FORECAST
    assert rows["GiB a rank of"] == ["1", "GPU", "2", "GPUs", "4", "GPUs", "6", "GPUs"]
    assert "bfloat16," in rows["model"]
    assert rows["micro-batch"][0] == f"{1000 + 2 * 24:,}"
    assert rows["fits 24 GiB"] == ["yes"] * 4
    assert {len(rows[name]) for name in plan._PARTS} == {4}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_rows_at_hand_take_the_place_of_settings(tiny_model: Path, pairs: Path):
    config = settings(tiny_model, pairs, gpus=1, gpu_memory=1e-6, tuning="lora")
    rows = forecast_of(*plan.run(config))
    longest = max(tree_of(row).num_tokens for row in prepare(config.training).rows)
    assert rows["micro-batch"] == [str(longest), "tokens:", "the", "longest", "row"]
    assert rows["fits 0 GiB"] == ["no"]
    assert rows["fits 1 with"][:2] == ["no", "setting:"]
    assert rows["host"][1] == "GiB"


@pytest.mark.parametrize(
    ("gpu", "free", "said"),
    [
        (False, 0, "goes on, where half of the free memory of a node holds {} of copies; else training waits"),
        (True, 2.5, "goes on, from copies of {} on the host"),
        (True, 1.5, "waits: the host has no room for copies of {} beside it"),
    ],
)
def test_a_plan_says_whether_training_waits_for_checkpoints(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, free: float, said: str
):
    """Copies of all ranks of a node in half of its memory: of 16 ranks those of 8. They are powers of two."""
    monkeypatch.setattr(machine, "has_gpu", lambda: gpu)
    config = settings(tiny_model, gpus=16, tuning="full", distributed="fsdp2", **LORA)
    trained = load.load_model(tiny_model, "float32").parameters()
    copies = max(
        n * 3 * sum(host_copies.pinned_bytes(4 * -(-p.shape[0] // n) * (p.numel() // p.shape[0])) for p in trained)
        for n in (1, 2, 4, 8)
    )
    monkeypatch.setattr(machine, "available_memory", lambda: free * copies)
    (line,) = (line for line in plan.run(config) if line.startswith("saving"))
    amount = f"{copies / 2**30:.2f} GiB" if not gpu else f"{copies / 2**30:.3f} GiB"
    assert line.endswith("while training " + said.format(amount))


@pytest.mark.parametrize("absent", [True, False])
def test_what_this_machine_cannot_measure_is_predicted_for_up_to_64_gpus(
    tiny_model: Path, pairs: Path, tmp_path: Path, absent: bool, monkeypatch: pytest.MonkeyPatch
):
    """Weights that are not there, and weights that the free memory does not hold."""
    shutil.copyfile(tiny_model / "config.json", tmp_path / "config.json")
    monkeypatch.setattr(memory, "free_bytes", lambda _device: 1000)
    rows = forecast_of(*plan.run(settings(tmp_path if absent else tiny_model, pairs)))
    assert rows["GiB a rank of"][::2] == ["1", "2", "4", "8", "16", "32", "64"]


def test_checkpointing_is_foretold_for_gpus_too(tiny_model: Path, pairs: Path):
    for setting, room, said in (("auto", 80, "off"), ("on", 80, "on"), ("off", 1e-6, "off"), ("auto", 1e-6, "on")):
        config = settings(tiny_model, pairs, gpus=1, gpu_memory=room, gradient_checkpointing=setting)
        assert forecast_of(*plan.run(config))["checkpointing"] == [said]


def test_groups_without_rows_have_no_length(tiny_model: Path):
    config = PlanConfig(model=str(tiny_model), groups=(), loss_type=("plackett_luce",), dtype="float32", gpus=2)
    with pytest.raises(UsageError, match="how many completions a group has"):
        plan.run(config)
