"""The load-balancing loss of a mixture of experts (arXiv:2101.03961, eq. 4 to 6), for every completion of a layout.

A completion's loss is what transformers computes for its prompt and itself in a row of their own, so that it does not
depend on what else a batch holds. T = tokens of the layout, E = experts, C = completions.
"""

import inspect
import sys
from collections.abc import Callable, Sequence

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from transformers import PreTrainedModel

from prefpipe.errors import UsageError
from prefpipe.forward.layout import Span

_PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


def check_balance(causal: PreTrainedModel) -> None:
    """Raise UsageError for a model without such a loss, and for an adapter that its router logits leave out."""
    if _loss_of(causal) is None:
        raise UsageError(
            f"router_aux_loss_coef: transformers has no load-balancing loss for {causal.config.model_type}",
            "leave it at 0: it is for mixtures of experts such as Mixtral, Qwen3-MoE, OLMoE or gpt-oss",
        )
    recorded = (getattr(causal.get_decoder(), "_can_record_outputs", None) or {}).get("router_logits")
    for recorder in recorded if isinstance(recorded, list) else [recorded]:
        for name, module in causal.named_modules():
            # transformers takes router logits where a router leaves its module, and an adapter on it adds to them later
            adapted = isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)
            read = adapted and isinstance(module.base_layer, getattr(recorder, "target_class", ()))
            if read and (getattr(recorder, "layer_name", None) or "") in name:
                raise UsageError(
                    f"router_aux_loss_coef: transformers reads the router logits of {causal.config.model_type} before "
                    f"the adapter on {name}",
                    "leave the routers out of lora_target_modules, or train with tuning = full",
                )


def balance_losses(
    causal: PreTrainedModel, router_logits: Sequence[torch.Tensor], spans: Sequence[Span]
) -> torch.Tensor:
    """Router logits [T, E] of every layer with experts -> the loss of every completion [C]."""
    loss = _loss_of(causal)
    assert loss is not None
    experts, top_k = causal.num_experts, causal.num_experts_per_tok
    found: list[torch.Tensor] = []
    for span in spans:
        for start, length in span.completions:
            parts = (slice(span.start, span.start + span.trunk_length), slice(start, start + length))
            found.append(loss(tuple(torch.cat([layer[p] for p in parts]) for layer in router_logits), experts, top_k))
    return torch.stack(found)


def _loss_of(causal: PreTrainedModel) -> Callable[..., torch.Tensor] | None:
    loss = getattr(sys.modules[type(causal).__module__], "load_balancing_loss_func", None)
    known = loss is not None and list(inspect.signature(loss).parameters) == _PARAMETERS
    return loss if known and hasattr(causal, "num_experts") and hasattr(causal, "num_experts_per_tok") else None
