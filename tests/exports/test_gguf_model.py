"""A policy as GGUF: read back by gguf and by transformers, it computes the same logits from the same tokens."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from prefpipe.errors import MissingInputError, UsageError
from prefpipe.exports import gguf_model
from prefpipe.models.chat import load_chat
from prefpipe.stages.train import merging
from tests.cases import assert_refused
from tests.conftest import Cli
from tests.stages.train import data
from tests.tiny import with_tokenizer

pytestmark = pytest.mark.slow
SHAPE = {
    "vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TEXT = "Owls, 42 of them:\n\tnaïve <|im_end|> 🦉"


def with_merges(directory: Path) -> Path:
    """The model with merges in its tokenizer, as real ones have them."""
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    pairs = [("O", "w"), ("Ow", "l"), ("Ġ", "o"), ("h", "e")]
    size = len(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"] |= {a + b: size + number for number, (a, b) in enumerate(pairs)}
    tokenizer["model"]["merges"] = [list(pair) for pair in pairs]
    path.write_text(json.dumps(tokenizer))
    return directory


@pytest.fixture(scope="module")
def merged_bytes(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with such a tokenizer."""
    return with_merges(shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "merges"))


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=32, rope_theta=5000.0, tie_word_embeddings=True))


def mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None, tie_word_embeddings=False))


def qwen2() -> PreTrainedModel:
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, rms_norm_eps=1e-5, tie_word_embeddings=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=128, tie_word_embeddings=False))


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(3, 43).unsqueeze(0)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", [llama, mistral, qwen2, qwen3])
def test_the_file_computes_the_same(make: Callable[[], PreTrainedModel], dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide a norm under another name
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    directory = with_merges(with_tokenizer(model, tmp_path / "m"))
    gguf_model.write(directory, tmp_path / "model.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    saved = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.testing.assert_close(logits(read), logits(saved), rtol=1e-5, atol=1e-5)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == len(list(model.named_parameters()))
    numbers = {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) > 1}
    assert numbers == {"F32" if dtype == torch.float32 else "BF16"}
    assert tensors["blk.1.attn_norm.weight"].tensor_type.name == "F32"


def test_the_tokens_are_the_same(merged_bytes: Path, tmp_path: Path) -> None:
    gguf_model.write(merged_bytes, tmp_path / "model.gguf")
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    chat = load_chat(merged_bytes)
    ids = chat.tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert len(ids) < len(TEXT.encode())  # merges were made
    assert read(TEXT, add_special_tokens=False)["input_ids"] == ids
    assert read.chat_template == chat.template
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["general.name"].contents() == "policy"


def test_a_run_with_an_adapter_is_merged_on_the_way(cli: Cli, merged_bytes: Path, tmp_path: Path) -> None:
    run = data.train(merged_bytes, tmp_path / "p", tmp_path / "t")
    done = cli("export", "gguf", run, "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"exported     {tmp_path / 'o' / 'model.gguf'}\n"
    merging.run(run, tmp_path / "m")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "o", gguf_file="model.gguf", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(merged_bytes, dtype=torch.float32)
    assert torch.equal(logits(read), logits(merged))
    assert not torch.equal(logits(base), logits(merged))
    assert {path.name for path in tmp_path.iterdir()} == {"p", "t", "o", "m"}
    assert_refused(cli("export", "gguf", run, "--out", tmp_path / "o"), 2, "is not empty")
    assert_refused(cli("export", "nemo-rl", run, "--model", "m", "--out", tmp_path / "n"), 2, "made of rows")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model_type": "gpt2"}, "the architecture gpt2"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "positions of the kind llama3"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "positions of the kind linear"),
        ({"mlp_bias": True}, "biases"),
        ({"sliding_window": 64}, "a window"),
        ({"hidden_act": "gelu"}, "the activation gelu"),
        ({"quantization_config": {"bits": 4}}, "weights in"),
    ],
)
def test_what_is_not_written_is_refused(tiny_model: Path, tmp_path: Path, change: dict[str, object], why: str) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UsageError, match=why) as error:
        gguf_model.write(model, tmp_path / "model.gguf")
    assert "llama.cpp" in error.value.hint
    assert not (tmp_path / "model.gguf").exists()


def test_a_tensor_without_a_name_is_refused(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.register_parameter("extra", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(UsageError, match="the tensor extra, which has no name"):
        gguf_model.write(with_merges(with_tokenizer(model, tmp_path / "m")), tmp_path / "model.gguf")


def test_without_the_package_nothing_is_touched(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(MissingInputError, match="package gguf"):
        gguf_model.export(trained, tmp_path / "o")
    assert list(tmp_path.iterdir()) == []
