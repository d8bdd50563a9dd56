"""Adapters on disk: what is written loads anywhere and means the same."""

import gc
import importlib.util
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.forward import load
from prefpipe.forward.attention import Row
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import TreeModel, causal_model, score, self_test
from prefpipe.runs import fsio
from tests.forward.cases import Tensors, with_tensors

TREES = [Tree([5, 6, 7, 8], [[9, 10, 11], [12, 2]]), Tree([20], [[30, 31]])]


def values(model: torch.nn.Module) -> torch.Tensor:
    """Log-probs of every token of TREES."""
    return torch.tensor([v for tree in score(TreeModel(model), TREES) for completion in tree for v in completion])


def moved(model_directory: Path, seed: int = 3) -> PeftModel:
    """A LoRA policy that has left its base: B is not zero."""
    base = load.load_model(model_directory, "float32")
    model = load.add_lora(base, r=4, alpha=8, target_modules="all-linear", seed=seed)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model


def save(model: PeftModel, directory: Path) -> Path:
    fsio.publish_dir(directory, lambda into: load.save_adapter(model, load.adapter_tensors(model), into, "some/base"))
    return directory


def test_a_new_adapter_changes_nothing_and_its_seed_fixes_it(tiny_model: Path):
    """B = 0, so the policy is the base to the bit."""
    base = values(load.load_model(tiny_model, "float32"))
    models = [
        load.add_lora(load.load_model(tiny_model, "float32"), r=4, alpha=8, target_modules="all-linear", seed=s)
        for s in (0, 0, 1)
    ]
    assert torch.equal(values(models[0]), base)
    first, same, other = ([p for p in m.parameters() if p.requires_grad] for m in models)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_only_the_adapter_is_trainable_and_the_head_has_none(tiny_model: Path):
    model = moved(tiny_model)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in n for n in trainable)
    assert not any("lm_head" in n for n in trainable)
    assert not any(m.training for m in model.modules())


def test_round_trip_gives_the_same_values_and_weights(tiny_model: Path, tmp_path: Path):
    model = moved(tiny_model)
    save(model, tmp_path / "a")
    again = load.load_adapter(load.load_model(tiny_model, "float32"), tmp_path / "a", trainable=True)
    assert torch.equal(values(again), values(model))
    theirs = {n: p for n, p in again.named_parameters() if p.requires_grad}
    ours = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[n], ours[n]) for n in ours)


def test_plain_peft_and_transformers_load_it_and_agree(tiny_model: Path, tmp_path: Path):
    model = moved(tiny_model)
    save(model, tmp_path / "a")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="sdpa")
    plain = PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    found: list[float] = []
    with torch.no_grad():
        for tree in TREES:
            for completion in tree.completions:
                ids = torch.tensor([[*tree.prompt, *completion]])
                logps = plain(input_ids=ids).logits[0].log_softmax(-1)
                found += [float(logps[len(tree.prompt) - 1 + i, t]) for i, t in enumerate(completion)]
    torch.testing.assert_close(values(model), torch.tensor(found), rtol=0, atol=2e-5)


def test_adapter_off_gives_the_base_and_comes_back(tiny_model: Path):
    base = values(load.load_model(tiny_model, "float32"))
    model = moved(tiny_model)
    on = values(model)
    assert float((on - base).abs().max()) > 0.1
    with load.adapter_off(model, off=True):
        assert torch.equal(values(model), base)
    with load.adapter_off(model, off=False):
        assert torch.equal(values(model), on)
    assert torch.equal(values(model), on)


def test_files_hold_no_pickle_and_others_may_read_them(tiny_model: Path, tmp_path: Path):
    """safetensors leaves mode 0600 behind; published files follow the umask as any other file does."""
    mask = os.umask(0o022)
    try:
        directory = save(moved(tiny_model), tmp_path / "a")
    finally:
        os.umask(mask)
    files = [p for p in directory.rglob("*") if p.is_file()]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in files}
    for path in files:
        assert path.suffix in (".json", ".safetensors", ".md"), path
        assert stat.S_IMODE(path.stat().st_mode) == 0o644, path
        assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04"), path  # zip and pickle begin so


