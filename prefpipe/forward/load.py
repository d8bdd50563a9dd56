"""Load a model with tree attention, with or without a LoRA adapter, and save an adapter or a model."""

import importlib.util
import json
import shutil
import warnings
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from prefpipe import extras, reading
from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.forward import attention, lora_targets, on_meta
from prefpipe.forward.architecture import reason
from prefpipe.forward.loading import silent
from prefpipe.forward.logps import SCORER_VERSION, causal_model
from prefpipe.forward.weights import DTYPES, integer_tensors, listed, read_model

M = TypeVar("M", bound=torch.nn.Module)
_SETS = ("target_modules", "target_parameters", "exclude_modules")  # of an adapter's config
_OTHER_ADAPTER = "copy or save the adapter again, or pass the model that it was trained on"
# Files of a model directory beside its weights and their config: tokenizer, chat template, generation settings.
_BESIDE_WEIGHTS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*.model",
)


def scorer_name(dtype: str, *, in_4bit: bool = False) -> str:
    """The name of the numerics of log-probs from this forward pass."""
    return f"forward-{SCORER_VERSION}/{dtype}{'-nf4' if in_4bit else ''}"


def load_model(directory: Path, dtype: str, *, in_4bit: bool = False, device: str = "") -> PreTrainedModel:
    """A frozen causal language model in eval mode (no dropout), on the GPU when there is one; `read_model` says which
    are refused.

    `in_4bit` keeps its matrices as nf4 with double quantization (QLoRA, arXiv:2305.14314), all but the head. Raises
    UsageError for a model that this forward pass cannot compute, MissingInputError without bitsandbytes.
    """
    attention.register()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = _four_bits(dtype, device) if in_4bit else {}
    model: PreTrainedModel = read_model(AutoModelForCausalLM, directory, dtype, **options)
    attention.check_positions(model.config)
    model.requires_grad_(requires_grad=False)
    if not in_4bit:
        torch.nn.Module.to(model, device=device)
    return _without_dropout(model)


def empty_model(directory: Path, dtype: str) -> PreTrainedModel:
    """As `load_model`, without weights: every parameter is on the meta device (`on_meta`)."""
    attention.register()
    model = on_meta.empty_model(directory, dtype)
    attention.check_positions(model.config)
    model.requires_grad_(requires_grad=False)
    return _without_dropout(model)


def _without_dropout(model: M) -> M:
    """The model in eval mode, except its 4-bit matrices: in eval mode bitsandbytes may pack them for a CPU kernel that
    gives no gradient. They have no dropout."""
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes"):
            module.training = True
    return model


def _four_bits(dtype: str, device: str) -> dict[str, Any]:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingInputError("load_in_4bit needs the package bitsandbytes", extras.hint("bnb"))
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )
    return {
        "quantization_config": settings,
        "device_map": {"": torch.cuda.current_device() if device == "cuda" else device},
    }


def train_all(model: PreTrainedModel) -> None:
    """Make every weight trainable, but for towers beside the text decoder, which text gives no gradient."""
    model.requires_grad_(requires_grad=True)
    if lora_targets.is_composite(model):
        parts = [part for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None]
        text = {id(p) for part in parts for p in part.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad = id(parameter) in text


def add_lora(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: int,
    target_modules: str,
    target_parameters: str = "",
    seed: int | None,
    rslora: bool = False,
) -> PeftModel:
    """A new LoRA adapter (B = 0, so the policy starts as the base), in the model's dtype; on a model without weights it
    is on the CPU, with the same values, or without a seed as empty as the model.

    `all-linear` leaves out the head, routers of experts, towers beside the text decoder and what Mamba's kernels read
    past an adapter. `target_parameters` names parameters of no linear module, such as stacked experts. Raises
    UsageError for modules and parameters that the model does not have.
    """
    torch.manual_seed(seed or 0)
    empty = next(model.parameters()).is_meta
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=lora_targets.modules_of(model, target_modules),
        target_parameters=lora_targets.parameters_of(model, target_parameters) or None,
        lora_dropout=0.0,
        use_rslora=rslora,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=empty)
    except ValueError as error:
        names = f"lora_target_modules = {target_modules!r}"
        names += f", lora_target_parameters = {target_parameters!r}" if target_parameters else ""
        raise UsageError(
            f"{names}: {error}", "name linear modules of this model, and parameters that no such has"
        ) from error
    if empty and seed is not None:
        on_meta.draw_lora(adapted)
    return _check_head(adapted)


