"""Load a model with tree attention, with or without a LoRA adapter, and save an adapter."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from prefpipe.errors import UsageError
from prefpipe.forward import attention
from prefpipe.forward.logps import SCORER_VERSION, causal_model

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def scorer_name(dtype: str) -> str:
    """Names the numerics of log-probs from this forward pass."""
    return f"forward-{SCORER_VERSION}/{dtype}"


def load_model(directory: Path, dtype: str) -> PreTrainedModel:
    """A frozen causal language model in eval mode (no dropout), on the GPU when there is one. safetensors only."""
    attention.register()
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=DTYPES[dtype], use_safetensors=True, local_files_only=True
    )
    attention.check_positions(model.config)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UsageError(f"{directory}: an output head with a bias is not supported", "use a model without one")
    model.requires_grad_(requires_grad=False)
    torch.nn.Module.to(model, device="cuda" if torch.cuda.is_available() else "cpu")
    return model.eval()


def add_lora(model: PreTrainedModel, *, r: int, alpha: int, target_modules: str, seed: int) -> PeftModel:
    """A new LoRA adapter (B = 0, so the policy starts as the base), in the model's dtype."""
    torch.manual_seed(seed)
    targets = target_modules if target_modules == "all-linear" else [t.strip() for t in target_modules.split(",")]
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
    try:
        return _check_head(get_peft_model(model, config, autocast_adapter_dtype=False).eval())
    except ValueError as error:
        raise UsageError(
            f"lora_target_modules = {target_modules!r}: {error}", "name linear modules of this model"
        ) from error


def load_adapter(model: PreTrainedModel, directory: Path, *, trainable: bool) -> PeftModel:
    """An adapter from disk on a loaded model."""
    return _check_head(
        PeftModel.from_pretrained(model, directory, is_trainable=trainable, autocast_adapter_dtype=False).eval()
    )


def _check_head(model: PeftModel) -> PeftModel:
    """The output head is read as a plain matrix: an adapter on it would be left out of every value."""
    if type(causal_model(model).get_output_embeddings()) is not torch.nn.Linear:
        raise UsageError("the adapter changes the output head", "leave lm_head out of lora_target_modules")
    return model


def adapter_off(model: torch.nn.Module, *, off: bool) -> AbstractContextManager[None]:
    """The base model for the length of a `with` block, when `off`; no second copy exists."""
    return model.disable_adapter() if off and isinstance(model, PeftModel) else nullcontext()


def adapter_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trainable parameters of a PEFT model by their names in its state dict (shards, where they are sharded)."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_adapter(model: torch.nn.Module, tensors: dict[str, torch.Tensor], directory: Path, base_name: str) -> None:
    """A PEFT adapter that plain peft and vLLM load; no pickle. `tensors` as `adapter_tensors` gives them, whole."""
    assert isinstance(model, PeftModel)
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_name
        config.inference_mode = True
    model.save_pretrained(str(directory), state_dict=tensors, safe_serialization=True, save_embedding_layers=False)
