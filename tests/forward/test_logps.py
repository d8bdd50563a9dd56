"""Token trees against transformers' own forward, one plain row per completion, on random models of many families."""

from collections.abc import Callable, Sequence
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
from prefpipe.forward.attention import tree_attention
from prefpipe.forward.layout import Span, Tree, flatten
from prefpipe.forward.logps import causal_model, completion_logps, score, self_test, tree_logps

VOCABULARY = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.3, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip

SUPPORTED: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen2-window": lambda: transformers.Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    "mistral-window": lambda: transformers.MistralConfig(**GROUPED, sliding_window=5),
    "phi3": lambda: transformers.Phi3Config(**GROUPED),
    "phi3-window": lambda: transformers.Phi3Config(**GROUPED, sliding_window=5),
    "olmo2": lambda: transformers.Olmo2Config(**GROUPED),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**COMMON),
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4),
    "gemma": lambda: transformers.GemmaConfig(**GROUPED, head_dim=8),
    "gemma3-window": lambda: transformers.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=5),
    "smollm3": lambda: transformers.SmolLM3Config(**GROUPED),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
}
# What token trees would compute wrongly, and what must show it: a refusal, or a self-test far above its limit.
SCALED_LOGITS: dict[str, Callable[[], PretrainedConfig]] = {
    "granite": lambda: transformers.GraniteConfig(**GROUPED, logits_scaling=8.0),
    "cohere": lambda: transformers.CohereConfig(**GROUPED),
}
REFUSED: dict[str, Callable[[], PretrainedConfig]] = {
    "gemma2 (soft-capping)": lambda: transformers.Gemma2Config(**GROUPED, head_dim=8),
    "gpt_oss (sinks)": lambda: transformers.GptOssConfig(
        **{**GROUPED, "max_position_embeddings": 131072}, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "phi (bias in the head)": lambda: transformers.PhiConfig(**GROUPED),
    "falcon (own attention classes)": lambda: transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1
    ),
    "nemotron (drops extra arguments)": lambda: transformers.NemotronConfig(**GROUPED, head_dim=8),
}
# Rotary frequencies that follow the longest position of the whole row: a completion's values depend on its neighbours.
LENGTH_DEPENDENT: dict[str, Callable[[], PretrainedConfig]] = {
    "dynamic": lambda: transformers.LlamaConfig(
        **{**GROUPED, "max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ),
    "longrope": lambda: transformers.Phi3Config(
        **GROUPED, original_max_position_embeddings=24,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 24,
        },
    ),
}  # fmt: skip


def build(config: PretrainedConfig, directory: Path, dtype: str = "float32") -> PreTrainedModel:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return load.load_model(directory, dtype)


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def trees(num_completions: int) -> list[Tree]:
    """Two trees of prompts longer and shorter than the sliding windows, completions of 1 to 12 tokens."""
    lengths = [9, 1, 12, 4, 7, 2, 11, 5][:num_completions]
    completions = [tokens(n, seed) for seed, n in enumerate(lengths)]
    return [Tree(tokens(13, 100), completions), Tree(tokens(2, 101), completions[::-1])]


def plain_logps(model: torch.nn.Module, some: Sequence[Tree]) -> torch.Tensor:
    """The oracle: one row per completion, transformers' sdpa attention, full logits, log_softmax."""
    found: list[torch.Tensor] = []
    for tree in some:
        for completion in tree.completions:
            ids = torch.tensor([[*tree.prompt, *completion]])
            logps = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            rows = logps[len(tree.prompt) - 1 : -1]
            found.append(rows.gather(1, ids[0, len(tree.prompt) :].unsqueeze(1)).squeeze(1))
    return torch.cat(found)


def gradients(model: torch.nn.Module, logps: torch.Tensor) -> torch.Tensor:
    """Of a random linear function of the log-probs, over all LoRA weights, as one vector."""
    slope = torch.randn(logps.shape, generator=torch.Generator().manual_seed(5))
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad((logps * slope).sum(), trainable)])


