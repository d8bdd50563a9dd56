"""Small models of an architecture: its config with few narrow layers, one of each kind, and random weights."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

Config = dict[str, Any]
_MOST_LAYERS = 4
_LAYERS = re.compile("(num_)?(hidden_|encoder_|decoder_)?layers|n_layers?|num_blocks|depth|num_layers_per_stack")
_HEADS = re.compile(
    "(num_|n_)?((encoder|decoder|attention|swa|swa_num|linear_num|linear_num_value|index_n|indexer_n|mamba|mamba_n|"
    "mamba_num)_)*heads?"
)
_KEY_HEADS = re.compile(".*(key_value|kv|kv_n|linear_num_key|query)_(heads|groups)|n_head_kv|multi_query_group_num")
# The first pattern that the whole name of a setting matches says its largest value.
_SIZES: tuple[tuple[str, int], ...] = (
    ("qk_head_dim", 32),
    ("rotary_dim", 8),
    ("attention_head_dim", 32),
    ("mamba_(d_head|head_?dim)", 32),  # four heads of them are twice the hidden size
    ("n_groups|mamba_n_?groups|mamba_num_groups", 1),
    ("mamba_d_ssm", 128),
    (".*(head_?dim|head_size|dim_head|d_head|kv_channels|query_pre_attn_scalar)", 16),
    ("(num|n)_.*experts|num_local_experts|moe_num_experts|zero_expert_num|n_routed_experts", 4),
    ("(num_)?experts_per_tok(en)?|moe_top_?k|moe_k|num_experts_per_tok(en)?", 2),
    ("n_group|topk_group|num_expert_group|.*n_shared_experts|num_shared_experts|first_k_dense_replace", 1),
    ("num_dense_layers|num_nextn_predict_layers|moe_layer_start_index|max_window_layers", 1),
    ("moe_layer_end_index", 3),
    ("(moe|.*expert).*intermediate_size|expert_ffn_hidden_size", 32),
    (".*(intermediate_size.*|ffn.*_dim|ffn_hidden_size|dff|dim_ff|d_inner)", 128),
    ("feed_forward_size|block_ff_dim|mlp_dim", 128),
    (".*_lora_rank|.*_rank|lru_width", 16),
    ("hidden_size_per_layer_input|prompt_mid_dim", 16),
    ("dim_model_base|hidden_size.*|n_embd|d_model|emb(edding)?_dim|.*embedding_size|word_embed_proj_dim", 64),
    ("block_dim|conv_dim.*|out_hidden_size|.*_embed_dim|backbone_hidden_size|input_size", 64),
    ("(sliding|attention)_window(_size)?|sliding_window_size|local_attention|window_size|attention_chunk_size", 16),
    (".*(chunk_size|chunk_length)", 16),
    ("index_topk|index_block_size", 16),
    ("image_size|crop_size", 56),
    (".*_vocab|.*ngram_vocab_size.*", 512),
)  # fmt: skip


def shrunk(config: Config) -> Config:
    """A config of the same architecture with one layer of each kind, hidden size 64, four heads and four experts.

    Windows become 16 tokens, so that rows are longer than they are."""
    out = {name: _smaller(name, value, config) for name, value in config.items()}
    if "expand" in out and "head_dim" in out:
        out["head_dim"] = 32  # of Mamba 2, whose heads have no prefix
    if "attention_hidden_size" in out:  # Zamba's is twice the hidden size
        out["attention_hidden_size"] = config["attention_hidden_size"] * out["hidden_size"] // config["hidden_size"]
    _choose_layers(config, out)
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(out.get(name), dict):
            out[name] = _smaller_rope(out[name], _rotary_pairs(out))
    return out


def _smaller(name: str, value: Any, config: Config) -> Any:
    if isinstance(value, dict) and name.endswith(("_config", "encoder", "decoder")):
        return shrunk(value)
    if isinstance(value, float) and (at_work := _at_work(name, value)):
        return at_work
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if _KEY_HEADS.fullmatch(name):
        heads = next((v for n, v in config.items() if _HEADS.fullmatch(n) and isinstance(v, int)), value)
        return 1 if value == 1 else 2 if value < heads else 4
    if _HEADS.fullmatch(name):
        return min(value, 4)
    return next((min(value, most) for pattern, most in _SIZES if re.fullmatch(pattern, name)), value)


def _at_work(name: str, value: float) -> float | None:
    """A factor or a cap that shows in a model of this size: many are 1 by default, or caps that nothing reaches."""
    if value and re.fullmatch(".*soft_?cap(ping)?", name):
        return 3.0
    return 0.5 if value == 1.0 and re.search("logit|(?<!dim_)multiplier|(embedding|residual)_scal", name) else None


def _choose_layers(config: Config, out: Config) -> None:
    """Keep the first layer of each kind, in every list that has an entry for each layer or the indices of some."""
    counts = {name: value for name, value in config.items() if _LAYERS.fullmatch(name) and isinstance(value, int)}
    count = max(counts.values(), default=0)
    if not count:
        return
    lists = {n: v for n, v in config.items() if isinstance(v, list) and v}
    each = {n: v for n, v in lists.items() if len(v) == count}
    some = {n: v for n, v in lists.items() if n not in each and all(type(i) is int and 0 <= i < count for i in v)}
    some = {n: v for n, v in some.items() if re.search("layer|idx|indices", n)}
    kinds = [
        (*(str(v[i]) for v in each.values()), *(i in v for v in some.values()), *(i >= d for d in _dense(config)))
        for i in range(count)
    ]
    chosen = sorted(kinds.index(kind) for kind in set(kinds))[:_MOST_LAYERS]
    if config.get("num_kv_shared_layers"):
        out["num_kv_shared_layers"] = len(chosen)
    chosen = chosen * 2 if len(chosen) <= 2 or config.get("num_kv_shared_layers") else chosen
    out |= {name: min(len(chosen), value) for name, value in counts.items()}
    out |= {name: [value[i] for i in chosen] for name, value in each.items()}
    out |= {name: [j for j, i in enumerate(chosen) if i in value] for name, value in some.items()}
    if isinstance(special := config.get("per_layer_config"), dict):  # by the index of a layer, in digits
        settings = {int(i): shrunk(value) for i, value in special.items()}
        out["per_layer_config"] = {str(j): settings[i] for j, i in enumerate(chosen) if i in settings}


def _dense(config: Config) -> list[int]:
    names = ("first_k_dense_replace", "num_dense_layers")
    return [value for name in names if isinstance(value := config.get(name), int)]


def _rotary_pairs(config: Config) -> int:
    """Frequencies of the rotary embedding of a small config."""
    size = config.get("qk_rope_head_dim") or config.get("head_dim") or 16
    rope = config.get("rope_parameters") or {}
    return int(size * (config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0)) // 2


def _smaller_rope(rope: Config, pairs: int) -> Config:
    out = {n: _smaller_rope(v, pairs) if isinstance(v, dict) else v for n, v in rope.items()}
    out |= {name: out[name][:pairs] for name in ("long_factor", "short_factor") if name in out}
    if "mrope_section" in out:
        out["mrope_section"] = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    return out


def write_weights(directory: Path) -> None:
    """Random float32 weights for the config.json of a directory, which stays as it is. What starts at zero (biases,
    norms of Gemma) becomes small numbers, so that none of them can be left out unseen."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or not weight.any() or name.endswith("sinks"):
                weight.normal_(std=0.1)
    kept = {path: path.read_bytes() for path in directory.glob("*.json")}
    model.save_pretrained(directory)
    for path in directory.glob("*config.json"):
        path.unlink()
    for path, content in kept.items():
        path.write_bytes(content)


def read(path: Path) -> Config:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