def test_the_config_names_the_base_and_no_embeddings_are_copied(tiny_model: Path, tmp_path: Path):
    directory = save(moved(tiny_model), tmp_path / "a")
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["inference_mode"] is True
    assert (directory / "adapter_model.safetensors").stat().st_size < (tiny_model / "model.safetensors").stat().st_size


def test_unknown_target_modules_are_a_usage_error(tiny_model: Path):
    with pytest.raises(UsageError, match="no_such_layer"):
        load.add_lora(load.load_model(tiny_model, "float32"), r=4, alpha=8, target_modules="no_such_layer", seed=0)


def untied(directory: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def test_lora_on_the_head_is_refused(tmp_path: Path):
    """The log-prob head reads W alone: an adapter on it would be trained by nothing and left out of every value.

    With B = 0 the self-test cannot see it, so it is refused by name; also when it comes from a file.
    """
    untied(tmp_path / "m")
    with pytest.raises(UsageError, match="output head"):
        load.add_lora(load.load_model(tmp_path / "m", "float32"), r=4, alpha=8, target_modules="q_proj,lm_head", seed=0)
    adapted = get_peft_model(load.load_model(tmp_path / "m", "float32"), LoraConfig(target_modules=["lm_head"]))
    adapted.save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
    with pytest.raises(UsageError, match="output head"):
        load.load_adapter(load.load_model(tmp_path / "m", "float32"), tmp_path / "a", trainable=False)


def test_attention_switches_for_sampling_and_back(tiny_model: Path):
    model = TreeModel(moved(tiny_model))
    before = values(model.policy)
    model.set_rows("separate")
    assert causal_model(model.policy).config._attn_implementation == "sdpa"
    model.set_rows("shared")
    assert causal_model(model.policy).config._attn_implementation == "prefpipe_tree"
    assert torch.equal(values(model.policy), before)


def test_rotary_frequencies_that_grow_with_use_are_refused_by_the_loader(tmp_path: Path):
    """Dynamic NTK keeps the longest length it has seen: no value would be the same twice."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    with pytest.raises(UsageError, match="dynamic NTK"):
        load.load_model(tmp_path / "m", "float32")


def test_lora_dropout_is_on_inside_of_the_block_only_and_drawn_from_the_generator(tiny_model: Path):
    model = moved(tiny_model)
    without = values(model)
    drawn: list[torch.Tensor] = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with load.lora_dropout(model, 0.5):
            drawn.append(values(model))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], without)
    assert torch.equal(values(model), without)
    with load.lora_dropout(model, 0.0):
        assert torch.equal(values(model), without)


def test_rank_stabilised_lora_scales_by_the_root_of_the_rank(tiny_model: Path):
    """alpha / sqrt(r) = 8 / 2 against alpha / r = 8 / 4."""
    scalings: list[float] = []
    for rslora in (False, True):
        base = load.load_model(tiny_model, "float32")
        model = load.add_lora(base, r=4, alpha=8, target_modules="q_proj", seed=0, rslora=rslora)
        scalings.append(next(m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")))
    assert scalings == [2.0, 4.0]


def test_four_bits_without_the_package_is_a_clear_error(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(MissingInputError, match="load_in_4bit needs the package bitsandbytes") as caught:
        load.load_model(tiny_model, "float32", in_4bit=True)
    assert caught.value.exit_code == 66


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore")
def test_gradients_through_4_bits_are_those_of_the_same_weights_written_out(tiny_model: Path):
    """In eval mode bitsandbytes would choose a CPU kernel without gradient: LoRA would seem to train."""
    from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415

    packed = load.load_model(tiny_model, "float32", in_4bit=True)
    plain = load.load_model(tiny_model, "float32")
    for name, module in packed.named_modules():
        if type(module).__name__ == "Linear4bit":
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            plain.get_submodule(name).weight.data = weight
    found: list[dict[str, torch.Tensor]] = []
    for base in (packed, plain):
        model = load.add_lora(base, r=4, alpha=8, target_modules="all-linear", seed=0)
        tree = TreeModel(model)
        tree(tree.layout(TREES)).sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_row_lives_until_backward_when_layers_are_computed_again_and_no_longer(tiny_model: Path):
    """Its masks are needed again in backward; after a step, or a pass without gradient, nothing of it is left."""

    def rows() -> int:
        gc.collect()
        return sum(type(thing) is Row for thing in gc.get_objects())

    model, before = TreeModel(moved(tiny_model)), rows()
    load.checkpoint_layers(model.policy)
    total = model(model.layout(TREES)).sum()
    assert rows() == before + 1
    total.backward()
    del total
    assert rows() == before
    list(score(model, TREES))
    assert rows() == before


def first(tensors: Tensors, part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def without_a_half(tensors: Tensors) -> None:
    del tensors[first(tensors, "lora_B")]


def misshapen(tensors: Tensors) -> None:
    tensors[first(tensors, "lora_B")] = torch.ones(3, 4)


def of_a_deeper_model(tensors: Tensors) -> None:
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.ones(4, 64)


def integer(tensors: Tensors) -> None:
    tensors[first(tensors, "lora_B")] = tensors[first(tensors, "lora_B")].to(torch.int8)


def infinite(tensors: Tensors) -> None:
    tensors[first(tensors, "lora_B")][0, 0] = torch.inf


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_a_half, r"lacks 1 weight \(.*lora_B"),
        (dict.clear, r"lacks 28 weights \(.*, \.\.\.\)"),
        (misshapen, "does not fit the model: .*size mismatch"),
        (of_a_deeper_model, r"has 1 weight \(.*layers\.7.*\) of no module"),
        (integer, "integers in place of floats"),
        (infinite, r"no finite numbers in 1 weight \("),
    ],
)
def test_an_adapter_that_is_not_whole_is_refused_with_names(
    tiny_model: Path, tmp_path: Path, change: Callable[[Tensors], None], words: str
):
    """peft leaves what is missing as it was drawn, and drops what has no place."""
    directory = with_tensors(save(moved(tiny_model), tmp_path / "a"), change)
    with pytest.raises(DataError, match=words):
        load.load_adapter(load.load_model(tiny_model, "float32"), directory, trainable=False)


def test_a_saved_adapter_is_the_same_file_whatever_the_order_of_its_sets(tiny_model: Path, tmp_path: Path):
    model = moved(tiny_model)
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    config.target_parameters = ["b.up", "a.down"]
    written = json.loads((save(model, tmp_path / "a") / "adapter_config.json").read_text())
    assert written["target_parameters"] == ["a.down", "b.up"]
    config.target_modules = ".*_proj"  # a pattern stays one
    written = json.loads((save(model, tmp_path / "b") / "adapter_config.json").read_text())
    assert written["target_modules"] == ".*_proj"


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"use_rslora": True}, {"bias": "none"}])
def test_kinds_of_lora_load_whole_and_agree_with_peft(tiny_model: Path, tmp_path: Path, kind: dict[str, object]):
    torch.manual_seed(1)
    model = get_peft_model(
        load.load_model(tiny_model, "float32"), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **kind)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(str(tmp_path / "a"))
    loaded = load.load_adapter(load.load_model(tiny_model, "float32"), tmp_path / "a", trainable=False)
    torch.testing.assert_close(values(loaded), values(model), rtol=0, atol=1e-5)
    assert self_test(TreeModel(loaded), TREES) < 1e-4


def test_the_self_test_compares_with_the_peft_wrapper(tiny_model: Path):
    """What a wrapper adds beside the weights of modules is a difference, not a blind spot."""
    model = moved(tiny_model)
    assert self_test(TreeModel(model), TREES) < 1e-4
    inner = model.forward
    model.forward = lambda *args, **kwargs: _louder(inner(*args, **kwargs))
    assert self_test(TreeModel(model), TREES) > 0.1


def _louder(output: object) -> object:
    output.logits = output.logits * 2  # pyright: ignore[reportAttributeAccessIssue]
    return output
