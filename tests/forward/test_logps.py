"""Token trees against transformers' own forward, one plain row per completion, on random models of many families."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from prefpipe.errors import UsageError
from prefpipe.forward import attention, load
from prefpipe.forward.attention import Row, tree_attention
from prefpipe.forward.head import LogitRule
from prefpipe.forward.layout import Span, Tree, flatten
from prefpipe.forward.logps import (
    TreeModel,
    causal_model,
    completion_logps,
    decoder,
    extremes,
    pack,
    plain_attention,
    score,
    self_test,
    settle_rows,
)

VOCABULARY = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.3, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3,
        "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip

SHARED: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": lambda **k: transformers.LlamaConfig(**GROUPED, **k),
    "qwen2": lambda **k: transformers.Qwen2Config(**GROUPED, **k),
    "qwen2-window": lambda **k: transformers.Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1, **k
    ),
    "qwen3": lambda **k: transformers.Qwen3Config(**GROUPED, head_dim=8, **k),
    "mistral-window": lambda **k: transformers.MistralConfig(**GROUPED, sliding_window=5, **k),
    "phi3": lambda **k: transformers.Phi3Config(**GROUPED, **k),
    "phi3-window": lambda **k: transformers.Phi3Config(**GROUPED, sliding_window=5, **k),
    "olmo2": lambda **k: transformers.Olmo2Config(**GROUPED, **k),
    "gpt_neox": lambda **k: transformers.GPTNeoXConfig(**COMMON, **k),
    "mixtral": lambda **k: transformers.MixtralConfig(**GROUPED, num_local_experts=4, **k),
    "gemma": lambda **k: transformers.GemmaConfig(**GROUPED, head_dim=8, **k),
    # Both caps low, so that they bend: Gemma's own 50 and 30 would hardly show in a model of this size.
    "gemma2-window-caps": lambda **k: transformers.Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
        query_pre_attn_scalar=8, **k
    ),
    "gemma3-window": lambda **k: transformers.Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=5, sliding_window_pattern=2, **k
    ),
    "gemma3-final-cap": lambda **k: transformers.Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=5, final_logit_softcapping=3.0, **k
    ),
    "smollm3": lambda **k: transformers.SmolLM3Config(**GROUPED, **k),
    "gpt2": lambda **k: transformers.GPT2Config(**GPT2, **k),
    # Afmoe passes the mask by its name, JetMoe views the output as one row of heads.
    "afmoe": lambda **k: transformers.AfmoeConfig(
        **GROUPED, head_dim=8, sliding_window=5, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        num_dense_layers=1, **k
    ),
    "jetmoe": lambda **k: transformers.JetMoeConfig(
        **{n: v for n, v in COMMON.items() if n != "num_attention_heads"}, num_key_value_heads=2, kv_channels=8,
        num_local_experts=4, num_experts_per_tok=2, **k
    ),
    "granite-scale": lambda **k: transformers.GraniteConfig(
        **GROUPED, logits_scaling=8.0, attention_multiplier=0.2, embedding_multiplier=2.0, residual_multiplier=0.5, **k
    ),
    "hyperclovax-scale": lambda **k: transformers.HyperCLOVAXConfig(**GROUPED, logits_scaling=0.25, **k),
    "cohere-scale": lambda **k: transformers.CohereConfig(**GROUPED, logit_scale=0.25, **k),
    "cohere2-scale-window": lambda **k: transformers.Cohere2Config(
        **GROUPED, logit_scale=0.25, sliding_window=5, sliding_window_pattern=2, **k
    ),
    "gpt_oss-sinks-window": lambda **k: transformers.GptOssConfig(
        **{**GROUPED, "max_position_embeddings": 131072}, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=5, **k
    ),
    "phi-bias": lambda **k: transformers.PhiConfig(**GROUPED, **k),
    # Values are smaller than queries and keys.
    "deepseek_v3-mla": lambda **k: transformers.DeepseekV3Config(
        **COMMON, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16,
        v_head_dim=12, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, **k
    ),
    "llama-yarn": lambda **k: transformers.LlamaConfig(
        **{**GROUPED, "max_position_embeddings": 16},
        rope_parameters={
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16,
        }, **k
    ),
}  # fmt: skip
# The families whose heads are tested tied and untied; the others as their configs have them.
MATRIX = (
    "llama", "qwen2", "qwen3", "gemma2-window-caps", "gemma3-window", "gemma3-final-cap", "mistral-window", "phi3",
    "olmo2", "gpt_neox", "granite-scale",
)  # fmt: skip
CASES = [(family, tied) for family in SHARED for tied in ((False, True) if family in MATRIX else (None,))]
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8
}  # fmt: skip
# Rows that cannot be shared, and by what they are known: every completion in a row of its own.
SEPARATE: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "bloom": (
        lambda: transformers.BloomConfig(
            vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3
        ),
        "ALiBi",
    ),
    "falcon-alibi": (
        lambda: transformers.FalconConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True,
            bos_token_id=1, eos_token_id=2, initializer_range=0.3,
        ),
        "ALiBi",
    ),
    "falcon": (
        lambda: transformers.FalconConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1,
            eos_token_id=2, initializer_range=0.3,
        ),
        "shared rows differ",
    ),
    "gptj-bias": (
        lambda: transformers.GPTJConfig(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, rotary_dim=4, bos_token_id=1,
            eos_token_id=2, initializer_range=0.3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
        "shared rows",
    ),
    "nemotron": (lambda: transformers.NemotronConfig(**GROUPED, head_dim=8), "does not take shared rows"),
    "mpt": (
        lambda: transformers.MptConfig(
            vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=256, initializer_range=0.3
        ),
        "ALiBi",
    ),
    "lfm2": (
        lambda: transformers.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"], block_multiple_of=8),
        "recurrent",
    ),
    "mamba2": (
        lambda: transformers.Mamba2Config(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8,
            n_groups=1, chunk_size=8, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
        "recurrent",
    ),
    "bamba": (
        lambda: transformers.BambaConfig(**GROUPED, **MAMBA, mamba_expand=2, attn_layer_indices=[1]), "recurrent"
    ),
    "falcon_h1": (lambda: transformers.FalconH1Config(**GROUPED, **MAMBA, mamba_d_ssm=64), "recurrent"),
    "jamba": (
        lambda: transformers.JambaConfig(
            **GROUPED, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
            num_experts=4, num_experts_per_tok=2, mamba_d_state=8, mamba_expand=2, mamba_dt_rank=4,
        ),
        "recurrent",
    ),
    "recurrent_gemma": (
        lambda: transformers.RecurrentGemmaConfig(
            **{n: v for n, v in GROUPED.items() if n != "max_position_embeddings"}, lru_width=32,
            attention_window_size=8, block_types=["recurrent", "attention"], logits_soft_cap=3.0,
        ),
        "recurrent",
    ),
    "qwen3_5": (
        lambda: transformers.Qwen3_5TextConfig(
            **GROUPED, head_dim=8, layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8,
            linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        ),
        "recurrent",
    ),
    # Positions of three axes alone: all of its layers attend.
    "qwen3_5-mrope": (
        lambda: transformers.Qwen3_5TextConfig(
            **GROUPED, head_dim=8, layer_types=["full_attention", "full_attention"],
            rope_parameters={
                "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]
            },
        ),
        "M-RoPE",
    ),
    "qwen3_next": (
        lambda: transformers.Qwen3NextConfig(
            **GROUPED, head_dim=8, layer_types=["linear_attention", "full_attention"], num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_key_head_dim=8,
            linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        ),
        "recurrent",
    ),
    "longrope": (
        lambda: transformers.Phi3Config(
            **GROUPED, original_max_position_embeddings=24,
            rope_parameters={
                "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 24,
            },
        ),
        "longrope",
    ),
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


def build(config: PretrainedConfig, directory: Path, dtype: str = "float32") -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("sinks", "lm_head.bias")):
            parameter.data.normal_(std=1.0)
    model.save_pretrained(directory)
    return load.load_model(directory, dtype)


def adapted(base: PreTrainedModel) -> TreeModel:
    """A policy that has left its base: B is not zero."""
    model = load.add_lora(base, r=4, alpha=8, target_modules="all-linear", seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return TreeModel(model)


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def decoder_layers(causal: PreTrainedModel) -> torch.nn.ModuleList:
    return max((m for m in causal.modules() if isinstance(m, torch.nn.ModuleList)), key=len)


def trees(num_completions: int) -> list[Tree]:
    """Three trees of prompts longer and shorter than the sliding windows, completions of 1 to 12 tokens.

    In the last one all completions begin with the same 7 tokens, and one of them is nothing else.
    """
    lengths = [9, 1, 12, 4, 7, 2, 11, 5][:num_completions]
    completions = [tokens(n, seed) for seed, n in enumerate(lengths)]
    start = tokens(7, 50)
    alike = [[*start, *c] for c in completions[1:]] + [start]
    return [Tree(tokens(13, 100), completions), Tree(tokens(2, 101), completions[::-1]), Tree(tokens(4, 102), alike)]


def plain_logps(model: TreeModel, some: Sequence[Tree]) -> torch.Tensor:
    """The oracle: one row per completion, transformers' own attention, full logits, log_softmax."""
    causal = causal_model(model.policy)
    causal.set_attn_implementation(plain_attention(causal))
    found: list[torch.Tensor] = []
    for tree in some:
        for completion in tree.completions:
            ids = torch.tensor([[*tree.prompt, *completion]])
            logps = causal(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            rows = logps[len(tree.prompt) - 1 : -1]
            found.append(rows.gather(1, ids[0, len(tree.prompt) :].unsqueeze(1)).squeeze(1))
    model.set_rows(model.rows)
    return torch.cat(found)


def gradients(model: torch.nn.Module, logps: torch.Tensor) -> torch.Tensor:
    """Of a random linear function of the log-probs, over all LoRA weights, as one vector."""
    slope = torch.randn(logps.shape, generator=torch.Generator().manual_seed(5))
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad((logps * slope).sum(), trainable)])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 2e-5 nats in every token."""
    assert found.shape == expected.shape
    assert float((found - expected).detach().abs().max()) <= 2e-5


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.norm() > 0
    return float((found - expected).norm() / expected.norm())


# peft says that it adapts GPT-2's Conv1D layers and leaves Mixtral's stacked experts alone: both are as they should be.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False", "ignore:The following .*_pattern keys")
@pytest.mark.parametrize(("family", "tied"), CASES)
def test_trees_equal_separate_rows(family: str, tied: bool | None, tmp_path: Path):
    """Values within 2e-5 nats per token in fp32, LoRA gradients within 1e-5 relative, for K = 1, 2 and 8.

    With the adapter and without it; with gradient checkpointing (in train mode; no dropout here) the same gradients.
    """
    model = adapted(build(SHARED[family](**({} if tied is None else {"tie_word_embeddings": tied})), tmp_path))
    causal = causal_model(model.policy)
    if tied is not None:
        same = causal.get_output_embeddings().weight is causal.get_input_embeddings().weight
        assert same == tied
    for num_completions in (1, 2, 8):
        some = trees(num_completions)
        shared = model(flatten(some))
        plain = plain_logps(model, some)
        close(shared, plain)
        gradient, expected = gradients(model, shared), gradients(model, plain)
        assert relative(gradient, expected) <= 1e-5
        with torch.no_grad(), load.adapter_off(model.policy, off=True):
            without = model(flatten(some))
            close(without, plain_logps(model, some))
        assert float((shared.detach() - without).abs().max()) > 0.1  # the adapter took part
    assert settle_rows(model, trees(2), "float32") is None
    assert self_test(model, trees(2)) <= 2e-5
    if family == "jetmoe":
        return  # transformers has no checkpointing for it
    causal.gradient_checkpointing_enable()
    model.train()
    calls: list[int] = []
    decoder_layers(causal)[0].register_forward_pre_hook(lambda *_: calls.append(1))
    again = model(flatten(some))
    close(again, shared)
    assert relative(gradients(model, again), gradient) <= 1e-5
    assert len(calls) == 2  # the layer ran once more in backward: checkpointing was on


@pytest.mark.parametrize("family", ["llama", "gemma2-window-caps", "gpt_oss-sinks-window", "granite-scale"])
def test_separate_rows_equal_plain_rows_too(family: str, tmp_path: Path):
    """The fallback on models that do not need it: values, gradients, and the order of completions."""
    model = adapted(build(SHARED[family](), tmp_path))
    model.set_rows("separate")
    some = trees(8)
    values, plain = model(model.layout(some)), plain_logps(model, some)
    close(values, plain)
    assert relative(gradients(model, values), gradients(model, plain)) <= 1e-5
    assert [len(c) for t in score(model, some) for c in t] == [len(c) for t in some for c in t.completions]


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys", "ignore:.*fast path")
@pytest.mark.parametrize("family", SEPARATE)
def test_models_that_cannot_share_a_row_are_computed_in_separate_rows(family: str, tmp_path: Path):
    """Exact values and LoRA gradients in padded batches, and the reason in words."""
    make, why = SEPARATE[family]
    model = adapted(build(make(), tmp_path))
    some = [*trees(2), Tree(tokens(30, 2), [tokens(8, 3), tokens(3, 4), tokens(10, 5)])]
    shapes: list[torch.Size] = []
    causal_model(model.policy).get_input_embeddings().register_forward_pre_hook(
        lambda _module, given: shapes.append(given[0].shape)
    )
    reason = settle_rows(model, some, "float32")
    assert why in (reason or "shared")
    assert model.rows == "separate"
    shapes.clear()
    values = model(model.layout(some))
    assert torch.Size([2, 40]) in shapes  # rows of 40 and 38 tokens
    assert sum(shape[0] for shape in shapes) == 9
    plain = plain_logps(model, some)
    close(values, plain)
    assert relative(gradients(model, values), gradients(model, plain)) <= 1e-5
    close(torch.tensor([v for tree in score(model, some) for c in tree for v in c]), plain)


@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_a_model_that_looks_ahead_is_computed_one_row_at_a_time(weight: float, tmp_path: Path):
    """The last state of a row is added to all of its states: beside a longer row it would be that of the padding."""
    model = adapted(build(SHARED["llama"](), tmp_path))

    def look_ahead(_module: object, _given: object, out: Any) -> Any:
        out.last_hidden_state = out.last_hidden_state + weight * out.last_hidden_state[:, -1:]
        return out

    decoder(causal_model(model.policy)).register_forward_hook(look_ahead)
    model.set_rows("separate")
    some = trees(2)
    reason = settle_rows(model, some, "float32")
    assert model.rows == ("single" if weight else "separate")
    assert ("separate rows differ" in (reason or "")) == bool(weight)
    values, plain = model(model.layout(some)), plain_logps(model, some)
    close(values, plain)
    assert relative(gradients(model, values), gradients(model, plain)) <= 1e-5
    assert settle_rows(model, some, "float32") is None  # what was left is not tried again


def test_growing_rotary_frequencies_are_refused_in_words(tmp_path: Path):
    config = transformers.LlamaConfig(**{**GROUPED, "max_position_embeddings": 16}, rope_parameters=DYNAMIC)
    with pytest.raises(UsageError, match="dynamic NTK"):
        build(config, tmp_path / "dynamic")


def test_a_model_that_is_wrong_in_separate_rows_too_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A logit rule that nobody knows: neither kind of row agrees with the model's own logits."""
    model = TreeModel(build(SHARED["granite-scale"](), tmp_path))
    causal = causal_model(model.policy)
    monkeypatch.setattr("prefpipe.forward.logps.logit_rule", lambda _text: LogitRule())
    with pytest.raises(UsageError, match=r"not supported yet: single rows differ from plain .* by \d"):
        settle_rows(model, trees(2), "float32")
    monkeypatch.undo()
    assert settle_rows(model, trees(2), "float32") is None
    assert (model.rows, causal.config._attn_implementation) == ("shared", attention.NAME)


