"""A model with an adapter added into its weights, written tensor by tensor: it is never whole in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from prefpipe import log
from prefpipe.forward import load, on_meta, tensor_files
from prefpipe.forward.on_meta import OnlyWhole, Source
from prefpipe.forward.tensor_files import Stored
from prefpipe.runs import in_place

FILE_BYTES = 50 * 10**9  # of tensors in a file, as transformers writes them


def save_merged(directory: Path, adapter: Path, dtype: str, into: Path) -> None:
    """Write weights and config of the model in `directory`, with an adapter added into its weights, as peft and
    transformers do: with the same bytes, and one linear module in memory at a time.

    Models and adapters that do not allow it are merged in memory, which the log says. Raises as `load.load_model` and
    `load.load_adapter`.
    """
    try:
        _tensor_by_tensor(directory, adapter, dtype, into)
    except OnlyWhole as error:
        log.info(f"merging in memory: {error.message}")
        adapted = load.load_adapter(load.load_model(directory, dtype, device="cpu"), adapter, trainable=False)
        whole = cast(PreTrainedModel, adapted.merge_and_unload())
        whole.save_pretrained(str(into), state_dict=load.model_tensors(whole), safe_serialization=True)


def _tensor_by_tensor(directory: Path, adapter: Path, dtype: str, into: Path) -> None:
    base = load.empty_model(directory, dtype)
    where, parts = on_meta.sources_and_parts(directory, base)
    # What is written, under the names that it has in the files; buffers that the model computes are in none.
    contents: dict[str, Stored | torch.Tensor] = {}
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    tensors = load.model_tensors(base)
    for name, tensor in sorted(tensors.items(), key=lambda item: dot_natural_key(item[0])):  # as transformers does
        sources = parts.get(name) or ((where[name],) if name in where else ())
        held = {source.name: source.stored for source in sources} or {name: tensor}
        contents |= held
        shapes |= {key: (tensor.dtype, tuple(content.shape)) for key, content in held.items()}
    adapted = load.load_adapter(base, adapter, trainable=False)
    layers = _layers(adapted, {name: where[name] for name in tensors if name in where})
    files = tensor_files.plan(shapes, "model", FILE_BYTES)
    for file in files:
        in_place.create(into / file.name, file.head, file.size)
    targets = {name: target for file in files for name, target in file.stored(into).items()}
    for layer, sources in layers:
        for name, tensor in _merged(layer, sources).items():
            targets.pop(name).write(0, tensor)
    for name, target in targets.items():
        content = contents[name]
        tensor_files.copy(content, target) if isinstance(content, Stored) else target.write(0, content)
    load.save_config(base, into, dtype)
    tensor_files.write_index(files, into)


def _layers(adapted: PeftModel, where: Mapping[str, Source]) -> list[tuple[LoraLinear, dict[str, Source]]]:
    """The linear modules with an adapter, each with the sources of its parameters by their names in it. Raises
    OnlyWhole for an adapter that changes anything else, and for parameters that are not in the files as they are."""
    found: list[tuple[LoraLinear, dict[str, Source]]] = []
    for name, module in adapted.get_base_model().named_modules():
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        if type(module) is not LoraLinear or module.lora_variant:
            raise OnlyWhole(f"the adapter has more than two matrices on a linear module in {name}", "")
        names = [key for key, _ in module.get_base_layer().named_parameters()]
        absent = [key for key in names if f"{name}.{key}" not in where]
        if absent:
            raise OnlyWhole(f"{name}.{absent[0]} is not in the files as in the model, or has two names", "")
        found.append((module, {key: where[f"{name}.{key}"] for key in names}))
    return found


def _merged(layer: LoraLinear, sources: Mapping[str, Source]) -> dict[str, torch.Tensor]:
    """The parameters of a linear module with its adapter added, by their names in the files; the module is left as it
    was, without memory."""
    base = layer.get_base_layer()
    empty = {name: getattr(base, name) for name in sources}
    for name, source in sources.items():
        values = torch.empty_like(empty[name], device="cpu")
        source.stored.read(0, values)
        setattr(base, name, torch.nn.Parameter(values, requires_grad=False))
    layer.merge()
    merged = {source.name: getattr(base, name).detach() for name, source in sources.items()}
    for name, parameter in empty.items():
        setattr(base, name, parameter)
    return merged
