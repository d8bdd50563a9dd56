"""The memory of a rank from a config: against files, shards and steps that are real."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from safetensors import safe_open
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig

from prefpipe.config.train import TrainConfig
from prefpipe.errors import UsageError
from prefpipe.forward import load, shards
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import TreeModel
from prefpipe.memory import resident_peak
from prefpipe.stages.train import forecast, parallel, process_memory
from prefpipe.stages.train.forecast import Forecast, Need, Setting
from prefpipe.stages.train.memory import SHARE
from prefpipe.stages.train.parallel import World
from tests.conftest import ROOT
from tests.stages.train import data
from tests.tiny import make_adapter

TREE = Tree([5] * 40, ([6] * 30, [7] * 25))
ALONE = Setting(ranks=1, trees=1, distributed="ddp", checkpointing=False, tuning="lora", in_4bit=False)
GIB = 2**30
WAYS = ("lora/off", "lora/on", "full/off")  # tuning and gradient checkpointing


def forecast_of(directory: Path, adapter: Path | None = None, tree: Tree = TREE, **settings: Any) -> Forecast:
    return Forecast(TrainConfig(model=str(directory), **{"dtype": "bfloat16", **settings}), directory, adapter, tree)


def stored_bytes(directory: Path, size: int) -> int:
    """Bytes of all weights in files of a directory, with `size` bytes a number."""
    count = 0
    for path in directory.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            count += sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    return count * size


def llama(directory: Path, **sizes: int) -> Path:
    """A config.json of the shape of Llama 3, by default of 70B."""
    standard = {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    }  # fmt: skip
    LlamaConfig(**{**standard, **sizes}, architectures=["LlamaForCausalLM"]).save_pretrained(directory)
    return directory


def test_weights_and_an_adapter_are_those_of_the_files(tiny_model: Path, tmp_path: Path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", seed=1)
    need = forecast_of(tiny_model, adapter).need(ALONE)
    buffers = sum(b.nbytes for b in load.load_model(tiny_model, "bfloat16").buffers())
    assert need.weights == stored_bytes(tiny_model, 2) + buffers
    assert need.trained == 2 * stored_bytes(adapter, 2)
    assert need.optimizer == 16 / 2 * stored_bytes(adapter, 2)


def test_a_full_model_by_hand(tiny_model: Path):
    """In bfloat16 18 + 2 bytes a weight on one rank (weight, gradient, master, its gradient, moments); with fsdp2 the
    float32 shards are the masters: 16 bytes. In float32 16 everywhere; ddp has one more buffer of gradients."""
    count = stored_bytes(tiny_model, 1)
    full = replace(ALONE, tuning="full")
    for dtype, each, of_ddp in (("bfloat16", 20, 2), ("float32", 16, 4)):
        found = forecast_of(tiny_model, tuning="full", dtype=dtype)
        need = found.need(full)
        assert need.trained + need.optimizer == each * count
        two = found.need(replace(full, ranks=2))
        assert two.trained + two.optimizer == (each + of_ddp) * count
        cut = found.need(replace(full, ranks=2, distributed="fsdp2"))
        assert cut.trained + cut.optimizer == pytest.approx(16 * count / 2, rel=0.01)
        assert need.gathered == 0 < cut.gathered


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_rows_of_a_rank_are_those_that_fsdp2_cuts(tiny_model: Path, size: int, tuning: Any):
    """264 rows of the embedding and 16 of an adapter, which three ranks do not divide."""
    found = forecast_of(tiny_model, tuning=tuning).model(tuning)
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        base = load.empty_model(tiny_model, "float32" if tuning == "full" else "bfloat16")
        policy: torch.nn.Module = base
        if tuning == "full":
            load.train_all(base)
        else:
            policy = load.add_lora(base, r=16, alpha=32, target_modules="all-linear", seed=0)
        model = TreeModel(policy)
        parallel.cut(model, World(0, size), torch.bfloat16)
        parts = [(p.requires_grad, shards.local(p)) for p in model.parameters()]
    finally:
        dist.destroy_process_group()
    for trained, ours in ((False, found.frozen), (True, found.trained)):
        assert forecast.rows_of_a_rank(ours, size) == sum(p.numel() for flag, p in parts if flag is trained)
    held = sum(p.nbytes for _, p in parts)
    need = forecast_of(tiny_model, tuning=tuning).need(replace(ALONE, ranks=size, distributed="fsdp2", tuning=tuning))
    assert need.weights + need.trained / 2 == pytest.approx(held, abs=4096)  # buffers


@pytest.mark.slow
def test_a_checkpoint_has_the_bytes_of_its_files(tiny_model: Path, tmp_path: Path):
    run = data.train(tiny_model, tmp_path / "p", tmp_path / "t")
    state = max(run.glob("checkpoints/*/state.safetensors"))
    config = data.config(tiny_model)
    need = Forecast(config, tiny_model, None, TREE).need(ALONE)
    with safe_open(state, framework="pt") as tensors:
        names = [n for n in tensors.keys() if n.startswith(("master/", "exp_avg/", "exp_avg_sq/"))]  # noqa: SIM118
        assert need.checkpoint == 4 * sum(tensors.get_tensor(name).numel() for name in names)
    assert need.checkpoint < state.stat().st_size  # the header, step counts, states of generators


@pytest.fixture(scope="module")
def peaks(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Predicted and taken, by the way to train a random Llama of 7M parameters. glibc keeps holes between freed blocks
    unless each has pages of its own."""
    folder = tmp_path_factory.mktemp("peaks") / "m"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=384, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    own_pages = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.stages.train.step", str(folder), str(tiny_model), *WAYS],
        capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, **own_pages},
    )  # fmt: skip
    return {way: list(map(float, line.split())) for way, line in zip(WAYS, done.stdout.splitlines(), strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_peak_of_real_steps_is_within_a_fifth(peaks: dict[str, list[float]], way: str):
    predicted, taken = peaks[way]
    assert predicted == pytest.approx(taken, rel=0.2)


def test_a_model_of_70b_takes_seconds_and_little_memory(tmp_path: Path):
    directory = llama(tmp_path)
    before, begin = process_memory.resident_memory(), time.process_time()
    counted = process_memory.restart_resident_peak()
    found = forecast_of(directory, tree=Tree([0] * 32768, ([1] * 2048, [2] * 2048)))
    need = found.need(replace(ALONE, checkpointing=True))
    assert time.process_time() - begin < 60  # 5 seconds on an idle machine
    if counted:
        assert resident_peak() - before < GIB
    assert need.weights == pytest.approx(70.55e9 * 2, rel=0.001)
    assert need.kept > 80 * 36864 * 8192 * 2  # a state between layers, each


def test_four_bits_hold_the_linear_modules(tmp_path: Path):
    """Of Llama 3 8B: 6.98 G weights at 4.127 bits, embedding and head in bfloat16."""
    directory = llama(tmp_path, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
    found = forecast_of(directory)
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert sum(p.numel() for p in found.model("lora").in_4bit) == linear
    plain, four = (found.need(replace(ALONE, in_4bit=flag)) for flag in (False, True))
    assert plain.weights - four.weights == pytest.approx(linear * (2 - 0.5159), rel=1e-4)
    assert four.gathered == 2 * 4096 * 14336


def test_an_adapter_on_experts_is_planned_where_train_takes_it(tmp_path: Path):
    """Backward keeps the adapted stack whole in every layer: 6 experts of 64 x 96. Ranks that cut the model cannot."""
    MixtralConfig(
        vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=6,
    ).save_pretrained(tmp_path)  # fmt: skip
    experts = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    for name, options in (("modules", {"target_modules": ["q_proj"]}), ("experts", experts)):
        LoraConfig(r=4, **options).save_pretrained(tmp_path / name)
    less, more = (forecast_of(tmp_path, tmp_path / name).need(ALONE) for name in ("modules", "experts"))
    assert more.weights == less.weights
    assert more.kept - less.kept >= 2 * (2 * 6 * 64 * 96)
    with pytest.raises(UsageError, match="the adapter is on parameters, which neither lora_dropout nor"):
        forecast_of(tmp_path, tmp_path / "experts", distributed="fsdp2").need(ALONE)


def room_for(need: Need) -> float:
    """The least memory that a need fits into."""
    held = need.weights + need.trained / 2
    return held + (need.peak - held) / SHARE + 1


CHECKPOINTED = replace(ALONE, checkpointing=True)
FULL = replace(ALONE, ranks=2, tuning="full")


@pytest.mark.parametrize(
    ("setting", "wanted", "words"),
    [
        (ALONE, CHECKPOINTED, "gradient_checkpointing = on"),
        (replace(CHECKPOINTED, trees=8), CHECKPOINTED, "max_tokens_per_micro_batch = 0"),
        (replace(CHECKPOINTED, ranks=2), replace(CHECKPOINTED, ranks=2, distributed="fsdp2"), "distributed = fsdp2"),
        (CHECKPOINTED, replace(CHECKPOINTED, ranks=8, distributed="fsdp2"), "distributed = fsdp2 on 8 GPUs"),
        (FULL, replace(FULL, distributed="fsdp2", checkpointing=True),
         "gradient_checkpointing = on, distributed = fsdp2"),
    ],
)  # fmt: skip
def test_the_cheapest_change_that_suffices_is_named(tmp_path: Path, setting: Setting, wanted: Setting, words: str):
    """Alone where one does, else with those before it; the room is the least that the wanted settings fit into."""
    directory = llama(tmp_path, vocab_size=1000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    found = forecast_of(directory, tuning=setting.tuning, tree=Tree([5] * 20000, ([6] * 30, [7] * 25)))
    room = room_for(found.need(wanted))
    assert found.need(wanted).fits(room)
    assert not found.need(setting).fits(room)
    assert found.remedy(setting, room) == f"{words} ({found.need(wanted).peak / GIB:.1f} GiB)"
    assert found.remedy(setting, 1e6) == "no setting: shorter rows than 20,055 tokens, or a larger GPU"


def test_a_step_fits_by_the_rule_of_train():
    """Weights of 10 in 30: of the 20 beside them a step may use 80 %."""
    need = Need(weights=10, trained=0, optimizer=4, gathered=0, kept=8, passing=4, checkpoint=0, host_copy=0)
    assert need.peak == 26
    assert need.fits(30)
    assert not need.fits(29.9)