def test_a_self_test_takes_the_longest_sequence_not_the_largest_tree():
    """Of 3 + 4 * 20 tokens the longest sequence has 23; the other tree has one of 31."""
    many, long = Tree(tokens(3, 0), [tokens(20, n) for n in range(4)]), Tree(tokens(30, 5), [tokens(1, 6)])
    short = Tree(tokens(2, 7), [tokens(4, 8), tokens(9, 9), tokens(1, 10)])
    first, last = extremes([many, long, short])
    assert (first.prompt, [len(c) for c in first.completions]) == (short.prompt, [9, 1])
    assert last == long
    assert extremes([long]) == [long, long]


def test_running_out_of_memory_is_no_verdict_on_an_architecture(tmp_path: Path):
    model = TreeModel(build(SHARED["llama"](), tmp_path))

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    causal_model(model.policy).base_model.layers[0].register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        settle_rows(model, trees(2), "float32")


def test_longrope_beside_a_longer_neighbour_keeps_its_values(tmp_path: Path):
    """A short completion beside a long one must have the values that it has alone: what separate rows are for."""
    make, _ = SEPARATE["longrope"]
    model = TreeModel(build(make(), tmp_path))
    short, long = Tree(tokens(3, 0), [tokens(4, 1)]), Tree(tokens(30, 2), [tokens(10, 3)])
    settle_rows(model, [short], "float32")
    (alone,), (beside, _) = score(model, [short]), score(model, [short, long])
    close(torch.tensor(beside), torch.tensor(alone))


