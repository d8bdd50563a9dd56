"""A model without weights, and where its files hold each of them: for ranks that read their shards and nothing else."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from prefpipe.errors import DataError, UsageError
from prefpipe.forward import shards, tensor_files
from prefpipe.forward.tensor_files import Stored
from prefpipe.forward.weights import (
    DTYPES,
    check_floats,
    check_report,
    listed,
    read_config,
    weight_files,
    without_weights,
)

_WRAPPERS = (".base_layer", ".original_module")  # what peft adds to the name of a weight


class OnlyWhole(UsageError):
    """A model that cannot be read tensor by tensor."""


@dataclass(frozen=True)
class Source:
    """Where a weight is read from: its name in the file, and its bytes."""

    name: str
    stored: Stored


def empty_model(directory: Path, dtype: str) -> PreTrainedModel:
    """A causal language model whose parameters have shapes and no memory, tied as its config says; its buffers are
    real. Raises as `weights.read_model`, and OnlyWhole."""
    config = read_config(AutoModelForCausalLM, directory)
    if getattr(config, "quantization_config", None) is not None:
        raise only_whole(directory, "its weights are quantised, and no part of such a matrix stands alone")
    model = without_weights(config, directory, dtype, init_empty_weights(include_buffers=False), "cannot be loaded")
    model.name_or_path = str(directory)
    kept = model._get_dtype_plan(DTYPES[dtype])  # pyright: ignore[reportPrivateUsage]  (no public name)
    wide = [name for name, _ in model.named_parameters() if any(part in name for part in kept)]
    if wide:
        raise only_whole(directory, f"{listed(wide)} stay in float32 whatever the dtype")
    return model


def sources(directory: Path, model: PreTrainedModel) -> dict[str, Source]:
    """Where each parameter and persistent buffer of an `empty_model` is read from, under each of its names.

    Raises as `weights.read_model`; DataError for tied weights that differ, OnlyWhole for weights that transformers
    would convert.
    """
    result, parts = sources_and_parts(directory, model)
    if parts:
        keys = sorted(part.name for held in parts.values() for part in held)
        raise only_whole(
            directory,
            f"transformers converts {listed(keys)} while it reads them, such as experts that it stacks",
            "; or save it once as this version of transformers has it in memory: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW, save_original_format=False)",
        )
    return result


def sources_and_parts(
    directory: Path, model: PreTrainedModel
) -> tuple[dict[str, Source], dict[str, tuple[Source, ...]]]:
    """As `sources`; and of the tensors that transformers makes of others, such as stacked experts, the others. That
    these are all there is not checked. Raises OnlyWhole for a tensor that it takes apart."""
    found = {name: tensor for file in weight_files(directory) for name, tensor in tensor_files.stored(file).items()}
    check_floats(directory, model)
    tensors: Mapping[str, torch.Tensor] = model.state_dict(keep_vars=True)
    by_name, parts, extra = _renamed(directory, model, found, tensors)
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    result: dict[str, Source] = {}
    missing: set[str] = set()
    for tied in names.values():
        held = [by_name[name] for name in tied if name in by_name]
        for other in held[1:]:
            if not tensor_files.same_content(held[0].stored, other.stored):
                raise DataError(
                    f"{directory}: {held[0].name} and {other.name} differ, but config.json ties them",
                    "set tie_word_embeddings to false in config.json",
                )
        result |= dict.fromkeys(tied, held[0]) if held else {}
        missing |= set() if held or tied[0] in parts else {tied[0]}
    report = SimpleNamespace(missing_keys=set(missing), unexpected_keys=extra)
    model._adjust_missing_and_unexpected_keys(report)  # pyright: ignore[reportPrivateUsage, reportArgumentType]  (no public name)
    never_read = {name for name in missing if tensors[name].is_meta}
    shapes = [
        (source.name, source.stored.shape, tensors[name].shape)
        for name, source in result.items()
        if source.stored.shape != tuple(tensors[name].shape)
    ]
    check_report(
        directory,
        AutoModelForCausalLM,
        {**vars(report), "missing_keys": report.missing_keys | never_read, "mismatched_keys": shapes},
    )
    return result, parts


def draw_lora(model: PeftModel) -> None:
    """Give a new adapter on an `empty_model` its values, on the CPU: those that peft draws from torch's generator for a
    model in memory, on every rank alike. Raises UsageError for an adapter on anything but linear modules."""
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if type(layer) is not LoraLinear:
            raise UsageError(
                f"distributed = fsdp2 takes adapters on linear modules, and {name} is none",
                "leave it out of lora_target_modules, or take distributed = ddp",
            )
        dtype: Any = layer.get_base_layer().weight.dtype
        pairs: Any = zip(layer.lora_A.values(), layer.lora_B.values(), strict=True)
        for a, b in pairs:
            # peft makes both matrices as torch does, which draws for each, and then draws A again.
            drawn, _ = (torch.nn.Linear(m.in_features, m.out_features, bias=False) for m in (a, b))
            torch.nn.init.kaiming_uniform_(drawn.weight, a=math.sqrt(5))
            a.weight = torch.nn.Parameter(drawn.weight.detach().to(dtype))
            b.weight = torch.nn.Parameter(torch.zeros(b.weight.shape, dtype=dtype))


def give_memory(model: PeftModel, of_base: Iterable[torch.Tensor], dtype: torch.dtype) -> None:
    """Put the parameters of an adapter on an `empty_model` on the CPU, with any values: peft moves those that it reads
    to where the base is. `of_base` are the other parameters."""
    others = {id(parameter) for parameter in of_base}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and id(parameter) not in others:
                there = torch.empty_like(parameter, dtype=dtype, device="cpu")
                setattr(module, name, torch.nn.Parameter(there, requires_grad=parameter.requires_grad))


def plain_name(name: str) -> str:
    """The name of a weight before peft wrapped its module."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _renamed(
    directory: Path, model: PreTrainedModel, found: Mapping[str, Stored], tensors: Mapping[str, Any]
) -> tuple[dict[str, Source], dict[str, tuple[Source, ...]], set[str]]:
    """The tensors of files by their names in the model, those that a tensor of the model is made of, and the names of
    those that it does not have."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    apart = {p for t in converters if len(t.target_patterns) > 1 for p in t.source_patterns}
    prefix, known = model.base_model_prefix, dict(tensors)
    by_name: dict[str, Source] = {}
    parts: dict[str, tuple[Source, ...]] = {}
    extra: set[str] = set()
    for key in sorted(found, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in tensors and key in tensors:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if pattern in apart:
            raise only_whole(directory, f"transformers makes several tensors of {key} while it reads it")
        if pattern is not None:
            parts[name] = (*parts.get(name, ()), Source(key, found[key]))
        elif name in tensors:
            by_name[name] = Source(key, found[key])
        else:
            extra.add(key)
    return by_name, parts, extra


def only_whole(directory: Path, why: str, way: str = "") -> OnlyWhole:
    """Why a model cannot be read tensor by tensor, and what to do with ranks that would."""
    return OnlyWhole(
        f"{directory.name} can only be read whole: {why}",
        f"distributed = fsdp2 reads every rank its part of the files: take distributed = ddp{way}",
    )


def read(parameters: Iterable[tuple[str, torch.Tensor]], where: Mapping[str, Source]) -> None:
    """Fill parameters and buffers (shards, where they are sharded) from the files."""
    for name, tensor in parameters:
        if plain_name(name) in where:
            shards.fill(tensor, where[plain_name(name)].stored)