# peft says that it adapts GPT-2's Conv1D layers and leaves Mixtral's stacked experts alone: both are as they should be.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False", "ignore:The following .*_pattern keys")
@pytest.mark.parametrize("family", SUPPORTED)
def test_trees_equal_separate_rows(family: str, tmp_path: Path):
    """Values within 2e-5 nats per token in fp32, LoRA gradients within 1e-5 relative, for K = 1, 2 and 8."""
    base = build(SUPPORTED[family](), tmp_path)
    model = load.add_lora(base, r=4, alpha=8, target_modules="all-linear", seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    with torch.no_grad(), load.adapter_off(model, off=True):
        without = tree_logps(model, flatten(trees(2)))
    for num_completions in (1, 2, 8):
        some = trees(num_completions)
        shared = tree_logps(model, flatten(some))
        shared_gradient = gradients(model, shared)
        load.switch_attention(model, "sdpa")
        plain = plain_logps(model, some)
        plain_gradient = gradients(model, plain)
        load.switch_attention(model, attention.NAME)
        assert float((shared - plain).detach().abs().max()) <= 2e-5
        assert plain_gradient.norm() > 0
        assert (shared_gradient - plain_gradient).norm() <= 1e-5 * plain_gradient.norm()
        if num_completions == 2:
            assert float((shared.detach() - without).abs().max()) > 0.1  # the adapter took part
    assert self_test(model, trees(2)) <= 2e-5


@pytest.mark.parametrize("family", SCALED_LOGITS)
def test_scaled_logits_are_refused_or_show_in_the_self_test(family: str, tmp_path: Path):
    try:
        difference = self_test(build(SCALED_LOGITS[family](), tmp_path), trees(2))
    except UsageError:
        return
    assert difference > 1.0


@pytest.mark.parametrize("family", REFUSED)
def test_unsupported_attention_is_refused_in_words(family: str, tmp_path: Path):
    with pytest.raises(UsageError):
        self_test(build(REFUSED[family](), tmp_path), trees(2))


@pytest.mark.parametrize("kind", LENGTH_DEPENDENT)
def test_length_dependent_rotary_embeddings_are_refused_or_right(kind: str, tmp_path: Path):
    """A short completion beside a long one must have the values that it has alone, or the model is refused.

    The stage's self-test takes the shortest pairs, where these models agree: it cannot be what refuses them.
    """
    short, long = Tree(tokens(3, 0), [tokens(4, 1)]), Tree(tokens(30, 2), [tokens(10, 3)])
    try:
        model = build(LENGTH_DEPENDENT[kind](), tmp_path)
        alone, beside = score(model, [short])[0], score(model, [short, long])[0]
    except UsageError:
        return
    torch.testing.assert_close(torch.tensor(beside), torch.tensor(alone), rtol=0, atol=2e-5)


def test_a_mixture_of_trees_changes_no_value(tmp_path: Path):
    """Each tree alone gives what all of them in one row give."""
    model = build(SUPPORTED["mistral-window"](), tmp_path)
    some = [*trees(8), Tree(tokens(20, 7), [tokens(3, 8)])]
    together = score(model, some)
    alone = [score(model, [tree])[0] for tree in some]
    for mine, other in zip(together, alone, strict=True):
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=0, atol=2e-5)


def test_score_has_the_shape_of_the_trees_and_sums_by_completion(tmp_path: Path):
    model = build(SUPPORTED["llama"](), tmp_path)
    some = trees(2)
    values = score(model, some)
    assert [[len(c) for c in tree] for tree in values] == [[len(c) for c in tree.completions] for tree in some]
    layout = flatten(some)
    sums = completion_logps(tree_logps(model, layout), layout)
    expected = torch.tensor([sum(c) for tree in values for c in tree])
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_within_the_limit_of_its_self_test(tmp_path: Path):
    """bf16 keeps 8 bits: kernels differ by tenths of a nat on a model of this spread, never by a nat."""
    config = transformers.LlamaConfig(**{**GROUPED, "initializer_range": 0.1})
    model = build(config, tmp_path, "bfloat16")
    values = tree_logps(model, flatten(trees(2)))
    assert values.dtype == torch.float32
    assert self_test(model, trees(8)) < 0.5


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
    spans = [Span(s.start, s.prompt_length, ()) for s in given["tree_spans"]]
    spans += [Span(start, length, ()) for s in given["tree_spans"] for start, length in s.completions]
    spans.sort(key=lambda s: s.start)
    return tree_attention(module, query, key, value, None, **{**given, "tree_spans": spans})


def one_row_off(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **given: Any
) -> tuple[torch.Tensor, None]:
    """Wrong on purpose: the last prompt token is counted to the first completion, so its siblings miss it."""
    spans = [
        Span(s.start, s.prompt_length - 1, ((s.completions[0][0] - 1, s.completions[0][1] + 1), *s.completions[1:]))
        for s in given["tree_spans"]
    ]
    return tree_attention(module, query, key, value, None, **{**given, "tree_spans": spans})


def ignores_the_window(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **given: Any
) -> tuple[torch.Tensor, None]:
    return tree_attention(module, query, key, value, None, **{**given, "sliding_window": None})


@pytest.mark.parametrize("wrong", [whole_row_causal, forgets_the_prompt, one_row_off, ignores_the_window])
def test_the_self_test_sees_wrong_attention(wrong: Callable[..., Any], tmp_path: Path):
    """A fault in who sees whom is worth more than a tenth of a nat on a random model; right ones agree to 2e-5."""
    model = build(SUPPORTED["mistral-window"](), tmp_path)
    assert self_test(model, trees(2)) <= 2e-5
    AttentionInterface.register(wrong.__name__, wrong)
    AttentionMaskInterface.register(wrong.__name__, lambda *_args, **_kwargs: None)
    load.switch_attention(model, wrong.__name__)
    assert self_test(model, trees(2)) > 0.1
    assert causal_model(model).config._attn_implementation == attention.NAME  # and it leaves the right one behind
    assert self_test(model, trees(2)) <= 2e-5
