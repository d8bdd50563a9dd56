"""Weights from a model directory into a model, each of them: what transformers would draw at random is an error."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from prefpipe import reading
from prefpipe.errors import DataError, UsageError
from prefpipe.forward.architecture import check_architecture, reason
from prefpipe.forward.loading import silent

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_AGAIN = "fetch or save the model again: what is not read would be random"


def read_model(kind: Any, directory: Path, dtype: str, **options: Any) -> Any:
    """A model of `kind` (AutoModelForCausalLM, AutoModelForSequenceClassification) with every weight from its files:
    safetensors only, no code of the model, SDPA or eager attention. `options` go to `from_pretrained`.

    Raises what `check_architecture` raises; DataError for weights that are missing, left over, of another shape or not
    floats, for damaged files and for a quantisation whose package is absent. A classifier without weights for its head
    is a UsageError: it is a language model.
    """
    config = read_config(kind, directory)
    attention = config._attn_implementation  # pyright: ignore[reportPrivateUsage]  (no public name)
    try:
        with silent():
            model, report = kind.from_pretrained(
                directory,
                config=config,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, with their names
                **options,
            )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except ImportError as error:
        raise DataError(
            f"{directory} needs a package that is not installed: {reason(error)}",
            "install it, or take the model in 16 bits",
        ) from error
    except (SafetensorError, OSError) as error:
        raise DataError(f"{directory} cannot be read: {reason(error)}", "fetch or save the model again") from error
    except Exception as error:  # whatever its classes raise for the values of a config
        raise UsageError(f"{directory} cannot be loaded: {reason(error)}", "take another model") from error
    check_report(directory, kind, report)
    check_floats(directory, model)
    return model


def without_weights(
    config: PreTrainedConfig, directory: Path, dtype: str, place: AbstractContextManager[Any], refusal: str
) -> PreTrainedModel:
    """The causal language model of a `read_config`, tied as the config says, made inside `place`, which keeps tensors
    without memory. Raises UsageError, in the words of `refusal`, for values that no model can be built from."""
    try:
        with silent(), place:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                dtype=DTYPES[dtype],
                attn_implementation=config._attn_implementation,  # pyright: ignore[reportPrivateUsage]  (no public name)
                trust_remote_code=False,
            )
        model.tie_weights()
    except Exception as error:  # whatever its classes raise for the values of a config
        raise UsageError(f"{directory} {refusal}: {reason(error)}", "take another model") from error
    return model


def read_config(kind: Any, directory: Path, *, weights: bool = True) -> PreTrainedConfig:
    """The config of a model of `kind`, with SDPA or eager attention. Raises what `check_architecture` raises, and with
    `weights` DataError for an index that does not say which file has which of them."""
    config = check_architecture(directory, kind)
    if weights:
        _check_index(directory)
    attention = _attention(kind, config)
    setattr(config, "_attn_implementation", attention)  # noqa: B010  (no public name; config.json may name a kernel)
    return config


def weight_files(directory: Path) -> list[Path]:
    """The files that a model in safetensors is read from, as transformers chooses them."""
    one, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if one.exists() or not reading.is_there(index):
        return [one]
    return [directory / name for name in sorted(set(reading.read_json(index)["weight_map"].values()))]


def integer_tensors(files: Iterable[Path]) -> list[str]:
    """The names of the tensors of safetensors files that are no floats."""
    found: list[str] = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                found += [n for n in tensors.keys() if not re.match("B?F[0-9]", tensors.get_slice(n).get_dtype())]  # noqa: SIM118
        except SafetensorError as error:
            raise DataError(f"{path} is damaged: {reason(error)}", "fetch or save it again") from error
    return found


def listed(names: Sequence[str]) -> str:
    """`3 weights (a, b, ...)`: how many, and the first few."""
    shown = sorted(names)[:3]
    return f"{len(names)} weight{'s' * (len(names) != 1)} ({', '.join(shown)}{', ...' * (len(names) > len(shown))})"


def _check_index(directory: Path) -> None:
    """Raise DataError where the index of weights in several files does not say which of the files has which: only files
    that `fingerprint.weights_digest` reads may hold weights."""
    path = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists() or not reading.is_there(path):
        return
    try:
        index = reading.read_json(path)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no JSON: {error}", _AGAIN) from error
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not files or not isinstance(files, dict) or not isinstance(index.get("metadata"), dict):
        raise DataError(f"{path} is not an index of weights", _AGAIN)
    there = {file.name for file in directory.glob("model*.safetensors")}
    absent = [name for name in map(str, files.values()) if name not in there]
    if absent:
        raise DataError(f"{path} names the file '{absent[0]}', which is not among the weights beside it", _AGAIN)


def _attention(kind: Any, config: PreTrainedConfig) -> str:
    classes = kind._model_mapping[type(config)]
    both = classes if isinstance(classes, tuple) else (classes,)
    return "sdpa" if all(getattr(each, "_supports_sdpa", False) for each in both) else "eager"


def check_report(directory: Path, kind: Any, report: Mapping[str, Any]) -> None:
    """Raise for names in `missing_keys` and `unexpected_keys` and for (name, shape in the file, shape in the model) in
    `mismatched_keys` of a report of transformers."""
    missing = sorted(report["missing_keys"])
    if missing and kind is AutoModelForSequenceClassification:
        raise UsageError(
            f"reward model {directory} has no weights for {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}",
            "give a model trained for sequence classification, not a language model",
        )
    if missing:
        raise DataError(f"{directory} lacks {listed(missing)}", _AGAIN)
    shapes = [f"{name}: {list(file)}, not {list(model)}" for name, file, model in report["mismatched_keys"]]
    if shapes:
        raise DataError(f"{directory}: other shapes than config.json says in {listed(shapes)}", _AGAIN)
    extra = sorted(report["unexpected_keys"])
    if extra:
        raise DataError(
            f"{directory} holds {listed(extra)} that its architecture does not have",
            "the weights belong to another architecture or another config.json: fetch or save the model again",
        )


def check_floats(directory: Path, model: Any) -> None:
    """Raise DataError for integers in place of weights; buffers (such as masks), and tensors that the architecture
    ignores, may be integers, and a quantised model's weights are."""
    if getattr(model, "hf_quantizer", None) is not None:
        return
    buffers = {_ending(name) for name, _ in model.named_buffers()}
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    integers = [
        name
        for name in integer_tensors(sorted(directory.glob("model*.safetensors")))
        if _ending(name) not in buffers
        and not any(re.search(pattern, name) for pattern in ignored)
        and not name.endswith(("position_ids", "rotary_emb.inv_freq"))
    ]
    if integers:
        raise DataError(
            f"{directory}: integers in place of floats in {listed(integers)}, and config.json names no quantisation",
            "take the model in 16 bits, or add the quantization_config that it was made with",
        )


def _ending(name: str) -> str:
    """The last two parts of the name of a tensor: files may have other ones before them than the model."""
    return ".".join(name.split(".")[-2:])
