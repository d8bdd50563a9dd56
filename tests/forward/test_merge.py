"""Adapters added into the weights of their models, tensor by tensor: the bytes that peft and transformers write."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from prefpipe.forward import load, merge, tensor_files
from tests.forward.cases import edited, with_tensors
from tests.tiny import make_gpt2, make_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out", "ignore:Model has", "ignore:Model with", "ignore:Setting `save_emb"
)


def adapter_of(model: Path, directory: Path, **settings: Any) -> Path:
    """An adapter with random values in every matrix."""
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": "all-linear", **settings}, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(directory)
    return directory


def oracle(model: Path, adapter: Path, dtype: str, into: Path, **options: Any) -> dict[str, bytes]:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False).merge_and_unload().save_pretrained(
        into, **options
    )
    return contents(into)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def ours(model: Path, adapter: Path, dtype: str, into: Path) -> dict[str, bytes]:
    into.mkdir()
    merge.save_merged(model, adapter, dtype, into)
    return contents(into)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The models that are loaded whole."""
    found: list[Path] = []
    whole = load.load_model

    def note(directory: Path, *arguments: Any, **options: Any) -> Any:
        found.append(directory)
        return whole(directory, *arguments, **options)

    monkeypatch.setattr(load, "load_model", note)
    return found


def make_mixture(directory: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(directory, **options)
    return directory


def in_parts(directory: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(make_model(directory / "one")).save_pretrained(
        directory, max_shard_size="50KB"
    )
    return directory


def untied(directory: Path) -> Path:
    made = edited(make_model(directory / "tied"), directory / "free", tie_word_embeddings=False)
    return with_tensors(made, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] / 2}))


MODELS: list[Callable[[Path], Path]] = [make_model, untied, in_parts, lambda d: make_gpt2(d, 64), make_mixture]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", MODELS, ids=["tied", "untied", "parts", "conv1d", "experts"])
def test_it_is_what_peft_and_transformers_write(
    tmp_path: Path, make: Callable[[Path], Path], dtype: str, loads: list[Path]
):
    """And the model is never loaded. Of Mixtral, whose experts transformers stacks, the linear modules are adapted."""
    model = make(tmp_path / "m")
    targets = "all-linear" if make is not make_mixture else ["q_proj", "o_proj"]
    adapter = adapter_of(model, tmp_path / "a", use_rslora=True, target_modules=targets)
    expected = oracle(model, adapter, dtype, tmp_path / "theirs")
    assert ours(model, adapter, dtype, tmp_path / "ours") == expected
    assert loads == []
    before = load_file(next(iter(model.glob("*.safetensors"))))
    after = load_file(tmp_path / "ours" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name].to(after[name].dtype), after[name])}
    assert changed
    assert all("proj" in name or "c_" in name for name in changed)


OTHERS: dict[str, dict[str, Any]] = {
    "saved modules": {"modules_to_save": ["norm"]},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
def test_other_adapters_are_merged_in_memory(
    tmp_path: Path, tiny_model: Path, settings: dict[str, Any], loads: list[Path], capfd: pytest.CaptureFixture[str]
):
    adapter = adapter_of(tiny_model, tmp_path / "a", **settings)
    expected = oracle(tiny_model, adapter, "float32", tmp_path / "theirs")
    assert ours(tiny_model, adapter, "float32", tmp_path / "ours") == expected
    assert loads == [tiny_model]
    assert "merging in memory: the adapter has more than two matrices" in capfd.readouterr().err


def test_biases_that_were_trained_are_merged(tmp_path: Path, loads: list[Path]):
    model = make_gpt2(tmp_path / "m", 64)
    adapter = adapter_of(model, tmp_path / "a", bias="lora_only")
    expected = oracle(model, adapter, "float32", tmp_path / "theirs")
    assert ours(model, adapter, "float32", tmp_path / "ours") == expected
    assert loads == [model]


def test_experts_that_are_adapted(tmp_path: Path, loads: list[Path]):
    model = make_mixture(tmp_path / "m")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = adapter_of(model, tmp_path / "a", target_modules=["q_proj"], target_parameters=names)
    expected = oracle(model, adapter, "float32", tmp_path / "theirs")
    assert ours(model, adapter, "float32", tmp_path / "ours") == expected
    assert loads == [model]


def test_several_files_with_an_index(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    adapter = adapter_of(tiny_model, tmp_path / "a")
    monkeypatch.setattr(merge, "FILE_BYTES", 70_000)
    expected = oracle(tiny_model, adapter, "float32", tmp_path / "theirs", max_shard_size=70_000)
    found = ours(tiny_model, adapter, "float32", tmp_path / "ours")
    assert len(found) > 4
    name = "model.safetensors.index.json"
    theirs, index = json.loads(expected.pop(name)), json.loads(found.pop(name))
    assert index["weight_map"] == theirs["weight_map"]
    assert found == expected
    assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"]


def test_one_module_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a model of 1.1 MB: what is read and not yet written, in tensors that are there when one is written."""
    model = make_model(tmp_path / "m", hidden_size=128)
    adapter = adapter_of(model, tmp_path / "a")
    largest = max(tensor.nbytes for tensor in load_file(model / "model.safetensors").values())
    gc.collect()
    gc.freeze()  # what is there already is searched for tensors no more, twenty times
    held: list[int] = []
    write = tensor_files.Stored.write

    def note(self: tensor_files.Stored, first: int, rows: torch.Tensor) -> None:
        gc.collect()
        alive = [
            o
            for o in gc.get_objects()
            if type(o) in (torch.Tensor, torch.nn.Parameter) and not o.is_meta and o.numel() > 1000
        ]
        held.append(sum({t.untyped_storage().data_ptr(): t.nbytes for t in alive}.values()))
        write(self, first, rows)

    monkeypatch.setattr(tensor_files.Stored, "write", note)
    ours(model, adapter, "float32", tmp_path / "ours")
    assert len(held) == 20  # as many as the model has tensors
    assert max(held) < 3 * largest
