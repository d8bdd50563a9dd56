"""`prefpipe export gguf RUN --out DIR`: the policy of a run as one file for llama.cpp and what is built on it.

Names of tensors, their order inside heads and the fields of the header are those of GGUF (github.com/ggml-org/ggml),
written by the package gguf. Numbers keep their type; norms and biases are float32, as llama.cpp wants.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from prefpipe import extras, log
from prefpipe.errors import MissingInputError, UsageError
from prefpipe.exports import gguf_tokens
from prefpipe.models import fingerprint
from prefpipe.runs import fsio
from prefpipe.stages.train import merging, results

# model_type -> the architecture in GGUF. Mistral without a window is a Llama by another name.
_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
_ROTATED = ("llama", "mistral")  # architectures for which GGUF stores rotated dimensions as neighbours, not as halves
_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_FILE_TYPES = {"F32": "ALL_F32", "BF16": "MOSTLY_BF16", "F16": "MOSTLY_F16"}
_BY_HAND = "merge it and convert it with llama.cpp: docs/exports.md has the commands"


def export(directory: Path, out: Path, model: str = "") -> Path:
    """Write `out`/model.gguf: the base model with the adapter merged in, or the whole model. Returns its path. `model`
    names the base model where it is no longer under the name that the run was started with.

    Raises as `results.find` does, MissingInputError without the package gguf, UsageError for an `out` that exists and
    for an architecture, a tokenizer or a setting that this module cannot write.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingInputError("GGUF is written by the package gguf", extras.hint("embedded"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty", "choose an empty or a new --out")
    found = results.find(directory, model)
    header(found.policy.directory)  # a model that cannot be written is refused before the merge
    gguf_tokens.cut_name(gguf_tokens.load(found.policy.directory))
    with fsio.temporary_dir(out.with_name(f"{out.name}.merged")) as place:
        whole = found.policy.directory
        if found.policy.adapter is not None:
            merging.run(directory, place / "model", model)
            whole = place / "model"
        log.info("writing model.gguf")
        fsio.publish_dir(out, lambda into: write(whole, into / "model.gguf"))
    return out / "model.gguf"


def header(directory: Path) -> dict[str, Any]:
    """The fields of the header that describe the architecture, by their GGUF names without the prefix of the
    architecture. Raises UsageError for a model that this module cannot write."""
    config = fingerprint.read_json(directory / "config.json")
    kind = str(config.get("model_type"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    positions = rope.get("rope_type") or rope.get("type") or "default"
    problems = [
        *([f"the architecture {kind}"] if kind not in _ARCHITECTURES else []),
        *([f"positions of the kind {positions}"] if positions != "default" else []),
        *(["biases"] if config.get("attention_bias") or config.get("mlp_bias") else []),
        *(["a window"] if config.get("sliding_window") and config.get("use_sliding_window", True) else []),
        *([f"the activation {config['hidden_act']}"] if config.get("hidden_act", "silu") != "silu" else []),
        *([f"weights in {config['quantization_config']}"] if "quantization_config" in config else []),
    ]
    if problems:
        raise UsageError(f"{directory} has {', '.join(problems)}: export does not write it", _BY_HAND)
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    return {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "head_count": heads,
        "head_count_kv": config.get("num_key_value_heads") or heads,
        "key_length": head,
        "value_length": head,
        "rope_dimension_count": head,
        "rope_freq_base": float(rope.get("rope_theta") or config.get("rope_theta", 10_000.0)),
        "layer_norm_rms_eps": float(config["rms_norm_eps"]),
        "vocab_size": config["vocab_size"],
    }


def write(directory: Path, target: Path) -> None:
    """Write a model directory as a GGUF file. Raises UsageError for a tensor without a GGUF name."""
    import gguf

    config, fields = fingerprint.read_json(directory / "config.json"), header(directory)
    kind = gguf.MODEL_ARCH[_ARCHITECTURES[config["model_type"]]]
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[kind], use_temp_file=True)
    writer.add_type("model")
    writer.add_name("policy")
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    _write_tokenizer(writer, directory, fields["vocab_size"])
    names = gguf.get_tensor_name_map(kind, fields["block_count"])
    types: set[str] = set()
    for name, tensor in _tensors(directory, config):
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if written is None:
            raise UsageError(f"{directory} has the tensor {name}, which has no name in GGUF", _BY_HAND)
        if config["model_type"] in _ROTATED and ".self_attn." in name and name.split(".")[-2] in ("q_proj", "k_proj"):
            tensor = neighbours(tensor, fields["key_length"])
        number = "F32" if tensor.ndim == 1 else _TYPES[tensor.dtype]
        types.add(number)
        kept = gguf.GGMLQuantizationType[number]
        writer.add_tensor(written, gguf.quantize(tensor.float().numpy(), kept), raw_dtype=kept)
    largest = next((name for name in ("BF16", "F16") if name in types), "F32")
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[largest]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def neighbours(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder rows [heads * head_dim, ...] of queries or keys: dimensions i and i + head_dim / 2 of a head, which
    rotate together, become neighbours."""
    shape = (-1, 2, head_dim // 2, *tensor.shape[1:])
    return tensor.reshape(shape).transpose(1, 2).reshape(tensor.shape).contiguous()


def _write_tokenizer(writer: Any, directory: Path, size: int) -> None:
    import gguf

    tokenizer = gguf_tokens.load(directory)
    texts, kinds = gguf_tokens.tokens(tokenizer, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(gguf_tokens.cut_name(tokenizer))
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    gguf.SpecialVocab(directory, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def _tensors(directory: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(directory.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no mapping)
                if not (name == "lm_head.weight" and config.get("tie_word_embeddings")):
                    yield name, file.get_tensor(name)
