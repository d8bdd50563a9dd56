"""The tokenizer of a model in GGUF: byte-level BPE whose pre-tokenizer has a name in llama.cpp.

Under a wrong name llama.cpp silently cuts text into other tokens. Therefore any other tokenizer is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefpipe import reading
from prefpipe.errors import UsageError

_MOST_BYTES = 512 << 20
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Steps of a pre-tokenizer -> its name in llama.cpp.
_CUTS: dict[tuple[str, ...], str] = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_WORDS + r"\p{N}" + _REST, "bytes"): "qwen2",
    (_WORDS + r"\p{N}{1,3}" + _REST, "bytes"): "llama-bpe",
}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType


def load(directory: Path) -> dict[str, Any]:
    """The tokenizer.json of a model. Raises UsageError for a model without one."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UsageError(f"{directory} has no tokenizer.json", "convert it with llama.cpp (docs/exports.md)")
    return reading.read_json(path, _MOST_BYTES)


def cut_name(tokenizer: Mapping[str, Any]) -> str:
    """The name that llama.cpp has for the pre-tokenizer. Raises UsageError for a tokenizer without a known name."""
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer")
    name = _CUTS.get(_steps(tokenizer.get("pre_tokenizer") or {}))
    is_plain = all(not model.get(key) for key in ("unk_token", "dropout", "byte_fallback")) and model.get("merges")
    fits = model.get("type") == "BPE" and is_plain and bool(model.get("ignore_merges")) == (name == "llama-bpe")
    fits = fits and (normalizer is None or (normalizer == {"type": "NFC"} and name == "qwen2"))
    if name is None or not fits:
        raise UsageError(
            f"the tokenizer ({model.get('type')}) works in a way that has no name here",
            "convert the merged model with llama.cpp: docs/exports.md has the commands",
        )
    return name


def tokens(tokenizer: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type of every id below `size`, the rows of the embedding; ids without a token have the type unused."""
    texts = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, _NORMAL)
    for token in tokenizer.get("added_tokens", []):
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    ids = range(size)
    return [texts.get(i, f"[PAD{i}]") for i in ids], [kinds.get(i, _UNUSED) for i in ids]


def _steps(pre_tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    """The steps of a pre-tokenizer, each as its regular expression or its name."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return tuple(map(_step, steps))


def _step(step: Mapping[str, Any]) -> str:
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "ByteLevel" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "Digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex"))
    return json.dumps(step, sort_keys=True)  # nothing that has a name
