"""Digests of weights, adapter, tokenizer and chat template. They depend on content only, never on names and paths.

A policy is named `weights:HEX` or `weights:HEX+adapter:HEX`, so that an error can say which part differs.
"""

import json
import math
import operator
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from prefpipe import reading
from prefpipe.errors import DataError, MissingInputError
from prefpipe.ids import canonical_json

VERSION = 1  # raise it when a function below can return another digest: cached digests of other versions are ignored
# Fields of a model's config and of an adapter's config that do not change the forward pass.
_IGNORED_CONFIG = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "architectures_version",
}
_IGNORED_ADAPTER = {
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "task_type",
    "lora_dropout",
}
# Settings of an adapter that peft keeps as sets, and writes in another order in every process.
ADAPTER_SETS = ("target_modules", "target_parameters", "exclude_modules")
_CHUNK = 8 << 20
_LONGEST_HEADER = 100_000_000  # bytes of a header, the limit of safetensors
_MOST_BYTES = 512 << 20  # bytes of a JSON file; tokenizers of 250,000 tokens have 33 million
_BITS = {  # of one number, by the dtype in a safetensors header
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


def policy_id(weights: str, adapter: str | None) -> str:
    """The name of a policy from the digests of its parts."""
    return f"weights:{weights}" + (f"+adapter:{adapter}" if adapter else "")


def weights_digest(directory: Path) -> str:
    """blake3 over name, dtype, shape and content of every tensor, and the config. Shards have no part in it."""
    config = read_json(directory / "config.json")
    kept = {k: v for k, v in config.items() if k not in _IGNORED_CONFIG}
    return _digest(_tensor_files(directory, "model*.safetensors"), kept)


def adapter_digest(directory: Path) -> str:
    """The digest of a LoRA adapter: its tensors, and the settings that change their effect."""
    path = directory / "adapter_config.json"
    if not path.is_file():
        inside = directory / "adapter"  # written by a run of train
        hint = f"give {inside}" if (inside / path.name).is_file() else "give an adapter directory"
        raise MissingInputError(f"{directory} is not a PEFT adapter: no adapter_config.json", hint)
    config = read_json(path)
    kept = {k: sorted(v) if k in ADAPTER_SETS and isinstance(v, list) else v for k, v in config.items()}
    return _digest(
        _tensor_files(directory, "adapter_model.safetensors"),
        {k: v for k, v in kept.items() if k not in _IGNORED_ADAPTER},
    )


def text_digest(text: str) -> str:
    """128-bit digest of a text, such as a chat template."""
    return blake3(text.encode()).hexdigest(16)


def tokenizer_digest(tokenizer: Mapping[str, Any]) -> str:
    """The digest of a tokenizer.json without padding and truncation, which libraries write into the file."""
    kept = {k: v for k, v in tokenizer.items() if k not in ("padding", "truncation")}
    return text_digest(canonical_json(kept))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model. Raises DataError for anything else, and as `reading` does."""
    try:
        value = reading.read_json(path, _MOST_BYTES)
    except json.JSONDecodeError as error:
        raise DataError(f"cannot read {path}: {error}", "fetch or save the model again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a JSON object", "fetch or save the model again")
    return value


def _tensor_files(directory: Path, pattern: str) -> list[Path]:
    files = sorted(directory.glob(pattern))
    if not files:
        hint = "prefpipe reads safetensors only; convert with save_pretrained"
        if (directory / "adapter").is_dir():  # a run of train
            hint = f"it is a run: give its base as --model and {directory / 'adapter'} as --adapter"
        elif inside := [directory / name for name in ("merged", "model") if (directory / name).is_dir()]:
            hint = f"give {inside[0]}"
        raise MissingInputError(f"{directory} has no weights ({pattern})", hint)
    return files


def _digest(files: list[Path], config: dict[str, Any]) -> str:
    entries = sorted(entry for file in files for entry in _tensors(file))
    return blake3(canonical_json([entries, config]).encode()).hexdigest(16)


def _tensors(path: Path) -> list[tuple[str, str, list[int], str]]:
    """(name, dtype, shape, blake3 of the bytes) of every tensor in a safetensors file.

    Raises DataError when the header does not describe tensors that lie inside the file, and as `reading` does.
    """
    with reading.opened(path) as file, reading.reading(path):
        size = os.fstat(file.fileno()).st_size
        header, start_of_data = _header(path, file, size)
        tensors: list[tuple[str, str, list[int], str]] = []
        for name, tensor in sorted(header.items()):
            try:
                start, end = map(operator.index, tensor["data_offsets"])
                dtype, shape, inside = tensor["dtype"], tensor["shape"], 0 <= start <= end <= size - start_of_data
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path} is damaged: tensor {name} is not described", "fetch the file again") from error
            if not inside:
                raise DataError(f"{path} is damaged: tensor {name} reaches past its end", "fetch the file again")
            _check_size(path, name, tensor, end - start)
            file.seek(start_of_data + start)
            tensors.append((name, dtype, shape, _bytes_digest(file, end - start)))
        return tensors


def _header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The description of the tensors in a safetensors file, and the place where their bytes begin."""
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > min(size - 8, _LONGEST_HEADER):
        raise DataError(f"{path} is damaged: its header is longer than the file", "fetch the file again")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: unreadable header", "fetch the file again") from error
    if not isinstance(header, dict) or reading.has_lone_surrogate(header):
        raise DataError(f"{path} is damaged: its header is not an object of names", "fetch the file again")
    header.pop("__metadata__", None)
    return header, 8 + length


def _check_size(path: Path, name: str, tensor: dict[str, Any], size: int) -> None:
    """Raise DataError for an unknown dtype, and for a shape that needs another number of bytes."""
    dtype, shape = tensor["dtype"], tensor["shape"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise DataError(f"{path}: tensor {name} has the unknown dtype {dtype!r}", "fetch or save the model again")
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise DataError(f"{path} is damaged: tensor {name} has the shape {shape!r}", "fetch the file again")
    if math.prod(shape) * _BITS[dtype] != 8 * size:
        raise DataError(
            f"{path} is damaged: tensor {name} has {size} bytes, not those of {shape} {dtype}", "fetch the file again"
        )


def _bytes_digest(file: BinaryIO, length: int) -> str:
    hasher = blake3()
    while length > 0:
        block = file.read(min(length, _CHUNK))
        if not block:
            break
        hasher.update(block)
        length -= len(block)
    return hasher.hexdigest(16)