def test_a_mixture_of_trees_changes_no_value(tmp_path: Path):
    """Each tree alone gives what all of them in one row give."""
    model = TreeModel(build(SHARED["mistral-window"](), tmp_path))
    some = [*trees(8), Tree(tokens(20, 7), [tokens(3, 8)])]
    together = list(score(model, some))
    alone = [next(score(model, [tree])) for tree in some]
    for mine, other in zip(together, alone, strict=True):
        for a, b in zip(mine, other, strict=True):
            close(torch.tensor(a), torch.tensor(b))


@pytest.mark.parametrize("max_tokens", [10**9, 60, 1])
def test_score_has_the_shape_of_the_trees_and_sums_by_completion(max_tokens: int, tmp_path: Path):
    model = TreeModel(build(SHARED["llama"](), tmp_path))
    some = trees(2)
    values = list(score(model, some, max_tokens))
    assert [[len(c) for c in tree] for tree in values] == [[len(c) for c in tree.completions] for tree in some]
    layout = flatten(some)
    sums = completion_logps(model(layout), layout)
    assert not torch.is_inference(sums)
    expected = torch.tensor([sum(c) for tree in values for c in tree])
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)


def test_scoring_is_lazy_and_leaves_gradients_on(tmp_path: Path):
    """Trees are taken as passes need them; between two results of the iterator autograd is as the caller has it."""
    model = adapted(build(SHARED["llama"](), tmp_path))
    taken: list[int] = []

    def source() -> Iterator[Tree]:
        for number, tree in enumerate(trees(2) * 10):
            taken.append(number)
            yield tree

    found = score(model, source(), max_tokens=1)
    next(found)
    assert len(taken) <= 2
    assert torch.is_grad_enabled()
    assert model(flatten(trees(1))).requires_grad
    assert len(list(found)) == 29


