"""Tree attention against scaled_dot_product_attention under an explicit mask of who sees whom."""

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention
from transformers import PretrainedConfig

from prefpipe.errors import UsageError
from prefpipe.forward.attention import Row, check_positions, tree_attention, why_not_shared
from prefpipe.forward.layout import Layout, Tree, flatten
from tests.forward.rows import GROUPS, HEADS, MODULE, SIZE, WINDOWS, same_in_value_and_gradient, tensors, trees


def visible(layout: Layout, window: int | None) -> torch.Tensor:
    """[T, T]: row i sees row j when j is of its own trunk or completion, at a position not after its own.

    With a window w it sees the positions p - w + 1 .. p, as transformers' sliding windows do.
    """
    count = len(layout.input_ids)
    tree, part = torch.empty(count, dtype=torch.long), torch.empty(count, dtype=torch.long)
    for number, span in enumerate(layout.spans):
        tree[span.start : span.start + span.trunk_length] = number
        part[span.start : span.start + span.trunk_length] = -1
        for own, (start, length) in enumerate(span.completions):
            tree[start : start + length] = number
            part[start : start + length] = own
    same_tree = tree[:, None] == tree[None, :]
    trunk_or_own = (part[None, :] == -1) | (part[:, None] == part[None, :])
    ahead = layout.position_ids[:, None] - layout.position_ids[None, :]
    seen = same_tree & trunk_or_own & (ahead >= 0)
    return seen if window is None else seen & (ahead < window)