def load_adapter(model: PreTrainedModel, directory: Path, *, trainable: bool) -> PeftModel:
    """A LoRA adapter from disk on a loaded model; on a model without weights the adapter is on the CPU, and OnlyWhole
    is raised for one with biases of the model.

    Raises DataError for an adapter that lacks matrices of its target modules, has some that fit no module of the model,
    or holds what is no finite float.
    """
    path = directory / "adapter_model.safetensors"
    integers = integer_tensors([path])
    if integers:
        raise DataError(f"{path}: integers in place of floats in {listed(integers)}", _OTHER_ADAPTER)
    first = next(model.parameters())
    options: dict[str, Any] = {"low_cpu_mem_usage": True, "torch_device": "cpu"} if first.is_meta else {}
    of_base = list(model.parameters())
    try:
        with silent(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
            options |= {"is_trainable": trainable, "autocast_adapter_dtype": False}
            adapted = PeftModel.from_pretrained(model, directory, **options)
        on_meta.give_memory(adapted, of_base, first.dtype) if first.is_meta else None
        tensors = load_peft_weights(
            str(directory), device="cpu", key_mapping=getattr(model, "_checkpoint_conversion_mapping", None)
        )
        # Once more, for what it says: `from_pretrained` keeps to itself which tensors had no place.
        report = set_peft_model_state_dict(adapted, tensors)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever peft raises for the values of a config
        raise DataError(f"adapter {directory} does not fit the model: {reason(error)}", _OTHER_ADAPTER) from error
    if first.is_meta and any(getattr(config, "bias", "none") != "none" for config in adapted.peft_config.values()):
        raise on_meta.only_whole(Path(str(model.name_or_path)), f"the adapter {directory} has biases of it")
    missing = [name for name in report.missing_keys if "lora_" in name or ".modules_to_save." in name]
    if missing:
        raise DataError(f"adapter {directory} lacks {listed(missing)}", _OTHER_ADAPTER)
    if report.unexpected_keys:
        raise DataError(f"adapter {directory} has {listed(report.unexpected_keys)} of no module", _OTHER_ADAPTER)
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise DataError(f"adapter {directory}: no finite numbers in {listed(broken)}", _OTHER_ADAPTER)
    return _check_head(adapted)


def with_adapter(model: torch.nn.Module, directory: Path | None) -> torch.nn.Module:
    """A loaded model, in place of the adapter that it may have with the one in a directory, or with none. Raises as
    `load_adapter` does."""
    base = cast(PreTrainedModel, model.unload() if isinstance(model, PeftModel) else model)
    return base if directory is None else load_adapter(base, directory, trainable=False)


def _check_head(model: PeftModel) -> PeftModel:
    """The model in eval mode. Raises UsageError for an adapter on the output head: the head is read as a plain matrix,
    so that every log-prob would leave such an adapter out."""
    if type(causal_model(model).get_output_embeddings()) is not torch.nn.Linear:
        raise UsageError("the adapter changes the output head", "leave lm_head out of lora_target_modules")
    return _without_dropout(model)


def adapter_off(model: torch.nn.Module, *, off: bool) -> AbstractContextManager[None]:
    """The base model for the length of a `with` block, if `off`: the adapter is disabled, no weight is copied."""
    return model.disable_adapter() if off and isinstance(model, PeftModel) else nullcontext()


@contextmanager
def lora_dropout(model: torch.nn.Module, share: float) -> Generator[None]:
    """Dropout of this share before every module with an adapter, for the length of a `with` block.

    All other modules stay in eval mode. Outside of the block nothing is random: audits and evaluations see the same
    model. Draws come from torch's global generator.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)] if share else []
    before = [dict(layer.lora_dropout) for layer in layers]
    for layer in layers:
        for name in layer.lora_dropout:
            layer.lora_dropout[name] = torch.nn.Dropout(share)
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.lora_dropout.update(old)


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated blocks of a model: the longest module list in its body."""
    lists = [m for m in causal_model(model).modules() if isinstance(m, torch.nn.ModuleList)]
    return list(max(lists, key=len))


def checkpoint_layers(model: torch.nn.Module) -> None:
    """Gradient checkpointing: from now on backward computes the activations of each decoder layer again."""
    for layer in decoder_layers(model):
        if getattr(layer.forward, "func", None) is not checkpoint:  # a base that is trained on again has it already
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def adapter_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trainable parameters of a PEFT model by their names in its state dict (shards, where they are sharded)."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_adapter(model: torch.nn.Module, tensors: dict[str, torch.Tensor], directory: Path, base_name: str) -> None:
    """Write a PEFT adapter that peft and vLLM load; no pickle. `tensors` are those of `adapter_tensors`, whole."""
    assert isinstance(model, PeftModel)
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_name
        config.inference_mode = True
    model.create_or_update_model_card = lambda *_args, **_named: None  # stages say in README.md what was trained
    model.save_pretrained(str(directory), state_dict=tensors, safe_serialization=True, save_embedding_layers=False)
    # peft writes sets, in another order in every process: the same adapter would have another digest each time.
    path = directory / "adapter_config.json"
    settings = reading.read_json(path)
    settings |= {k: sorted(settings[k]) for k in _SETS if isinstance(settings.get(k), list)}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def model_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Weights and persistent buffers of a model by their names in its state dict, tied ones once (shards, where they
    are sharded)."""
    once: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        once.setdefault(id(tensor), (name, tensor.detach()))
    return dict(once.values())


def save_model(
    model: PreTrainedModel, tensors: dict[str, torch.Tensor], directory: Path, source: Path, chat_template: str
) -> None:
    """Write a model directory that transformers and vLLM load: weights as safetensors (`tensors` are those of
    `model_tensors`, whole), config, and the tokenizer and chat template of `source`, or the template file
    `chat_template`."""
    model.save_pretrained(str(directory), state_dict=tensors, safe_serialization=True)
    save_beside_weights(directory, source, chat_template)


def save_config(model: PreTrainedModel, directory: Path, dtype: str) -> None:
    """Write the config of a model as transformers does beside weights of this dtype."""
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(str(directory))
    if model.can_generate():
        model.generation_config.save_pretrained(str(directory))


def save_beside_weights(directory: Path, source: Path, chat_template: str) -> None:
    """Write tokenizer and chat template of `source`, or the template file `chat_template`."""
    for pattern in _BESIDE_WEIGHTS:
        for file in source.glob(pattern):
            shutil.copyfile(file, directory / file.name)
    if chat_template not in ("model", "none"):
        shutil.copyfile(chat_template, directory / "chat_template.jinja")