@pytest.mark.parametrize(
    ("budget", "sizes"), [(100, [5]), (9, [2, 2, 1]), (6, [2, 1, 1, 1]), (1, [1] * 5), (8, [2, 1, 1, 1])]
)
def test_packing_keeps_the_order_and_the_budget(budget: int, sizes: list[int]):
    """Trees of 2, 4, 6, 3, 7 tokens."""
    some = [Tree([0], [[1] * n]) for n in (1, 3, 5, 2, 6)]
    found = list(pack(some, budget))
    assert [tree for group in found for tree in group] == some
    assert [len(group) for group in found] == sizes


def test_bfloat16_stays_within_the_limit_of_its_self_test(tmp_path: Path):
    """bf16 keeps 8 bits: kernels differ by tenths of a nat on a model of this spread, never by a nat."""
    config = transformers.LlamaConfig(**{**GROUPED, "initializer_range": 0.1})
    model = TreeModel(build(config, tmp_path, "bfloat16"))
    values = model(flatten(trees(2)))
    assert values.dtype == torch.float32
    assert self_test(model, trees(8)) < 0.5
    assert settle_rows(model, trees(8), "bfloat16") is None


def whole_row_causal(
    _module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: object, **_: Any
) -> tuple[torch.Tensor, None]:
    """Wrong on purpose: the flat row as one sequence, so siblings see each other."""
    repeats = query.shape[1] // key.shape[1]
    wide = [t.repeat_interleave(repeats, dim=1) for t in (key, value)]
    return scaled_dot_product_attention(query, *wide, is_causal=True).transpose(1, 2), None


