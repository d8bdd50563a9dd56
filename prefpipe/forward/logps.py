"""Per-token log-probs of completions: the one forward pass that scoring, audit and training share."""

from collections.abc import Sequence
from typing import cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from prefpipe.forward.attention import NAME
from prefpipe.forward.head import frozen_head_logps
from prefpipe.forward.layout import Layout, Tree, flatten

SCORER_VERSION = 1  # raise it when the numbers below can change: cached values of another version are refused


def tree_logps(model: torch.nn.Module, layout: Layout) -> torch.Tensor:
    """float32 log-probs [N] of every completion token of a layout, in its order."""
    causal = causal_model(model)
    head = cast(torch.nn.Linear, causal.get_output_embeddings())
    layout = layout.to(causal.device)
    hidden = causal.base_model(
        input_ids=layout.input_ids.unsqueeze(0),
        position_ids=layout.position_ids.unsqueeze(0),
        use_cache=False,
        tree_spans=layout.spans,
    ).last_hidden_state[0]
    return frozen_head_logps(hidden[layout.sources], head.weight, layout.targets)


def completion_logps(token_logps: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Sum token log-probs [N] into one log-prob per completion [C], in float32."""
    sums = torch.zeros(layout.num_completions, dtype=torch.float32, device=token_logps.device)
    return sums.index_add(0, layout.owners.to(token_logps.device), token_logps)


def causal_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


@torch.no_grad()
def score(model: torch.nn.Module, trees: Sequence[Tree]) -> list[list[list[float]]]:
    """Token log-probs of every completion of every tree, without gradient."""
    layout = flatten(trees)
    values = iter(tree_logps(model, layout).tolist())
    return [[[next(values) for _ in completion] for completion in tree.completions] for tree in trees]


@torch.no_grad()
def self_test(model: torch.nn.Module, trees: Sequence[Tree]) -> float:
    """Largest |difference| per token between token trees and one plain forward pass per completion (nats).

    The plain pass is transformers' own, with its full logits: it knows nothing of trees, heads or spans.
    """
    shared = [torch.tensor(c) for tree in score(model, trees) for c in tree]
    causal = causal_model(model)
    causal.set_attn_implementation("sdpa")
    try:
        plain = [_plain_logps(causal, tree.prompt, c) for tree in trees for c in tree.completions]
    finally:
        causal.set_attn_implementation(NAME)
    return max(float((a - b).abs().max()) for a, b in zip(shared, plain, strict=True))


def _plain_logps(model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *completion]], device=model.device)
    logps = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    targets = ids[0, len(prompt) :]
    return logps[len(prompt) - 1 : -1].gather(1, targets.unsqueeze(1)).squeeze(1).cpu()
