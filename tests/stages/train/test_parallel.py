"""Two real processes (gloo, CPU) through the command line against one; what is dealt to whom; checkpoints across."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from prefpipe.config.train import TrainConfig
from prefpipe.errors import StorageError
from prefpipe.models import policy
from prefpipe.runs import fsio, store
from prefpipe.schemas import RefLogps, from_table
from prefpipe.stages.train import parallel, stage
from prefpipe.stages.train.micro_batches import micro_batches
from prefpipe.stages.train.parallel import World
from tests.forge import Forge
from tests.stages.train import data
from tests.stages.train.runs import two_ranks

STRATEGIES = ["ddp", "fsdp2"]


@given(st.lists(st.integers(), min_size=1, max_size=40), st.integers(1, 9))
def test_every_item_is_dealt_once_and_every_rank_gets_equally_many(items: list[int], size: int):
    hands = [World(rank, size).deal(items) for rank in range(size)]
    assert len({len(hand) for hand in hands}) == 1
    counted = [item for hand in hands for item, counts in hand if counts]
    assert sorted(counted) == sorted(items)
    assert sum(not counts for hand in hands for _, counts in hand) < size  # no more is repeated than needed
    assert all(item == items[0] for hand in hands for item, counts in hand if not counts)


def test_alone_there_is_nothing_to_share(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = parallel.start()
    assert (world, world.leads) == (World(0, 1), True)
    assert world.tell(5) == 5
    assert world.gather("x") == ["x"]
    assert parallel.sum_over_ranks({"a": 1.0}, world) == {"a": 1.0}
    model = data.policy(tiny_model)
    assert all(parallel.wrap(model, world, strategy) is model for strategy in STRATEGIES)
    parallel.stop(world)


def test_a_wrapped_model_computes_and_saves_what_an_unwrapped_one_does(forged: Forge, tiny_model: Path):
    done = two_ranks(forged, tiny_model, *STRATEGIES, module="tests.stages.train.ranks")
    assert done.code == 0, done.stderr[-4000:]


@dataclass(frozen=True)
class Case:
    """One process from beginning to end, and the settings of it."""

    config: Callable[[str], TrainConfig]
    whole: Path


@pytest.fixture(scope="module")
def case(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """13 pairs of 5 prompts from two sources in steps of 5, 5, 3, twice, each with 3 of 4 answers to imitate;
    micro-batches of 40 tokens: odd numbers of them.

    Every other pair has no reference values: they are made at the start, by all ranks.
    """
    folder = tmp_path_factory.mktemp("parallel")
    bare = data.bare_pairs(13)
    own = data.with_reference(bare, tiny_model)
    rows_of = [(own if i % 2 else bare)[i] for i in range(13)]
    sources = [data.write_pairs(folder / str(n), part) for n, part in enumerate((rows_of[:7], rows_of[7:]))]
    answers = folder / "sft.jsonl"
    answers.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": "ja" * (n + 1)}) + "\n" for n in range(4)))

    def config(strategy: str) -> TrainConfig:
        return data.config(
            tiny_model, *sources, train_batch_size=5, max_tokens_per_micro_batch=40, save_steps=2, distributed=strategy,
            learning_rate=1e-3, source_weights=(7.0, 6.0), sft=(str(answers),), sft_batch_size=3,
        )  # fmt: skip

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stage.run(config("ddp"), folder / "whole", force=False)
    torch.set_num_threads(threads)
    rows = data.to_train_pairs(bare)
    assert {len(micro_batches(rows[start : start + 5], 40)) % 2 for start in (0, 5, 10)} == {0, 1}
    return Case(config, folder / "whole")


def command(case: Case, strategy: str, out: Path) -> tuple[object, ...]:
    recipe = out.with_suffix(".json")
    recipe.write_text(case.config(strategy).model_dump_json())
    return ("train", recipe, "--out", out)


def same_as_whole(out: Path, case: Case) -> None:
    """Weights within 1e-6, metrics within rounding, the same rows and identity, nothing twice.

    Adam divides by the gradient's size, so that one element of nearly zero gradient can carry rounding up to the
    learning rate; the difference of all weights is therefore also measured against how far they moved.
    """
    ours, theirs = (load_file(o / "adapter" / "adapter_model.safetensors") for o in (out, case.whole))
    assert ours.keys() == theirs.keys()
    difference = torch.cat([(ours[name] - theirs[name]).flatten() for name in theirs])
    moved = torch.cat([t.flatten() for name, t in theirs.items() if "lora_B" in name])  # it was 0
    assert float(difference.abs().max()) <= 1e-6
    assert moved.abs().max() > 1e-3
    assert difference.norm() <= 1e-5 * moved.norm()
    mine, other = (
        [json.loads(line) for line in (o / "metrics.jsonl").read_text().splitlines()] for o in (out, case.whole)
    )
    assert [line["step"] for line in mine] == list(range(6))
    for a, b in zip(mine, other, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    found, expected = (store.read_manifest(o) for o in (out, case.whole))
    assert {k: v for k, v in found["identity"].items() if k != "policy"} == {
        k: v for k, v in expected["identity"].items() if k != "policy"
    }
    model = policy.resolve(case.config("ddp").model, str(out / "adapter"))
    assert found["identity"]["policy"] == model.id
    values = [
        {r.completion_id: r.token_logps for r in from_table(RefLogps, store.read_dataset(o, "ref_logps", RefLogps))}
        for o in (out, case.whole)
    ]
    assert values[0].keys() == values[1].keys()
    assert len(values[0]) == 14
    for key, logps in values[0].items():
        assert logps == pytest.approx(values[1][key], abs=2e-5)
    assert not list(out.rglob("*.tmp"))


def test_fully_sharded_from_beginning_to_end_and_from_its_checkpoint_alone(forged: Forge, case: Case, tmp_path: Path):
    """Two ranks do all 6 steps. Then, with the checkpoint of step 4 only, one process does the last two."""
    out = tmp_path / "t"
    done = two_ranks(forged, *command(case, "fsdp2", out))
    assert done.code == 0, done.stderr[-4000:]
    same_as_whole(out, case)
    assert stage.run(case.config("ddp"), out, force=False) == store.read_manifest(out)  # complete for one process too
    for path in (out / "manifest.json", out / "adapter", out / "checkpoints" / "step-00000006"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    stage.run(case.config("ddp"), out, force=False)
    same_as_whole(out, case)


def test_replicated_ranks_stop_together_and_one_process_goes_on(
    forged: Forge, case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """An I/O error on rank 0 before the metrics of step 3 ends both ranks; one process goes on after step 2."""
    out = tmp_path / "t"
    stopped = two_ranks(forged, *command(case, "ddp", out), faults=("append:4:eio", ""))
    assert stopped.code != 0
    assert stopped.stderr.count("error: cannot write") == 1
    assert not (out / "manifest.json").exists()
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000002"]
    stage.run(case.config("fsdp2"), out, force=False)
    assert "resuming after step 2" in capsys.readouterr().err
    same_as_whole(out, case)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_go_on_where_one_has_stopped(
    forged: Forge, case: Case, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "t"
    monkeypatch.setenv("PREFPIPE_FAULT", f"append:{fsio._passes['append'] + 4}:eio")
    with pytest.raises(StorageError):
        stage.run(case.config(strategy), out, force=False)
    done = two_ranks(forged, *command(case, strategy, out))
    assert done.code == 0, done.stderr[-4000:]
    assert done.stderr.count("resuming after step 2") == 1  # rank 0 alone talks
    assert done.stdout.count("trained on 13 pairs in 6 steps") == 1
    same_as_whole(out, case)


@pytest.fixture(scope="module")
def full(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Every weight trained by one process, with tied embeddings, held-out rows and the best weights at the end.

    The learning rate is small: Adam carries the rounding of an element with next to no gradient up to its size.
    """
    changes = {"tuning": "full", "lora_r": 16, "lora_alpha": 32, "eval_split": 0.4, "eval_steps": 2,
               "load_best_model_at_end": True, "train_batch_size": 3, "learning_rate": 1e-4}  # fmt: skip
    folder = tmp_path_factory.mktemp("full")
    stage.run(case.config("ddp").model_copy(update=changes), folder / "whole", force=False)
    return Case(lambda strategy: case.config(strategy).model_copy(update=changes), folder / "whole")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_weight_trained_on_two_ranks_equals_one_process(
    forged: Forge, full: Case, tiny_model: Path, strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Two ranks do all steps. Then, without what came after their last checkpoint but one, one process goes on."""
    out = tmp_path / "t"
    done = two_ranks(forged, *command(full, strategy, out))
    assert done.code == 0, done.stderr[-4000:]
    same_model(out, full.whole, tiny_model)
    *_, last = sorted((out / "checkpoints").iterdir())
    for path in (out / "manifest.json", out / "model", last):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    stage.run(full.config("ddp"), out, force=False)
    assert "resuming after step" in capsys.readouterr().err
    same_model(out, full.whole, tiny_model)


def same_model(out: Path, whole: Path, start: Path) -> None:
    """Weights within 1e-6, and near to each other against how far they moved; metrics within rounding."""
    ours, theirs, before = (load_file(d / "model.safetensors") for d in (out / "model", whole / "model", start))
    assert ours.keys() == theirs.keys() == before.keys()
    difference, moved = (
        torch.cat([(theirs[name] - other[name]).flatten() for name in theirs]) for other in (ours, before)
    )
    assert moved.abs().max() > 1e-4
    assert difference.abs().max() <= 1e-6
    assert difference.norm() <= 1e-4 * moved.norm()
    mine, other = ([json.loads(line) for line in (o / "metrics.jsonl").read_text().splitlines()] for o in (out, whole))
    assert len(mine) == len(other)
    for a, b in zip(mine, other, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    assert any("eval_loss" in line for line in mine)
    assert store.read_manifest(out)["totals"]["best"] == pytest.approx(store.read_manifest(whole)["totals"]["best"])


def test_two_ranks_agree_about_a_reference_of_its_own(
    forged: Forge, tiny_model: Path, other_model: Path, tmp_path: Path
):
    """Half of its values are missing: both ranks make some, audit some, and go on to what one process does."""
    bare = data.bare_pairs(6)
    own = data.with_reference(bare, other_model)
    pairs = data.write_pairs(tmp_path / "p", [*own[:3], *bare[3:]])
    config = data.config(tiny_model, pairs, reference_model=str(other_model), num_train_epochs=1)
    (tmp_path / "c.json").write_text(config.model_dump_json())
    done = two_ranks(forged, "train", tmp_path / "c.json", "--out", tmp_path / "two")
    assert done.code == 0, done.stderr[-4000:]
    stage.run(config, tmp_path / "one", force=False)
    two, one = (store.read_manifest(tmp_path / o) for o in ("two", "one"))
    assert two["inputs"]["reference"] == one["identity"]["reference"] == policy.resolve(str(other_model)).id
    assert two["totals"]["audit"] == pytest.approx(one["totals"]["audit"], abs=1e-5)
    lines = [(tmp_path / o / "metrics.jsonl").read_text().splitlines() for o in ("two", "one")]
    for mine, theirs in zip(*lines, strict=True):
        assert json.loads(mine) == pytest.approx(json.loads(theirs), rel=1e-3, abs=1e-4)
