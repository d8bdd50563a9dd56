"""Passes on the meta device: what they count is what real passes hold, and no weight is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from prefpipe.errors import UsageError
from prefpipe.forward import load, meta_pass
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import TreeModel
from prefpipe.stages.train import memory

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16},
    "gpt2": {},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "gpt_neox": {},
}
TREE = Tree([5] * 40, ([6] * 30, [7] * 25))


def described(directory: Path, kind: str, layers: int = 2, **changes: Any) -> Path:
    """A directory with the config.json of a small model of this family, and nothing else."""
    config = AutoConfig.for_model(
        kind, vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **{**FAMILIES[kind], **changes},
    )  # fmt: skip
    config.architectures = None
    config.save_pretrained(directory)
    return directory


def saved(directory: Path, kind: str, **changes: Any) -> Path:
    """The same with random weights."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(described(directory, kind, **changes)))
    model.save_pretrained(directory, save_original_format=False)
    return directory


def adapted(directory: Path, **options: Any) -> torch.nn.Module:
    described_one = meta_pass.described_model(directory, "float32")
    return load.add_lora(described_one, r=4, alpha=8, target_modules="all-linear", seed=None, **options)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", FAMILIES)
def test_parameters_are_those_of_the_files(tmp_path: Path, kind: str):
    """Of the model and of an adapter, to the byte."""
    directory = saved(tmp_path / "m", kind)
    real = load.load_model(directory, "float32")
    real_shapes = {name: p.shape for name, p in real.named_parameters()}
    with_adapter = load.add_lora(real, r=4, alpha=8, target_modules="all-linear", seed=0)
    trained = {name: p.shape for name, p in with_adapter.named_parameters() if p.requires_grad}
    (directory / "model.safetensors").unlink()
    found = meta_pass.described_model(directory, "float32")
    assert {name: p.shape for name, p in found.named_parameters()} == real_shapes
    ours = adapted(directory)
    assert {name: p.shape for name, p in ours.named_parameters() if p.requires_grad} == trained
    assert {p.device.type for p in [*ours.parameters(), *ours.buffers()]} == {"meta"}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    ("kind", "parameters"), [("llama", ""), ("gpt2", ""), ("gemma2", ""), ("mixtral", ""), ("mixtral", "all-experts")]
)
def test_what_is_kept_for_backward_is_what_a_real_pass_keeps(tmp_path: Path, kind: str, parameters: str):
    """Within 5 %: real passes count what autograd saves, passes on the meta device all that lives."""
    directory, on = saved(tmp_path / "m", kind), {"target_modules": "all-linear", "target_parameters": parameters}
    real = load.add_lora(load.load_model(directory, "float32"), r=4, alpha=8, seed=0, **on)
    kept, _ = memory._kept(TreeModel(real), [TREE])
    found = meta_pass.held(adapted(directory, target_parameters=parameters), [TREE], checkpointing=False)
    assert found.kept == pytest.approx(kept, rel=0.05)
    assert found.peak >= found.kept


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_of_one_kind_are_counted_by_three(tmp_path: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch):
    """To the byte as all layers; the model has its layers back afterwards, computes none again, and has no gradient."""
    model = adapted(described(tmp_path, "llama", layers=9))
    found = meta_pass.held(model, [TREE], checkpointing=checkpointing)
    layers = load.decoder_layers(model)
    assert len(layers) == 9
    assert all("forward" not in vars(layer) for layer in layers)
    assert all(p.grad is None for p in model.parameters())
    monkeypatch.setattr(meta_pass, "_OF_A_KIND", 100)
    assert meta_pass.held(model, [TREE], checkpointing=checkpointing) == found


def test_checkpointing_keeps_the_states_between_layers(tmp_path: Path):
    model = adapted(described(tmp_path, "llama", layers=9))
    off, on = (meta_pass.held(model, [TREE], checkpointing=flag) for flag in (False, True))
    assert on.kept < 0.3 * off.kept
    assert on.peak < 0.5 * off.peak


def test_bytes_grow_with_tokens_and_with_trees(tmp_path: Path):
    model = adapted(described(tmp_path, "llama"))
    one, two = (meta_pass.held(model, [TREE] * n, checkpointing=False) for n in (1, 2))
    assert two.kept == pytest.approx(2 * one.kept, rel=0.05)  # trees of the same lengths share masks


def test_models_that_share_no_row_are_counted_in_rows_of_their_own(tmp_path: Path):
    """Bloom has an attention of its own, whose bias counts rows: the prompt is computed twice."""
    config = AutoConfig.for_model("bloom", vocab_size=264, hidden_size=64, n_layer=2, n_head=4)
    config.save_pretrained(tmp_path)
    long = Tree([5] * 400, ([6] * 10, [7] * 10))
    once = meta_pass.held(adapted(tmp_path), [Tree([5] * 400, ([6] * 10,))], checkpointing=True)
    assert meta_pass.held(adapted(tmp_path), [long], checkpointing=True).kept == pytest.approx(2 * once.kept, rel=0.1)


def test_experts_are_counted_all_and_computed_by_choice(tmp_path: Path):
    """Twice the experts hold twice the weights; a token keeps as much as before, but for the router's scores. With
    adapters on them every expert keeps its adapted weights for backward, used or not."""
    few, many = (adapted(described(tmp_path / str(n), "mixtral", num_local_experts=n)) for n in (4, 8))
    counts = [sum(p.numel() for name, p in m.named_parameters() if "experts" in name) for m in (few, many)]
    assert counts[1] == 2 * counts[0]
    kept = [meta_pass.held(m, [TREE], checkpointing=False).kept for m in (few, many)]
    assert kept[0] == pytest.approx(kept[1], rel=0.02)
    on_experts = [adapted(tmp_path / str(n), target_parameters="all-experts") for n in (4, 8)]
    more = [meta_pass.held(m, [TREE], checkpointing=False).kept - k for m, k in zip(on_experts, kept, strict=True)]
    assert more[1] - more[0] == pytest.approx(4 * counts[0], rel=0.01)  # bytes of float32


def test_a_model_whose_code_does_not_run_without_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = adapted(described(tmp_path, "llama"))
    norm = load.decoder_layers(model)[0].input_layernorm
    monkeypatch.setattr(norm, "forward", lambda hidden: hidden[hidden > 0])  # a shape that depends on values
    with pytest.raises(UsageError, match="a step of LlamaForCausalLM cannot be counted without weights"):
        meta_pass.held(model, [TREE], checkpointing=False)
    assert torch.autocast is torch.amp.autocast_mode.autocast


def test_a_config_that_describes_no_model_is_refused(tmp_path: Path):
    described(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": -4, "head_dim": 16}))
    with pytest.raises(UsageError, match="describes no model"):
        meta_pass.described_model(tmp_path, "float32")


def test_an_index_without_its_files_is_no_obstacle(tmp_path: Path):
    described(tmp_path, "llama")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert isinstance(meta_pass.described_model(tmp_path, "float32"), LlamaForCausalLM)
    assert LlamaConfig.from_pretrained(tmp_path).num_hidden_layers == 2
