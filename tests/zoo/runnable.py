"""Runnable stand-ins with random weights: of a model of the corpus, and of an architecture of transformers."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from prefpipe.errors import UsageError
from prefpipe.forward.architecture import check_architecture
from tests import tiny
from tests.zoo import cases, small

VOCABULARY = 264  # ids of the tokenizer over bytes
# What some configs leave open by default, although their models need it.
_OPEN = {
    "head_dim": 16, "num_key_value_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "layer_types": ["conv", "full_attention"] * 16, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
    "indexer_budget": 16, "indexer_compress_ratio": 4,
}  # fmt: skip


# LFM2 has convolutions by its files, and none by default.
_USUAL = {"lfm2": {"layer_types": ["conv", "full_attention"] * 16, "full_attn_idxs": list(range(1, 32, 2))}}


def of_corpus(name: str, target: Path) -> Path:
    """The files of a model, with a tokenizer, its config with small numbers in place of large ones, and weights."""
    cases.stand_in(name, target)
    path = target / "config.json"
    found = small.read(path)
    found.pop("quantization_config", None)  # published in 8 or 4 bits: the stand-in is not
    if found.get("model_type") in CONFIG_MAPPING:
        path.write_text(json.dumps(found), encoding="utf-8")
        whole = AutoConfig.from_pretrained(target, local_files_only=True, trust_remote_code=False).to_dict()
        found = _changed(found, whole, small.shrunk(whole))
        path.write_text(json.dumps(found), encoding="utf-8")
    _write_weights(target)
    return target


def of_architecture(name: str, target: Path) -> Path:
    """A model of an architecture by its default config, with the tokenizer over bytes. Raises what transformers raises
    where it builds no model of it, unless the architecture is refused for what it is."""
    whole = CONFIG_MAPPING[name]().to_dict()
    written = _changed({"model_type": name}, whole, small.shrunk(_for_bytes(whole | _USUAL.get(name, {}))))
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(written), encoding="utf-8")
    tiny.write_tokenizer(target)
    _write_weights(target)
    if len(load_file(target / "model.safetensors")) == 1:
        with contextlib.suppress(UsageError):
            check_architecture(target)
            small.write_weights(target)
    return target


def _for_bytes(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the vocabulary of the tokenizer over bytes, its ids of tokens, and nothing left open."""
    out: dict[str, Any] = {}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    for name, value in config.items():
        if isinstance(value, dict) and name.endswith(("_config", "encoder", "decoder")):
            out[name] = _for_bytes(value)
        elif name.startswith("vocab_size") and isinstance(value, int):
            out[name] = VOCABULARY
        elif name.endswith(("token_id", "token_index")) and value is not None:
            out[name] = ids.get(name, 3)
        else:
            out[name] = _OPEN.get(name) if value is None else value
    return out | {name: number for name, number in ids.items() if name in config}


def _changed(found: dict[str, Any], whole: dict[str, Any], smaller: dict[str, Any]) -> dict[str, Any]:
    """A config as it was found, with those values that are smaller than in the whole one."""
    out = dict(found)
    for name, value in smaller.items():
        before = whole.get(name)
        if isinstance(value, dict) and isinstance(before, dict) and name.endswith("_config"):
            out[name] = _changed(found.get(name) or {}, before, value)
        elif value != before:
            out[name] = value
    if "rope_parameters" in out and "rope_parameters" not in found:
        out.pop("rope_scaling", None)
    return out


def _write_weights(target: Path) -> None:
    """Random weights; a file with none of them where transformers has no code, so that there is something to refuse."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        small.write_weights(target)
    except Exception:
        save_file({"none": torch.zeros(1)}, target / "model.safetensors")
    finally:
        logging.set_verbosity(before)