@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("num_completions", [1, 2, 8])
def test_equals_masked_attention_in_value_and_gradient(num_completions: int, window: int | None, shared: int):
    layout = flatten(trees(num_completions, shared))
    query, key, value = inputs = tensors(len(layout.input_ids))
    found, weights = tree_attention(
        MODULE, query, key, value, None, tree_row=Row(layout.spans), scaling=0.2, sliding_window=window
    )
    wide = [t.repeat_interleave(HEADS // GROUPS, dim=1) for t in (key, value)]
    expected = scaled_dot_product_attention(query, *wide, attn_mask=visible(layout, window), scale=0.2).transpose(1, 2)
    assert weights is None
    same_in_value_and_gradient(found, expected, inputs)


@pytest.mark.parametrize("window", [None, 40, 300])
@pytest.mark.parametrize("heads", [HEADS, GROUPS], ids=["grouped", "one for one"])
def test_long_rows_in_blocks_equal_masked_attention(window: int | None, heads: int):
    """A trunk of three blocks with a rest, a completion of two and one of none; float64."""
    layout = flatten([Tree([0] * 270, ([1] * 256, [2] * 9))])
    count = len(layout.input_ids)
    query, key, value = inputs = [
        torch.randn(1, of, count, 4, generator=torch.Generator().manual_seed(of), dtype=torch.float64).requires_grad_()
        for of in (heads, GROUPS, GROUPS)
    ]
    row = Row(layout.spans)
    found, _ = tree_attention(MODULE, query, key, value, None, tree_row=row, scaling=0.2, sliding_window=window)
    wide = [t.repeat_interleave(heads // GROUPS, dim=1) for t in (key, value)]
    expected = scaled_dot_product_attention(query, *wide, attn_mask=visible(layout, window), scale=0.2).transpose(1, 2)
    assert max(mask.shape[0] for mask in row._masks.values()) == 128 * heads // GROUPS
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(out, inputs, upstream) for out in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_scale_defaults_to_one_over_root_of_the_head_size():
    layout = flatten(trees(2))
    query, key, value = tensors(len(layout.input_ids))
    default, _ = tree_attention(MODULE, query, key, value, None, tree_row=Row(layout.spans))
    given, _ = tree_attention(MODULE, query, key, value, None, tree_row=Row(layout.spans), scaling=SIZE**-0.5)
    torch.testing.assert_close(default, given)


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "softcap"])
def test_finite_differences(softcap: float | None):
    """All three inputs in float64, grouped heads, a window that cuts into the trunk.

    With a cap the weights pass through float32, as in the models' own code: the step and the tolerance are wider.
    """
    layout = flatten([Tree([0, 0, 0], [[1, 0], [2]])])
    query, key, value = (t[..., :3].detach().requires_grad_() for t in tensors(len(layout.input_ids), torch.float64))

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        return tree_attention(MODULE, *inputs, None, tree_row=Row(layout.spans), sliding_window=2, softcap=softcap)[0]

    limits = {} if softcap is None else {"eps": 1e-3, "atol": 2e-3}
    assert torch.autograd.gradcheck(run, (query, key, value), **limits)


def test_a_completion_is_untouched_by_its_siblings_and_by_other_trees():
    """Completion (3, 2) of the first tree: replacing all but its trunk and itself leaves its output as it was."""
    layout = flatten([Tree([0, 0, 0], [[1, 0], [2, 0]]), Tree([0, 0], [[0]])])
    query, key, value = tensors(len(layout.input_ids))
    before, _ = tree_attention(MODULE, query, key, value, None, tree_row=Row(layout.spans))
    changed = [t.detach().clone() for t in (query, key, value)]
    for tensor in changed:
        tensor[:, :, 5:] = 1e3
    after, _ = tree_attention(MODULE, *changed, None, tree_row=Row(layout.spans))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def eager(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor,
    softcap: float | None, sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Gemma 2's and gpt-oss's formulas over the whole row under a mask: cap tanh(s / cap), one more logit per head."""
    key, value = (t.repeat_interleave(HEADS // GROUPS, dim=1) for t in (key, value))
    scores = query @ key.mT * 0.2
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    scores = scores + torch.where(seen, 0.0, -torch.inf)
    if sinks is None:
        return (scores.softmax(-1) @ value).transpose(1, 2)
    total = scores.exp().sum(-1, keepdim=True) + sinks.exp().reshape(1, -1, 1, 1)
    return (scores.exp() / total @ value).transpose(1, 2)


@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("capped", "sunk"), [(True, False), (False, True), (True, True)])
def test_soft_cap_and_sinks_equal_an_eager_oracle(capped: bool, sunk: bool, window: int | None, shared: int):
    """Gemma 2's cap and gpt-oss's sinks, each and both, in value and in all gradients, those of the sinks too."""
    layout = flatten(trees(8, shared))
    query, key, value = inputs = tensors(len(layout.input_ids))
    softcap = 0.8 if capped else None
    sinks = torch.linspace(-1.0, 2.0, HEADS).requires_grad_() if sunk else None
    found, _ = tree_attention(
        MODULE, query, key, value, None, tree_row=Row(layout.spans), scaling=0.2, sliding_window=window,
        softcap=softcap, s_aux=sinks,
    )  # fmt: skip
    expected = eager(query, key, value, visible(layout, window), softcap, sinks)
    same_in_value_and_gradient(found, expected, [*inputs, *([] if sinks is None else [sinks])])
    plain, _ = tree_attention(MODULE, query, key, value, None, tree_row=Row(layout.spans), scaling=0.2)
    assert float((found - plain).detach().abs().max()) > 0.1  # they do change the output


def test_the_layers_of_a_row_share_its_masks_which_are_freed_with_it():
    """A mask of a long prompt fills gigabytes: it is made once for all layers, and none outlives its row."""
    layout = flatten([Tree([0] * 5, [[1], [2, 2]])])
    query, key, value = tensors(len(layout.input_ids))
    row = Row(layout.spans)
    masks = [row.mask(length, total, 3, None, query) for length, total in ((5, 5), (1, 6), (2, 7))]
    for _layer in range(3):
        tree_attention(MODULE, query, key, value, None, tree_row=row)
    again = [row.mask(length, total, 3, None, query) for length, total in ((5, 5), (1, 6), (2, 7))]
    assert all(mine is other for mine, other in zip(masks, again, strict=True))
    kept = [weakref.ref(mask) for mask in masks]
    del masks, again, row
    gc.collect()
    assert [mask() for mask in kept] == [None] * 3


def test_windows_of_one_row_have_masks_of_their_own():
    """A model may mix layers with and without a window: position 6 of 7 sees 0 to 6, or 5 and 6."""
    query, row = tensors(7)[0], Row(())
    wide, narrow = row.mask(1, 7, 1, None, query), row.mask(1, 7, 1, 2, query)
    assert wide.tolist() == [[0.0] * 7]
    assert narrow.tolist() == [[-torch.inf] * 5 + [0.0] * 2]


def test_heads_and_dtypes_of_other_models_have_masks_of_their_own():
    """The same row through models with 3, 1 and 6 query heads per group, in fp32 and fp64, one after the other."""
    layout = flatten(trees(2))
    query, key, value = tensors(len(layout.input_ids))
    for dtype in (torch.float32, torch.float64):
        for groups in (2, 6, 1):
            k, v = (t.repeat_interleave(3, dim=1)[:, :groups].to(dtype) for t in (key, value))
            found, _ = tree_attention(MODULE, query.to(dtype), k, v, None, tree_row=Row(layout.spans))
            capped, _ = tree_attention(MODULE, query.to(dtype), k, v, None, tree_row=Row(layout.spans), softcap=1e4)
            wide = [t.repeat_interleave(HEADS // groups, dim=1) for t in (k, v)]
            expected = scaled_dot_product_attention(query.to(dtype), *wide, attn_mask=visible(layout, None))
            torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(capped, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4,
        "original_max_position_embeddings": 24}  # fmt: skip
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
NOT_SHARED: dict[str, tuple[Callable[[], Any], str]] = {
    "falcon-alibi": (lambda: transformers.FalconConfig(alibi=True), "ALiBi"),
    "bloom": (transformers.BloomConfig, "ALiBi"),
    "mpt": (transformers.MptConfig, "ALiBi"),
    "mamba": (transformers.MambaConfig, "recurrent"),
    "mamba2": (transformers.Mamba2Config, "recurrent"),
    "rwkv": (transformers.RwkvConfig, "recurrent"),
    "recurrent_gemma": (transformers.RecurrentGemmaConfig, "recurrent"),
    "jamba": (transformers.JambaConfig, "recurrent"),
    "bamba": (transformers.BambaConfig, "recurrent"),
    "zamba": (transformers.ZambaConfig, "recurrent"),
    "zamba2": (transformers.Zamba2Config, "recurrent"),
    "falcon_h1": (transformers.FalconH1Config, "recurrent"),
    "nemotron_h": (transformers.NemotronHConfig, "recurrent"),
    "granitemoehybrid": (transformers.GraniteMoeHybridConfig, "recurrent"),
    "lfm2": (
        lambda: transformers.Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]), "recurrent"
    ),
    "qwen3_next": (transformers.Qwen3NextConfig, "recurrent"),
    "minimax": (transformers.MiniMaxConfig, "recurrent"),
    "olmo_hybrid": (transformers.OlmoHybridConfig, "recurrent"),
    "qwen2_vl": (
        lambda: transformers.Qwen2VLConfig(
            text_config={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
        ),
        "M-RoPE",
    ),
    "longrope": (
        lambda: transformers.Phi3Config(**TINY, original_max_position_embeddings=24, rope_parameters=LONG), "longrope"
    ),
    "longrope of one layer type": (
        lambda: SimpleNamespace(get_text_config=lambda: SimpleNamespace(
            model_type="x", rope_parameters={"full_attention": LONG, "sliding_attention": {"rope_type": "default"}}
        )),
        "longrope",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_SHARED)
def test_models_that_cannot_share_a_row_are_named(name: str):
    make, why = NOT_SHARED[name]
    assert why in (why_not_shared(make()) or "nothing")


@pytest.mark.parametrize(
    "make",
    [
        transformers.LlamaConfig, transformers.Gemma2Config, transformers.Gemma3TextConfig, transformers.GptOssConfig,
        transformers.Qwen3Config, transformers.CohereConfig, transformers.GPT2Config, transformers.Llama4TextConfig,
        lambda: transformers.FalconConfig(alibi=False),
    ],
)  # fmt: skip
def test_models_that_may_share_a_row(make: Callable[[], PretrainedConfig]):
    assert why_not_shared(make()) is None


def test_rotary_frequencies_that_grow_with_use_are_refused():
    growing = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    with pytest.raises(UsageError, match="dynamic NTK"):
        check_positions(transformers.LlamaConfig(rope_parameters=growing))
    layered: Any = SimpleNamespace(
        get_text_config=lambda: SimpleNamespace(rope_parameters={"full_attention": growing, "other": LONG})
    )
    with pytest.raises(UsageError, match="dynamic NTK"):
        check_positions(layered)
    for fixed in ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, None):
        check_positions(transformers.LlamaConfig(rope_parameters=fixed))
