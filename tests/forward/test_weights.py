"""Every weight of a model comes from its files, or the model is refused with the names."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from transformers.models.llama.configuration_llama import LlamaConfig

from prefpipe.errors import DataError, UsageError
from prefpipe.forward.weights import integer_tensors, listed, read_model
from tests.conftest import Call, Write
from tests.forward.cases import Tensors, edited, with_tensors
from tests.zoo import runnable

NORM, Q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


def read(directory: Path) -> Any:
    return read_model(AutoModelForCausalLM, directory, "float32")


def integer(tensors: Tensors) -> None:
    tensors[Q] = tensors[Q].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(NORM), rf"lacks 1 weight \({NORM}\)"),
        (
            lambda tensors: tensors.clear(),
            r"lacks 21 weights \(lm_head\.weight, model\.embed_tokens\.weight, .*, \.\.\.",
        ),
        (lambda tensors: tensors.update(other=torch.ones(2)), r"holds 1 weight \(other\) that its architecture"),
        (lambda tensors: tensors.update({NORM: torch.ones(3)}), rf"{NORM}: \[3\], not \[64\]"),
        (integer, rf"integers in place of floats in 1 weight \({Q}\)"),
    ],
)
def test_weights_that_do_not_make_the_model_are_named(
    tiny_model: Path, tmp_path: Path, change: Callable[[Tensors], object], words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read(with_tensors(edited(tiny_model, tmp_path / "m"), change))
    assert caught.value.exit_code == 65


def test_an_untied_head_is_a_weight_as_any_other(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lacks 1 weight \(lm_head\.weight\)"):
        read(edited(tiny_model, tmp_path / "m", tie_word_embeddings=False))


def test_a_tied_head_may_be_there_twice(tiny_model: Path, tmp_path: Path) -> None:
    def twice(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    model = read(with_tensors(edited(tiny_model, tmp_path / "m"), twice))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_an_integer_mask_of_an_old_checkpoint_is_no_weight(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    mask = torch.ones(1, 1, 16, 16, dtype=torch.uint8)
    read(with_tensors(tmp_path / "m", lambda tensors: tensors.update({"transformer.h.0.attn.bias": mask})))


def test_a_table_of_integers_that_the_model_keeps_is_no_weight(tmp_path: Path) -> None:
    """DeepSeek V4: which experts a token id goes to. The file has another name for it than the model."""
    directory = runnable.of_architecture("deepseek_v4", tmp_path / "m")
    (name,) = integer_tensors([directory / "model.safetensors"])
    buffers = dict(read(directory).named_buffers())
    assert name not in buffers
    assert any(n.endswith(".tid2eid") for n in buffers)


def test_a_quantisation_without_its_package(tiny_model: Path, tmp_path: Path) -> None:
    model = edited(tiny_model, tmp_path / "m", quantization_config={"quant_method": "hqq"})
    with pytest.raises(DataError, match="needs a package that is not installed"):
        read(model)


def test_the_attention_is_ours_and_not_that_of_the_config(tiny_model: Path, tmp_path: Path) -> None:
    """A config may name a kernel that transformers would fetch."""
    model = edited(
        tiny_model, tmp_path / "m", attn_implementation="acme/kernel", _attn_implementation="flash_attention_2"
    )
    assert read(model).config._attn_implementation == "sdpa"


def test_a_model_is_read_as_transformers_reads_it(tiny_model: Path) -> None:
    ours, theirs = read(tiny_model), LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in theirs.state_dict().items())


def test_a_classifier_needs_its_head(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "m")
    read_model(AutoModelForSequenceClassification, tmp_path / "m", "float32")
    with_tensors(tmp_path / "m", lambda tensors: tensors.pop("score.weight"))
    with pytest.raises(UsageError, match=r"no weights for score\.weight"):
        read_model(AutoModelForSequenceClassification, tmp_path / "m", "float32")


def test_a_command_ends_with_the_names(call: Call, tiny_model: Path, tmp_path: Path, write: Write) -> None:
    model = edited(tiny_model, tmp_path / "m", tie_word_embeddings=False)
    rows = write({"prompt": "a", "chosen": "b", "rejected": "c"})
    done = call("train", "--model", model, "--pairs", rows, "--dtype", "float32", "--out", tmp_path / "t")
    assert done.code == 65
    assert "lacks 1 weight (lm_head.weight)" in done.stderr


def test_many_names_are_counted() -> None:
    assert listed(["b"]) == "1 weight (b)"
    assert listed(["d", "c", "b", "a"]) == "4 weights (a, b, c, ...)"


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "is not an index"),
        ('{"metadata": {}}', "is not an index"),
        ('{"metadata": null, "weight_map": {}}', "is not an index"),
        (
            '{"metadata": {}, "weight_map": {"a": "../other/model.safetensors"}}',
            "which is not among the weights beside it",
        ),
        ('{"metadata": {}, "weight_map": {"a": ["model-1.safetensors"]}}', "which is not among the"),
        ('{"metadata": {}, "weight_map": {}}', "is not an index"),
    ],
)
def test_an_index_that_names_no_files_of_the_model(tiny_model: Path, tmp_path: Path, index: str, words: str) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "model-1.safetensors")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DataError, match=words) as caught:
        read(tmp_path / "m")
    assert str(tmp_path / "m") in caught.value.message
