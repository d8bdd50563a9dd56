"""A tokenizer with its named tokens, chat templates and end-of-sequence ids, as transformers builds them from the files
of a model. Code in the model's directory never runs."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from prefpipe.errors import DataError, MissingInputError, PrefpipeError, UsageError
from prefpipe.forward.loading import silent
from prefpipe.models import fingerprint

_SAVE = "make one with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
_NO_TEXT_CHANGE = ("padding", "truncation", "post_processor")  # parts that do not change the ids of a single text
_PROBE = "a"


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer and what its model says about it.

    backend: what encodes and decodes, without padding and truncation
    named_tokens: `bos_token`, `eos_token`, ... by name, as transformers hands them to a chat template
    chat_template: the template of the model; several by name; None where it has none
    eos_token_ids: ids that end a completion: of the generation config, the model config and the tokenizer together
    opening, closing: texts of the tokens that the tokenizer puts before and behind every text; often empty
    digest: identity of the tokenizer that is used
    """

    backend: Tokenizer
    named_tokens: dict[str, str]
    chat_template: str | dict[str, str] | None
    eos_token_ids: frozenset[int]
    opening: str
    closing: str
    digest: str


def load_tokenizer(directory: Path) -> LoadedTokenizer:
    """Load the tokenizer of a model directory through transformers, without a network and without code of the model.

    Raises MissingInputError without tokenizer files, UsageError for a tokenizer that needs code of its own or has no
    fast version, DataError for damaged files.
    """
    tokenizer = _from_transformers(directory)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UsageError(
            f"the tokenizer of {directory} ({type(tokenizer).__name__}) has no fast version, which prefpipe needs",
            f"add a tokenizer.json to the model: {_SAVE}",
        )
    backend.no_padding()
    backend.no_truncation()
    opening, closing = _around(backend)
    return LoadedTokenizer(
        backend=backend,
        named_tokens={name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        chat_template=tokenizer.chat_template,
        eos_token_ids=frozenset(_eos_ids(directory, tokenizer.eos_token_id)),
        opening=opening,
        closing=closing,
        digest=_digest(directory, backend),
    )


def _from_transformers(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with silent():
            return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever its classes raise for the files of a model
        raise _refusal(directory, error) from error


def _refusal(directory: Path, error: Exception) -> PrefpipeError:
    """The error for files of a tokenizer that transformers refuses."""
    words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if "trust_remote_code" in str(error):
        return UsageError(
            f"the tokenizer of {directory} needs Python code that comes with the model, which prefpipe never runs",
            "take a version of the model that transformers knows (its tokenizer_config.json names no auto_map)",
        )
    if not (directory / "tokenizer.json").is_file():
        return MissingInputError(
            f"{directory} has no tokenizer.json, and transformers makes no tokenizer of its other files ({words})",
            _SAVE,
        )
    return DataError(
        f"transformers cannot load the tokenizer of {directory}: {words}",
        "fetch the model again; its tokenizer.json, tokenizer_config.json and config.json must fit together",
    )


def _around(backend: Tokenizer) -> tuple[str, str]:
    """The texts of the tokens that the tokenizer puts before and after a text."""
    encoding = backend.encode(_PROBE, add_special_tokens=True)
    added = list(zip(encoding.tokens, encoding.special_tokens_mask, strict=True))
    before = [token for token, _ in takewhile(lambda pair: pair[1], added)]
    behind = [token for token, _ in takewhile(lambda pair: pair[1], reversed(added))]
    return "".join(before), "".join(reversed(behind))


def _eos_ids(directory: Path, of_tokenizer: int | None) -> set[int]:
    """Every id that ends a completion. The files themselves are read, so that no id is lost to a class that does not
    know it. Where there is no generation config, transformers makes one from the model config."""
    config = _json(directory / "config.json")
    generation = _json(directory / "generation_config.json")
    settings = (generation, config, config.get("text_config"))
    values = [value.get("eos_token_id") for value in settings if isinstance(value, Mapping)]
    if not generation:
        values.append(_default_eos(directory))
    return set(_numbers([*values, of_tokenizer]))


def _default_eos(directory: Path) -> Any:
    """The end-of-sequence ids that transformers takes where a model has no generation config."""
    from transformers import AutoConfig, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        return GenerationConfig.from_model_config(config).eos_token_id
    except Exception:  # an architecture that transformers does not know has no defaults either
        return None


def _numbers(values: Iterable[Any]) -> Iterable[int]:
    for value in values:
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
                yield number


def _digest(directory: Path, backend: Tokenizer) -> str:
    """The digest of tokenizer.json where transformers builds exactly this tokenizer, else that of the built
    tokenizer."""
    used = json.loads(backend.to_str())
    path = directory / "tokenizer.json"
    if path.is_file():
        written = _json(path)
        if _is_same(written, used) or _is_same(json.loads(Tokenizer.from_file(str(path)).to_str()), used):
            used = written
    return fingerprint.tokenizer_digest(used)


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two tokenizers produce the same ids and texts. They may differ only in a step that adds nothing."""
    steps = [_steps(one), _steps(other)]
    return steps[0] == steps[1] and _parts(one) == _parts(other)


def _steps(settings: Mapping[str, Any]) -> Any:
    """The post-processor; None for a post-processor that puts no token around a text."""
    step = settings.get("post_processor")
    nothing = isinstance(step, Mapping) and step.get("type") == "TemplateProcessing" and not step["special_tokens"]
    return None if nothing else step


def _parts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a tokenizer that ids and texts depend on, in one spelling: files of older versions write merges as
    text and leave out what is off."""
    model = {k: v for k, v in settings["model"].items() if v is not None and v is not False and v != ""}
    merges = model.get("merges", [])
    model["merges"] = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    return {name: value for name, value in settings.items() if name not in _NO_TEXT_CHANGE} | {"model": model}


def _json(path: Path) -> dict[str, Any]:
    """The settings in a JSON file; empty where the file does not exist. Raises DataError for a damaged file."""
    return fingerprint.read_json(path) if path.is_file() else {}