def forgets_the_prompt(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **given: Any
) -> tuple[torch.Tensor, None]:
    """Wrong on purpose: every completion is a tree of its own, without its prompt."""
    spans = [Span(s.start, s.trunk_length, ()) for s in given["tree_row"].spans]
    spans += [Span(start, length, ()) for s in given["tree_row"].spans for start, length in s.completions]
    spans.sort(key=lambda s: s.start)
    return tree_attention(module, query, key, value, None, **{**given, "tree_row": Row(spans)})


def one_row_off(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **given: Any
) -> tuple[torch.Tensor, None]:
    """Wrong on purpose: the last prompt token is counted to the first completion, so its siblings miss it."""
    spans = [
        Span(s.start, s.trunk_length - 1, ((s.completions[0][0] - 1, s.completions[0][1] + 1), *s.completions[1:]))
        for s in given["tree_row"].spans
    ]
    return tree_attention(module, query, key, value, None, **{**given, "tree_row": Row(spans)})


def ignores_the_window(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **given: Any
) -> tuple[torch.Tensor, None]:
    return tree_attention(module, query, key, value, None, **{**given, "sliding_window": None})


def ignores_the_cap(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **given: Any
) -> tuple[torch.Tensor, None]:
    """Wrong on purpose: the cap of the scores is dropped (Gemma 2 under SDPA)."""
    return tree_attention(module, query, key, value, None, **{**given, "softcap": None})


