"""The load-balancing loss of every completion against transformers' aux_loss of its row alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from prefpipe.errors import UsageError
from prefpipe.forward import load
from prefpipe.forward.balance import check_balance
from prefpipe.forward.layout import Tree
from prefpipe.forward.logps import Rows, TreeModel, causal_model

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, **LOCAL),
    # A layer without experts, an expert that all tokens share.
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        mlp_only_layers=[0],
    ),
    # Routers in attention too.
    "jetmoe": lambda: transformers.JetMoeConfig(
        **{k: v for k, v in SMALL.items() if k != "num_attention_heads"}, kv_channels=8, **LOCAL
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**SMALL, head_dim=16, sliding_window=5, **LOCAL),
    "jamba": lambda: transformers.JambaConfig(
        **SMALL, attn_layer_period=2, attn_layer_offset=1, num_experts=4, num_experts_per_tok=2, mamba_d_state=4
    ),
}  # fmt: skip
SOME = [Tree([5, 6, 7, 9, 3], [[8, 9, 4, 4], [8, 10, 11, 12, 13]]), Tree([5, 6, 8], [[21, 22], [23, 24, 25]])]


def build(name: str) -> PreTrainedModel:
    load.attention.register()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MIXTURES[name]()).eval()


@pytest.mark.parametrize(
    ("name", "rows"),
    [*((name, rows) for name in ("mixtral", "qwen2_moe", "jetmoe", "gpt_oss") for rows in ("shared", "single")),
     ("mixtral", "separate"), ("jamba", "separate")],
)  # fmt: skip
def test_every_completion_has_the_loss_of_its_row_alone(name: str, rows: Rows):
    model = TreeModel(build(name), rows)
    causal = causal_model(model.policy)
    check_balance(causal)
    layout = model.layout(SOME)
    logps, found = model(layout, balance=True)
    torch.testing.assert_close(logps, model(layout))
    causal.set_attn_implementation("eager")
    expected = [
        causal(torch.tensor([[*tree.prompt, *completion]]), output_router_logits=True, use_cache=False).aux_loss
        for tree in SOME for completion in tree.completions
    ]  # fmt: skip
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert len(set(found.tolist())) == 4


def test_it_reaches_the_routers_through_checkpointed_layers():
    """The same gradient with gradient checkpointing as without it, and one that log-probs do not give."""
    model = TreeModel(build("mixtral"))
    routers = [p for n, p in model.named_parameters() if n.endswith("gate.weight")]
    assert len(routers) == 2
    layout = model.layout(SOME)
    whole = torch.autograd.grad(model(layout, balance=True)[1].sum(), routers)
    load.checkpoint_layers(model.policy)
    again = torch.autograd.grad(model(layout, balance=True)[1].sum(), routers)
    for mine, other in zip(whole, again, strict=True):
        assert other.norm() > 0
        torch.testing.assert_close(mine, other)


def test_what_has_no_such_loss_is_refused(tiny_model: Path):
    with pytest.raises(UsageError, match="no load-balancing loss for llama"):
        check_balance(load.load_model(tiny_model, "float32"))
    deepseek = transformers.DeepseekV3Config(
        **SMALL, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2
    )
    with pytest.raises(UsageError, match="no load-balancing loss for deepseek_v3"):
        check_balance(AutoModelForCausalLM.from_config(deepseek))


def test_an_adapter_that_router_logits_leave_out_is_refused():
    """Jamba's router is a plain linear module: transformers reads what it gives before peft adds to it."""
    model = load.add_lora(build("jamba"), r=2, alpha=2, target_modules="q_proj,router", seed=0)
    with pytest.raises(UsageError, match=r"before the adapter on model\.layers\.\d\.feed_forward\.router"):
        check_balance(causal_model(model))
    check_balance(causal_model(load.add_lora(build("jamba"), r=2, alpha=2, target_modules="q_proj", seed=0)))
