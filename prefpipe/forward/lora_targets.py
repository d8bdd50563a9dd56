"""Which linear modules a new LoRA adapter goes on: those of the text decoder, without head and routers of experts,
and without modules that nobody calls."""

import re

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_ROUTER_CLASS = re.compile(r"Router|Top[kK]_?Gating")
_LINEAR = (torch.nn.Linear, Conv1D)


def routers(model: PreTrainedModel) -> set[str]:
    """The linear modules that choose the experts of a token: what an adapter moves there is a choice, not a value, and
    some of them give more than one tensor."""
    found: set[str] = set()
    for name, module in model.named_modules():
        if _ROUTER_CLASS.search(type(module).__name__):
            found |= {f"{name}.{inner}".rstrip(".") for inner, m in module.named_modules() if isinstance(m, _LINEAR)}
        elif hasattr(module, "experts"):
            found |= {
                f"{name}.{child}".lstrip(".")
                for child, m in module.named_children()
                if child in ("gate", "router") and isinstance(m, _LINEAR)
            }
    return found


def outside_of_text(model: PreTrainedModel) -> set[str]:
    """The linear modules of a model of several kinds of input (images, sound) that lie outside of its text decoder."""
    if not is_composite(model):
        return set()
    head = model.get_output_embeddings()
    text = {id(module) for module in [*model.get_decoder().modules(), *([] if head is None else [head])]}
    return {name for name, m in model.named_modules() if isinstance(m, _LINEAR) and id(m) not in text}


def past_adapters(model: PreTrainedModel) -> set[str]:
    """The linear modules of Mamba mixers whose weights the code or its kernels read directly, past an adapter: all but
    the first projection. peft refuses some of them."""
    return {
        f"{name}.{child}"
        for name, mixer in model.named_modules()
        if hasattr(mixer, "A_log") and hasattr(mixer, "D")
        for child, m in mixer.named_children()
        if isinstance(m, _LINEAR) and child != "in_proj"
    }


def is_composite(model: PreTrainedModel) -> bool:
    """Whether a model has towers beside its text decoder."""
    return model.config.get_text_config() is not model.config


def may_skip_parameters(model: PreTrainedModel) -> bool:
    """Whether a trainable parameter may have no part in the log-probs of a text: one of a tower, or of an expert."""
    return is_composite(model) or has_experts(model)


def has_experts(model: PreTrainedModel) -> bool:
    """Whether a model is a mixture of experts."""
    return any(hasattr(module, "experts") for module in model.modules())


def all_linear(model: PreTrainedModel) -> list[str] | str:
    """The target modules of `all-linear`: peft's own word for them, or names where some are left out."""
    left_out = routers(model) | outside_of_text(model) | past_adapters(model)
    if not left_out:
        return "all-linear"
    head = model.get_output_embeddings()
    return sorted(
        name
        for name, module in model.named_modules()
        if isinstance(module, _LINEAR) and module is not head and name not in left_out
    )


def matches(name: str, targets: list[str]) -> bool:
    """Whether peft puts an adapter on the module of this name."""
    return any(name == target or name.endswith(f".{target}") for target in targets)
