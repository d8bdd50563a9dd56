"""Models without weights: what their files hold, new adapters, and which models can only be loaded whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaModel, MixtralConfig, MixtralForCausalLM
from transformers.core_model_loading import Chunk, WeightConverter

from prefpipe.errors import DataError, UsageError
from prefpipe.forward import load, on_meta
from tests.tiny import make_gpt2, make_model

Tensors = dict[str, torch.Tensor]


def check_sources(directory: Path) -> None:
    """Every parameter and buffer that transformers loads is found, with its values."""
    empty = load.empty_model(directory, "float32")
    assert all(p.is_meta and not p.requires_grad for p in empty.parameters())
    where = on_meta.sources(directory, empty)
    loaded = load.load_model(directory, "float32")
    assert where.keys() == loaded.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(where[name].stored.whole().float(), tensor.float()), name
    ours, theirs = dict(empty.named_buffers()), dict(loaded.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name not in where)
    assert [n for n, _ in empty.named_parameters()] == [n for n, _ in loaded.named_parameters()]  # tied alike


def test_every_weight_is_found(tiny_model: Path, tmp_path: Path):
    """In one file and in several, of a model with a prefix and saved without it, with positions that are learned."""
    check_sources(tiny_model)
    shutil.copytree(tiny_model, tmp_path / "parts")
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    (tmp_path / "parts" / "model.safetensors").unlink(missing_ok=True)
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    check_sources(tmp_path / "parts")
    LlamaModel.from_pretrained(tiny_model).save_pretrained(tmp_path / "body")
    shutil.copyfile(tiny_model / "config.json", tmp_path / "body" / "config.json")
    assert "norm.weight" in load_file(tmp_path / "body" / "model.safetensors")
    check_sources(tmp_path / "body")
    check_sources(make_gpt2(tmp_path / "gpt2", 64))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_adapter_has_the_values_that_it_has_on_a_loaded_model(tiny_model: Path, tmp_path: Path, dtype: str):
    """Linear modules, and GPT-2's, which hold their matrices transposed."""
    for directory in (tiny_model, make_gpt2(tmp_path / "gpt2", 64)):
        found = []
        for make in (load.load_model, load.empty_model):
            adapted = load.add_lora(make(directory, dtype), r=4, alpha=8, target_modules="all-linear", seed=3)
            found.append({name: p for name, p in adapted.named_parameters() if p.requires_grad})
        theirs, ours = found
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in theirs)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_from_disk_has_the_values_that_it_has_on_a_loaded_model(
    tiny_model: Path, tiny_adapter: Path, dtype: str
):
    """peft itself would leave it without memory, as the model is."""
    loaded, empty = (
        load.load_adapter(make(tiny_model, dtype), tiny_adapter, trainable=True)
        for make in (load.load_model, load.empty_model)
    )
    theirs, ours = ({n: p for n, p in model.named_parameters() if p.requires_grad} for model in (loaded, empty))
    assert ours.keys() == theirs.keys()
    assert ours
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in theirs)
    assert all(p.is_meta for n, p in empty.named_parameters() if n not in ours)


@pytest.mark.filterwarnings("ignore:Model has")
def test_an_adapter_on_an_embedding_is_refused(tiny_model: Path):
    with pytest.raises(UsageError, match="takes adapters on linear modules"):
        load.add_lora(
            load.empty_model(tiny_model, "float32"), r=2, alpha=2, target_modules="q_proj,embed_tokens", seed=0
        )


def changed(source: Path, into: Path, change: Callable[[Tensors], object], **settings: object) -> Path:
    shutil.copytree(source, into)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, into / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (into / "config.json").write_text(json.dumps({**config, **settings}))
    return into


NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
WRONG: list[tuple[Callable[[Tensors], object], str]] = [
    (lambda t: t.pop(NORM), "lacks 1 weight"),
    (lambda t: t.update(more=torch.zeros(2)), "holds 1 weight .more. that its architecture does not have"),
    (lambda t: t.update({NORM: torch.zeros(3)}), "other shapes than config.json says"),
    (lambda t: t.update({NORM: t[NORM].to(torch.int32)}), "integers in place of floats"),
    (lambda t: t.update({HEAD: t[EMBEDDING] + 1}), "differ, but config.json ties them"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_weights_that_do_not_fit(tiny_model: Path, tmp_path: Path, change: Callable[[Tensors], object], message: str):
    directory = changed(tiny_model, tmp_path / "m", change)
    with pytest.raises(DataError, match=message):
        on_meta.sources(directory, load.empty_model(directory, "float32"))


def test_a_tied_weight_may_stand_in_the_file_twice(tiny_model: Path, tmp_path: Path):
    check_sources(changed(tiny_model, tmp_path / "m", lambda t: t.update({HEAD: t[EMBEDDING].clone()})))
    check_sources(changed(tiny_model, tmp_path / "h", lambda t: t.update({HEAD: t.pop(EMBEDDING)})))


def test_models_that_can_only_be_loaded_whole(tiny_model: Path, tmp_path: Path):
    """Quantised weights, and experts that transformers stacks while it reads them; saved stacked, they are taken."""
    quantised = changed(
        tiny_model, tmp_path / "q", lambda _: None, quantization_config={"quant_method": "gptq", "bits": 4}
    )
    with pytest.raises(UsageError, match="its weights are quantised"):
        load.empty_model(quantised, "float32")
    config = MixtralConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    mixture = MixtralForCausalLM(config)
    mixture.save_pretrained(tmp_path / "moe")
    with pytest.raises(UsageError, match="transformers converts 24 weights") as refused:
        on_meta.sources(tmp_path / "moe", load.empty_model(tmp_path / "moe", "float32"))
    assert "save_original_format=False" in refused.value.hint
    mixture.save_pretrained(tmp_path / "stacked", save_original_format=False)
    check_sources(tmp_path / "stacked")


def test_names_before_peft_wrapped_them():
    assert on_meta.plain_name("model.layers.0.q_proj.base_layer.weight") == "model.layers.0.q_proj.weight"
    assert on_meta.plain_name("score.original_module.weight") == "score.weight"


def test_tiny_models_differ(tmp_path: Path, tiny_model: Path):
    """The comparison above can fail."""
    other = make_model(tmp_path / "o", seed=5)
    where = on_meta.sources(other, load.empty_model(other, "float32"))
    assert not torch.equal(where[EMBEDDING].stored.whole(), load_file(tiny_model / "model.safetensors")[EMBEDDING])


def test_a_tensor_that_transformers_takes_apart(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As in models that store the projections of a layer in one matrix."""

    def join(tensors: Tensors) -> None:
        for layer in ("model.layers.0.mlp", "model.layers.1.mlp"):
            sides = [tensors.pop(f"{layer}.{name}_proj.weight") for name in ("gate", "up")]
            tensors[f"{layer}.gate_up.weight"] = torch.cat(sides)

    directory = changed(tiny_model, tmp_path / "m", join)
    split = WeightConverter(["mlp.gate_up.weight"], ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)])
    monkeypatch.setattr(on_meta, "get_model_conversion_mapping", lambda _: [split])
    with pytest.raises(on_meta.OnlyWhole, match=r"makes several tensors of model\.layers\.0\.mlp\.gate_up"):
        on_meta.sources(directory, load.empty_model(directory, "float32"))
