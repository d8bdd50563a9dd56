"""Which linear modules a new LoRA adapter goes on: those of the text decoder, without head and routers of experts,
and without modules that nobody calls."""

import re

import torch
from peft import LoraConfig
from peft.tuners.lora import ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefpipe import log
from prefpipe.errors import UsageError

_ROUTER_CLASS = re.compile(r"Router|Top[kK]_?Gating")
_LINEAR = (torch.nn.Linear, Conv1D)
ALL_EXPERTS = "all-experts"  # of target_parameters
_STACKED_DIMENSIONS = 3  # experts, rows, columns
_BEFORE_LAYER = re.compile(r"^.*?\.\d+\.")  # of the name of a parameter, such as model.layers.3.


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


def taken_for_experts(model: PreTrainedModel) -> set[str]:
    """The linear modules in whose place peft adapts stacked experts: they have the names that experts had in
    transformers 4, as shared experts and dense layers have them."""
    names = [name for name, module in model.named_modules() if isinstance(module, _LINEAR)]
    leaves = {leaf for leaf in {name.rpartition(".")[2] for name in names} if _moved(model, [leaf])}
    return {name for name in names if name.rpartition(".")[2] in leaves}


def all_linear(model: PreTrainedModel) -> list[str] | str:
    """The target modules of `all-linear`: peft's own word for them, or names where some are left out."""
    left_out = routers(model) | outside_of_text(model) | past_adapters(model) | taken_for_experts(model)
    if not left_out and not _moved(model, "all-linear"):
        return "all-linear"
    head = model.get_output_embeddings()
    return sorted(
        name
        for name, module in model.named_modules()
        if isinstance(module, _LINEAR) and module is not head and name not in left_out
    )


def modules_of(model: PreTrainedModel, target_modules: str) -> list[str] | str:
    """The modules to adapt; the log says what happens to experts and their routers."""
    found = routers(model)
    if target_modules == "all-linear":
        for names, what in ((found, "routers"), (taken_for_experts(model), "modules that peft would take for stacks")):
            if names:
                log.info(f"all-linear leaves out {len(names)} {what} of experts (first {min(names)})")
        return all_linear(model)
    targets = [t.strip() for t in target_modules.split(",")]
    _warn_of_routers("lora_target_modules", [name for name in found if matches(name, targets)])
    if _moved(model, targets):
        log.warn(
            f"lora_target_modules = {target_modules}: for this model peft takes some of these names for stacked "
            "experts and routers, and adapts those; lora_target_parameters names them as they are"
        )
    return targets


def parameters_of(model: PreTrainedModel, target_parameters: str) -> list[str]:
    """The parameters to adapt; `all-experts` stands for `experts_of`. Raises UsageError for a name that is none, or
    whose module takes adapters itself, and for a model without stacked experts."""
    if target_parameters == ALL_EXPERTS:
        return experts_of(model)
    targets = [t.strip() for t in target_parameters.split(",") if t.strip()]
    free = stacked(model)
    for target in targets:
        named = [name for name, _ in model.named_parameters() if matches(name, [target])]
        if not named:
            raise UsageError(
                f"lora_target_parameters: the model has no parameter {target}",
                f"it has {', '.join(free[:3])} and others" if free else "all of its matrices are linear modules",
            )
        others = set(named) - set(free)
        if others:
            raise UsageError(
                f"lora_target_parameters: {min(others)} belongs to a linear module, an embedding or a norm",
                "name linear modules in lora_target_modules; parameters are for stacked experts, and for their routers",
            )
        modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in named}
        routing = [name for name, module in modules.items() if _ROUTER_CLASS.search(type(module).__name__)]
        _warn_of_routers("lora_target_parameters", routing)
    return targets


def experts_of(model: PreTrainedModel) -> list[str]:
    """The matrices of stacked experts by their names inside a layer, without biases and routers. Raises UsageError for
    a model that has none."""
    found = {
        _BEFORE_LAYER.sub("", name)
        for name in stacked(model)
        if "Experts" in type(model.get_submodule(name.rpartition(".")[0])).__name__
        and model.get_parameter(name).dim() == _STACKED_DIMENSIONS
    }
    if not found:
        linear = "its experts are linear modules: lora_target_modules takes their names, and all-linear all of them"
        raise UsageError(
            f"lora_target_parameters = {ALL_EXPERTS}: {model.config.model_type} has no stacked experts",
            linear if has_experts(model) else "leave it out: it is for mixtures of experts such as Mixtral or gpt-oss",
        )
    return sorted(found)


def stacked(model: PreTrainedModel) -> list[str]:
    """The matrices, often those of all experts in one tensor, that belong to no linear module: what only
    target_parameters of peft reaches."""
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if not isinstance(module, (*_LINEAR, torch.nn.Embedding)) and not hasattr(module, "A_log")
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() in (2, 3)
    ]


def check_parameters(model: PreTrainedModel, *, lora_dropout: float, distributed: str) -> None:
    """Raise UsageError for an adapter on parameters instead of modules, where peft has no dropout and FSDP2 cuts what
    it reads whole."""
    if (lora_dropout or distributed == "fsdp2") and any(isinstance(m, ParamWrapper) for m in model.modules()):
        raise UsageError(
            "the adapter is on parameters, which neither lora_dropout nor distributed = fsdp2 works with",
            "leave both at their defaults, or start from an adapter on modules",
        )


def matches(name: str, targets: list[str]) -> bool:
    """Whether peft puts an adapter on the module or parameter of this name."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _warn_of_routers(setting: str, names: list[str]) -> None:
    if names:
        log.warn(
            f"{setting} trains {len(names)} routers of experts (first {min(names)}); what keeps experts evenly loaded "
            "is router_aux_loss_coef"
        )


def _moved(model: PreTrainedModel, targets: list[str] | str) -> bool:
    """Whether peft makes parameters of stacked experts, or of routers, out of these target modules."""
    config = LoraConfig(target_modules=targets)
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # some of the names of one stacked matrix, without the others
        return True
    return bool(config.target_parameters)