WRONG = {
    "mistral-window": (whole_row_causal, forgets_the_prompt, one_row_off, ignores_the_window),
    "gemma2-window-caps": (ignores_the_window, ignores_the_cap),
}


@pytest.mark.parametrize(("family", "wrong"), [(family, wrong) for family, all_ in WRONG.items() for wrong in all_])
def test_the_self_test_sees_wrong_attention(
    family: str, wrong: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A fault in who sees whom is worth more than a tenth of a nat on a random model; right ones agree to 2e-5.

    Then rows are separate, for a reason in words.
    """
    model = TreeModel(build(SHARED[family](), tmp_path))
    assert self_test(model, trees(2)) <= 2e-5
    AttentionInterface.register(wrong.__name__, wrong)
    AttentionMaskInterface.register(wrong.__name__, lambda *_args, **_kwargs: None)
    monkeypatch.setattr("prefpipe.forward.logps.NAME", wrong.__name__)
    model.set_rows("shared")
    assert self_test(model, trees(2)) > 0.1
    assert causal_model(model.policy).config._attn_implementation == wrong.__name__  # it leaves what it found
    assert "shared rows differ" in (settle_rows(model, trees(2), "float32") or "")
    assert model.rows == "separate"
    assert self_test(model, trees(2)) <= 2e-5
    monkeypatch.undo()
    model.set_rows("shared")
    assert causal_model(model.policy).config._attn_implementation == attention.NAME
    assert self_test(model, trees(2)) <= 2e-5
